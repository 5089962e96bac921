"""Package layout and CUDA extension; the rest of the metadata is in pyproject.toml.

Every kernels/<op> is installed as repa_fast.kernels.<op>. All csrc/<op>/*.cu become one library,
repa_fast/lib/csrc.so, where a CUDA toolkit and torch's headers are at hand:

    python setup.py build_ext --inplace            # in a checkout, with torch installed
    pip install --no-build-isolation .             # isolated builds have no torch, and go without

REPA_FAST_CUDA=0 skips it, REPA_FAST_CUDA=1 insists. REPA_FAST_CUDA_ARCHS="8.0 9.0 10.0+PTX" chooses
the GPUs. The library uses torch's stable ABI: one file serves every torch from 2.11 on.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OPS = sorted(init.parent.name for init in (ROOT / "kernels").glob("*/__init__.py"))
SOURCES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "csrc").glob("*/*.cu"))
TORCH_TARGET = "0x020b000000000000"  # 2.11
ARCHS = os.environ.get("REPA_FAST_CUDA_ARCHS", "8.0 9.0 10.0+PTX")


def folder_of(package):
    """Where a package is installed, without importing it, or None."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


def toolkit():
    """Root of the CUDA toolkit: CUDA_HOME, that of the nvcc on PATH, or pip's; or None."""
    nvidia = folder_of("nvidia")
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        Path(nvcc).resolve().parents[1] if nvcc else None,
        *(sorted(nvidia.glob("cu*"), reverse=True) if nvidia else []),
    ]
    roots = (Path(root) for root in candidates if root)
    return next((root for root in roots if (root / "bin" / "nvcc").is_file()), None)


def why_not_cuda():
    """Why the extension cannot be built, or None."""
    if os.environ.get("REPA_FAST_CUDA") == "0":
        return "REPA_FAST_CUDA=0"
    if folder_of("torch") is None:
        return "torch is not installed here (isolated build? use --no-build-isolation)"
    if toolkit() is None:
        return "no nvcc in CUDA_HOME, on PATH or from the package nvidia-cuda-nvcc"
    return None


def gencode():
    """nvcc's flags for ARCHS; "+PTX" adds code for later GPUs."""
    flags = []
    for arch in ARCHS.split():
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


class BuildCuda(build_ext):
    """Compiles with nvcc alone; the library is loaded by torch, not imported."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"  # no part of Python's ABI in it

    def copy_extensions_to_source(self):
        (ROOT / "repa_fast" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, extension):
        root, torch = toolkit(), folder_of("torch")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [*root.glob("lib64"), root / "lib"][0]
        command = [
            root / "bin" / "nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC",
            "-cudart=static", "--threads=0", *gencode(),
            "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f"-I{torch / 'include'}", f"-I{root / 'include'}",
            f"-L{torch / 'lib'}", f"-L{libraries}", "-ltorch_cpu", "-ltorch_cuda",
            "-o", target, *extension.sources,
        ]  # fmt: skip
        subprocess.run([str(part) for part in command], cwd=ROOT, check=True)
        print(f"repa-fast: {target.name} built by {root / 'bin' / 'nvcc'} for {ARCHS}")


def extensions():
    reason = why_not_cuda()
    if reason is None:
        return [Extension("repa_fast.lib.csrc", SOURCES, py_limited_api=True)]
    if os.environ.get("REPA_FAST_CUDA") == "1":
        sys.exit(f"repa-fast: REPA_FAST_CUDA=1, but {reason}")
    print(f"repa-fast: csrc is not built: {reason}")
    return []


EXTENSIONS = extensions()
setup(
    packages=[
        *find_packages(str(ROOT), include=["repa_fast", "repa_fast.*"]),
        *(f"repa_fast.kernels.{op}" for op in OPS),
    ],
    package_dir={f"repa_fast.kernels.{op}": f"kernels/{op}" for op in OPS},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if EXTENSIONS else {},
)
