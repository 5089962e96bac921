"""Whose a moment of a step is: kernels, operators, their ranges and their names."""

import re

import pytest

from benchmarks.harness.environment import ROOT
from benchmarks.step.profile import CATEGORIES, WINDOW, breakdown, category_of

OTHER = "other elementwise"


def event(cat, name, ts, dur, tid=1, correlation=None):
    arguments = {} if correlation is None else {"args": {"correlation": correlation}}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, **arguments}


WHOLE = event("user_annotation", WINDOW, 0, 1000)


def test_kernels_are_those_of_the_range_that_launched_them_else_of_their_names():
    """Of two steps in 1000 us."""
    events = [
        WHOLE,
        event("user_annotation", "encoder", 0, 100),
        event("user_annotation", "Optimizer.step#AdamWEMA.step", 300, 100),
        # the same moment on autograd's thread is not the optimizer's
        event("cuda_runtime", "cudaLaunchKernel", 310, 5, tid=2, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 320, 5, correlation=2),
        event("cuda_driver", "cuLaunchKernelEx", 200, 5, correlation=4),
        event("cuda_runtime", "cudaMemcpyAsync", 210, 5, correlation=5),
        event("cuda_runtime", "cudaStreamSynchronize", 990, 5, correlation=6),
        event("kernel", "nvjet_tst_128x256", 20, 100, tid=7, correlation=1),
        event("kernel", "multi_tensor_apply_kernel", 400, 200, tid=7, correlation=2),
        event("kernel", "nvjet_tst_128x256", 600, 50, tid=7, correlation=3),
        event("kernel", "adaln_backward_kernel", 650, 30, tid=7, correlation=4),
        event("gpu_memcpy", "Memcpy DtoD", 680, 20, tid=7, correlation=5),
        event("kernel", "before the window", -50, 20, tid=7, correlation=9),
    ]
    found = breakdown(events, 2, cuda=True)
    busy = {name: ms for name, ms in found.busy_ms.items() if ms}
    expected = {"encoder": 0.05, "optimizer": 0.1, "GEMM": 0.025, "our kernels": 0.015, OTHER: 0.01}
    assert busy == pytest.approx(expected)
    assert (found.window_ms, found.launches) == (0.5, 2.5)
    parts = found.milliseconds(0.5)
    assert tuple(parts) == CATEGORIES
    assert parts["idle"] == pytest.approx(0.3)
    assert sum(parts.values()) == pytest.approx(0.5)


def test_a_graph_is_one_launch_and_what_overlaps_counts_once():
    events = [
        WHOLE,
        event("cuda_runtime", "cudaGraphLaunch", 0, 5, correlation=1),
        event("kernel", "ampere_bf16_gemm", 100, 300, correlation=1),
        event("kernel", "elementwise_kernel", 200, 300, correlation=1),  # beside it
        event("kernel", "elementwise_kernel", 900, 400, correlation=1),  # past the end
    ]
    found = breakdown(events, 1, cuda=True)
    assert found.launches == 1
    assert found.busy_ms["GEMM"] == pytest.approx(0.3)
    assert found.busy_ms["other elementwise"] == pytest.approx(0.1 + 0.1)
    assert found.milliseconds(1.0)["idle"] == pytest.approx(0.5)
    assert found.milliseconds(0.4)["idle"] == 0  # never shorter than its kernels


def test_on_a_cpu_a_moment_is_the_innermost_operators():
    events = [
        WHOLE,
        event("user_annotation", "encoder", 100, 200),
        event("cpu_op", "aten::linear", 150, 100),
        event("cpu_op", "aten::addmm", 160, 80),
        event("cpu_op", "aten::linear", 400, 100),
        event("cpu_op", "aten::addmm", 410, 60),
        event("cpu_op", "aten::copy_", 420, 20),
        event("cpu_op", "aten::_scaled_dot_product_flash_attention_for_cpu", 600, 50),
        event("cpu_op", "repa_fast::adaln_forward", 700, 50),
        event("cpu_op", "aten::native_layer_norm", 710, 30),
        event("cpu_op", "aten::mul", 800, 10),
        event("user_annotation", "Optimizer.step#AdamW.step", 900, 100),
        event("cpu_op", "aten::addmm", 900, 90),
    ]
    found = breakdown(events, 1, cuda=False)
    assert found.launches is None
    parts = found.milliseconds(found.window_ms)
    expected = {"GEMM": 0.08, "attention": 0.05, "our kernels": 0.02}  # linear and addmm, no copy
    expected |= {OTHER: 0.02 + 0.03 + 0.01, "optimizer": 0.09, "encoder": 0.1, "idle": 1.0 - 0.4}
    assert parts == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, category",
    [
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(Params)", "GEMM"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "GEMM"),
        ("triton_tem_fused_addmm_3", "GEMM"),
        ("aten::convolution_backward", "GEMM"),
        ("aten::mm", "GEMM"),
        ("aten::mul", OTHER),
        ("triton_poi_fused_addmm_gelu_4", OTHER),
        ("triton_red_fused__scaled_dot_product_flash_attention_backward_1", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", OTHER),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k96_sm80", "attention"),
        ("repa_fast::attention_packed", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_32x", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<FlashAttnFwdSm90>>", "attention"),
        ("Memset (Device)", OTHER),
    ],
)
def test_kernels_by_name(name, category):
    assert category_of(name) == category


def test_every_triton_kernel_of_ours_is_known():
    """By the decorated functions that a program is launched of, which end in _kernel."""
    found = []
    for path in (*ROOT.glob("kernels/*/triton_kernels.py"), ROOT / "repa_fast/backend/rows.py"):
        found += re.findall(r"@triton\.jit\w*\ndef (\w+_kernel)\(", path.read_text())
    assert len(found) >= 9
    assert {category_of(name) for name in found} == {"our kernels"}
