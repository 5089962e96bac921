"""SiT's objective: the velocity, score or noise of an interpolant (arXiv 2401.08740)."""

from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.diffusion import path as paths
from repa_fast.diffusion import samplers
from repa_fast.diffusion.alignment import teacher_times
from repa_fast.diffusion.flow import noise_loss, velocity_loss
from repa_fast.objective.base import Objective


class Flow(Objective):
    """An interpolant between latents and noise, its times in [0, 1]."""

    name = "flow"
    paper = "SiT, 2401.08740"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self.path = paths.get(config.path_type)

    @classmethod
    def check(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError also for a DiT."""
        super().check(config)
        if config.model.startswith("DiT"):
            raise ValueError(f"model is {config.model}, expected --objective ddpm with it")

    def losses(self, output, clean, noise, velocity, t):
        """Return the error of the velocity (REPA eq. 4), or of the noise (SiT), and no others."""
        if self.prediction == "v":
            return velocity_loss(output, velocity), []
        return noise_loss(self.prediction, output, noise, t, self.path, self.loss_weight), []

    def earlier(self, t, u, t_max):
        """Return t - t_max u, as SRA has it for flow."""
        return teacher_times(t, u, t_max)

    def sample(self, model, noise, labels, settings: SamplerConfig, *, seed, index=None):
        """Integrate the probability-flow ODE or the reverse SDE from noise to latents."""
        interval = (settings.guidance_low, settings.guidance_high)
        options = settings.guidance() | {"guidance_interval": interval}
        options |= {"path": self.path, "prediction": self.prediction}
        if settings.adaptive:
            return samplers.dopri5(model, noise, labels, **options)[0]
        options["num_steps"] = settings.num_steps
        if settings.mode == "ode":
            return samplers.euler(model, noise, labels, heun=settings.heun, **options)
        of_sde = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
        options |= {name: getattr(settings, name) for name in of_sde}
        return samplers.euler_maruyama(model, noise, labels, seed=seed, index=index, **options)

    def scheduler(self):
        """Return mode "ode", Euler's steps, which diffusers has for velocities on the linear path.

        There is none for the SDE, nor for other paths and predictions.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        exact = self.path is paths.linear and self.prediction == "v"
        return FlowMatchEulerDiscreteScheduler(shift=1.0) if exact else None
