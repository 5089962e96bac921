"""One dataclass holds every choice of a training run. Flag names are REPA's where REPA has one."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from repa_fast.contracts import expect_choice
from repa_fast.diffusion.draws import WEIGHTINGS
from repa_fast.diffusion.path import PATHS

POSITIVE = (
    "batch_size",
    "gradient_accumulation_steps",
    "log_every",
    "checkpointing_steps",
    "num_workers",
    "epochs",
    "max_train_steps",
    "max_bad_steps",
    "eval_samples",
)
NOT_NEGATIVE = (
    "seed",
    "warmup_steps",
    "resume_step",
    "keep_last",
    "keep_every",
    "sampling_steps",
    "eval_every",
    "rollback",
    "watchdog",
    "data_timeout",
)
RETIRED = ("gemm_epilogues", "encoder_stream", "compile_mode")
"""Of earlier versions' saved configs: they were for speed alone and are dropped at any value."""
FORMER = {"cuda_graph": {False: "off", True: "on"}}
"""Values that choices had in earlier versions: {name: {as saved: as now}}."""


@dataclass(kw_only=True)
class TrainConfig:
    """A training run. Batch size is global; steps are optimizer steps."""

    output_dir: str = "exps"
    """Folder of all runs."""
    exp_name: str = ""
    """Name of this run; it lives in OUTPUT_DIR/EXP_NAME. The preset's name if empty."""
    logging_dir: str = "logs"
    """Inside the run: TensorBoard's files, each process's errors and its stacks when it hangs."""
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go beside metrics.jsonl."""
    log_every: int = 100
    """Read the metrics, which stay on the device between, every so many steps."""
    sampling_steps: int = 10_000
    """Write a sample grid every so many steps; 0 writes none."""
    checkpointing_steps: int = 50_000
    """Write a checkpoint every so many steps; one is always written at the end."""
    keep_last: int = 0
    """Keep only so many of the newest checkpoints; 0 keeps all."""
    keep_every: int = 0
    """With KEEP_LAST, also keep the checkpoints of every so many steps; 0 keeps no more."""
    resume: str = "never"
    """auto: go on from the newest whole checkpoint of the run, if there is one; or a step, a
    checkpoint, an official .pt file, or another run's folder."""
    resume_step: int = 0
    """Go on from the checkpoint of this step; 0 is none."""
    init_from: str = ""
    """Start a new run from the weights in this checkpoint or file."""
    init_origin: Literal["repa", "sit", "dit"] = "repa"
    """Whose weights INIT_FROM holds: REPA's or ours, or the original SiT's or DiT's."""
    rollback: int = 0
    """Go back to the last good checkpoint, and skip the data since then, when the loss spikes or
    after MAX_BAD_STEPS: so many times, then stop."""
    watchdog: float = 120.0
    """Write all stacks to LOGGING_DIR/stacks-rankK.txt when a step takes longer than so many
    seconds and than 20 times the median of recent ones; 0 never."""
    collective_timeout: float = 1800.0
    """Seconds a process waits for the others before it fails."""
    data_timeout: float = 0.0
    """Seconds a step waits for its batch before it fails; 0 waits for ever."""
    dry_run: bool = False
    """Print the resolved config, parameter count, FLOPs and a memory estimate, and stop."""

    model: str = "SiT-XL/2"
    """SiT-{S,B,L,XL}/{2,4,8}, or DiT-... with OBJECTIVE ddpm."""
    hidden_size: int | None = None
    """Overrides the model's width."""
    depth: int | None = None
    """Overrides the model's number of blocks."""
    num_heads: int | None = None
    """Overrides the model's number of heads."""
    patch_size: int | None = None
    """Overrides the model's patch size."""
    num_classes: int = 1000
    """Number of classes; the embedding table has one more row, the null label."""
    encoder_depth: int = 8
    """The block (1-based) whose output is aligned with encoders."""
    projector_dim: int = 2048
    """Hidden width of the projectors."""
    projector: Literal["mlp", "conv"] = "mlp"
    """REPA's three-layer MLP, or iREPA's 3x3 convolution over the patches."""
    fused_attn: bool = True
    """The backend of ATTENTION; otherwise the explicit softmax."""
    qk_norm: bool = False
    """LayerNorm on queries and keys."""

    data_dir: str = "../data/imagenet256"
    """Dataset folder; `digits` stands for the bundled set, written to data/digits on first use."""
    resolution: int = 256
    """Image resolution; must be the dataset's."""
    batch_size: int = 256
    """Global batch size, over all processes; accumulation multiplies it."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step, as upstream: the effective batch is this times BATCH_SIZE."""
    micro_batch: int | Literal["auto"] = "auto"
    """Images per forward pass of one process, or auto: the most that fit into memory."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A row that cannot be read or does not fit: stop, or take the next good row and count it."""
    num_workers: int = 4
    """Threads that decode images."""
    decode: Literal["auto", "dali-gpu", "dali-cpu", "torch"] = "auto"
    """Who decodes images: DALI on the GPU, DALI on the CPU, or (torch) Pillow on the CPU; auto is
    dali-gpu on CUDA where DALI is installed, else torch."""

    seed: int = 0
    """Determines initial weights, sample order and all noise."""
    allow_tf32: bool = False
    """TF32 matrix products for fp32 tensors on CUDA."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto is bf16 on CUDA and fp32 (no) on CPU."""
    compute_copy: Literal["autocast", "optimizer"] = "autocast"
    """Who makes the bf16 copies of weights: autocast at every forward pass, or the optimizer."""
    joint_adaln: bool = False
    """One matrix product for the adaLN layers of all blocks, with COMPUTE_COPY optimizer."""
    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the residual stream while training; bf16 halves its traffic and rounds every addition."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Replay the training step as one CUDA graph; auto where it can: on CUDA, in one process, not
    in fp16 and not with a weight of alignment that changes."""
    kernels: Literal["auto", "triton", "reference"] = "auto"
    """Triton kernels or plain torch; auto asks REPA_FAST_KERNELS, then takes Triton on CUDA."""
    attention: str = "auto"
    """Attention backend; auto times those whose gradients are right, and takes the fastest."""
    compile: bool = False
    """torch.compile each block (fullgraph)."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """Several processes: a copy of weights and optimizer state on each (ddp), one sharded over all
    (fsdp), or one on each node, sharded over its processes (hsdp)."""
    shard_size: int = 0
    """hsdp: processes that share a copy; 0 is a node's."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are averaged over processes."""
    reshard_after_forward: bool = False
    """fsdp and hsdp: drop gathered weights after a block's forward pass and gather them again for
    its backward pass; less memory, more communication."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute again in the backward pass: nothing, what is cheap (all but linear layers and
    attention), or whole blocks."""
    shard_encoder: bool = False
    """fsdp and hsdp: shard the frozen encoders too, for those of ViT-g or ViT-H size."""

    epochs: int = 1400
    """Stop after so many passes over the data."""
    max_train_steps: int = 400_000
    """Stop after so many steps."""
    learning_rate: float = 1e-4
    """Constant learning rate of AdamW."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.999
    """AdamW's beta2."""
    adam_weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global norm."""
    max_bad_steps: int = 100
    """Stop after so many consecutive steps skipped for a non-finite loss or gradient."""
    ema_decay: str = "0.9999"
    """Decay of the exponential moving average of the weights, per step; several, comma separated,
    keep as many averages, of which the first is sampled."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at MIN_LEARNING_RATE after MAX_TRAIN_STEPS."""
    warmup_steps: int = 0
    """Raise the learning rate linearly over so many steps."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    optimizer_impl: Literal["auto", "cuda", "torch"] = "auto"
    """One pass over memory (csrc) or torch's fused AdamW; auto takes cuda where it can run."""

    objective: Literal["flow", "ddpm"] = "flow"
    """SiT's velocity of an interpolant, or DiT's noise and variance of a chain of 1000 steps."""
    path_type: str = "linear"
    """Interpolant: linear, cosine (GVP) or VP."""
    prediction: Literal["v", "score", "noise"] = "v"
    """What a flow model predicts: the velocity, the score or the noise."""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """Weight of the loss of scores and noise, as SiT's."""
    weighting: str = "uniform"
    """Distribution of times: uniform or lognormal."""
    cfg_prob: float = 0.1
    """Probability of replacing a label by the null label."""
    legacy: bool = False
    """Drop labels twice over, as upstream does under this flag: 1 - (1 - CFG_PROB)^2."""
    align: Literal["repa", "sra"] = "repa"
    """What hidden states are aligned with: encoders (REPA), or the model's own average (SRA), which
    needs no images."""
    loss_type: Literal["cos", "nt-xent", "cos-features", "sml1", "l1", "l2"] = "cos"
    """REPA: cos (over features) or nt-xent. SRA: cos (over tokens, as its code), cos-features, sml1
    (smooth L1, the paper's), l1, l2."""
    align_until: int = 0
    """Steps after which nothing is aligned and encoders are dropped; 0 aligns to the end."""
    align_decay: Literal["constant", "linear", "sra"] = "constant"
    """Weight of the alignment: PROJ_COEFF, PROJ_COEFF falling to 0 at ALIGN_UNTIL, or that of SRA's
    code, which decays with the images."""
    block_out_s: int = 8
    """SRA: the block (1-based) of the student."""
    block_out_t: int = 20
    """SRA: the block of the teacher, above the student's."""
    t_max: float = 0.2
    """SRA: how far the teacher may be ahead of the student in time."""
    spatial_norm: bool = False
    """Normalise encoders' tokens over the patches of an image first, as iREPA does."""
    nt_xent_temperature: float = 0.1
    """NT-Xent's temperature."""
    nt_xent_negatives: Literal["image", "batch", "global"] = "image"
    """NT-Xent's negatives: patches of the same image, of this process's micro-batch, or of all
    processes'."""
    enc_type: str = "dinov2-vit-b"
    """Frozen encoders to align with, comma separated; none trains without alignment."""
    enc_weights: str = ""
    """A weights file for each of ENC_TYPE, comma separated; its own source where empty."""
    features: str = ""
    """Columns of the dataset with the features of each of ENC_TYPE, comma separated, from which to
    train without images and encoders; `repa-fast prepare features` adds them."""
    proj_coeff: float = 0.5
    """Weight of the alignment loss."""

    eval_every: int = 0
    """Judge samples of the average every so many steps, and at the end; 0 never."""
    eval_samples: int = 10_000
    """Samples of each evaluation, over all processes."""
    eval_features: str = "inception"
    """inception (FID, sFID and so on), digits-judge, or an encoder's name."""
    eval_weights: str = ""
    """File of its weights; its own source where empty."""
    eval_reference: str = ""
    """The .npz to compare with, as ADM publishes them; all images of the dataset where empty."""

    mode: Literal["ode", "sde"] = "ode"
    """Sampler of the sample grids and evaluations: euler or euler_maruyama; with OBJECTIVE ddpm
    ode is DDIM and sde DDPM's ancestral one."""
    num_steps: int = 50
    """Steps of that sampler."""
    cfg_scale: float = 4.0
    """Its guidance scale."""
    vae_path: str = ""
    """Folder or hub name of the autoencoder for sample grids; the dataset's if empty."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                expect_choice(name, getattr(self, name), typing.get_args(hint))
        expect_choice("path_type", self.path_type, tuple(PATHS))
        expect_choice("weighting", self.weighting, WEIGHTINGS)
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        self._check_alignment()
        if self.model.startswith("DiT") and self.objective == "flow":
            raise ValueError(f"model is {self.model}, expected --objective ddpm with it")
        if self.objective == "ddpm" and self.prediction != "v":
            raise ValueError(
                f"prediction is {self.prediction!r}, expected the default with --objective ddpm, "
                "which predicts noise and variance"
            )
        if self.prediction == "v" and self.loss_weight != "none":
            raise ValueError(
                f"loss_weight is {self.loss_weight!r}, expected none with --prediction v"
            )
        if not 0 <= self.cfg_prob <= 1:
            raise ValueError(f"cfg_prob is {self.cfg_prob}, expected a probability in [0, 1]")
        for decay in self.ema_decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_decay is {self.ema_decay}, expected values in [0, 1)")
        self._check_precision()
        self._check_parallel()
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}, expected 0 to learning_rate "
                f"({self.learning_rate})"
            )
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.rollback and self.keep_last == 1:
            raise ValueError(
                "keep_last is 1 with rollback, expected 0 or at least 2: a checkpoint is trusted "
                "once a good reading has followed it"
            )
        if self.collective_timeout <= 0:
            raise ValueError(
                f"collective_timeout is {self.collective_timeout}, expected more than 0 seconds"
            )
        if self.micro_batch != "auto" and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, expected auto or at least 1")

    def _check_precision(self) -> None:
        for name, value in (("compute_copy", "optimizer"), ("residual_dtype", "bf16")):
            if getattr(self, name) == value and self.mixed_precision not in ("auto", "bf16"):
                raise ValueError(
                    f"{name} is {value!r} with mixed_precision {self.mixed_precision!r}, expected "
                    "bf16"
                )
        if self.joint_adaln and self.compute_copy != "optimizer":
            raise ValueError("joint_adaln is set, which needs --compute-copy optimizer")

    def _check_parallel(self) -> None:
        if self.parallel != "ddp" and self.compute_copy == "optimizer":
            raise ValueError(
                f"compute_copy is 'optimizer' with parallel {self.parallel!r}, expected autocast: "
                "sharded weights are gathered in the dtype of the compute"
            )
        if self.shard_size < 0 or (self.shard_size and self.parallel != "hsdp"):
            raise ValueError(
                f"shard_size is {self.shard_size} with parallel {self.parallel!r}, expected 0, or "
                "a number of processes with hsdp"
            )
        for name in ("reshard_after_forward", "shard_encoder"):
            if getattr(self, name) and self.parallel == "ddp":
                raise ValueError(f"{name} is set, which needs --parallel fsdp or hsdp")

    def _check_alignment(self) -> None:
        if self.align == "sra":
            self.enc_type, self.features = "none", ""
            if not 1 <= self.block_out_s < self.block_out_t:
                raise ValueError(
                    f"block_out_s is {self.block_out_s} and block_out_t {self.block_out_t}, "
                    "expected 1 <= block_out_s < block_out_t"
                )
        known = {"repa": ("cos", "nt-xent"), "sra": ("cos", "cos-features", "sml1", "l1", "l2")}
        if self.loss_type not in known[self.align]:
            raise ValueError(
                f"loss_type is {self.loss_type!r}, expected one of "
                f"{', '.join(known[self.align])} with align {self.align}"
            )
        if self.align_decay == "sra" and self.align != "sra":
            raise ValueError("align_decay is 'sra', which needs --align sra")
        if self.align_decay == "linear" and self.align_until < 1:
            raise ValueError("align_decay is 'linear', which needs --align-until, where it ends")
        if self.align_until < 0 or not 0 <= self.t_max <= 1:
            raise ValueError(
                f"align_until is {self.align_until} and t_max {self.t_max}, expected at least 0, "
                "and 0 to 1"
            )

    @property
    def images_per_step(self) -> int:
        """Images one optimizer step consumes, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """One per average; the first average is the one that is sampled."""
        try:
            return tuple(float(decay) for decay in str(self.ema_decay).split(","))
        except ValueError:
            raise ValueError(
                f"ema_decay is {self.ema_decay!r}, expected numbers, comma separated"
            ) from None

    @property
    def feature_columns(self) -> list[str]:
        """One column of features per encoder; none if the encoders run."""
        return [name.strip() for name in self.features.split(",")] if self.features else []

    @property
    def drop_prob(self) -> float:
        """Probability that a label is dropped."""
        return 1 - (1 - self.cfg_prob) ** 2 if self.legacy else self.cfg_prob

    def to_dict(self) -> dict:
        """Plain dictionary, enough to rerun."""
        return dataclasses.asdict(self)


def from_saved(values: dict) -> TrainConfig:
    """Return the config that `to_dict` gave, of this version or an earlier one.

    Raises:
        ValueError: a name that no version of ours knows, or a value that does not fit.
    """
    kept = {name: value for name, value in values.items() if name not in RETIRED}
    if unknown := kept.keys() - {field.name for field in dataclasses.fields(TrainConfig)}:
        raise ValueError(f"a saved config has {', '.join(sorted(unknown))}, which is unknown here")
    for name in FORMER.keys() & kept.keys():
        kept[name] = FORMER[name].get(kept[name], kept[name])
    return TrainConfig(**kept)
