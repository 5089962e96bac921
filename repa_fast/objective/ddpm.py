"""DiT's objective: the noise and its variance on a chain of 1000 steps (arXiv 2212.09748)."""

from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import SamplerConfig
from repa_fast.diffusion import ddpm, ddpm_samplers
from repa_fast.diffusion.alignment import teacher_steps
from repa_fast.models.dit import DiT
from repa_fast.objective.base import Objective


class DDPM(Objective):
    """A chain of noising steps with learned variances, its times integers in 0..999."""

    name = "ddpm"
    paper = "DiT, 2212.09748"
    model = DiT
    others = ("variational",)
    unused = ("heun", "adaptive", "guidance_low", "guidance_high", "path_type", "prediction")
    integer_times = True
    path = ddpm.path

    @classmethod
    def check(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError also for a prediction that is a flow's."""
        if config.prediction != "v":
            raise ValueError(
                f"prediction is {config.prediction!r}, expected the default with --objective ddpm, "
                "which predicts noise and variance"
            )
        super().check(config)

    def losses(self, output, clean, noise, velocity, t):
        """Return the error of the noise, and the variational bound that trains the variance."""
        found = ddpm.ddpm_losses(ddpm.chain(output.device), output, clean, noise, t)
        return found.simple, [found.variational]

    def earlier(self, t, u, t_max):
        """Return a step of the chain up to 1000 t_max before that of t, as SRA has it for DiT."""
        return teacher_steps(self.path.model_times(t), u, t_max)

    def sample(self, model, noise, labels, settings: SamplerConfig, *, seed, index=None):
        """Walk the chain from noise to latents: by DDIM, or DDPM's ancestral sampler."""
        options = settings.guidance() | {"mode": settings.mode, "num_steps": settings.num_steps}
        return ddpm_samplers.sample(model, noise, labels, seed=seed, index=index, **options)

    def scheduler(self):
        """Return mode "sde", DDPM's ancestral steps; diffusers' DDIM differs from ours."""
        from diffusers import DDPMScheduler

        return DDPMScheduler(  # of 1000 betas from 0.0001 to 0.02 by itself
            variance_type="learned_range", timestep_spacing="linspace", clip_sample=False
        )
