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
    *-bf16, *-tf32        autocast; fp32 with TF32 matmuls (on a CPU plain fp32), as the official

`--toy` samples a model of the digits' size in 8 steps, for machines without a GPU.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time

import torch

from benchmarks.harness import timing
from benchmarks.harness.environment import parser, results_folder, stamp
from benchmarks.harness.rows import append, read
from benchmarks.harness.timing import spread
from benchmarks.sample import providers as ways
from benchmarks.sample.gate import Gate
from benchmarks.sample.providers import GUIDANCES, MEASURED, PROVIDERS, SEED, Provider
from benchmarks.sample.report import markdown
from repa_fast.backend import dispatch
from repa_fast.data.latents import DECODE_BATCH, VAE
from repa_fast.kernels.attention.backends import describe
from repa_fast.models.flops import peak_flops, sit_flops

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


def decoding(provider: Provider, toy: bool) -> dict:
    """Return the ms to decode a batch by an autoencoder of Stable Diffusion's size, or why not.

    In fp32. Ours decodes as ImageSampler does, the rival the whole batch at once.
    """
    if toy:
        return {"decode_skipped": "the latents are pixels"}
    try:
        from diffusers import AutoencoderKL

        metadata = dataclasses.replace(provider.sampler.metadata, vae="random")
        with tempfile.TemporaryDirectory() as folder:
            AutoencoderKL(**SD_VAE).save_pretrained(folder)
            at_once = provider.batch if provider.official else DECODE_BATCH
            options = {"rounding": False, "batch_size": at_once}
            decode = VAE(folder).decoder(metadata, provider.device, **options)
        latents = torch.randn(provider.batch, *metadata.latent_shape, device=provider.device)
        times = []
        for _ in range(3):
            started = time.perf_counter()
            decode(latents).cpu()  # which waits for the device
            times.append(1e3 * (time.perf_counter() - started))
        return {"decode_ms": statistics.median(times[1:])}
    except (ImportError, torch.OutOfMemoryError) as error:
        return {"decode_skipped": describe(error)}


def figures(
    provider: Provider, rounds: list[dict[bool, list[float]]], num_steps: int, matmul: float
) -> list[dict]:
    """Return a row's figures for each guidance, from the times of the steps of each round."""
    model, batch, device = provider.model.model, provider.batch, provider.device
    shape = {"tokens": model.num_tokens, "width": model.pos_embed.shape[-1]}
    shape |= {"depth": len(model.blocks), "mlp_ratio": 4.0}
    forward = sit_flops(**shape, patch_values=model.patch_size**2 * model.in_channels)
    medians = [{kind: statistics.median(ms) for kind, ms in times.items()} for times in rounds]
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if peak and provider.precision == "no":
        peak /= 2  # TF32
    rows = []
    for name, guidance in GUIDANCES.items():
        plain, guided = ways.evaluations(num_steps, guidance)
        batch_ms = [plain * ms[False] + guided * ms[True] for ms in medians]
        rates = [1e3 * batch / ms for ms in batch_ms]
        flops = forward * (plain + 2 * guided)
        achieved, middle = statistics.median(rates) * flops, statistics.median(batch_ms)
        row = {"guidance": name, **spread("images_per_s", rates), "images_per_s": rates}
        row |= {"ms_per_batch": middle, "ms_per_step": middle / num_steps}
        row |= {"evaluations": {"plain": plain, "guided": guided}, "gflop_per_image": flops / 1e9}
        row |= {"share_of_floor": achieved / matmul}
        rows.append(row | {"share_of_datasheet": achieved / peak if peak else None})
    return rows


def prepare(options: argparse.Namespace, device: torch.device) -> dict[str, Provider | str]:
    """Return every provider, past its gate and warmed up, or what is wrong with it."""
    torch.set_float32_matmul_precision("high")
    plain = ways.build(options.model, options.toy, device)
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
            loaded = ways.build(options.model, options.toy, device)
            provider = Provider(name, loaded, options.batch, device)
            latents = provider.latents(len(gate.increments) + 1, gate.increments)
            wrong = gate.why_wrong(latents, provider.precision, official=provider.official)
            found[name] = f"gate: {wrong}" if wrong else provider
            if not wrong:
                provider.run(options.measured)
        except Exception as error:  # compilers raise anything
            found[name] = describe(error)
    return found


def measure(options: argparse.Namespace) -> list[dict]:
    """Return a row per provider and guidance."""
    device = torch.device(options.device)
    common = {"model": "digits" if options.toy else options.model, "batch": options.batch}
    common |= {"num_steps": options.steps, "measured_steps": options.measured}
    common |= {"rounds": options.rounds, "load_average_before": round(os.getloadavg()[0], 2)}
    providers = prepare(options, device)
    ready = {name: p for name, p in providers.items() if isinstance(p, Provider)}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what the gate needed
        torch.cuda.reset_peak_memory_stats()
    runs = [
        {name: p.run(options.measured) for name, p in ready.items()} for _ in range(options.rounds)
    ]
    peaks = (None, None)
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    memory = dict(zip(("peak_allocated_gib", "peak_reserved_gib"), peaks))
    common["kernels"] = dispatch.describe(device.type)
    matmul_rate = functools.cache(lambda dtype: timing.matmul_rate(dtype, device))
    rows = []
    for name, provider in providers.items():
        row = {"provider": name, **common, **stamp()}
        if isinstance(provider, str):
            failed = {**row, "status": "failed", "message": provider}
            rows += [{**failed, "guidance": guidance} for guidance in GUIDANCES]
            continue
        matmul = matmul_rate(torch.bfloat16 if provider.precision == "bf16" else torch.float32)
        times = [run[name][0] for run in runs]
        row |= {
            "status": "ok",
            **spread("ms_plain", [ms for one in times for ms in one[False]]),
            **spread("ms_guided", [ms for one in times for ms in one[True]]),
            "wall_over_steps": statistics.median(run[name][1] for run in runs),
            "matmul_tflop_per_s": matmul / 1e12,
            **memory,
            **decoding(provider, options.toy),
        }
        for found in figures(provider, times, options.steps, matmul):
            if "decode_ms" in row:
                whole = found["ms_per_batch"] + row["decode_ms"]
                found["images_per_s_decoded"] = 1e3 * options.batch / whole
            rows.append({**row, **found})
    return rows


def parse() -> argparse.Namespace:
    """Parse the command line, with defaults that depend on --toy."""
    flags = parser(__doc__.splitlines()[0], "file to append the rows to")
    flags.add_argument("--provider", nargs="+", choices=PROVIDERS)
    flags.add_argument("--model", default="SiT-XL/2", help="SiT-{S,B,L,XL}/{2,4,8}")
    flags.add_argument("--toy", action="store_true", help="a model of the digits' size, 8 steps")
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--steps", type=int, help="evaluations of a sampling: 250, or 8")
    flags.add_argument("--measured", type=int, help="steps of a run: 50, or 8")
    flags.add_argument("--rounds", type=int, default=3, help="runs that count")
    options = flags.parse_args()
    usual = list(ways.TOY_PROVIDERS) if options.toy else ["ours-compile-bf16"]
    options.provider = options.provider or usual
    options.steps = options.steps or (8 if options.toy else 250)
    options.measured = options.measured or (8 if options.toy else 50)
    if options.device != "cpu" and "official" in options.provider and options.provider[1:]:
        flags.error("on a GPU the official runs other kernels, expected it alone in --provider")
    return options


def main() -> int:
    """Measure, append the rows and write their report."""
    options = parse()
    rows = measure(options)
    out = options.out or results_folder("sample", options.device) / "rows.jsonl"
    append(out, *rows)
    print(*map(json.dumps, rows), sep="\n", flush=True)
    out.with_name("report.md").write_text(markdown(read(out)))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
