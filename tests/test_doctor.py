"""`repa-fast doctor`: what it says is what a run would choose, and nothing private is in it."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from repa_fast import __version__, cli, doctor
from repa_fast.backend import dispatch
from repa_fast.data import dali
from repa_fast.diffusion import samplers
from tests.refusals import refused

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(doctor, "this_device", lambda: CPU)


def plain(lines) -> str:
    return " ".join(" ".join(lines).split())


def test_it_says_everything_in_a_block_of_few_lines(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45 and (lines[0], lines[-1]) == ("```text", "```")
    names = [line[: doctor.INDENT].rstrip() for line in lines[1:-1]]
    expected = "repa-fast Python system torch packages environment CPU disk GPUs kernels attention"
    assert {*expected.split(), "not installed", "optimizer", "decode", "compile"} <= set(names)
    text = plain(lines)
    assert __version__ in text and torch.__version__ in text and "not known," not in text
    for name in doctor.PACKAGES:
        assert re.search(rf"[ ,]{name}[ ,]", text), name


def test_what_it_says_is_chosen_is_what_a_run_would_choose(on_cpu):
    said = plain(doctor.kernels())
    assert said.startswith(f"kernels {dispatch.describe('cpu')}")
    said = plain(doctor.attention())
    assert said.startswith("attention sdpa, auto: on cpu torch chooses the kernel")
    assert "cudnn, fa2, fa3, xformers: it runs on cuda, got tensors on cpu" in said
    assert "sdpa-flash, math, reference: can be asked for" in said
    assert plain(doctor.optimizer()) == "optimizer torch, since the tensors are on cpu"
    said = plain(doctor.decode())
    assert said.startswith("decode torch, since the run is on cpu, expected cuda dali-cpu: ")
    assert "dali-gpu" not in said  # why not is said already
    against = dali.why_not(gpu=False)
    assert said.endswith(doctor.one_line(against) if against else "can be asked for")
    assert "the device is cpu, expected cuda" in plain(doctor.cuda_graph())


def test_what_is_asked_for_in_the_environment_counts(on_cpu, monkeypatch):
    monkeypatch.setenv("REPA_FAST_KERNELS", "reference")
    assert plain(doctor.kernels()).startswith("kernels reference, asked for")
    monkeypatch.setenv("REPA_FAST_KERNELS", "cuda")
    assert plain(doctor.told(doctor.kernels)).startswith(
        "kernels not known, ValueError: REPA_FAST_KERNELS is 'cuda', expected one of auto"
    )


def test_missing_packages_are_said_with_what_to_install(on_cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install 'repa-fast[eval]'" in plain(doctor.adaptive())
    assert plain(doctor.adaptive()).endswith(f"dopri5 {samplers.why_not_adaptive()}")
    said = plain(doctor.evaluation())
    assert "pip install 'repa-fast[eval]'" in said and "fitted, digits-judge: can run" in said


def test_without_a_compiler_nothing_is_compiled_on_a_cpu(on_cpu, monkeypatch):
    from torch._inductor.cpp_builder import cpp_compiler_search

    said = []
    for path in (os.environ["PATH"], ""):
        monkeypatch.setenv("PATH", path)
        cpp_compiler_search.cache_clear()
        said.append(plain(doctor.compiler()))
    cpp_compiler_search.cache_clear()
    found = shutil.which(os.environ.get("CXX", "g++"), path=os.defpath)
    assert said[0].startswith("compile can run, with " if found else "compile cannot run")
    assert said[1].startswith("compile cannot run: No working C++ compiler found")


def test_gpus_are_listed(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    lines = list(doctor.gpus())
    assert lines[0].startswith("GPUs            0: NVIDIA H100, 80 GiB, compute capability 9.0, ")
    assert lines[1].split()[0] == "1:"


@pytest.mark.gpu
def test_on_a_gpu_the_card_and_the_attention_that_was_timed_are_there():
    assert torch.cuda.get_device_name() in plain(doctor.gpus())
    assert "ms forward and backward at (32, 16, 256, 72)" in plain(doctor.attention())
    assert plain(doctor.cuda_graph()) == "cuda_graph on, in one process"


HIDDEN = {
    "HF_TOKEN": "hf_sesame",
    "WANDB_API_KEY": "wandb-sesame",
    "AWS_SECRET_ACCESS_KEY": "aws-sesame",
    "NCCL_AUTH_TOKEN": "nccl-sesame",
    "PASSWORD": "sesame",
}


def test_nothing_private_is_in_it_and_without_torch_it_still_says_the_rest(tmp_path):
    home = tmp_path / "homes" / "jane.doe"
    home.mkdir(parents=True)
    script = (
        "import sys; sys.modules['torch'] = None; from repa_fast import cli; cli.main(['doctor'])"
    )
    given = {
        **os.environ,
        **HIDDEN,
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "USER": "jane.doe",
        "TORCH_HOME": f"{home}/torch",
        "REPA_FAST_RESULTS": "/scratch/jane.doe/results",
        "NCCL_HOSTID": socket.gethostname(),
        "TORCH_MIRROR": "https://jane:open@example.org/torch",
    }
    done = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    for word in ("sesame", "jane", "open@", str(tmp_path), socket.gethostname()):
        assert not re.search(rf"(?<![\w-]){re.escape(word)}", done.stdout), word
    said = plain([done.stdout])
    assert "NCCL_AUTH_TOKEN=(hidden), NCCL_HOSTID=HOST, " in said and "HF_TOKEN" not in said
    assert "REPA_FAST_RESULTS=/scratch/USER/results, TORCH_HOME=~/torch" in said
    assert "TORCH_MIRROR=(hidden)" in said
    assert f"repa-fast {__version__}" in said and "cores" in said and "GiB free" in said
    assert "torch_versions not known, ModuleNotFoundError: import of torch halted" in said


def test_a_part_that_raises_is_a_line_and_what_else_is_asked_is_refused(capsys):
    def broken():
        yield "one"
        raise OSError(5, "Input/output error")

    assert doctor.told(broken) == [
        doctor.row("broken", "not known, OSError: [Errno 5] Input/output error")
    ]
    refused(lambda: doctor.doctor(["--json"]), "doctor takes no words, got --json")
    assert "usage: repa-fast doctor" in doctor.doctor(["--help"])


def test_an_installed_package_does_not_take_another_repositorys_commit(monkeypatch, tmp_path):
    monkeypatch.delenv("REPA_FAST_COMMIT", raising=False)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert doctor.commit() == "unknown"
    monkeypatch.setenv("REPA_FAST_COMMIT", "abc1234")
    assert doctor.commit() == "abc1234"
