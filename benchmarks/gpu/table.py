"""The last word of the queue: a line for each figure, in at most 6,000 characters."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

MOST = 6000
"""Characters."""

RIVALS = ("released", "recipe", "one-pass")


def read(results: Path) -> list[dict]:
    """Return all rows under a folder of results, oldest file first."""
    files = sorted(results.glob("**/rows.jsonl"), key=lambda file: file.stat().st_mtime)
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def write(items: Sequence[dict], results: Path, logs: Path) -> str:
    """Return the table: states of the items, then figures, then the ends of logs that failed."""
    rows = read(results)
    lines = [" ".join(f"{row['item']}:{row['state']}/{row['seconds']:.0f}s" for row in items)]
    lines += figures(rows)
    for row in items:
        log = logs / f"{row['item']}.log"
        if row["item"].endswith("tests") and log.exists():
            lines += tests(log.read_text())
        elif row["state"] in ("failed", "stopped") and log.exists():
            lines.append(f"{row['item']}: {last_line(log.read_text())}")
    text = "\n".join(lines)
    return text if len(text) <= MOST else text[: MOST - 4] + "\n..."


def states(items: Sequence[dict], logs: Path) -> list[str]:
    """Return a line for each item: its state, its seconds, and why it did not run to its end."""
    lines = []
    for row in items:
        log = logs / f"{row['item']}.log"
        why = row.get("message", "")
        if row["state"] in ("failed", "stopped") and log.exists():
            why = last_line(log.read_text())[:100]
        lines.append(f"{row['item']:16} {row['state']:9} {row['seconds']:5.0f} s  {why}".rstrip())
    return lines


def figures(rows: Sequence[dict]) -> list[str]:
    """Return a line for each row that has figures, the card's first."""
    lines = []
    for row in rows:
        if row.get("item") == "card":
            lines.append(
                f"card {row['device']}: copy {row['copy_tb_per_s']:.2f} TB/s, "
                f"matmul {row['matmul_tflop_per_s']:.0f} TFLOP/s, driver {row['driver']}"
            )
        elif "least_cosine" in row:
            lines.append(
                f"parity {row['rung']}: gradients {row['least_cosine']:.5f}, norm "
                f"{row['norm_ratio']:.4f}, losses {row['loss_distance'] or 0:.2e} apart"
            )
        elif row.get("rung"):
            lines.append(step(row, rows))
        elif "op" in row:
            lines += op(row, rows)
        elif "tensors" in row:
            lines.append(optimizer(row, rows))
        elif "guidance" in row and row["status"] == "ok":
            lines.append(
                f"sample {row['provider']} {row['guidance']} {row['images_per_s_p50']:.2f}/s"
            )
    return lines


def step(row: dict, rows: Sequence[dict]) -> str:
    """Return a configuration of the training step, beside the rivals measured at its batch."""
    head = f"{row['rung']} {row['batch']}"
    if row["status"] != "ok":
        return f"{head}: {row['message'][:200]}"
    ratios = [
        f"x{other['ms_p50'] / row['ms_p50']:.2f} {name}"
        for name in RIVALS
        if name != row["rung"]
        for other in latest(rows, rung=name, batch=row["batch"], status="ok")
    ]
    parts = " ".join(f"{name[:5]} {ms:.1f}" for name, ms in row["ms_by_category"].items())
    return (
        f"{head}: {row['ms_p50']:.2f} ms {row['images_per_second']:.0f}/s {' '.join(ratios)} "
        f"host {row['host_ms']:.1f} launches {row['launches'] or 0:.0f} "
        f"peak {row['peak_memory_gib']:.1f} first {row['first_step_seconds']:.0f}s | {parts}"
    )


def op(row: dict, rows: Sequence[dict]) -> list[str]:
    """Return our kernel beside the compiler's, or a backend of attention; nothing of the others."""
    if row["provider"] != "ours" and row["op"] != "attention":
        return []
    head = f"{row['op']} {'x'.join(map(str, row['shape']))} {row['dtype']} {row['mode']}"
    if row["op"] == "attention":
        head += f" {row['provider']}"
    if row["status"] != "ok" or "ms_p50" not in row:
        return [f"{head}: {row.get('message', '')[:120]}"] if row["status"] == "failed" else []
    same = {name: row[name] for name in ("op", "shape", "dtype", "mode")}
    rival = [
        f" x{r['ms_p50'] / row['ms_p50']:.2f}" for r in latest(rows, **same, provider="compile")
    ]
    share = f"{100 * row['share_of_copy']:.0f}%"
    return [f"{head}: {1e3 * row['ms_p50']:.1f} us {share}{''.join(rival)}"]


def optimizer(row: dict, rows: Sequence[dict]) -> str:
    """Return an optimizer's step beside the best of torch's own."""
    head = f"optim {row['provider']}"
    if row["status"] != "ok":
        return f"{head}: {row['message'][:160]}"
    stock = latest(rows, provider="stock", tensors=row["tensors"])
    ratio = "".join(f" x{other['ms_p50'] / row['ms_p50']:.2f}" for other in stock)
    return f"{head}: {row['ms_p50']:.2f} ms {100 * row['share_of_copy']:.0f}%{ratio}"


def latest(rows: Iterable[dict], **wanted) -> list[dict]:
    """Return the last row with these values and a time, if there is one."""
    found = [r for r in rows if "ms_p50" in r and all(r.get(n) == v for n, v in wanted.items())]
    return found[-1:]


def tests(log: str) -> list[str]:
    """Return pytest's closing line and the tests that failed."""
    failed = re.findall(r"^(?:FAILED|ERROR) .*$", log, re.MULTILINE)
    return [last_line(log), *(line[:150] for line in failed[:25])]


def last_line(log: str) -> str:
    """Return the last line that says anything."""
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing was printed)"
