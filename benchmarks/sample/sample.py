"""Images per second of sampling: `python -m benchmarks.sample.sample --provider ours-compile-bf16`.

The reverse SDE with REPA's settings (250 evaluations, guidance 1.8) on random weights, which are
as fast as trained ones. The clock is read at every call of the model, so that a run gives the time
of a step with guidance (twice the batch) and of one without. A run takes `--measured` steps with
guidance on [0, 0.7], which has both kinds; the rate of a whole sampling is the batch over

    (steps with guidance) x (median time of one) + (steps without) x (median time of one),

counted on its own grid of `--steps` times, for each of the three guidances. `wall_over_steps` in
a row is the wall clock of the runs over the sum of their steps: near 1, nothing else takes time.
Providers in one process take turns. A provider whose latents are wrong gets no figure.

    official              benchmarks/sample/rival.py with plain torch kernels and torch's attention
    ours-eager-*          ImageSampler
    ours-compile-*        with torch.compile, on a GPU with CUDA graphs
    *-bf16, *-tf32        autocast; fp32 with TF32 products (on a CPU plain fp32), as the official

`--toy` samples a model of the digits' size in 8 steps, for machines without a GPU.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import timing
from benchmarks.harness.environment import results_folder, stamp
from benchmarks.sample.gate import Gate
from benchmarks.sample.providers import (
    GUIDANCES,
    MEASURED,
    PROVIDERS,
    SEED,
    TOY_PROVIDERS,
    Provider,
    build,
    evaluations,
)
from benchmarks.sample.report import markdown, read
from repa_fast.backend import dispatch
from repa_fast.data.vae import DECODE_BATCH, VAE
from repa_fast.models.flops import sit_flops
from repa_fast.train.memory import peak_flops

# diffusers' arguments of the Stable Diffusion autoencoder
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}


def decode_time(provider: Provider) -> float:
    """Milliseconds to decode a batch by an autoencoder of Stable Diffusion's size, fp32.

    Ours decodes as ImageSampler does, the rival the whole batch at once.
    """
    from diffusers import AutoencoderKL

    metadata = dataclasses.replace(provider.sampler.metadata, vae="random")
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**SD_VAE).save_pretrained(folder)
        vae = VAE(folder)
        at_once = provider.batch if provider.official else DECODE_BATCH
        decode = vae.decoder(metadata, provider.device, rounding=False, batch_size=at_once)
    latents = torch.randn(provider.batch, *metadata.latent_shape, device=provider.device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        decode(latents).cpu()  # which waits for the device
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def decoding(provider: Provider, toy: bool) -> dict:
    """The milliseconds, or why there are none."""
    if toy:
        return {"decode_skipped": "the latents are pixels"}
    try:
        return {"decode_ms": decode_time(provider)}
    except (ImportError, torch.OutOfMemoryError) as error:
        return {"decode_skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def figures(
    provider: Provider, rounds: list[dict[bool, list[float]]], num_steps: int, matmul: float
) -> list[dict]:
    """A row's figures for each guidance, from the times of the steps of each round."""
    model, batch, device = provider.model.model, provider.batch, provider.device
    forward = sit_flops(
        tokens=model.num_tokens,
        width=model.pos_embed.shape[-1],
        depth=len(model.blocks),
        mlp_ratio=4.0,
        patch_values=model.patch_size**2 * model.in_channels,
    )
    medians = [{kind: statistics.median(ms) for kind, ms in times.items()} for times in rounds]
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if peak and provider.precision == "no":
        peak /= 2  # TF32
    rows = []
    for name, guidance in GUIDANCES.items():
        plain, guided = evaluations(num_steps, guidance)
        batch_ms = [plain * ms[False] + guided * ms[True] for ms in medians]
        low, middle, high = timing.percentiles([1e3 * batch / ms for ms in batch_ms])
        flops = forward * (plain + 2 * guided)
        rows.append(
            {
                "guidance": name,
                "images_per_s_p20": low,
                "images_per_s_p50": middle,
                "images_per_s_p80": high,
                "images_per_s": [1e3 * batch / ms for ms in batch_ms],
                "ms_per_batch": statistics.median(batch_ms),
                "ms_per_step": statistics.median(batch_ms) / num_steps,
                "evaluations": {"plain": plain, "guided": guided},
                "gflop_per_image": flops / 1e9,
                "share_of_floor": middle * flops / matmul,
                "share_of_datasheet": middle * flops / peak if peak else None,
            }
        )
    return rows


def step_figures(rounds: list[dict[bool, list[float]]]) -> dict[str, float]:
    """Percentiles of the milliseconds of a step, over all rounds."""
    found = {}
    for kind, name in ((False, "plain"), (True, "guided")):
        times = timing.percentiles([ms for times in rounds for ms in times[kind]])
        found |= {f"ms_{name}_p{p}": ms for p, ms in zip((20, 50, 80), times)}
    return found


def prepare(options: argparse.Namespace, device: torch.device) -> dict[str, Provider | str]:
    """Every provider, past its gate and warmed up; or what is wrong with it."""
    torch.set_float32_matmul_precision("high")
    plain = build(options.model, options.toy, device)
    first = Provider("official", plain, options.batch, device)
    start = first.sampler.noise(first.index, SEED), torch.from_numpy(first.labels).to(device)
    index = torch.from_numpy(first.index).to(device)
    gate = Gate(plain.model, *start, index, SEED, MEASURED)
    del first, plain
    if device.type == "cuda":
        dispatch.use_kernels("reference" if "official" in options.provider else None)
    found: dict[str, Provider | str] = {}
    for name in options.provider:
        try:
            loaded = build(options.model, options.toy, device)
            provider = Provider(name, loaded, options.batch, device)
            latents = provider.latents(len(gate.increments) + 1, gate.increments)
            wrong = gate.why_wrong(latents, provider.precision, official=provider.official)
            found[name] = f"gate: {wrong}" if wrong else provider
            if not wrong:
                provider.run(options.measured)
        except Exception as error:  # compilers raise anything
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def measure(options: argparse.Namespace) -> list[dict]:
    """A row per provider and guidance."""
    device = torch.device(options.device)
    common = {
        "model": "digits" if options.toy else options.model,
        "batch": options.batch,
        "num_steps": options.steps,
        "measured_steps": options.measured,
        "rounds": options.rounds,
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    providers = prepare(options, device)
    ready = {name: p for name, p in providers.items() if isinstance(p, Provider)}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what the gate needed
        torch.cuda.reset_peak_memory_stats()
    runs = [
        {name: p.run(options.measured) for name, p in ready.items()} for _ in range(options.rounds)
    ]
    memory = {"peak_allocated_gib": None, "peak_reserved_gib": None}
    if device.type == "cuda":
        memory["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        memory["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    common["kernels"] = dispatch.describe(device.type)
    rates = {}
    rows = []
    for name, provider in providers.items():
        row = {"provider": name, **common, **stamp()}
        if isinstance(provider, str):
            rows += [
                {**row, "guidance": g, "status": "failed", "message": provider} for g in GUIDANCES
            ]
            continue
        dtype = torch.bfloat16 if provider.precision == "bf16" else torch.float32
        if dtype not in rates:
            rates[dtype] = timing.matmul_rate(dtype, device)
        times = [run[name][0] for run in runs]
        row |= {
            "status": "ok",
            **step_figures(times),
            "wall_over_steps": statistics.median(run[name][1] for run in runs),
            "matmul_tflop_per_s": rates[dtype] / 1e12,
            **memory,
            **decoding(provider, options.toy),
        }
        for found in figures(provider, times, options.steps, rates[dtype]):
            if "decode_ms" in row:
                whole = found["ms_per_batch"] + row["decode_ms"]
                found["images_per_s_decoded"] = 1e3 * options.batch / whole
            rows.append({**row, **found})
    return rows


def parse() -> argparse.Namespace:
    """The command line, with defaults that depend on --toy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS)
    parser.add_argument("--model", default="SiT-XL/2", help="SiT-{S,B,L,XL}/{2,4,8}")
    parser.add_argument("--toy", action="store_true", help="a model of the digits' size, 8 steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, help="evaluations of a sampling: 250, or 8")
    parser.add_argument("--measured", type=int, help="steps of a run: 50, or 8")
    parser.add_argument("--rounds", type=int, default=3, help="runs that count")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    options = parser.parse_args()
    options.provider = options.provider or (
        list(TOY_PROVIDERS) if options.toy else ["ours-compile-bf16"]
    )
    options.steps = options.steps or (8 if options.toy else 250)
    options.measured = options.measured or (8 if options.toy else 50)
    if options.device != "cpu" and "official" in options.provider and options.provider[1:]:
        parser.error("on a GPU the official runs other kernels, expected it alone in --provider")
    return options


def main() -> int:
    """Measure, append the rows and write their report."""
    options = parse()
    rows = measure(options)
    out = options.out or results_folder("sample", options.device) / "rows.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        for row in rows:
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")
    out.with_name("report.md").write_text(markdown(read(out)))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
