"""Package layout: every kernels/<op> is installed as repa_fast.kernels.<op>.

CUDA extensions from csrc/<op> are to be declared here when a CUDA toolkit is present and
REPA_FAST_CUDA is not 0; csrc holds no op yet. The rest of the metadata is in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
OPS = sorted(init.parent.name for init in (ROOT / "kernels").glob("*/__init__.py"))

setup(
    packages=[
        *find_packages(str(ROOT), include=["repa_fast", "repa_fast.*"]),
        *(f"repa_fast.kernels.{op}" for op in OPS),
    ],
    package_dir={f"repa_fast.kernels.{op}": f"kernels/{op}" for op in OPS},
)
