"""One subpackage per op.

An installed wheel has them in this folder; in a checkout they stand in ../../kernels, which
joins the path only if setup.py and csrc/ stand beside it, so that a wheel never reaches a
foreign site-packages/kernels.
"""

from pathlib import Path

_ROOT = Path(__file__).parents[2]
if (_ROOT / "setup.py").is_file() and (_ROOT / "csrc").is_dir():
    __path__.append(str(_ROOT / "kernels"))
