"""AdamW with EMAs of the weights, and gradient clipping, without waiting for the device.

A step can be a no-op, decided on the device: where its flag is set, neither weights, moments, step
counts nor EMAs change.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from repa_fast import ops
from repa_fast.backend.dispatch import choose, runs
from repa_fast.configs.optim import OptimConfig
from repa_fast.train.gradients import grouped
from repa_fast.train.torch_private import fused_adamw

CAST_NUMBERS = 2**26
"""At which a group of gradients ends that are cast at once for torch's AdamW."""

Tensors = list[Tensor]


class Plan(NamedTuple):
    """What a step does with a group's parameters: this process's tensors, in one order."""

    weights: Tensors
    leaves: list[Tensor | None]
    exp_avgs: Tensors
    exp_avg_sqs: Tensors
    steps: Tensors
    emas: list[Tensors]  # of these weights, by EMA
    resting: tuple[Tensors, list[Tensors]]  # weights without a gradient, and their EMAs


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW that also moves EMAs, `ema += (1 - decay) (parameter - ema)`.

    Its state_dict is torch AdamW's own, so each loads the other's. Learning rates are 0-d tensors
    on the parameters' device (`set_lr`), so that a schedule recompiles nothing; so is 1 - decay
    of each EMA (`set_ema_rates`).

    Args:
        params: parameters or groups, as for torch.optim.AdamW; frozen ones may be among them.
        averages: for each EMA its tensors, one per parameter in the order of `params`.
        ema_decays: for each EMA its decay.
        leaves: by parameter, the bf16 tensor that is kept equal to it, and gets its gradient if it
            is a parameter itself.
        lr, betas, eps, weight_decay: AdamW's.
        implementation: "cuda" does a step in one pass over memory (csrc/adamw_ema; parameters in
            fp32), "torch" is torch's fused AdamW and fused EMAs, on any device; "auto" takes
            "cuda" where it can run.

    Attributes:
        held: gradients that are not at their parameter or leaf, by that.

    ValueError, with the reason, if EMAs do not fit, or "cuda" cannot run.
    """

    def __init__(
        self,
        params: Iterable,
        averages: Sequence[Iterable[Tensor]] = (),
        ema_decays: Sequence[float] = (),
        leaves: Mapping[Tensor, Tensor] | None = None,
        *,
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
        self._rates = tuple(1 - decay for decay in ema_decays)
        self.ema_rates = [
            torch.as_tensor(rate, dtype=torch.float32, device=self.device) for rate in self._rates
        ]
        self._step_supports_amp_scaling = False  # a GradScaler unscales, and skips steps, itself
        self.leaves = dict(leaves or {})
        self._averages = [dict(zip(own, average)) for average in self.averages]
        self._owners = [[self._owner(p) for p in group["params"]] for group in self.param_groups]
        self.held: Mapping[Tensor, Tensor] = {}
        self.implementation, self.reason = choose_implementation(implementation, own)
        self._one = torch.ones((), dtype=torch.float32, device=self.device)
        self.begin_states()
        self._settle()
        self.register_load_state_dict_post_hook(lambda optimizer: optimizer._settle())
        self.register_state_dict_post_hook(_lr_to_host)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group as torch does, at construction; later it would have no EMAs."""
        if hasattr(self, "averages"):
            raise ValueError("AdamWEMA: groups are fixed at construction, as their averages are")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict:
        raise TypeError("AdamWEMA cannot be copied or pickled: use state_dict()")

    def begin_states(self, params: Iterable[Tensor] | None = None) -> None:
        """Set moments and step counts of zero for trainable parameters (all) that have none yet."""
        own = (p for group in self.param_groups for p in group["params"])
        for p in own if params is None else params:
            if self._owner(p).requires_grad and not self.state[p]:
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
        """Set each EMA's 1 - decay; what does not change is not written."""
        for tensor, old, new in zip(self.ema_rates, self._rates, rates, strict=True):
            if new != old:
                tensor.fill_(new)
        self._rates = tuple(rates)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return the gradient that a step takes for one of the optimizer's parameters."""
        owner = self._owner(parameter)
        return self.held.get(owner, owner.grad)

    def _owner(self, parameter: Tensor) -> Tensor:
        """Return at what autograd leaves the gradient: the leaf, or else the parameter."""
        leaf = self.leaves.get(parameter, parameter)
        return leaf if leaf.requires_grad else parameter

    def _gradients(self) -> list[list[Tensor | None]]:
        """Return the gradient of every parameter, or None, group by group."""
        if not self.held:
            return [[owner.grad for owner in owners] for owners in self._owners]
        return [[self.held.get(owner, owner.grad) for owner in owners] for owners in self._owners]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that autograd has left, also at leaves."""
        for owner in itertools.chain(*self._owners):
            owner.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients together, over all shards; 0-d fp32 on the device."""
        gradients = [g for g in itertools.chain(*self._gradients()) if g is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        parts, one = _locals(gradients), gradients[0]  # FSDP shards all of them alike
        if self.implementation == "cuda":
            squares = ops.sum_of_squares(parts, self.device, implementation="cuda")
        else:
            alike = defaultdict(list)  # foreach would launch a kernel for each of several dtypes
            for part in parts:
                alike[part.dtype].append(part)
            norms = []
            for dtype, some in alike.items():
                norms += torch._foreach_norm(some, 2.0, torch.promote_types(dtype, torch.float32))
            squares = torch.stack(norms).norm().double().square()
        if isinstance(one, DTensor):
            summed = [Partial() if p.is_shard() else Replicate() for p in one.placements]
            squares = DTensor.from_local(squares, one.device_mesh, summed, run_check=False)
            squares = squares.full_tensor()
        return squares.sqrt().float()

    @torch.no_grad()
    def step(
        self, closure: None = None, *, grad_scale: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Take one step of parameters, leaves and EMAs; closures are not supported.

        Args:
            grad_scale: 0-d fp32, multiplies gradients; they are undefined afterwards.
            skip: 0-d fp32; where it is 1, nothing changes.
        """
        if closure is not None:
            raise ValueError("AdamWEMA.step: got a closure, expected None")
        grad_scale = self._one if grad_scale is None else grad_scale
        skip = self._one - 1 if skip is None else skip
        cuda = self.implementation == "cuda"
        run = self._step_by_cuda if cuda else self._step_by_torch
        for number, (group, gradients) in enumerate(zip(self.param_groups, self._gradients())):
            plan = self._plan(number, tuple(g is not None for g in gradients))
            taken = _locals(g for g in gradients if g is not None)
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            run(plan, taken, grad_scale=grad_scale, skip=skip, **options)
            self._move_averages(plan.weights, plan.emas, skip, first=int(cuda))
            self._move_averages(*plan.resting, skip)

    @torch.no_grad()
    def write_leaves(self) -> None:
        """Make every leaf equal to its parameter; needed after something else changed those."""
        if self.leaves:
            torch._foreach_copy_([p.detach() for p in self.leaves.values()], list(self.leaves))

    def _plan(self, number: int, present: tuple[bool, ...]) -> Plan:
        """Return what is done with group `number` where gradients are `present` at its parameters.

        Built once for each: in most runs there is one.
        """
        if found := self._plans.get((number, present)):
            return found
        params = self.param_groups[number]["params"]
        stepped, resting = ([p for p, g in zip(params, present) if g == is_] for is_ in (1, 0))
        self.begin_states(stepped)
        states = [self.state[p] for p in stepped]
        moments = [_locals(state[key] for state in states) for key in ("exp_avg", "exp_avg_sq")]
        leaves = [self.leaves[p].detach() if p in self.leaves else None for p in stepped]
        plan = Plan(
            _locals(stepped),
            leaves,
            *moments,
            [state["step"] for state in states],
            self._emas_of(stepped),
            (_locals(resting), self._emas_of(resting)),
        )
        self._plans[number, present] = plan
        return plan

    def _emas_of(self, params: Tensors) -> list[Tensors]:
        return [_locals(of[p] for p in params) for of in self._averages]

    def _step_by_cuda(self, plan: Plan, gradients: Tensors, **options) -> None:
        """Step weights, leaves and the first EMA in one pass over memory."""
        ops.adamw_ema(
            plan.weights,
            gradients,
            plan.exp_avgs,
            plan.exp_avg_sqs,
            plan.steps,
            emas=plan.emas[0] if plan.emas else (),
            ema_rate=self.ema_rates[0] if plan.emas else None,
            param_copies=plan.leaves if self.leaves else (),
            implementation="cuda",
            **options,
        )

    def _step_by_torch(
        self, plan: Plan, gradients: Tensors, *, grad_scale: Tensor, betas, **options
    ) -> None:
        """Step weights, then write leaves; torch's kernel divides by its scale."""
        options |= {"beta1": betas[0], "beta2": betas[1], "grad_scale": grad_scale.reciprocal()}
        rows = zip(plan.weights, gradients, plan.exp_avgs, plan.exp_avg_sqs, plan.steps)
        for some in grouped(rows, CAST_NUMBERS, lambda row: row[0].numel()):
            weights, grads, *moments = map(list, zip(*some))
            grads = [g.to(w.dtype) for g, w in zip(grads, weights)]
            fused_adamw(weights, grads, *moments, **options)
        self.write_leaves()

    def _move_averages(
        self, weights: Tensors, emas: list[Tensors], skip: Tensor, first: int = 0
    ) -> None:
        """Move EMAs number `first` and on, in a few launches that do nothing under skip.

        The step of a fused SGD: with the weight p as the gradient, to be maximised, and a decay of
        1, it takes the EMA a to a - (1 - decay) (a - p), reads and writes what it must, and has
        a flag on the device. torch's lerp has none: with weights on the device it would be a launch
        for each tensor, and a sum of foreach operations moves 32 bytes an element in place of 12.
        """
        sgd = {"weight_decay": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False}
        sgd |= {"maximize": True, "is_first_step": False, "found_inf": skip}
        for ema, rate in list(zip(emas, self.ema_rates, strict=True))[first:]:
            if ema:
                torch._fused_sgd_(ema, weights, [], lr=rate, **sgd)

    def _settle(self) -> None:
        """Move learning rates and step counts, which torch's own state may have on the host."""
        for group in self.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)
            group["fused"] = True
        for state in self.state.values():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=self.device)
        self._plans: dict[tuple[int, tuple[bool, ...]], Plan] = {}  # tensors are others now


def build_optimizer(
    model: nn.Module,
    emas: Sequence[nn.Module],
    config: OptimConfig,
    leaves: Mapping[Tensor, Tensor],
) -> AdamWEMA:
    """Build AdamW over all fp32 weights in order, frozen ones included (pos_embed is index 0)."""
    return AdamWEMA(
        model.state_dict(keep_vars=True).values(),
        [ema.parameters() for ema in emas],
        config.ema_decays,
        leaves,
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


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what clips a gradient of this norm to `max_norm`, as clip_grad_norm_ of torch does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def choose_implementation(implementation: str, params: Sequence[Tensor]) -> tuple[str, str]:
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
        if [(p.shape, p.dtype) for p in params] != [(a.shape, a.dtype) for a in average]:
            raise ValueError(
                f"an average has {len(average)} tensors that do not fit the {len(params)} "
                "parameters, expected the same shapes and dtypes in the same order"
            )


def _lr_to_host(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Return groups with plain numbers, as torch's own have them."""
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _locals(tensors: Iterable[Tensor]) -> Tensors:
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
