"""Stand-ins for the packages and kernels that attention can run on, with their signatures."""

import torch


def swap(*tensors):
    """(B, N, H, K) and (B, H, N, K), as the packages have them and as the formulas."""
    return tuple(x.transpose(1, 2) for x in tensors)


def forward(q, k, v, scale):
    """out and the log-sum-exp (B, H, N) of a package's stand-in, on (B, N, H, K)."""
    dtype, (q, k, v) = q.dtype, swap(q.float(), k.float(), v.float())
    scores = scale * (q @ k.mT)
    return (scores.softmax(-1) @ v).transpose(1, 2).to(dtype), scores.logsumexp(-1)


def backward(dout, q, k, v, out, lse, scale):
    dtype, (q, k, v, out, dout) = q.dtype, swap(*(x.float() for x in (q, k, v, out, dout)))
    p = (scale * (q @ k.mT) - lse[..., None]).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return tuple(x.to(dtype) for x in swap(ds @ k, ds.mT @ q, p.mT @ dout))


FLASH = """
from tests.kernels.attention_packages import forward

def flash_attn_qkvpacked_func(qkv, *, softmax_scale, deterministic):
    return forward(*qkv.unbind(2), softmax_scale)"""
XFORMERS = """
from tests.kernels.attention_packages import forward

def memory_efficient_attention(q, k, v, *, scale):
    return forward(q, k, v, scale)[0]
"""
# Reads and writes what cuDNN would: from a buffer's first element on, at the declared strides.
CUDNN = """
from types import SimpleNamespace
import torch
from tests.kernels.attention_packages import backward, forward, swap

WRONG = 1.0
WORKSPACE = 96
GRAPHS = []
data_type = SimpleNamespace(BFLOAT16=torch.bfloat16, HALF=torch.float16, FLOAT=torch.float32)
heur_mode = SimpleNamespace(A="A", FALLBACK="B")

class create_handle:
    stream = None

def set_stream(handle, stream):
    handle.stream = stream

class Place:
    def __init__(self, dim=None, stride=None, data_type=None, name=""):
        self.dim, self.stride, self.data_type = dim, stride, data_type

    def set_output(self, real):
        assert real
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self

    def at(self, buffer):
        assert buffer.dtype == self.data_type
        return torch.as_strided(buffer, self.dim, self.stride)

class pygraph:
    def __init__(self, *, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert intermediate_data_type == compute_data_type == torch.float32
        self.tensor = Place
        GRAPHS.append(self)

    def sdpa(self, *, name, q, k, v, attn_scale, generate_stats):
        self.given, self.scale, self.results = (q, k, v), attn_scale, (Place(), Place())
        return self.results

    def sdpa_backward(
        self, *, name, q, k, v, o, dO, stats, attn_scale, use_deterministic_algorithm
    ):
        self.given, self.scale = (dO, q, k, v, o, stats), attn_scale
        self.results = Place(), Place(), Place()
        return self.results

    def build(self, modes):
        assert modes == ["A", "B"]

    def get_workspace_size(self):
        return WORKSPACE

    def execute(self, pack, workspace, *, handle):
        assert workspace.nbytes == WORKSPACE and handle.stream == 7
        *given, last = (place.at(pack[place]) for place in self.given)
        if len(given) == 2:
            out, lse = forward(*swap(*given, last), self.scale)
            found = out.transpose(1, 2), lse[..., None]
        else:
            dq, dk, dv = swap(*backward(*swap(*given), last[..., 0], self.scale))
            found = WRONG * dq, dk, dv
        for place, result in zip(self.results, found, strict=True):
            place.at(pack[place]).copy_(result)
"""
STAND_INS = {
    "cudnn": {"cudnn.py": CUDNN},
    "fa2": {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": FLASH + "[0]"},
    "fa3": {"flash_attn_interface.py": FLASH},  # of before, with the log-sum-exp
    "xformers": {"xformers/ops/__init__.py": XFORMERS},
}
ROOTS = ("cudnn", "flash_attn", "flash_attn_interface", "xformers")


def efficient(q, k, v, bias, cu_q, cu_k, rows, keys, dropout, mask, compute_log_sumexp, *, scale):
    """aten's forward pass, which pads the rows of the log-sum-exp to 32."""
    assert bias is cu_q is cu_k is rows is keys is None and dropout == mask == 0
    assert compute_log_sumexp
    out, lse = forward(q, k, v, scale)
    tokens, seed = q.shape[1], torch.zeros((), dtype=torch.int64)
    padded = torch.nn.functional.pad(lse, (0, -tokens % 32))
    return out.contiguous(), padded, seed, seed.clone(), tokens, tokens


def efficient_backward(dout, q, k, v, bias, out, cu_q, cu_k, rows, keys, lse, *unused, **options):
    """aten's backward pass into a shared storage."""
    assert options.pop("shared_storage_dqdkdv") and rows == keys == q.shape[1] and bias is None
    chunk = q.new_empty((*q.shape[:2], 3, *q.shape[2:]))
    found = backward(dout, q, k, v, out, lse[..., :rows], options["scale"])
    for view, gradient in zip(chunk.unbind(2), found):
        view.copy_(gradient)
    return *(chunk.select(2, i) for i in range(3)), q.new_empty(0)
