"""The command line: the table of commands, configs as commands, the flags of a training run."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from repa_fast import __main__ as program
from repa_fast import __version__, cli, command
from repa_fast.configs import presets
from repa_fast.configs.config import PARTS, TrainConfig
from repa_fast.configs.flags import grouped, parse_config
from repa_fast.distributed import rank_and_size
from repa_fast.failure import Failure
from tests.refusals import refused

pytest.importorskip("tyro")


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit status, and everything printed in one line without the frames around messages."""
    try:
        status = cli.main(argv)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─|+]", " ", captured.out + captured.err)
    return status, " ".join(text.split())


# The table of commands


@pytest.mark.parametrize("argv, status", [([], 2), (["-h"], 0), (["--help"], 0)])
def test_the_commands_are_listed_with_a_line_each(capsys, argv, status):
    assert cli.main(argv) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(cli.COMMANDS)
    for line, (name, entry) in zip(lines[1:], cli.COMMANDS.items(), strict=True):
        assert line.split() == [*name.split(), *entry.summary.split()] and len(line) <= 100


def test_a_group_has_help_the_version_is_the_packages_and_the_package_is_a_program(
    capsys, monkeypatch
):
    status, text = run(capsys, "prepare", "--help")
    assert status == 0
    assert "prepare images" in text and "prepare digits" in text and "probe" not in text
    assert run(capsys, "--version") == (0, __version__)
    assert program.main is cli.main
    monkeypatch.setattr("sys.argv", ["repa-fast", "--version"])
    assert cli.main() == 0 and capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["fly"], "the command is 'fly', expected one of train, presets, prepare"),
        (["trian", "--help"], "the command is 'trian', expected one of train.* 'train'"),
        (["prepare", "imags"], "prepare: the command is 'imags', .* images, features.* 'images'"),
        (["prepare", "cifar"], "prepare: the command is 'cifar', expected one of .*digits"),
        (["prepare"], "prepare: the command is '', expected one of images"),
    ],
)
def test_a_mistyped_command_is_named_with_the_nearest(capsys, argv, said):
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert re.match(f"repa-fast: {said}", told) and told.count("\n") == 1


class Lost(Failure):
    """A failure of a kind of its own."""


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ValueError("two is 3, expected 2"), 2, "two is 3, expected 2"),
        (Lost("the store is gone"), 1, "the store is gone"),
        (ValueError("\x1b[31mred\nline\x07"), 2, r"\\x1b\[31mred line\\x07"),
        (OSError(28, "No space left on device", "x.txt"), 1, r"\[Errno 28\] No space.*'x\.txt'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_is_expected_to_fail_ends_in_one_line_and_a_traceback_with_debug(
    capsys, error, status, said
):
    def fails(words):
        assert words == ["--size", "3"]
        raise error

    assert command.main(fails, ["--size", "3"]) == status
    told = capsys.readouterr()
    assert told.out == "" and re.fullmatch(f"repa-fast: {said}\n", told.err)
    if status < 3:
        with pytest.raises(type(error)):
            command.main(fails, ["--size", "--debug", "3"])


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        command.main(lambda words: {}[1], [])


PRINTS = """
import sys
from repa_fast import command
sys.exit(command.main(lambda words: "a line\\n" * int(words[0]), sys.argv[1:]))
"""


@pytest.mark.parametrize("lines, status", [("1", 1), ("100000", 1)])
def test_what_a_full_disk_takes_nothing_of_is_said(lines, status):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, lines], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == status
    assert done.stderr == "repa-fast: [Errno 28] No space left on device\n"


def test_a_reader_that_has_seen_enough_ends_it_in_silence():
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(PRINTS)} 100000 | head -1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a line\n", "")


def test_letters_that_the_locale_lacks_are_printed_escaped():
    script = "import sys; from repa_fast import command; command.main(lambda w: w[0], ['\\u03c0'])"
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=ascii_alone)
    assert (done.returncode, done.stdout) == (0, b"\\u03c0\n"), done.stderr


def test_only_the_first_process_prints(capsys, monkeypatch):
    for rank, printed in (("0", "done\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert command.main(lambda words: "done", []) == 0
        assert capsys.readouterr() == (printed, "")


def test_prepare_writes_the_digits_once(capsys, tmp_path):
    pytest.importorskip("lance")
    out = tmp_path / "digits"
    for expected, words in ((0, str(out)), (2, "exists already")):
        status, text = run(capsys, "prepare", "digits", "--out", str(out))
        assert status == expected and words in text
    assert sorted(path.name for path in out.iterdir()) == ["train.lance", "val.lance"]


# Configs as commands


@dataclass(kw_only=True)
class Base:
    size: int = 3
    """How many."""


@dataclass(kw_only=True)
class Config(Base):
    """A config."""

    path: str = field(metadata={"positional": True})
    """Where it
    is."""
    kind: Literal["a", "b"] = "a"
    """Which one
    it is, in a sentence that goes on and on, line after line, without an end in sight, really."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}, expected at least 1")


def test_a_config_is_parsed_and_checks_itself_and_has_sentences_of_one_line_its_bases_too():
    assert command.parse(Config, ["here", "--size", "5"], "x") == Config(path="here", size=5)
    words = "size is 0, expected at least 1"
    refused(lambda: command.parse(Config, ["here", "--size", "0"], "x"), words)
    found = command.sentences(Config)
    assert found["size"] == "How many." and found["path"] == "Where it is."
    assert "\n" not in found["kind"]


def test_every_flag_of_every_command_has_a_sentence():
    configs = [TrainConfig]
    for name in cli.COMMANDS:
        call, config = cli.load(name)
        assert callable(call)
        configs += [config] if config else []
    assert len(configs) > 12
    for config in configs:
        texts = command.sentences(config)
        assert all(texts.get(f.name) for f in dataclasses.fields(config)), (config, texts)


def test_the_parts_are_all_of_a_training_config():
    preset, config, *groups = dataclasses.fields(grouped(TrainConfig()))
    assert (preset.name, config.name) == ("preset", "config")
    groups = {field.name: field for field in groups}
    assert list(groups) == list(PARTS)
    flat = [f.name for group in groups.values() for f in dataclasses.fields(group.default_factory)]
    assert sorted(flat) == sorted(f.name for f in dataclasses.fields(TrainConfig))
    assert len(flat) == len(set(flat))


# Flags of a training run

OFFICIAL = {
    "output_dir": ("exps", "out"),
    "logging_dir": ("logs", "events"),
    "sampling_steps": (10_000, 77),
    "resume_step": (0, 300),
    "model": (None, "SiT-B/2"),
    "num_classes": (None, 12),
    "encoder_depth": (8, 4),
    "fused_attn": (True, False, True),
    "qk_norm": (False, True, False),
    "data_dir": ("../data/imagenet256", "somewhere"),
    "resolution": (None, 512),
    "batch_size": (256, 64),
    "allow_tf32": (False, True),
    "mixed_precision": (None, "no", "fp16", "bf16"),
    "epochs": (1400, 80),
    "max_train_steps": (400_000, 1000),
    "checkpointing_steps": (50_000, 250),
    "gradient_accumulation_steps": (1, 2),
    "learning_rate": (1e-4, 3e-4),
    "adam_beta1": (0.9, 0.8),
    "adam_beta2": (0.999, 0.95),
    "adam_weight_decay": (0.0, 0.01),
    "adam_epsilon": (1e-8, 1e-6),
    "max_grad_norm": (1.0, 0.5),
    "seed": (0, 3),
    "num_workers": (4, 9),
    "path_type": ("linear", "cosine", "linear"),
    "prediction": ("v", "v"),
    "cfg_prob": (0.1, 0.2),
    "enc_type": ("dinov2-vit-b", "dinov2-vit-l", "dinov2-vit-b,dinov2reg-vit-b"),
    "proj_coeff": (0.5, 1.0),
    "weighting": ("uniform", "lognormal"),
}
"""Names as in REPA's train.py: its default (None where ours is another), values that it takes."""
README_FLAGS = """
--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v
--weighting=uniform --model=SiT-XL/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8
--output-dir=exps --exp-name=linear-dinov2-b-enc8 --data-dir=/data --resolution=512
"""


def test_defaults_are_the_official_ones():
    config = TrainConfig()
    official = {name: default for name, (default, *_) in OFFICIAL.items() if default is not None}
    assert {name: getattr(config, name) for name in official} == official
    assert config.ema_decay == "0.9999" and config.ema_decays == (0.9999,)


@pytest.mark.parametrize("number", range(3))
def test_official_flags_parse_and_nothing_else_changes(number):
    """The first, second and third value of each flag; of one that has fewer, the last."""
    values = {name: given[min(number, len(given) - 1)] for name, (_, *given) in OFFICIAL.items()}
    argv = ["--exp-name", "x"]
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            argv += [f"--{flag}", str(value)]
    assert parse_config(argv) == TrainConfig(exp_name="x", **values)


def test_the_command_of_the_official_readme_parses_and_no_flags_are_the_defaults():
    assert parse_config(["--exp-name", "x"]) == TrainConfig(exp_name="x")
    config = parse_config(README_FLAGS.split())
    assert config.exp_name == "linear-dinov2-b-enc8" and config.mixed_precision == "fp16"
    assert config.allow_tf32 and config.data_dir == "/data" and config.resolution == 512


@pytest.mark.parametrize("first", (True, False))
def test_flags_win_over_the_preset_wherever_it_stands_and_leave_it_as_it_was(first):
    preset, before = ["--preset=digits"], presets.get("digits")
    flags = ["--seed=5", "--batch-size", "24", "--hidden-size", "64"]
    expected = dataclasses.replace(before, seed=5, batch_size=24, hidden_size=64)
    assert parse_config(preset + flags if first else flags + preset) == expected != before
    assert parse_config(preset) == before


def test_flags_may_stand_in_any_order_whatever_their_part():
    """The official ones of SRA among them."""
    argv = "--cfg-scale 2 --block-out-s 8 --batch-size 8 --exp-name x --t-max 0.2 --qk-norm "
    argv += "--learning-rate 1e-3 --align sra --block-out-t 20 --loss-type sml1"
    given = {"cfg_scale": 2, "batch_size": 8, "qk_norm": True, "learning_rate": 1e-3}
    given |= {"block_out_s": 8, "block_out_t": 20, "t_max": 0.2, "loss_type": "sml1"}
    assert parse_config(argv.split()) == TrainConfig(exp_name="x", align="sra", **given)


def test_encoders_follow_from_the_alignment_and_are_refused_beside_sra():
    assert TrainConfig(align="sra").enc_type == "none"
    assert parse_config(["--preset", "digits", "--align", "sra"]).enc_type == "none"
    for preset in ([], ["--preset", "digits"]):
        argv = [*preset, "--align", "sra", "--exp-name", "x", "--enc-type", "mae-vit-l"]
        words = "enc_type is 'mae-vit-l' with align sra, expected"
        refused(lambda argv=argv: parse_config(argv), words)


@pytest.mark.parametrize(
    "argv, got, expected",
    [
        ("--preset sit-xxl", "'sit-xxl'", "sit-xl2-repa"),
        ("--exp-name x --enc-type dinov2-vit-b,dino9", "'dino9'", "dinov2-vit-b"),
        ("--exp-name x --path-type warp", "'warp'", "linear, cosine"),
        ("--exp-name x --model SiT-Q/2", "'SiT-Q/2'", "SiT-XL/2"),
        ("--exp-name x --mixed-precision fp8", "'fp8'", "'bf16'"),
        ("--exp-name x --batch-size 0", "batch_size is 0", "at least 1"),
        ("--exp-name x --batch-sizes 3", "--batch-sizes", ""),
        ("--preset digits --resolution 256", "resolution is 256", "expected 16"),
        ("--preset digits --num-classes 9", "num_classes is 9", "at least 10"),
        ("--preset sit-b2-repa --encoder-depth 13", "encoder_depth is 13", "1..12"),
        ("--preset sit-b2-repa --model SiT-B/4", "256 tokens", "expected 64"),
        ("--preset sit-b2-repa --resolution 128", "resolution is 128", "256, 512"),
        ("", "exp_name is empty", "--exp-name"),
    ],
)
def test_a_wrong_value_ends_in_a_message_with_expected_and_got(capsys, argv, got, expected):
    status, text = run(capsys, "train", *argv.split(), "--dry-run")
    assert status == 2 and got in text
    assert "expected" in text.lower() or not expected
    assert expected in text.lower() or expected in text
    assert "Traceback" not in text


def test_help_is_grouped_and_has_every_flag_with_its_whole_sentence(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert re.findall(r"^\W*([a-z]+) options\W*$", text, re.M) == list(PARTS)
    assert text.index("--preset") < text.index("run options")
    plain = " ".join(re.sub(r"[│╭╮╰╯─|+]", " ", text).split())
    for name, sentence in command.sentences(TrainConfig).items():
        assert re.search(rf"--{name.replace('_', '-')}(?![\w-])", plain), name
        assert sentence in plain, name
    assert all(name in plain for name in presets.PRESETS)


def test_a_dry_run_prints_the_size_and_cost_of_xl(capsys):
    flags = ("--preset", "sit-xl2-repa", "--data-dir", "absent", "--dry-run")
    status, text = run(capsys, "train", *flags)
    assert status == 0 and "675 M" in text and "683 M" in text and "770.5 GFLOP" in text


def test_a_dry_run_prints_the_resolved_config_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--preset", "digits", "--batch-size", "24", "--dry-run"]) == 0
    printed, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    changed = {"batch_size": 24, "dry_run": True, "resolution": 16, "num_classes": 10}
    expected = dataclasses.replace(presets.get("digits"), **changed)
    assert TrainConfig(**printed) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given, spins",
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_idle_threads_sleep_soon_unless_the_user_says_how_they_wait(monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams_are_in_nobodys_place(tmp_path, closed):
    """The next file that is opened would get the number of one, and what is printed."""
    script = "import sys, os; from repa_fast import command\n"
    script += "def f(words):\n    print('x'); print('y', file=sys.stderr)\n"
    script += f"    open({str(tmp_path / 'mine')!r}, 'w').write(str(os.open('.', 0)))\n"
    script += "sys.exit(command.main(f, []))"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {closed}"
    assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == 0
    assert int((tmp_path / "mine").read_text()) > 2


@pytest.mark.parametrize(
    "rank, size, words",
    [
        ("abc", "2", "RANK is 'abc'"),
        ("-1", "2", "RANK is '-1'"),
        ("0", "two", "WORLD_SIZE is 'two'"),
        ("5", "1", "RANK is 5 .*, expected less than 1"),
        ("0", "0", "RANK is 0 .*, expected less than 0"),
    ],
)
def test_numbers_of_processes_that_are_none_are_named(monkeypatch, rank, size, words):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    refused(rank_and_size, words)
