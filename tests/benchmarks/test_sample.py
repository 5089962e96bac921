"""Sampling measured: a rival that is right, a gate that holds, figures that add up."""

import argparse
import itertools
import re
import sys
from functools import partial

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.rows import read
from benchmarks.sample import gate as sample_gate
from benchmarks.sample import providers as sample_providers
from benchmarks.sample import report as sample_report
from benchmarks.sample import rival as sample_rival
from benchmarks.sample import sample
from repa_fast.diffusion import samplers
from repa_fast.models.sit import SiT
from repa_fast.testing import seeded
from tests.diffusion.gaussians import LABELS, SHAPE, Model, latents
from tests.eval import checkpoints
from tests.refusals import refused

CPU = torch.device("cpu")
BATCH = 2
pytestmark = pytest.mark.usefixtures("tiny_digits")
FULL, PART, NONE = (
    sample_providers.GUIDANCES[name] for name in ("1.8 on [0, 1]", "1.8 on [0, 0.7]", "none")
)


def options(*providers, **changes) -> argparse.Namespace:
    found = {"provider": list(providers), "model": "SiT-XL/2", "toy": True, "batch": BATCH}
    found |= {"steps": 8, "measured": 4, "rounds": 2, "device": "cpu"}
    return argparse.Namespace(**found | changes)


@pytest.mark.parametrize("guidance", (FULL, PART, NONE))
def test_the_rival_and_our_sampler_agree_in_fp64(guidance):
    start, increments = (Model(), latents(), LABELS), seeded((5, *SHAPE), seed=2).double()
    rival = sample_rival.sample(*start, num_steps=6, increments=increments, **guidance)
    scale, *interval = guidance.values()
    given = {"cfg_scale": scale, "guidance_interval": tuple(interval), "noise": increments}
    ours = samplers.euler_maruyama(*start, num_steps=6, **given)
    torch.testing.assert_close(rival, ours, rtol=1e-12, atol=1e-12)
    none = partial(sample_rival.sample, *start, num_steps=0, cfg_scale=1)
    refused(none, "num_steps is 0, expected at least 2")


def test_the_rival_draws_standard_normal_noise_in_fp64_for_a_model_in_fp32():
    run = partial(sample_rival.sample, Model(), latents(torch.float32), LABELS)
    torch.manual_seed(2)
    drawn = run(num_steps=6, cfg_scale=1)
    torch.manual_seed(2)
    increments = torch.stack([torch.randn(SHAPE, dtype=torch.float64) for _ in range(5)])
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, run(num_steps=6, cfg_scale=1, increments=increments))


def test_figures_are_the_mix_of_the_steps_of_each_kind():
    """ms 2 without and 5 with guidance, batch 2: 250 steps on [0, 0.7] take 78 * 2 + 172 * 5 ms."""
    # times 1 - 0.96 k / 249 of k = 0..249: 0.7 is passed at k = 77.8
    for guidance, guided in ((FULL, 250), (PART, 250 - 78), (NONE, 0)):
        assert sample_providers.evaluations(250, guidance) == (250 - guided, guided)
    provider = argparse.Namespace(batch=BATCH, device=CPU, precision="no")
    with torch.device("meta"):
        provider.model = argparse.Namespace(model=SiT(z_dims=()))
    rounds = [{False: [2.0, 1.0, 9.0], True: [5.0]}] * 3
    rows = {row["guidance"]: row for row in sample.figures(provider, rounds, 250, 1e12)}
    found = rows["1.8 on [0, 0.7]"]
    assert found["ms_per_batch"] == pytest.approx(78 * 2 + 172 * 5)
    assert found["images_per_s_p50"] == pytest.approx(BATCH / 1.016)
    # 118.6 GMAC of SiT-XL/2, twice that in FLOPs, and twice the batch under guidance
    assert rows["none"]["gflop_per_image"] == pytest.approx(250 * 237.2, rel=1e-3)
    assert rows["1.8 on [0, 1]"]["gflop_per_image"] == pytest.approx(500 * 237.2, rel=1e-3)
    share = found["images_per_s_p50"] * (78 + 2 * 172) * 237.2e9 / 1e12
    assert found["share_of_floor"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("name", ["official", "ours-eager-tf32", "ours-eager-bf16"])
def test_a_run_reads_the_clock_at_every_step(name):
    loaded = sample_providers.build("", True, CPU)
    provider = sample_providers.Provider(name, loaded, BATCH, CPU)
    times, wall = provider.run(6)
    plain, guided = sample_providers.evaluations(6, sample_providers.MEASURED)
    assert (len(times[False]), len(times[True])) == (plain, guided)
    assert min(times[False] + times[True]) > 0 and wall >= 1


def test_the_model_is_the_same_at_every_call_and_predicts_something_of_unit_size():
    first, again = (sample_providers.build("", True, CPU).model for _ in range(2))
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    velocity = first(x, torch.full((4,), 0.5), y)[0]
    assert 0.3 < velocity.std() < 3
    assert not torch.equal(velocity, first(x, torch.full((4,), 0.5), y + 1)[0])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"diffusion_norm": 1.05}, "gate: (latents: |relative error)"),
        ({"last_step": "euler"}, "gate: (latents: |relative error)"),
        ({"state_dtype": "fp32"}, "expected torch.float64"),
    ],
)
@pytest.mark.parametrize("name", ["ours-eager-tf32", "ours-eager-bf16"])
def test_a_wrong_sampler_gets_no_figure(monkeypatch, name, changes, named):
    settings = sample_providers.PROVIDERS[name] | changes
    monkeypatch.setitem(sample_providers.PROVIDERS, name, settings)
    (message,) = sample.prepare(options(name), CPU).values()
    assert isinstance(message, str) and re.search(named, message), message


def test_the_gate_knows_what_a_rounding_is_and_loops_that_do_not_agree_are_none(monkeypatch):
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert sample_gate.ROUNDOFF[name] == torch.finfo(dtype).eps / 2
    monkeypatch.setattr(sample_rival, "LAST_TIME", 0.05)
    prepare = partial(sample.prepare, options("official"), CPU)
    refused(prepare, r"differ by .* in fp64", error=RuntimeError)


def fails(*arguments, **changes):
    raise RuntimeError("no such kernel\nmore")


def test_a_run_writes_rows_and_a_report_and_what_fails_says_why_and_spoils_no_other(
    tmp_path, monkeypatch
):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    monkeypatch.setitem(timing.MATMUL_SIDE, "cpu", 64)
    names = ["official", "ours-eager-tf32", "ours-compile-tf32"]
    arguments = ["--provider", *names, "--measured", "4", "--rounds", "2"]
    command = ["sample", "--toy", "--device", "cpu", "--batch", "2", "--out", str(out), *arguments]
    monkeypatch.setattr("sys.argv", command)
    assert sample.main() == 1
    rows, text = read(out), out.with_name("report.md").read_text()
    found = [(row["provider"], row["guidance"]) for row in rows]
    assert found == list(itertools.product(names, sample_providers.GUIDANCES))
    for row in rows:
        assert {"commit", "command", "device", "cores", "kernels"} <= row.keys()
        assert row["num_steps"] == 8
        if row["provider"] == "ours-compile-tf32":
            assert (row["status"], row["message"]) == ("failed", "RuntimeError: no such kernel")
            continue
        assert row["images_per_s_p20"] <= row["images_per_s_p50"] <= row["images_per_s_p80"]
        assert row["status"] == "ok" and len(row["images_per_s"]) == 2
    assert text.count("| ours-eager-tf32 |") == 6 and "the latents are pixels" in text
    assert "RuntimeError: no such kernel" in text


def test_a_ratio_is_taken_round_by_round_within_a_process():
    row = {"provider": "ours", "command": "a", "rounds": 3, "images_per_s": [10.0, 20.0, 90.0]}
    rival = {**row, "images_per_s": [5.0, 10.0, 30.0], "images_per_s_p50": 10.0}
    row["images_per_s_p50"] = 25.0
    assert sample_report.ratio(row, rival) == ("ours", "2.00", "2.00", "2.60")
    assert sample_report.ratio(row, {**rival, "command": "b"}) == ("ours", "", "2.50", "")


@pytest.mark.parametrize("official", [True, False])
def test_decoding_is_timed_with_random_weights_or_it_is_said_what_is_missing(monkeypatch, official):
    pytest.importorskip("diffusers")
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    small |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4}
    monkeypatch.setattr(sample, "SD_VAE", small | {"up_block_types": ("UpDecoderBlock2D",) * 2})
    sampler = argparse.Namespace(metadata=checkpoints.LATENTS)
    provider = argparse.Namespace(batch=6, official=official, device=CPU, sampler=sampler)
    assert sample.decoding(provider, toy=False)["decode_ms"] > 0
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = sample.decoding(provider, toy=False)
    assert found.keys() == {"decode_skipped"} and "diffusers" in found["decode_skipped"]


def test_on_a_gpu_the_official_is_alone(monkeypatch, capsys):
    arguments = ["--device", "cuda", "--provider", "official", "ours-eager-bf16"]
    monkeypatch.setattr("sys.argv", ["sample", *arguments])
    with pytest.raises(SystemExit):
        sample.parse()
    assert "expected it alone" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours-compile-bf16", "official"])
def test_figures_on_a_gpu(name):
    rows = sample.measure(options(name, device="cuda", batch=8))
    for row in rows:
        assert row["status"] == "ok" and row["images_per_s_p50"] > 0, row
        assert row["peak_reserved_gib"] > 0
