"""The CUDA library and its build: what can be known of them without a GPU."""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repa_fast.backend import extension
from repa_fast.kernels.adamw_ema.cuda import CHUNK

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "adamw_ema" / "kernels.cuh"
ARCHS = ("sm_80", "sm_90", "sm_100")
KERNELS = ("adamw_ema_kernel", "advance_kernel", "squares_kernel", "sum_kernel")
ENTRY_BYTES = 64
PARAMETER_BYTES = 32_764
"""What a kernel may take from sm_70 and CUDA 12.1 on."""
NOTHING_TO_BUILD_WITH = "no nvcc in CUDA_HOME, on PATH or from the package nvidia-cuda-nvcc"
NO_TORCH = "torch is not installed here (isolated build? use --no-build-isolation)"


def setup_py(*args, root=ROOT, **environment):
    """A finished process of setup.py under the given environment (None removes a variable)."""
    env = {**os.environ, **environment}
    env = {name: value for name, value in env.items() if value is not None}
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", *args]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)


def output(*command, **options):
    """What a program prints that ends well."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def why_not_built():
    """setup.py's own reason, "" where it would build."""
    process = setup_py("--version", REPA_FAST_CUDA=None)
    assert process.returncode == 0, process.stderr
    return "".join(re.findall(r"csrc is not built: (.*)", process.stdout))


@pytest.fixture(scope="module")
def library():
    """Path of the library; skips where there is nothing to build it with."""
    if not extension.LIBRARY.is_file():
        if reason := why_not_built():
            pytest.skip(f"{extension.LIBRARY.name}: {reason}")
        pytest.fail(f"{extension.LIBRARY} is missing: python setup.py build_ext --inplace")
    return extension.LIBRARY


# Its contents.


@pytest.fixture(scope="module")
def cuobjdump(library):
    """cuobjdump(options...) -> what it prints of the library."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        pytest.skip("Triton, which brings cuobjdump, is not installed")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    return lambda *options: output(str(tool), *options, str(library))


@pytest.fixture(scope="module")
def usage(cuobjdump):
    """{(architecture, kernel): {resource: amount}}."""
    found, arch, kernel = {}, None, None
    for line in cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r" Function (\w+):", line):
            kernel = next(name for name in KERNELS if re.search(rf"\d{name}E", match.group(1)))
        elif "REG:" in line:
            pairs = re.findall(r"(\w+(?:\[\d\])?):(\d+)", line)
            found[arch, kernel] = {name: int(amount) for name, amount in pairs}
    return found


def test_every_architecture_has_every_kernel_and_later_gpus_get_ptx(cuobjdump, usage):
    assert set(usage) == {(arch, kernel) for arch in ARCHS for kernel in KERNELS}
    files = len(list(ROOT.glob("csrc/*/*.cu")))
    assert re.findall(r"\.(sm_\d+)\.ptx", cuobjdump("-lptx")) == ["sm_100"] * files


def test_no_kernel_spills_and_registers_leave_room_for_several_blocks(usage):
    """A multiprocessor has 65,536: 6 blocks of 256 threads with 40 registers each, 5 with 48."""
    for (arch, kernel), used in usage.items():
        assert used["STACK"] == used["LOCAL"] == 0, (arch, kernel)
        threads = 1024 if kernel == "sum_kernel" else 256
        blocks = 65_536 // (threads * -(-used["REG"] // 8) * 8)
        assert blocks >= {"sum_kernel": 1, "adamw_ema_kernel": 5}.get(kernel, 6), (arch, kernel)


def test_tables_of_pointers_fit_into_the_kernel_parameters(usage):
    """CONSTANT[0] is the parameters behind what the driver keeps there."""
    tensors = constant("kTensors")
    assert tensors * ENTRY_BYTES + 128 <= PARAMETER_BYTES
    for (arch, kernel), used in usage.items():
        assert used["CONSTANT[0]"] <= PARAMETER_BYTES, (arch, kernel)
    for arch in ARCHS:
        assert usage[arch, "squares_kernel"]["CONSTANT[0]"] > tensors * ENTRY_BYTES


def constant(name):
    """Value of a constexpr of the source, which may be a product of others."""
    expression = re.search(rf"constexpr \w+ {name} = ([^;]+);", SOURCE.read_text()).group(1)
    factors = (factor.strip() for factor in expression.split("*"))
    return math.prod(int(name) if name.isdecimal() else constant(name) for name in factors)


def test_chunks_are_as_long_in_the_source_as_in_python():
    assert constant("kChunk") == CHUNK
    assert constant("kChunk") % (constant("kThreads") * constant("kVector")) == 0


# Its operators.


@pytest.fixture(scope="module")
def operators(library):
    if reason := extension.why_not():
        pytest.fail(reason)
    return torch.ops.repa_fast


@pytest.mark.usefixtures("heavy")
def test_importing_everything_does_not_load_it_and_it_loads_without_a_gpu(library):
    script = (
        "import torch, repa_fast.ops, repa_fast.train.loop\n"
        "from repa_fast.backend import extension\n"
        "print(str(extension.LIBRARY) in open('/proc/self/maps').read(),\n"
        "      hasattr(torch.ops.repa_fast, 'adamw_ema'), repr(extension.why_not()),\n"
        "      hasattr(torch.ops.repa_fast, 'adamw_ema'), torch.cuda.is_initialized())"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    assert output(sys.executable, "-c", script, env=env).strip() == "False False '' True False"


def test_it_needs_nothing_but_torch_and_the_system(library):
    """No libcudart and no symbol of torch's C++ ABI, so that one file serves every torch."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", output(readelf, "-d", str(library))))
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2"}
    system |= {"libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    assert needed - system <= {"libtorch_cpu.so", "libtorch_cuda.so"}
    undefined = re.findall(r" UND (\S+)", output(readelf, "--dyn-syms", "-W", str(library)))
    assert not [name for name in undefined if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))]


WRITTEN = {
    "adamw_ema": "params exp_avgs exp_avg_sqs steps emas param_copies factors",
    "sum_of_squares": "partials out",
}
READ = {
    "adamw_ema": "grads lr grad_scale skip ema_rate beta1 beta2 eps weight_decay",
    "sum_of_squares": "grads",
}


@pytest.mark.parametrize("op", WRITTEN)
def test_schemas_say_what_is_written(operators, op):
    schema = getattr(operators, op).default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert " ".join(written) == WRITTEN[op]
    names = {*written, *READ[op].split()}
    assert {a.name for a in schema.arguments} == names
    assert not schema.returns and schema.is_mutable
    aliases = re.findall(r"Tensor\??\((\w)!\)", str(schema))
    assert len(set(aliases)) == len(aliases) == len(written)


def test_cpu_tensors_are_refused_by_op_and_argument(operators):
    def tensors(dtype=torch.float32):
        return [torch.zeros((), dtype=dtype) for _ in range(3)]

    lists, scalars = [[zero] for zero in (*tensors(), *tensors())], tensors()
    arguments = [*lists, [], *scalars, None, torch.zeros(2), 0.9, 0.99, 1e-8, 0.0]
    with pytest.raises(RuntimeError, match=r"adamw_ema: params\[0\] is not on a CUDA device"):
        operators.adamw_ema(*arguments)
    with pytest.raises(RuntimeError, match=r"sum_of_squares: out is not on a CUDA device"):
        operators.sum_of_squares(tensors(), *tensors(torch.float64)[:2])
    arguments = [[] if isinstance(a, list) else a for a in arguments]
    arguments[6] = [None]  # no copy
    assert operators.adamw_ema(*arguments) is None  # no tensors are no work
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.adamw_ema.default, tuple(arguments), test_utils=tests)


@pytest.mark.parametrize("newest", ({"added_since": ""}, {"adamw_ema": "added_since"}), ids=str)
def test_a_library_of_older_sources_is_refused(library, monkeypatch, newest):
    """Of which an operator is missing, or takes other arguments."""
    monkeypatch.setattr(extension, "OPERATORS", extension.OPERATORS | newest)
    assert extension.why_not.__wrapped__() == (
        f"{library.name} lacks {next(iter(newest))}: its sources are older, build it again"
    )


# Its build.


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What setup.py reads, so that nothing is built in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("repa_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Thing -> environment of a Python in which it is not to be found."""
    nvcc, torch = (tmp_path_factory.mktemp(name) for name in ("nvcc", "torch"))
    (nvcc / "nvidia").mkdir()
    (nvcc / "nvidia" / "__init__.py").write_text("")
    (torch / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    no_nvcc = {"PATH": "", "CUDA_HOME": None, "PYTHONPATH": str(nvcc)}
    return {"nvcc": no_nvcc, "torch": {"PYTHONPATH": str(torch)}, "nothing": {}}


def built(checkout):
    return [*(checkout / "repa_fast").rglob("*.so")]


@pytest.mark.parametrize(
    "thing, wish, status, said",
    (
        ("nvcc", None, 0, f"csrc is not built: {NOTHING_TO_BUILD_WITH}"),
        ("nvcc", "1", 1, f"REPA_FAST_CUDA=1, but {NOTHING_TO_BUILD_WITH}"),
        ("torch", None, 0, f"csrc is not built: {NO_TORCH}"),
        ("torch", "1", 1, f"REPA_FAST_CUDA=1, but {NO_TORCH}"),
        ("nothing", "0", 0, "csrc is not built: REPA_FAST_CUDA=0"),
    ),
)
def test_what_is_not_built_is_said_in_one_line(checkout, without, thing, wish, status, said):
    build = ("build_ext", "--inplace")
    process = setup_py(*build, root=checkout, REPA_FAST_CUDA=wish, **without[thing])
    line = f"repa-fast: {said}\n"
    out, err = ("", line) if status else (line, "")
    assert (process.returncode, process.stdout, process.stderr) == (status, out, err)
    assert not built(checkout)


def test_nvcc_is_told_the_architectures_that_were_chosen(checkout, tmp_path):
    """A stand-in for nvcc notes its arguments and writes the library."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).write_text(' '.join(sys.argv))\n"
    )
    nvcc.chmod(0o755)
    try:
        environment = {"REPA_FAST_CUDA_ARCHS": "8.6 12.0+PTX", "CUDA_HOME": str(tmp_path)}
        build = ("build_ext", "--inplace")
        process = setup_py(*build, root=checkout, REPA_FAST_CUDA="1", **environment)
        assert process.returncode == 0, process.stderr
        name = extension.LIBRARY.name
        assert process.stdout == f"repa-fast: {name} built by {nvcc} for 8.6 12.0+PTX\n"
        (found,) = built(checkout)
        arguments = found.read_text().split()
        inside = extension.LIBRARY.relative_to(Path(extension.__file__).parents[1])
        assert found == checkout / "repa_fast" / inside
        assert [a for a in arguments if a.startswith("-gencode")] == [
            "-gencode=arch=compute_86,code=sm_86",
            "-gencode=arch=compute_120,code=[sm_120,compute_120]",
        ]
        sources = {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/*/*.cu")}
        assert sources and sources <= set(arguments)
    finally:
        for file in built(checkout):
            file.unlink()
