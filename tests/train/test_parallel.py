"""DDP, FSDP and HSDP on several processes: what each computes and holds, against one process."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("lance")
pytest.importorskip("timm")

from repa_fast.configs import presets
from repa_fast.configs.build import expected_metadata
from repa_fast.train.memory import budget, describe
from repa_fast.train.parallel import checkpoint_activations, region_size, shard_count
from tests.refusals import refused
from tests.train import parallel_ranks as cases
from tests.train.conftest import tiny_config
from tests.train.parallel_ranks import ALONE, DDPM, FSDP, LEAN, PLAIN, SRA, distance, unequal

UNTIL = {"align_until": 1}
NT_XENT = {"loss_type": "nt-xent", "nt_xent_negatives": "global"}
CASES = {
    "ddp until": UNTIL,
    "ddp nt-xent": NT_XENT,
    "fsdp selective": FSDP | cases.SELECTIVE | {"shard_encoder": True, "ema_decay": "0.9,0.99"},
    "fsdp until": FSDP | UNTIL,
    "fsdp dit sra": FSDP | LEAN | SRA | DDPM | {"loss_type": "sml1"},
    "hsdp 2 x 1 sra": cases.REPLICATED | SRA,
}
MORE_CASES = {
    "ddp": {},
    "ddp selective": cases.SELECTIVE,
    "ddp vanilla": PLAIN,
    "ddp noise": PLAIN | {"prediction": "noise"},
    "ddp score-vp": {"prediction": "score", "path_type": "VP", "loss_weight": "likelihood"},
    "ddp conv": {"projector": "conv", "spatial_norm": True},
    "ddp sra": SRA,
    "ddp dit": DDPM | PLAIN,
    "ddp dit-repa": DDPM,
    "ddp dit-sra": DDPM | SRA | {"loss_type": "sml1", "align_decay": "sra"},
    "ddp nt-xent until": NT_XENT | UNTIL,
    "ddp sra until": SRA | UNTIL,
    "fsdp": FSDP,
    "fsdp conv": FSDP | {"projector": "conv", "qk_norm": True},
    "fsdp nt-xent": FSDP | NT_XENT,
    "fsdp sra until": FSDP | SRA | UNTIL,
    "fsdp sra": FSDP | SRA,
    "fsdp dit": FSDP | DDPM | PLAIN,
}
ALL_CASES = CASES | MORE_CASES
SQUARES = {"hsdp 2 x 2": cases.SQUARE, "hsdp 2 x 2 sra": cases.SQUARE | SRA | LEAN, "fsdp 4": FSDP}
TRACED = FSDP | LEAN | PLAIN | {"depth": 2}
COMPILED = {
    "fsdp": FSDP,
    "fsdp selective": FSDP | cases.SELECTIVE | {"shard_encoder": True},
    "fsdp full": TRACED,
    "fsdp full sra": FSDP | SRA | LEAN,
    "hsdp 2 x 1": cases.REPLICATED,
    "ddp selective": cases.SELECTIVE,
}
COMPILED_ALONE = [name for name in ALL_CASES if name.startswith("ddp") and name != "ddp vanilla"]
BF16 = {"mixed_precision": "bf16"}
ROUNDING, COMPILED_ROUNDING = 1e-6, 1e-5
"""Compiled sums have another order: a few hundred roundings of 6e-8 at the most in a row."""


def fast_and(heavy_ones, fast_ones):
    return [*fast_ones, *(pytest.param(name, marks=pytest.mark.heavy) for name in heavy_ones)]


@pytest.fixture(scope="module")
def run(ranks):
    """The steps of a case on two processes."""
    return functools.cache(lambda name: ranks(cases.steps, ALL_CASES[name]))


@pytest.fixture(scope="module")
def gradients(ranks):
    """Of the first step in bf16, of what kind."""

    def find(kind):
        flags = {"reduce_dtype": "bf16"} if "reduced" in kind else {}
        flags |= FSDP if "fsdp" in kind else {}
        return ranks(cases.first_gradients, BF16 | flags, 3 if "micro" in kind else 1)[0]

    return functools.cache(find)


def expected(overrides):
    """The same run in one process, eager."""
    return alone(json.dumps({k: v for k, v in overrides.items() if k not in cases.WHOLE}))


@functools.cache
def alone(flags):
    return cases.steps(ALONE, json.loads(flags) | cases.WHOLE)


@functools.cache
def gradients_alone(precision):
    return cases.first_gradients(ALONE, {"mixed_precision": precision})


def weights(tensors):
    return cases.only(tensors, "model", "ema", "ema_2")


def assert_same_run(found, wanted, rel=ROUNDING):
    """Losses, gradient norms, weights and averages."""
    assert len(found["readings"]) == len(wanted["readings"]) == cases.STEPS
    for mine, theirs in zip(found["readings"], wanted["readings"]):
        assert mine["skipped"] == theirs["skipped"] == 0
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=rel, abs=rel)
    assert distance(weights(found["end"]), weights(wanted["end"])) <= rel


def numbers(reading):
    """Metrics by name, the losses by time one by one; there is none where no time was drawn."""
    by_time = {f"t{tenth}": loss for tenth, loss in enumerate(reading["loss_by_t"])}
    found = {key: value for key, value in reading.items() if key != "loss_by_t"} | by_time
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize("name", fast_and(MORE_CASES, CASES))
def test_two_processes_equal_one(run, name):
    """And end with the same bits; alignment ends where it shall."""
    first, second = run(name)
    wanted = expected(ALL_CASES[name])
    for found in (first, second):
        assert_same_run(found, wanted)
    assert unequal(first["end"], second["end"]) == []
    # What makes the bound on weights one that a wrong gradient exceeds.
    assert distance(weights(wanted["start"]), weights(wanted["end"])) > 100 * ROUNDING
    for key, value in weights(wanted["end"]).items():
        moved = (value - wanted["start"][key]).norm()
        # Where AdamW divides gradients that are all rounding by themselves, single values differ.
        if "k_norm.bias" not in key:  # whose whole gradient is rounding: softmax does not see it
            assert (first["end"][key] - value).norm() <= 1e-3 * moved, key
    losses = [v for each in first["readings"] for k, v in each.items() if k.startswith("align/")]
    until = ALL_CASES[name].get("align_until", cases.STEPS)
    aligned = [] if ALL_CASES[name].get("enc_type") == "none" else range(cases.STEPS)
    assert [loss != 0 for loss in losses] == [step < until for step in aligned]


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", SQUARES)
def test_four_processes_equal_one(ranks, name):
    for found in ranks(cases.steps, SQUARES[name], size=4):
        assert_same_run(found, expected(SQUARES[name]))


def test_bf16_leaves_on_two_processes_are_stepped_as_on_one_in_any_buckets(ranks):
    """Gradients are rounded to bf16 once more for each part of the batch."""
    found = [ranks(cases.steps_in_buckets, BF16, numbers) for numbers in (2**24, 1000)]
    first, second = found[0]
    assert unequal(first["end"], second["end"]) == []
    for each in found[1]:
        assert unequal(each["end"], first["end"]) == []
    wanted = cases.steps(ALONE, BF16)
    assert wanted["joint"] and not first["joint"]  # whose gradients would all come last
    for mine, theirs in zip(first["readings"], wanted["readings"], strict=True):
        assert numbers(mine) == pytest.approx(numbers(theirs), rel=2e-3, abs=2e-3)
    moved = distance(weights(wanted["start"]), weights(wanted["end"]))
    assert distance(weights(first["end"]), weights(wanted["end"])) < 0.1 * moved


def test_processes_that_begin_with_other_weights_are_refused(ranks):
    for said in ranks(cases.refused_weights):
        assert len(said) == 3 and all("begin with other weights" in line for line in said)


@pytest.mark.parametrize("swapped, count", [(False, 1), (True, 2)])
def test_gradients_of_other_weights_than_before_or_elsewhere_are_refused(ranks, swapped, count):
    """Those of a process's own would be summed with what the others had before."""
    at_first, later = (ranks(cases.refused_gradients, step, swapped) for step in (0, 1))
    assert all("came on a process than on the first one" in said for said in at_first)
    assert later[0] == ""
    words = f"gradients of {count} weights came in this step, of 2 in the first: "
    assert later[1].startswith(words)


def test_negatives_of_a_process_are_fewer_than_those_of_all(ranks):
    """The same weights and images: a smaller pool of keys has a smaller sum in every loss."""
    found = ranks(cases.steps, NT_XENT | {"nt_xent_negatives": "batch"})
    whole, parts = expected(NT_XENT)["readings"][0], found[0]["readings"][0]
    assert parts["denoise"] == pytest.approx(whole["denoise"], rel=1e-6)
    # Half of the keys: about log 2 less.
    assert 0.3 < whole["align/digits-vit"] - parts["align/digits-vit"] < 1


# Precision.


@pytest.mark.parametrize("kind", ["fsdp", "fsdp micro-batches", "ddp", "ddp micro-batches"])
def test_bf16_gradients_are_as_good_as_those_of_one_process(gradients, kind):
    exact = gradients_alone("no")
    working = distance(gradients_alone("bf16"), exact)
    assert 1e-3 < working < 1e-2  # bf16 rounds by 2^-9
    assert distance(gradients(kind), exact) < 1.25 * working


@pytest.mark.parametrize("kind", ["fsdp reduced in bf16", "ddp reduced in bf16"])
def test_gradients_are_reduced_in_bf16_where_asked_for(gradients, kind):
    values = cases.joined(gradients(kind)).float()
    assert torch.equal(values, values.bfloat16().float())
    # One more rounding of each gradient and one of the sum: 2^-9 each, at most.
    exact = gradients_alone("no")
    assert distance(gradients(kind), exact) < distance(gradients_alone("bf16"), exact) + 2**-8
    values = cases.joined(gradients("fsdp")).float()
    assert not torch.equal(values, values.bfloat16().float())


def test_fp16_gradients_are_those_of_ddp(ranks):
    """Scaled, as they are before the scaler's unscaling."""
    ddp, fsdp = (
        ranks(cases.first_gradients, {"mixed_precision": "fp16"} | mode)[0] for mode in ({}, FSDP)
    )
    assert distance(fsdp, ddp) < 2**-10


def test_times_reach_the_embedder_unrounded(ranks):
    """bf16 has 8 bits, so times of 0..999 lose up to 2; FSDP casts inputs unless told not to."""

    def error(found):
        weight = "t_embedder.mlp.0.weight"
        return distance({weight: found[weight]}, {weight: exact[weight]})

    exact, one = (
        cases.gradients_at_fractional_times(ALONE, {"mixed_precision": precision})
        for precision in ("no", "bf16")
    )
    ours, cast = (
        ranks(cases.gradients_at_fractional_times, BF16 | FSDP, casts)[0] for casts in (False, True)
    )
    assert error(ours) < 1.25 * error(one) < 0.01
    assert error(cast) > 10 * error(one)  # the test would notice


def test_dtypes_inside_the_model(ranks):
    found = ranks(cases.dtypes_inside, BF16 | FSDP | SRA)[0]
    one = cases.dtypes_inside(ALONE, BF16 | SRA)
    fp32, bf16 = torch.float32, torch.bfloat16
    assert found["stored"] == found["gradients"] == [fp32]
    assert found["t_embedder"] == [fp32, bf16]
    assert found["blocks.1"] == [fp32, bf16, bf16]  # residual stream, modulation
    assert found["blocks.1.attn"] == found["blocks.1.mlp.fc2"] == [bf16, bf16]
    assert found["final_layer"][:3] == [fp32, bf16, bf16]  # residual stream, branch, gate
    for name in ("t_embedder", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc2"):
        assert one[name][:-1] == found[name][:-1]


# What is held and gathered.


def test_each_process_holds_half(ranks):
    found = ranks(cases.held, FSDP | SRA)
    assert all(one["whole"] == ["pos_embed"] and one["moments are sharded"] for one in found)
    first, second = (one["numbers"] for one in found)
    model = cases.build(ALONE, tiny_config(**SRA)).model
    assert first + second == sum(p.numel() for p in model.parameters()) - model.pos_embed.numel()
    assert abs(first - second) < 0.05 * (first + second)


def test_the_first_process_samples_from_the_whole_average(ranks):
    (first, second), one = ranks(cases.average, FSDP), cases.average(ALONE, {})
    assert distance(first["mine"], one["mine"]) < ROUNDING
    assert "mine" not in second and "grid" not in second
    assert unequal(second["everywhere"], first["mine"]) == []
    assert unequal(one["everywhere"], one["mine"]) == []
    assert (first["grid"].int() - one["grid"].int()).abs().max() <= 1


@pytest.mark.parametrize("overrides", [FSDP | {"shard_encoder": True}, FSDP | SRA])
def test_one_process_can_try_passes_alone(ranks, overrides):
    assert ranks(cases.trial_passes, overrides) == [True, True]


# Compilation.


def assert_compiled_once(found):
    """No graph break; all graphs exist after the first step."""
    assert found["breaks"] == {}
    assert found["graphs"][0] >= 2 and len(set(found["graphs"])) == 1


def test_tracing_blocks_breaks_no_graph_and_ends_in_the_first_step(ranks):
    for found in ranks(cases.traced_steps, TRACED):
        assert_compiled_once(found)
        assert_same_run(found, expected(TRACED), COMPILED_ROUNDING)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_equal_eager_ones(ranks, name):
    for found in ranks(cases.steps, COMPILED[name] | {"compile": True}):
        assert_compiled_once(found)
        assert_same_run(found, expected(COMPILED[name]), COMPILED_ROUNDING)


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("name", fast_and(COMPILED_ALONE, ["ddp vanilla"]))
def test_compiled_equals_eager_in_one_process(name):
    """The others cost time; test_guards.py compiles more of them in less."""
    found = cases.steps(ALONE, ALL_CASES[name] | {"compile": True})
    assert found["graphs"][-1] >= 2
    assert_same_run(found, expected(ALL_CASES[name]), COMPILED_ROUNDING)


@pytest.mark.parametrize(
    "depth, encoder_depth, size", [(28, 8, 4), (12, 6, 3), (24, 10, 2), (28, 7, 1), (2, 2, 2)]
)
def test_regions_of_blocks_are_alike_and_end_where_hidden_states_are_read(
    depth, encoder_depth, size
):
    assert region_size(depth, encoder_depth) == size


# Activation checkpointing, in one process.


def gradients_and_flops(kind):
    state = cases.build(ALONE, tiny_config(**PLAIN))
    checkpoint_activations(state.model.blocks, kind)
    batch, draws = cases.local_batch(state, 0), cases.draw_local(state)
    with FlopCounterMode(display=False) as counter:
        cases.accumulate(state, batch, draws)
    return cases.gradients(state.model), counter.get_total_flops()


def test_checkpointing_computes_again_what_it_says_and_changes_no_gradient():
    found = {kind: gradients_and_flops(kind) for kind in ("none", "selective", "full")}
    plain, flops = found["none"]
    for gradients, _ in found.values():
        assert unequal(gradients, plain) == []
    assert found["selective"][1] == flops
    batch, tokens, width, depth = 12, 16, 32, 3
    # qkv 3, projection 1 and the MLP's first layer 4; nothing needs the output of its second
    linear, attention = 2 * 8 * tokens * width**2, 4 * tokens**2 * width
    assert found["full"][1] - flops == depth * batch * (linear + attention)


# Choices and estimates.


@pytest.mark.parametrize(
    "flags, processes, local, shards",
    [
        ({}, 16, 8, 1),
        (FSDP, 16, 8, 16),
        ({"parallel": "hsdp"}, 16, 8, 8),
        ({"parallel": "hsdp"}, 8, 8, 8),
        ({"parallel": "hsdp", "shard_size": 4}, 16, 8, 4),
    ],
)
def test_shards(monkeypatch, flags, processes, local, shards):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert shard_count(tiny_config(**flags), processes) == shards


HSDP = {"parallel": "hsdp"}
GROUPS = "processes in shard groups of"


@pytest.mark.parametrize(
    "flags, processes, words",
    [
        (HSDP, 12, rf"12 {GROUPS} 8 \(a node's processes\)"),
        (HSDP | {"shard_size": 3}, 16, rf"16 {GROUPS} 3 \(shard_size\)"),
        (HSDP | {"shard_size": -1}, 16, "shard_size is -1"),
        (FSDP | {"shard_size": 2}, 16, "shard_size is 2 with parallel 'fsdp'"),
        ({"reshard_after_forward": True}, 16, "reshard_after_forward is set"),
        ({"shard_encoder": True}, 16, "shard_encoder is set"),
    ],
)
def test_what_does_not_fit_together_is_refused(monkeypatch, flags, processes, words):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    refused(lambda: shard_count(tiny_config(**flags), processes), words)


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_one_process_alone_shards_nothing(mode):
    assert_same_run(cases.steps(ALONE, {"parallel": mode, **UNTIL}), expected(UNTIL), 0)


def test_memory_under_sharding():
    """Weights, gradients, moments and average are shared out; bf16 weights are gathered."""
    config = replace(presets.get("sit-b2"), data_dir="/nowhere", **FSDP)
    metadata = expected_metadata(config)
    whole = budget(config, metadata)
    total = whole.parameters_with_projectors
    assert whole.state_bytes == 20 * total
    assert budget(config, metadata, 8).state_bytes == pytest.approx((20 / 8 + 2) * total)
    fp32 = replace(config, mixed_precision="no")
    assert budget(fp32, metadata, 8).state_bytes == pytest.approx((20 / 8 + 4) * total)
    lean = replace(config, **LEAN)
    assert budget(lean, metadata, 8).state_bytes == pytest.approx(20 / 8 * total)
    selective = replace(config, **cases.SELECTIVE)
    activations = [budget(c, metadata).activation_bytes for c in (lean, selective, config)]
    assert activations == sorted(activations) and activations[0] == 0.15 * activations[2]


def test_a_dry_run_says_what_each_process_takes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = replace(presets.get("sit-xl2"), data_dir="/nowhere", **FSDP)
    assert "in each of 8 processes" in describe(config)
    copies, metadata = replace(config, parallel="ddp"), expected_metadata(config)
    one, eight = (budget(copies, metadata, processes=processes) for processes in (1, 8))
    assert eight.state_bytes - one.state_bytes == 4 * one.parameters_with_projectors
    assert "in each of" not in describe(copies)
