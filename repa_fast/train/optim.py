"""AdamW with moving averages of the weights, and gradient clipping, without waiting for the device.

A step can be a no-op, decided on the device: where its flag is set, neither weights, moments, step
counts nor averages change.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from repa_fast import ops
from repa_fast.backend.dispatch import choose, runs
from repa_fast.configs.optim import OptimConfig
from repa_fast.train.torch_private import fused_adamw


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW that also moves averages, `ema += (1 - decay) (parameter - ema)`.

    Its state_dict is torch AdamW's own, so each loads the other's. Learning rates are 0-d tensors
    on the parameters' device (`set_lr`), so that a schedule recompiles nothing; so is 1 - decay
    of each average (`set_ema_rates`).

    Args:
        params: parameters or groups, as for torch.optim.AdamW; frozen ones may be among them.
        averages: for each average its tensors, one per parameter in the order of `params`.
        ema_decays: for each average its decay.
        ema_warmup: whether `set_ema_rates` may change 1 - decay. It is fp32 then; where it stays,
            torch's fused averages take it in fp64 on a GPU.
        copies: bf16 tensors that are kept equal to their parameters, by parameter.
        lr, betas, eps, weight_decay: AdamW's.
        implementation: "cuda" does a step in one pass over memory (csrc/adamw_ema; parameters in
            fp32), "torch" is torch's fused AdamW and fused averages, on any device; "auto" takes
            "cuda" where it can run.

    Raises:
        ValueError: averages that do not fit, or "cuda" where it cannot run, with the reason.
    """

    def __init__(
        self,
        params: Iterable,
        averages: Sequence[Iterable[torch.Tensor]] = (),
        ema_decays: Sequence[float] = (),
        copies: Mapping[torch.Tensor, torch.Tensor] | None = None,
        *,
        ema_warmup: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        own = [p for group in self.param_groups for p in group["params"]]
        self.device = own[0].device
        self.averages = [list(average) for average in averages]
        _check_averages(own, self.averages, tuple(ema_decays))
        self.ema_warmup = ema_warmup
        self._rates = tuple(1 - decay for decay in ema_decays)
        self.ema_rates = [
            torch.as_tensor(rate, dtype=torch.float32, device=self.device) for rate in self._rates
        ]
        self._step_supports_amp_scaling = False  # a GradScaler unscales, and skips steps, itself
        self._averages_of = {
            p: [average[i] for average in self.averages] for i, p in enumerate(own)
        }
        self.copies = dict(copies or {})
        self.implementation, self.reason = choose_implementation(implementation, own)
        self.begin_states()
        self._to_device()
        self.register_load_state_dict_post_hook(lambda optimizer: optimizer._to_device())
        self.register_state_dict_post_hook(_lr_to_host)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group as torch does, at construction; later it would have no averages."""
        if hasattr(self, "averages"):
            raise ValueError("AdamWEMA: groups are fixed at construction, as their averages are")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict:
        raise TypeError("AdamWEMA cannot be copied or pickled: use state_dict()")

    def begin_states(self, params: Iterable[torch.Tensor] | None = None) -> None:
        """Set moments and step counts of zero for trainable parameters (all) that have none yet."""
        for p in self._averages_of if params is None else params:
            if p.requires_grad and not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }

    def set_lr(self, lr: float) -> None:
        """Set every group's learning rate."""
        for group in self.param_groups:
            group["lr"].fill_(lr)

    def set_ema_rates(self, rates: Sequence[float]) -> None:
        """Set each average's 1 - decay; what does not change is not written.

        Raises:
            ValueError: they change without `ema_warmup`.
        """
        rates = tuple(rates)
        if rates != self._rates and not self.ema_warmup:
            raise ValueError(f"ema_rates are {rates}, expected {self._rates} without ema_warmup")
        for tensor, old, new in zip(self.ema_rates, self._rates, rates, strict=True):
            if new != old:
                tensor.fill_(new)
        self._rates = rates

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of all gradients together, over all shards; 0-d fp32 on the device."""
        by_layout: dict = {}
        for p in self._averages_of:
            grad = p.grad
            if grad is not None:
                layout = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
                by_layout.setdefault(layout, []).append(_local(grad))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for layout, gradients in by_layout.items():
            if self.implementation == "cuda":
                squares = ops.sum_of_squares(gradients, self.device, implementation="cuda")
            else:
                squares = nn.utils.get_total_norm(gradients).double().square()
            if layout is not None:
                mesh, placements = layout
                summed = [Partial() if p.is_shard() else Replicate() for p in placements]
                squares = DTensor.from_local(squares, mesh, summed, run_check=False).full_tensor()
            total = total + squares
        return total.sqrt().float()

    @torch.no_grad()
    def step(
        self,
        closure: None = None,
        *,
        grad_scale: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> None:
        """Take one step of parameters and averages; closures are not supported.

        Args:
            grad_scale: 0-d fp32, multiplies gradients; `.grad` is undefined afterwards.
            skip: 0-d fp32; where it is 1, nothing changes.
        """
        if closure is not None:
            raise ValueError("AdamWEMA.step: got a closure, expected None")
        one = torch.ones((), dtype=torch.float32, device=self.device)
        grad_scale = one if grad_scale is None else grad_scale
        skip = one - 1 if skip is None else skip
        cuda = self.implementation == "cuda"
        for group in self.param_groups:
            stepped = [p for p in group["params"] if p.grad is not None]
            self.begin_states(stepped)
            resting = [p for p in group["params"] if p.grad is None]
            parts = [stepped]
            if cuda:  # the kernel takes a copy of all tensors or of none
                copied = [p for p in stepped if p in self.copies]
                parts = [copied, [p for p in stepped if p not in self.copies]]
            for part in parts:
                self._step_group(group, part, grad_scale, skip)
            self._move_averages(stepped, skip, first=int(cuda))  # the kernel moves the first
            self._move_averages(resting, skip)
        if not cuda:
            self.write_copies()

    @torch.no_grad()
    def write_copies(self) -> None:
        """Make every copy equal to its parameter; needed after something else changed those."""
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    def _step_group(self, group: dict, params: list, grad_scale, skip) -> None:
        """Step parameters of a group; with "cuda" also their first averages and copies."""
        states = [self.state[p] for p in params]
        tensors = (
            [_local(p) for p in params],
            [_local(p.grad) for p in params],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
        )
        options = {name: group[name] for name in ("lr", "eps", "weight_decay")} | {"skip": skip}
        if self.implementation == "torch":
            options |= dict(zip(("beta1", "beta2"), group["betas"]))
            fused_adamw(*tensors, grad_scale=grad_scale.reciprocal(), **options)  # torch divides
            return
        averaged = bool(self.averages)
        ops.adamw_ema(
            *tensors,
            grad_scale=grad_scale,
            betas=group["betas"],
            emas=[_local(self._averages_of[p][0]) for p in params] if averaged else (),
            ema_rate=self.ema_rates[0] if averaged else None,
            param_copies=[self.copies[p] for p in params if p in self.copies],
            implementation="cuda",
            **options,
        )

    def _move_averages(self, params, skip: torch.Tensor, first: int = 0) -> None:
        """Move averages number `first` and on, in a few launches that do nothing under skip.

        The step of a fused SGD: with the weight p as the gradient, to be maximised, and a decay of
        1, it takes the average a to a - (1 - decay) (a - p), reads and writes what it must, and has
        a flag on the device. torch's lerp has none: with weights on the device it would be a launch
        for each tensor, and a sum of foreach operations moves 32 bytes an element in place of 12.
        """
        weights = [_local(p) for p in params]
        sgd = {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
        sgd |= {"maximize": True, "is_first_step": False, "found_inf": skip}
        rates = self.ema_rates if self.ema_warmup else self._rates
        for number, rate in enumerate(rates[first:], start=first):
            averages = [_local(self._averages_of[p][number]) for p in params]
            if averages:
                torch._fused_sgd_(averages, weights, [], lr=rate, **sgd)

    def _to_device(self) -> None:
        """Move learning rates and step counts, which torch's own state may have on the host."""
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)
            group["fused"] = True
        for state in self.state.values():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=self.device)


def build_optimizer(
    model: nn.Module,
    emas: Sequence[nn.Module],
    config: OptimConfig,
    copies: Mapping[torch.Tensor, torch.Tensor],
) -> AdamWEMA:
    """Build AdamW over all parameters in order, frozen ones included (pos_embed is index 0)."""
    return AdamWEMA(
        model.parameters(),
        [ema.parameters() for ema in emas],
        config.ema_decays,
        copies,
        ema_warmup=config.ema_warmup,
        lr=learning_rate(config, 0),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        implementation=config.optimizer_impl,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return that of the step after `step` steps: a linear warm-up, then constant or a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    span = max(1, config.max_train_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    low, high = config.min_learning_rate, config.learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_rates(config: OptimConfig, step: int) -> tuple[float, ...]:
    """Return 1 - decay of each EMA in the step after `step` steps; with ema_warmup 1 at step 0."""
    cap = 1 - (1 + step) ** -0.75 if config.ema_warmup else 1.0
    return tuple(1 - min(decay, cap) for decay in config.ema_decays)


def ema_warnings(config: OptimConfig, total: int) -> list[str]:
    """Return a line about each EMA that holds much of the initial weights after `total` steps."""
    held = {d: d**total for d in config.ema_decays if total * (1 - d) < 1 and not config.ema_warmup}
    return [
        f"warning: an EMA of decay {decay} still holds {100 * share:.0f} % of the initial weights "
        f"after {total} steps: expected --ema-warmup, or a lower --ema-decay"
        for decay, share in held.items()
    ]


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Return what clips a gradient of this norm to `max_norm`, as clip_grad_norm_ of torch does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def choose_implementation(implementation: str, params: Sequence[torch.Tensor]) -> tuple[str, str]:
    """Return who steps these parameters, "cuda" or "torch", and why, as `choose` does."""

    def against_cuda() -> str:
        foreign = [p.dtype for p in params if p.dtype != torch.float32]
        reason = f"a parameter is {foreign[0]}, expected torch.float32" if foreign else ""
        return ops.why_not_cuda(params[0].device) or reason

    return choose("optimizer_impl", implementation, {"cuda": against_cuda, "torch": runs})


def _check_averages(params, averages, decays) -> None:
    if len(averages) != len(decays):
        raise ValueError(f"{len(averages)} averages for {len(decays)} ema_decays, expected as many")
    if not all(0 <= decay < 1 for decay in decays):
        raise ValueError(f"ema_decays are {decays}, expected values in [0, 1)")
    for average in averages:
        if [p.shape for p in params] != [a.shape for a in average]:
            raise ValueError(
                f"an average has {len(average)} tensors that do not fit the {len(params)} "
                "parameters, expected the same shapes in the same order"
            )
        for p, a in zip(params, average):
            if a.dtype != p.dtype:
                raise ValueError(f"an average is {a.dtype}, expected {p.dtype} as its parameter")


def _lr_to_host(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Return groups with plain numbers, as torch's own have them."""
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
