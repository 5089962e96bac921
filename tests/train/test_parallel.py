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
from repa_fast.train.parallel import checkpoint_activations, shard_count
from tests import launching
from tests.train import parallel_ranks
from tests.train.conftest import tiny_config
from tests.train.parallel_ranks import (
    ALONE,
    CASES,
    COMPILED,
    MORE_CASES,
    SQUARES,
    STEPS,
    TRACED,
    UNTIL,
    WHOLE,
)

pytestmark = pytest.mark.usefixtures("torchrun")

LR = 1e-4


def launch(folder, part, processes):
    """What each of several processes found."""
    module, where = "tests.train.parallel_ranks", {"OUT": str(folder), "PART": part}
    process = launching.launch(module, processes, timeout=900, **where)
    assert process.returncode == 0, process.stderr
    return [torch.load(folder / f"found.{rank}") for rank in range(processes)]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("few"), "few", 2)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("more"), "more", 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("four"), "four", 4)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("compiled"), "compiled", 2)


@functools.cache
def alone(flags):
    """The same run in one process, eager, from its overrides as JSON."""
    return parallel_ranks.steps(ALONE, "alone", json.loads(flags) | WHOLE)


def expected(overrides):
    return alone(json.dumps({k: v for k, v in overrides.items() if k not in WHOLE}))


def distance(found, wanted):
    """Norm of the difference of all tensors, relative to that of all wanted ones."""
    assert found.keys() == wanted.keys()
    difference = [
        (found[name].double() - tensor.double()).flatten() for name, tensor in wanted.items()
    ]
    return (torch.cat(difference).norm() / joined(wanted).norm()).item()


def joined(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def assert_same_run(found, wanted, rel=1e-6):
    """Losses, gradient norms, weights and averages."""
    assert len(found["readings"]) == len(wanted["readings"]) == STEPS
    for mine, theirs in zip(found["readings"], wanted["readings"]):
        assert mine.keys() == theirs.keys() and mine["skipped"] == theirs["skipped"] == 0
        by_time, others = theirs["loss_by_t"], {**theirs, "loss_by_t": 0}
        assert {**mine, "loss_by_t": 0} == pytest.approx(others, rel=rel, abs=rel)
        for loss, wanted_loss in zip(mine["loss_by_t"], by_time):  # None where no time was drawn
            assert loss == (wanted_loss and pytest.approx(wanted_loss, rel=rel, abs=rel))
    assert distance(found["weights"], wanted["weights"]) <= rel


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(few, name):
    for found in few:
        assert_same_run(found[name], expected(CASES[name]))


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", MORE_CASES)
def test_two_processes_equal_one_in_more_cases(more, name):
    for found in more:
        assert_same_run(found[name], expected(MORE_CASES[name]))


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", SQUARES)
def test_four_processes_equal_one(four, name):
    for found in four:
        assert_same_run(found[name], expected(SQUARES[name]))


def test_every_process_ends_with_the_same_bits(few):
    for name in CASES:
        first, second = (found[name]["weights"] for found in few)
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_run_moves_weights_by_far_more_than_it_may_differ():
    """What makes the bound on weights one that a wrong gradient exceeds."""
    start = parallel_ranks.weights(parallel_ranks.build(ALONE, tiny_config()))
    assert distance(start, expected({})["weights"]) > 1e-4


def test_alignment_ends_under_fsdp(few):
    aligned = [reading["align/digits-vit"] != 0 for reading in few[0]["fsdp until"]["readings"]]
    assert aligned == [True] * UNTIL + [False] * (STEPS - UNTIL)


# Precision.


@pytest.mark.parametrize("name", ["fsdp", "fsdp micro-batches"])
def test_bf16_gradients_are_as_good_as_those_of_one_process(few, name):
    found = few[0]["precision"]
    working = distance(found["alone"], found["fp32"])
    assert 1e-3 < working < 1e-2  # bf16 rounds by 2^-9
    assert distance(found[name], found["fp32"]) < 1.25 * working


def test_times_reach_the_embedder_unrounded(few):
    """bf16 has 8 bits, so times of 0..999 lose up to 2; FSDP casts inputs unless told not to."""
    found = few[0]["precision"]
    weight = "t_embedder.mlp.0.weight"
    one, ours, cast = (
        distance({weight: found[f"times {name}"][weight]}, {weight: found["times fp32"][weight]})
        for name in ("alone", "fsdp", "cast")
    )
    assert ours < 1.25 * one < 0.01
    assert cast > 10 * one  # the test would notice


def test_dtypes_inside_the_model(few):
    found, one = few[0]["precision"]["dtypes"], few[0]["precision"]["dtypes alone"]
    assert found["stored"] == found["gradients"] == ["torch.float32"]
    fp32, bf16 = "torch.float32", "torch.bfloat16"
    assert found["t_embedder"] == [fp32, bf16]
    assert found["blocks.1"] == [fp32, bf16, bf16]  # residual stream, modulation
    assert found["blocks.1.attn"] == found["blocks.1.mlp.fc2"] == [bf16, bf16]
    assert found["final_layer"][:3] == [fp32, bf16, bf16]  # residual stream, branch, gate
    for name in ("t_embedder", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc2"):
        assert one[name][:-1] == found[name][:-1]


def test_gradients_are_reduced_in_bf16_where_asked_for(few):
    found = few[0]["precision"]
    for name in ("fsdp reduced in bf16", "ddp reduced in bf16"):
        values = joined(found[name]).float()
        assert torch.equal(values, values.bfloat16().float())
        # One more rounding of each gradient and one of the sum: 2^-9 each, at most.
        assert (
            distance(found[name], found["fp32"]) < distance(found["alone"], found["fp32"]) + 2**-8
        )
    values = joined(found["fsdp"]).float()
    assert not torch.equal(values, values.bfloat16().float())


@pytest.mark.usefixtures("heavy")
def test_fp16_gradients_are_those_of_ddp(more):
    """Scaled, as they are before the scaler's unscaling."""
    assert distance(more[0]["fsdp fp16"], more[0]["ddp fp16"]) < 2**-10


# What is held, saved and gathered.


def test_names_are_the_official_ones(few):
    assert few[0]["checkpoints"]["names"] == list(
        parallel_ranks.build(ALONE, tiny_config()).model.state_dict()
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_a_sharded_checkpoint_goes_on_under_every_mode(few, mode):
    for found in (rank["checkpoints"] for rank in few):
        assert distance(found[f"into {mode}"], found["undisturbed"]) < 1e-6


def test_an_official_file_goes_on_under_fsdp(few):
    found = few[1]["checkpoints"]
    assert found["official"].keys() == found["official alone"].keys()
    for name, tensor in found["official alone"].items():
        assert torch.equal(found["official"][name], tensor), name


def test_each_process_holds_half(few):
    for found in (rank["oddities"] for rank in few):
        assert found["whole"] == ["pos_embed"] and found["moments sharded"]
    held = [rank["oddities"]["held"] for rank in few]
    model = parallel_ranks.build(ALONE, tiny_config(**parallel_ranks.SRA)).model
    assert sum(held) == sum(p.numel() for p in model.parameters()) - model.pos_embed.numel()
    assert abs(held[0] - held[1]) < 0.05 * sum(held)


def test_the_first_process_samples_from_the_whole_average(few):
    first, second = (rank["averages"] for rank in few)
    assert distance(first["fsdp"], first["alone"]) < 1e-6
    assert "fsdp" not in second and "fsdp grid" not in second
    assert distance(second["fsdp everywhere"], first["fsdp"]) == 0
    grids = [first[name].int() for name in ("fsdp grid", "alone grid")]
    assert (grids[0] - grids[1]).abs().max() <= 1


def test_a_step_with_one_processs_nan_changes_nothing_anywhere(few):
    for found in (rank["oddities"] for rank in few):
        assert found["skipped"] == 1 and found["changed"] == []
        assert found["trains"] and not found["head moved"]


# Compilation.


def assert_compiled_once(found):
    """No graph break; all graphs exist after the first step."""
    assert found["breaks"] == {}
    assert found["graphs"][0] >= 2 and len(set(found["graphs"])) == 1


def test_tracing_blocks_breaks_no_graph_and_ends_in_the_first_step(few):
    for found in few:
        assert_compiled_once(found["traced"])
        assert_same_run(found["traced"], expected(COMPILED[TRACED]), 1e-5)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_equal_eager_ones(compiled, name):
    for found in compiled:
        assert_compiled_once(found[name])
        # Compiled sums have another order: a few hundred roundings of 6e-8 at the most in a row.
        assert_same_run(found[name], expected(COMPILED[name]), 1e-5)


# Activation checkpointing, in one process.


def gradients_and_flops(kind):
    state = parallel_ranks.build(ALONE, tiny_config(enc_type="none"))
    checkpoint_activations(state.model.blocks, kind)
    batch, draws = parallel_ranks.local_batch(state, 0), parallel_ranks.draw_local(state)
    with FlopCounterMode(display=False) as counter:
        parallel_ranks.accumulate(state, batch, draws)
    return parallel_ranks.gradients(state.model), counter.get_total_flops()


def test_checkpointing_computes_again_what_it_says_and_changes_no_gradient():
    found = {kind: gradients_and_flops(kind) for kind in ("none", "selective", "full")}
    plain, flops = found["none"]
    for gradients, _ in found.values():
        for name, tensor in plain.items():
            assert torch.equal(gradients[name], tensor), name
    assert found["selective"][1] == flops
    batch, tokens, width, depth = 12, 16, 32, 3
    # qkv 3, projection 1 and the MLP's first layer 4; nothing needs the output of its second
    linear, attention = 2 * 8 * tokens * width**2, 4 * tokens**2 * width
    assert found["full"][1] - flops == depth * batch * (linear + attention)


# Choices and estimates.


@pytest.mark.parametrize(
    "flags, processes, local, expected_shards",
    [
        ({}, 16, 8, 1),
        ({"parallel": "fsdp"}, 16, 8, 16),
        ({"parallel": "hsdp"}, 16, 8, 8),
        ({"parallel": "hsdp"}, 8, 8, 8),
        ({"parallel": "hsdp", "shard_size": 4}, 16, 8, 4),
    ],
)
def test_shards(monkeypatch, flags, processes, local, expected_shards):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert shard_count(tiny_config(**flags), processes) == expected_shards


def test_processes_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        ValueError, match=r"12 processes in shard groups of 8 \(a node's processes\)"
    ):
        shard_count(tiny_config(parallel="hsdp"), 12)
    with pytest.raises(ValueError, match=r"16 processes in shard groups of 3 \(shard_size\)"):
        shard_count(tiny_config(parallel="hsdp", shard_size=3), 16)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"parallel": "fsdp", "compute_copy": "optimizer"}, "compute_copy is 'optimizer'"),
        ({"parallel": "hsdp", "compute_copy": "optimizer"}, "compute_copy is 'optimizer'"),
        ({"parallel": "fsdp", "shard_size": 2}, "shard_size is 2 with parallel 'fsdp'"),
        ({"parallel": "hsdp", "shard_size": -1}, "shard_size is -1"),
        ({"reshard_after_forward": True}, "reshard_after_forward is set"),
        ({"shard_encoder": True}, "shard_encoder is set"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(**flags)


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_one_process_alone_shards_nothing(mode):
    found = parallel_ranks.steps(ALONE, "alone", {"parallel": mode})
    assert_same_run(found, expected({}), 0)


def test_memory_under_sharding():
    """Weights, gradients, moments and average are shared out; bf16 weights are gathered."""
    config = replace(presets.get("sit-b2"), data_dir="/nowhere", parallel="fsdp")
    metadata = expected_metadata(config)
    whole = budget(config, metadata)
    total = whole.parameters_with_projectors
    assert whole.state_bytes == 20 * total
    assert budget(config, metadata, 8).state_bytes == pytest.approx((20 / 8 + 2) * total)
    fp32 = replace(config, mixed_precision="no")
    assert budget(fp32, metadata, 8).state_bytes == pytest.approx((20 / 8 + 4) * total)
    lean = replace(config, reshard_after_forward=True, activation_checkpointing="full")
    assert budget(lean, metadata, 8).state_bytes == pytest.approx(20 / 8 * total)
    selective = replace(config, activation_checkpointing="selective")
    activations = [budget(c, metadata).activation_bytes for c in (lean, selective, config)]
    assert activations == sorted(activations) and activations[0] == 0.15 * activations[2]


def test_a_dry_run_says_what_each_process_takes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    config = replace(presets.get("sit-xl2"), data_dir="/nowhere", parallel="fsdp")
    assert "in each of 8 processes" in describe(config)
    assert "in each of" not in describe(replace(config, parallel="ddp"))
