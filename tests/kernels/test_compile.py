"""Every kernel compiled for GPUs that are not here: registers, spills, accesses."""

import re

import pytest

triton = pytest.importorskip("triton")

from benchmarks.kernels import resources as page  # noqa: E402
from benchmarks.kernels.resources import launches, resources, sampler_launches  # noqa: E402
from benchmarks.kernels.tune import KERNELS  # noqa: E402
from repa_fast.backend import launch as launch_module  # noqa: E402
from tests.kernels import checks  # noqa: E402
from tests.kernels.table import BF16, F32, F64, INTERPRETED  # noqa: E402

VERSION = ".".join(triton.__version__.split(".")[:2])
NAMES = tuple(name for name, _ in launches(8, F32, F32))
SAMPLERS = tuple(name for name, _ in sampler_launches(F32, F32))

# Blocks per SM at 1,152 columns and any dtype on sm_90, by Triton's major and minor version.
LATER = {
    "adaln forward": 6, "adaln backward": 3, "align_loss forward": 6, "align_loss backward": 6,
    "gate_residual forward": 6, "gate_residual backward": 4, "gate_residual_adaln forward": 4,
    "gate_residual_adaln backward": 2, "sum of chunks": 16,
}  # fmt: skip
BLOCKS = {"3.6": LATER | {"adaln forward": 7, "adaln backward": 2}, "3.9": LATER}
# cos of libdevice, which Triton 3.6 calls, has a table for huge arguments in local memory.
COSINE_TABLE = 32
# What Triton 3.6 spills of one kernel at one width, with any tile of two warps and three stages, on
# a GPU that nothing here has run on; later versions spill nothing.
SPILLED = {("3.6", "gate_residual_adaln forward", 100, 768): 8}


def name_of(value):
    return str(value).removeprefix("torch.")


def grid(test):
    """Every kernel, at every width and pair of dtypes."""
    for axis in (("name", NAMES), ("width", page.WIDTHS), ("stream, dtype", page.DTYPES)):
        test = pytest.mark.parametrize(*axis, ids=name_of)(test)
    return test


def check(name, capability, width, stream, dtype):
    launch = dict(launches(width, stream, dtype))[name]
    used = resources(launch, capability)
    assert used.spilled <= SPILLED.get((VERSION, name, capability, width), 0)
    rows = [t for t in launch.arguments.values() if getattr(t, "shape", ())[1:] == (256, width)]
    if rows:
        assert used.wide >= len(rows) and (used.asynchronous or "sum" in name)
        assert used.narrow <= 12  # numbers per row, not columns
    return used


@grid
def test_hopper(name, width, stream, dtype):
    used = check(name, 90, width, stream, dtype)
    if VERSION in BLOCKS:
        assert used.blocks >= BLOCKS[VERSION][name]


@grid
@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("capability", (80, 100))
def test_ampere_and_blackwell(name, capability, width, stream, dtype):
    check(name, capability, width, stream, dtype)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("state", (F32, F64), ids=name_of)
@pytest.mark.parametrize("capability", page.CAPABILITIES)
def test_sampler(name, state, capability):
    used = resources(dict(sampler_launches(state, BF16))[name], capability)
    assert used.spilled <= (COSINE_TABLE if "drawn" in name else 0)
    assert used.blocks >= 7 and used.wide >= 7


@pytest.mark.parametrize("name", NAMES)
def test_a_float_that_torch_compile_hands_over_as_fp64_takes_no_row_with_it(name, monkeypatch):
    usual = launch_module._type

    def as_inductor(parameter, value):
        return "fp64" if isinstance(value, float) else usual(parameter, value)

    launch = dict(launches(1152, F32, BF16))[name]
    plain = launch.compile(90).asm["ttir"]
    monkeypatch.setattr(launch_module, "_type", as_inductor)
    handed = launch.compile(90).asm["ttir"]
    assert "xf64" not in handed and "f64" not in plain
    assert ("f64" in handed) == any(isinstance(v, float) for v in launch.arguments.values())


def test_a_width_that_is_no_multiple_of_16_is_seen_as_narrow():
    launch = dict(launches(1151, F32, BF16))["adaln forward"]
    used = resources(launch, 90)
    assert used.asynchronous == 0 and used.wide == 0


HEAVY = pytest.param(page.CAPABILITIES, marks=pytest.mark.heavy)


@pytest.mark.parametrize("capabilities", ((90,), HEAVY))
def test_the_table_of_the_documentation_is_this_one(monkeypatch, capabilities):
    written = page.PAGE.read_text().split(page.BEGIN)[1].split(page.END)[0]
    if triton.__version__ not in written:
        pytest.skip(f"the table is of another version than Triton {triton.__version__}")
    for other in set(page.CAPABILITIES) - set(capabilities):
        written = re.sub(rf"\|[^|]*\|[^|]*\| {other} \|.*\n", "", written)
    monkeypatch.setattr(page, "CAPABILITIES", capabilities)
    assert written.strip() == page.table()


@INTERPRETED
@pytest.mark.parametrize("kernel", KERNELS)
def test_launch_parameters_of_every_kernel_can_be_swept(interpreter, kernel):
    assert interpreter(checks.swept, kernel) == [("ok", ""), ("ok", "")]
