"""A model as a component and a pipeline of diffusers.

    from repa_fast import SiTPipeline
    pipeline = SiTPipeline.from_pretrained("FOLDER, or owner/name on the hub")
    image = pipeline(["golden retriever"], num_inference_steps=50).images[0]

Where a scheduler of diffusers computes what our sampler does, the pipeline has it, and any other
can take its place; elsewhere it has none, and our sampler runs.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, ModelMixin
from diffusers import FlowMatchEulerDiscreteScheduler as FlowEuler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from repa_fast.checkpoint import formats, hub
from repa_fast.configs.objective import ObjectiveConfig
from repa_fast.configs.sampler import GUIDANCE, SamplerConfig
from repa_fast.contracts import expect_choice
from repa_fast.data.dataset import Metadata
from repa_fast.data.features import describing
from repa_fast.data.latents import DECODE_BATCH, VAE, can_decode, expect_all_weights, unscaled
from repa_fast.diffusion.guidance import Guided
from repa_fast.eval.load import Loaded, arguments_of, described, expect_same
from repa_fast.eval.sample import class_indices, class_names
from repa_fast.eval.sampling import decoder_of
from repa_fast.models.sit import SiT
from repa_fast.objective import build_objective
from repa_fast.share.card import public
from repa_fast.words import first_line, short

OBJECTIVE = ("objective", "prediction", "path_type")
OUTPUTS = ("pil", "np", "pt", "latent")


class SiTTransformer(SiT, ModelMixin, ConfigMixin):
    """A SiT or DiT without projectors, with what its weights do not say, as diffusers saves it.

    Args:
        model: SiT's arguments.
        objective: objective, prediction and path_type, as of `ObjectiveConfig`.
        dataset: metadata of the dataset it was trained on, as of `Metadata`.
        weights: which set of weights it has: model, ema, ema_2 and so on; "" where not known.
        step: optimizer steps of its training; None where not known.
    """

    _supports_param_buffer_assignment = False  # which goes by the dtype of the first, pos_embed

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        objective: dict[str, str],
        dataset: dict[str, Any],
        weights: str = "",
        step: int | None = None,
    ) -> None:
        learns = build_objective(ObjectiveConfig(**objective))
        super().__init__(**model, z_dims=(), learn_sigma=learns.model is not SiT)
        self.objective, self.metadata = learns, Metadata.from_dict(dict(dataset))

    @classmethod
    def of(cls, loaded: Loaded) -> "SiTTransformer":
        """Return the same model, with copies of its weights, in eval mode."""
        state = loaded.model.state_dict()
        shape, objective = formats.shape_of(state), loaded.objective
        made = cls(
            model=arguments_of(shape, loaded.model.blocks[0].attn.num_heads),
            objective=dict(
                zip(OBJECTIVE, (objective.name, objective.prediction, objective.path_type))
            ),
            dataset=vars(public(loaded.metadata)),
            weights=loaded.weights,
            step=loaded.step,
        )
        made.load_state_dict(state)
        return made.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str = hub.TRANSFORMER,
        revision: str | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ) -> "SiTTransformer | tuple[SiTTransformer, dict]":
        """Load the model of a shared folder or repository; further options are those of diffusers.

        Raises:
            ValueError: there is none, or its weights are not those that its config.json describes.
            Failure: a repository cannot be fetched.
        """
        expect_choice("subfolder", subfolder, (hub.TRANSFORMER,))
        weights = hub.find_shared(source, revision)
        _expect_described(weights)
        options.setdefault("low_cpu_mem_usage", False)  # which asks for accelerate
        model, info = super().from_pretrained(weights.parent, output_loading_info=True, **options)
        expect_all_weights(f"the model {weights.parent}", info)
        model.register_to_config(_name_or_path="")  # which would go into what is saved again
        return (model, info) if output_loading_info else model


def _expect_described(weights: Path) -> None:
    """Raise ValueError unless config.json has the arguments that the shapes of the weights tell.

    Nothing is built of it before: a stranger's sizes could be more than there is memory for.
    """
    from safetensors import SafetensorError, safe_open

    config, _, metadata, _ = described(weights, "ema")
    with describing(str(weights)):
        try:
            with safe_open(weights, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"it is damaged ({first_line(error)})") from error
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        shape = formats.shape_of(state)
        told = arguments_of(shape, config.get("num_heads", 0))
    beside = weights.with_name(hub.CONFIG)
    if metadata is None or not told["num_heads"]:
        raise ValueError(f"{beside}: no dataset or no num_heads, expected what describes a model")
    expected = told | {name: config.get(name, "") for name in OBJECTIVE}
    wrong = [
        name for name in sorted({*expected, *config}) if config.get(name) != expected.get(name)
    ]
    if wrong:
        name = wrong[0]
        found, there = short(config.get(name)), expected.get(name, "nothing by that name")
        raise ValueError(f"{beside}: {name} is {found}, expected {there} (the weights')")
    expect_same(weights, metadata, shape)
    with describing(str(beside)):
        learns = build_objective(ObjectiveConfig(**{n: config[n] for n in OBJECTIVE}))
    if (shape.out_channels > shape.in_channels) != (learns.model is not SiT):
        raise ValueError(
            f"{beside}: objective is {learns.name}, but the weights have {shape.out_channels} "
            f"output channels for {shape.in_channels}"
        )


class SiTPipeline(DiffusionPipeline):
    """Images of classes.

    Args:
        transformer: the model.
        scheduler: of flow matching for a SiT, of noise for a DiT; None for our sampler.
        vae: decodes latents. Where there is none, and latents are no pixels, that of the dataset's
            latents is fetched when it is first needed.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["scheduler", "vae"]  # noqa: RUF012 - diffusers' own spelling

    def __init__(
        self,
        transformer: SiTTransformer,
        scheduler: SchedulerMixin | None = None,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(transformer, SiTTransformer):
            kind = type(transformer).__name__
            raise ValueError(f"transformer is a {kind}, expected a SiTTransformer")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, **options: Any
    ) -> "SiTPipeline":
        """Load a shared folder or repository; further options are those of diffusers.

        ValueError and Failure as of `SiTTransformer.from_pretrained`.
        """
        weights = hub.find_shared(source, revision)
        options.setdefault("use_safetensors", True)  # of an autoencoder, which could be a pickle
        made = super().from_pretrained(weights.parents[1], **options)
        made.register_to_config(_name_or_path="")
        return made

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return class_names(self.transformer.metadata.class_names)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        guidance_scale: float = GUIDANCE,
        num_inference_steps: int = 50,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        sampler: SamplerConfig | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw an image for each label.

        Args:
            class_labels: numbers, or names or parts of names.
            guidance_scale: s in null + s (conditional - null); 1 is none.
            num_inference_steps: evaluations of the model.
            generator: draws the initial noise, and what a stochastic scheduler adds; our sampler
                draws by its initial seed.
            latents: (B, C, h, w), the initial noise, fp32, in the place of drawn one.
            sampler: settings of our sampler, which then runs in the scheduler's place: SDE, Heun,
                guidance in an interval and so on. Guidance and number of steps are theirs;
                precision, `compile` and what is of the decoder, but `vae`, are the pipeline's.
            output_type: "pil", "np" (B, R, R, 3) or "pt" (B, 3, R, R) in [0, 1], or "latent".

        Raises:
            ValueError: no such class or output, or noise of another shape.
        """
        expect_choice("output_type", output_type, OUTPUTS)
        model, device = self.transformer, self._execution_device
        found = class_indices(class_labels, self.class_names)
        y = torch.tensor(found, dtype=torch.int64, device=device)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at least 1")
        shape = (len(y), *model.metadata.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        if latents.shape != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, expected {shape}")
        latents = latents.to(device)
        dtype = model.x_embedder.proj.weight.dtype  # model.dtype is that of pos_embed, always fp32
        plain = SamplerConfig(cfg_scale=guidance_scale, num_steps=num_inference_steps)
        settings = sampler or plain
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if sampler is None and self.scheduler is not None:
                x = self._walk(latents, y, guidance_scale, num_inference_steps, generator)
            else:
                objective = model.objective.under(settings)
                x = objective.sample(model, latents, y, settings, seed=_seed_of(generator))
        images = x.float() if output_type == "latent" else self._decode(x, settings)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _walk(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        scale: float,
        steps: int,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Return the latents (B, C, h, w) that the scheduler makes of noise (B, C, h, w)."""
        scheduler, chain = self.scheduler, self.transformer.objective.integer_times
        _expect_kind(scheduler, flow=not chain)
        given = {"num_inference_steps": steps}
        if isinstance(scheduler, FlowEuler):  # our grid; its own ends at 1 / 1000
            given = {"sigmas": np.linspace(1, 1 / steps, steps)}
        scheduler.set_timesteps(**given, device=x.device)
        takes = inspect.signature(scheduler.step).parameters
        drawn = {"generator": generator} if "generator" in takes else {}
        channels = x.shape[1]
        learned = isinstance(scheduler, DDPMScheduler) and "learned" in scheduler.variance_type
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        guided = Guided(self.transformer, x, y, cfg_scale=scale, state_dtype=torch.float32)
        for time in self.progress_bar(scheduler.timesteps):
            t = int(time) if chain else float(time) / scheduler.config.num_train_timesteps
            scaled = scheduler.scale_model_input(x, time) if chain else x
            conditional, null = guided.outputs(scaled, t)
            null = None if null is None else null[:, :channels]
            output = guided.mix(conditional[:, :channels], null)
            if learned:
                output = torch.cat([output, conditional[:, channels:].float()], dim=1)
            x = scheduler.step(output, time, x, **drawn).prev_sample
        return x

    def _decode(self, latents: torch.Tensor, settings: SamplerConfig) -> torch.Tensor:
        """Return images (B, 3, R, R), fp32 in [0, 1], of latents (B, C, h, w)."""
        metadata = self.transformer.metadata
        x = unscaled(latents, metadata).float()
        if not can_decode(metadata):
            if self.vae is None:
                vae = VAE(decoder_of(settings, metadata)).load(metadata)
                self.register_modules(vae=vae.to(latents.device))
            parts = x.to(self.vae.dtype).split(DECODE_BATCH)
            x = torch.cat([self.vae.decode(part).sample.float() for part in parts])
        return (x / 2 + 0.5).clamp(0, 1)


def _expect_kind(scheduler: SchedulerMixin, *, flow: bool) -> None:
    """Raise ValueError unless a scheduler is one of flow matching, or else one of noise."""
    config = scheduler.config
    matches = (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )
    if matches != flow:
        kind = "of flow matching, for a SiT" if flow else "of noise, for a DiT"
        raise ValueError(f"scheduler is a {type(scheduler).__name__}, expected one {kind}")


def _seed_of(generator: torch.Generator | None) -> int:
    """Return a seed of our samplers, 0 to 2^63 - 1: a generator's, or a new one."""
    if isinstance(generator, list):
        raise ValueError("generator is a list, expected one: our sampler numbers its images")
    return (torch.seed() if generator is None else generator.initial_seed()) % 2**63
