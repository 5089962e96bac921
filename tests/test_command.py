"""Configs as commands: sentences, defaults, groups; the table of commands."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from repa_fast import __version__, cli, command, objective
from repa_fast.configs import presets
from repa_fast.configs.config import PARTS, TrainConfig
from repa_fast.configs.flags import grouped, parse_config

pytest.importorskip("tyro")


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


def test_a_config_is_parsed_and_checks_itself():
    assert command.parse(Config, ["here", "--size", "5"], "x") == Config(path="here", size=5)
    with pytest.raises(ValueError, match="size is 0, expected at least 1"):
        command.parse(Config, ["here", "--size", "0"], "x")


def test_sentences_are_one_line_and_those_of_bases_are_there():
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
        missing = [f.name for f in dataclasses.fields(config) if not texts.get(f.name)]
        assert not missing, (config, missing)


@pytest.mark.parametrize(
    "error, status, text",
    [(None, 0, "done"), (ValueError("two is 3, expected 2"), 2, "repa-fast: two is 3, expected 2")],
)
def test_a_value_error_is_one_line_and_status_2(capsys, error, status, text):
    def call():
        if error is not None:
            raise error
        return "done"

    assert command.main(call) == status
    captured = capsys.readouterr()
    assert (captured.out or captured.err) == f"{text}\n"


def test_only_the_first_process_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(lambda: "done") == 0
    assert capsys.readouterr().out == ""


def test_the_parts_are_all_of_a_training_config():
    groups = {f.name: f for f in dataclasses.fields(grouped(None)) if f.name != "preset"}
    assert list(groups) == list(PARTS)
    flat = [f.name for group in groups.values() for f in dataclasses.fields(group.default_factory)]
    assert sorted(flat) == sorted(f.name for f in dataclasses.fields(TrainConfig))
    assert len(flat) == len(set(flat))


def test_parsing_no_flags_gives_the_defaults_and_a_preset_its_own():
    assert parse_config(["--exp-name", "x"]) == TrainConfig(exp_name="x")
    assert parse_config(["--preset", "digits-sra"]) == presets.get("digits-sra")


def test_flags_may_stand_in_any_order_whatever_their_part():
    argv = "--cfg-scale 2 --batch-size 8 --exp-name x --qk-norm --learning-rate 1e-3 --align sra"
    config = parse_config(argv.split())
    assert config == TrainConfig(
        exp_name="x", cfg_scale=2, batch_size=8, qk_norm=True, learning_rate=1e-3, align="sra"
    )


def test_encoders_follow_from_the_alignment_and_are_refused_beside_sra():
    assert TrainConfig().enc_type == "dinov2-vit-b"
    assert TrainConfig(align="sra").enc_type == "none"
    assert parse_config(["--preset", "digits", "--align", "sra"]).enc_type == "none"
    for argv in (["--align", "sra"], ["--preset", "digits", "--align", "sra"]):
        with pytest.raises(ValueError, match="enc_type is 'mae-vit-l' with align sra, expected"):
            parse_config([*argv, "--exp-name", "x", "--enc-type", "mae-vit-l"])
    with pytest.raises(ValueError, match="features is 'column' with align sra"):
        TrainConfig(align="sra", features="column")


@pytest.mark.parametrize("name, known", objective.choices().items())
def test_names_of_methods_are_checked_where_the_config_is_made(name, known):
    with pytest.raises(ValueError, match=f"{name} is 'warp', expected one of {known[0]}"):
        TrainConfig(**{name: "warp"})


def test_help_is_grouped_and_sentences_are_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse_config(["--help"])
    assert stop.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    titles = re.findall(r"^\W*([a-z]+) options\W*$", text, re.M)
    assert titles == list(PARTS)
    assert text.index("--preset") < text.index("run options")
    plain = " ".join(re.sub(r"[│╭╮╰╯─|+]", " ", text).split())
    for name, sentence in command.sentences(TrainConfig).items():
        assert sentence in plain, name


def test_the_commands_are_listed_with_a_line_each(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(cli.COMMANDS)
    for line, (name, entry) in zip(lines[1:], cli.COMMANDS.items(), strict=True):
        assert line.split() == [*name.split(), *entry.summary.split()] and len(line) <= 100


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    "argv, said",
    [
        (["trian", "--x"], "the command is 'trian', expected one of train, presets, prepare"),
        (["trian", "--help"], "the command is 'trian', expected one of train, presets, prepare"),
        (["prepare", "imags"], "prepare: the command is 'imags', expected one of images, features"),
        (["prepare"], "prepare: the command is '', expected one of images"),
    ],
)
def test_a_mistyped_command_is_named_with_the_nearest(capsys, argv, said):
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"repa-fast: {said}") and told.count("\n") == 1
    if argv[-1]:
        near = {"trian": "'train'", "imags": "'images'"}
        assert next((near[word] for word in argv if word in near), "") in told


def test_help_of_a_group_lists_its_commands(capsys):
    assert cli.main(["prepare", "--help"]) == 0
    out = capsys.readouterr().out
    assert "prepare images" in out and "prepare digits" in out and "probe" not in out
