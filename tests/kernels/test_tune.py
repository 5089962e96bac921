import pytest

pytest.importorskip("triton")

from benchmarks.kernels.tune import KERNELS
from tests.kernels import checks


@pytest.mark.parametrize("kernel", KERNELS)
def test_launch_parameters_of_every_kernel_can_be_swept(interpreter, kernel):
    assert interpreter(checks.swept, kernel) == [("ok", ""), ("ok", "")]
