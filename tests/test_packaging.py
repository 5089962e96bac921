"""What a wheel, an sdist and a checkout offer: kernels/<op> imports as repa_fast.kernels.<op>."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(init.parent.name for init in ROOT.glob("kernels/*/__init__.py"))

pytestmark = pytest.mark.usefixtures("build")


def python(*args, cwd, path=None):
    """Standard output of a Python process; `path` goes in front of sys.path."""
    env = {**os.environ, "REPA_FAST_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    process = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def module_files(cwd, path=None):
    """{module: file} of repa_fast, its bridge and every op, imported in a fresh process."""
    names = ["repa_fast", "repa_fast.kernels", *(f"repa_fast.kernels.{op}" for op in OPS)]
    script = (
        "import importlib, json\n"
        f"files = {{n: importlib.import_module(n).__file__ for n in {names}}}\n"
        "print(json.dumps(files))"
    )
    output = python("-c", script, cwd=cwd, path=path)
    return {name: Path(file) for name, file in json.loads(output.splitlines()[-1]).items()}


def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing behind in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name in ("repa_fast", "kernels", "csrc"):
            shutil.copytree(
                entry, copy / entry.name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        elif entry.is_file():
            shutil.copy(entry, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--no-isolation", "--wheel", "--outdir", out, ".", cwd=checkout)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel installed beside somebody else's `kernels` package."""
    target = tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    python(*pip, "--target", target, wheel, cwd=target)
    foreign = target / "kernels" / "foreign"
    foreign.mkdir(parents=True)
    for folder in (foreign.parent, foreign):
        (folder / "__init__.py").write_text("")
    return target


def test_checkout_imports_uninstalled():
    files = module_files(cwd=ROOT)
    assert files.pop("repa_fast") == ROOT / "repa_fast/__init__.py"
    assert files.pop("repa_fast.kernels") == ROOT / "repa_fast/kernels/__init__.py"
    assert files == {f"repa_fast.kernels.{op}": ROOT / "kernels" / op / "__init__.py" for op in OPS}


def test_wheel_imports_from_elsewhere(site, tmp_path):
    files = module_files(cwd=tmp_path, path=site)
    for name, file in files.items():
        assert file == site.joinpath(*name.split("."), "__init__.py")


def test_bridge_ignores_foreign_kernels(site, tmp_path):
    script = (
        "import importlib.util, repa_fast.kernels as k\n"
        "print(list(k.__path__))\n"
        "print(importlib.util.find_spec('repa_fast.kernels.foreign'))"
    )
    path, spec = python("-c", script, cwd=tmp_path, path=site).splitlines()[-2:]
    assert path == str([str(site / "repa_fast" / "kernels")])
    assert spec == "None"


def test_wheel_has_one_top_level_name(wheel):
    files = wheel_files(wheel)
    assert {name.partition("/")[0] for name in files} == {"repa_fast"}
    with zipfile.ZipFile(wheel) as archive:
        top_level = next(n for n in archive.namelist() if n.endswith("dist-info/top_level.txt"))
        assert archive.read(top_level).split() == [b"repa_fast"]


def test_wheel_has_every_module_and_weight(checkout, wheel):
    sources = [*checkout.glob("repa_fast/**/*.py"), *checkout.glob("kernels/*/*.py")]
    sources += checkout.glob("repa_fast/encoders/weights/*.safetensors")
    expected = {path.relative_to(checkout).as_posix() for path in sources}
    assert wheel_files(wheel) == {
        f"repa_fast/{name}" if name.startswith("kernels/") else name for name in expected
    }


def test_sdist_builds_the_same_wheel(checkout, wheel, tmp_path):
    # Without --wheel or --sdist, build makes the sdist and then the wheel from its contents.
    python("-m", "build", "--no-isolation", "--outdir", tmp_path, ".", cwd=checkout)
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    assert wheel_files(next(tmp_path.glob("*.whl"))) == wheel_files(wheel)


def test_kernels_is_not_ours():
    script = (
        "import importlib.util, json\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(json.dumps(spec and [spec.loader is not None, spec.origin]))"
    )
    spec = json.loads(python("-c", script, cwd=ROOT).splitlines()[-1])
    if spec is None or spec == [False, None]:  # absent, or a namespace over our folder
        return
    assert spec[1] is not None
    assert not Path(spec[1]).is_relative_to(ROOT / "kernels")
