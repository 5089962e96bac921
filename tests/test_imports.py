"""Importing any module needs no GPU, no optional package and no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Runs in a fresh process. What is None in sys.modules looks absent to `import` and to find_spec.
SCRIPT = """
import importlib, json, pkgutil, socket, sys, traceback

BLOCKED = {
    "triton", "lance", "tyro", "timm", "diffusers", "nvidia", "sklearn", "matplotlib",
    "tensorboard", "transformers", "wandb", "torchdiffeq", "torch_fidelity",
}

def no_network(*args):
    raise RuntimeError(f"an import connected to {args[1:]}")

sys.modules |= dict.fromkeys(BLOCKED)
socket.socket.connect = socket.socket.connect_ex = no_network

import torch
import repa_fast

names, failed = ["repa_fast"], {}

def fail(name):
    failed.setdefault(name, traceback.format_exc())

for module in pkgutil.walk_packages(repa_fast.__path__, "repa_fast.", fail):
    if not module.name.endswith(".__main__"):
        names.append(module.name)
        # those are Triton, and diffusers' classes
        if not module.name.endswith((".triton_kernels", ".backend.rows", ".share.pipeline")):
            try:
                importlib.import_module(module.name)
            except BaseException:
                fail(module.name)
print(json.dumps({
    "names": names,
    "failed": failed,
    "file": repa_fast.__file__,
    "leaked": [name for name in BLOCKED if sys.modules[name] is not None],
    "cuda_initialized": torch.cuda.is_initialized(),
    "compiler": [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules],
}))
"""


def module_name(file):
    """kernels/adaln/op.py -> repa_fast.kernels.adaln.op"""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("repa_fast", *parts)
    return ".".join(parts).removesuffix(".__init__")


def test_every_module_imports_with_nothing_optional():
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert Path(result["file"]).parent == ROOT / "repa_fast"
    assert not result["failed"], "\n".join(result["failed"].values())
    files = [*ROOT.glob("repa_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    expected = {module_name(file) for file in files if file.name != "__main__.py"}
    assert {"repa_fast.ops", "repa_fast.models.sit", "repa_fast.train.loop"} <= expected
    assert set(result["names"]) == expected
    assert not result["leaked"] and not result["cuda_initialized"]
    assert not result["compiler"]  # two seconds of each process
