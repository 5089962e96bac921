"""What a wheel, an sdist and a checkout offer: kernels/<op> imports as repa_fast.kernels.<op>."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from repa_fast import __version__

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(init.parent.name for init in ROOT.glob("kernels/*/__init__.py"))
NAMES = ["repa_fast", "repa_fast.kernels", *(f"repa_fast.kernels.{op}" for op in OPS)]
FILES = f"""
import importlib, json, sys
from importlib.util import find_spec
imports = "--import" in sys.argv
files = {{
    name: importlib.import_module(name).__file__ if imports else find_spec(name).origin
    for name in {NAMES}
}}
path = list(importlib.import_module("repa_fast.kernels").__path__)
kernels, foreign = find_spec("kernels"), find_spec("repa_fast.kernels.foreign")
found = kernels and [kernels.loader is not None, kernels.origin]
print(json.dumps([files, path, found, foreign is None]))
"""


def python(*args, cwd, path=None, program=sys.executable):
    """Standard output of a process of Python or `program`; `path` goes in front of sys.path."""
    env = {**os.environ, "REPA_FAST_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    process = subprocess.run(
        [program, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing behind in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for entry in ROOT.iterdir():
        if entry.name in ("repa_fast", "kernels", "csrc"):
            shutil.copytree(entry, copy / entry.name, ignore=unwanted)
        elif entry.is_file():
            shutil.copy(entry, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--no-isolation", "--wheel", "--outdir", out, ".", cwd=checkout)
    return next(out.glob("*.whl"))


def test_a_checkout_is_found_uninstalled_and_its_kernels_folder_is_no_package():
    """That all of it can be imported, tests/test_imports.py knows."""
    files, _, kernels, _ = json.loads(python("-c", FILES, cwd=ROOT).splitlines()[-1])
    assert files.pop("repa_fast") == str(ROOT / "repa_fast/__init__.py")
    assert files.pop("repa_fast.kernels") == str(ROOT / "repa_fast/kernels/__init__.py")
    own = {f"repa_fast.kernels.{op}": str(ROOT / "kernels" / op / "__init__.py") for op in OPS}
    assert files == own
    if kernels not in (None, [False, None]):  # absent, or a namespace over our folder
        assert not Path(kernels[1]).is_relative_to(ROOT / "kernels")


@pytest.mark.usefixtures("build")
def test_a_wheel_has_every_module_and_weight_under_one_name(checkout, wheel):
    sources = [*checkout.glob("repa_fast/**/*.py"), *checkout.glob("kernels/*/*.py")]
    sources += [*checkout.glob("repa_fast/encoders/weights/*.safetensors")]
    sources += [checkout / "repa_fast/py.typed"]
    expected = {path.relative_to(checkout).as_posix() for path in sources}
    assert wheel_files(wheel) == {
        f"repa_fast/{name}" if name.startswith("kernels/") else name for name in expected
    }
    with zipfile.ZipFile(wheel) as archive:
        top_level = next(n for n in archive.namelist() if n.endswith("dist-info/top_level.txt"))
        assert archive.read(top_level).split() == [b"repa_fast"]
        scripts = archive.read(top_level.replace("top_level", "entry_points")).decode()
        assert scripts.splitlines() == ["[console_scripts]", "repa-fast = repa_fast.cli:main"]
        told = archive.read(top_level.replace("top_level.txt", "METADATA")).decode()
    assert f"\nVersion: {__version__}\n" in told and "\nLicense-Expression: MIT\n" in told


@pytest.fixture
def installed(wheel, tmp_path):
    """A function that runs `repa-fast` of a clean environment, in an empty folder.

    Dependencies come from the environment of the tests, whose site-packages are searched last and
    whose .pth files, an editable install's among them, are not read.
    """
    home, folder = tmp_path / "venv", tmp_path / "elsewhere"
    venv.create(home, with_pip=False, symlinks=True)
    folder.mkdir()
    pip = ["-m", "pip", "--python", home / "bin/python", "install", "--quiet"]
    python(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = home.glob("lib/python*/site-packages")
    here = sysconfig.get_paths()
    (site / "dependencies.pth").write_text(f"{here['purelib']}\n{here['platlib']}\n")

    def run(*words):
        return python(*words, cwd=folder, program=home / "bin/repa-fast")

    ask = ["-c", "import repa_fast; print(repa_fast.__file__)"]
    file = python(*ask, cwd=folder, program=home / "bin/python").strip()
    assert Path(file) == site / "repa_fast/__init__.py"
    return run


@pytest.mark.usefixtures("build", "heavy")
def test_an_installed_wheel_tells_of_itself_trains_and_samples(installed, tmp_path):
    for package in ("tyro", "lance"):
        pytest.importorskip(package)
    assert installed("--version") == f"{__version__}\n"
    said = installed("doctor")
    assert f"repa-fast       {__version__}\n" in said  # and no commit
    assert "not known" not in said
    flags = "--max-train-steps 2 --batch-size 8 --hidden-size 32 --num-heads 2 --exp-name one"
    installed("train", "--preset", "digits", *flags.split(), "--output-dir", "runs")
    run = tmp_path / "elsewhere/runs/one"
    assert (run / "checkpoints/0000002/COMPLETE").is_file()
    installed("sample", "--ckpt", run, "--num-steps", "2", "--count", "1", "--out", "one.png")
    assert (tmp_path / "elsewhere/one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("build", "heavy")
def test_a_wheel_imports_from_elsewhere_beside_somebody_elses_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    python(*pip, "--target", site, wheel, cwd=tmp_path)
    foreign = site / "kernels" / "foreign"
    foreign.mkdir(parents=True)
    for folder in (foreign.parent, foreign):
        (folder / "__init__.py").write_text("")
    output = python("-c", FILES, "--import", cwd=tmp_path, path=site)
    files, path, kernels, no_foreign = json.loads(output.splitlines()[-1])
    for name, file in files.items():
        assert Path(file) == site.joinpath(*name.split("."), "__init__.py")
    assert path == [str(site / "repa_fast" / "kernels")]
    assert no_foreign and kernels[1] == str(site / "kernels" / "__init__.py")


@pytest.mark.usefixtures("build", "heavy")
def test_an_sdist_builds_the_same_wheel(checkout, wheel, tmp_path):
    # Without --wheel or --sdist, build makes the sdist and then the wheel from its contents.
    python("-m", "build", "--no-isolation", "--outdir", tmp_path, ".", cwd=checkout)
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    assert wheel_files(next(tmp_path.glob("*.whl"))) == wheel_files(wheel)
