"""Config files, and who wins: flags, then --config, then --preset, then the defaults."""

import json
from functools import partial

import pytest

from repa_fast import cli
from repa_fast.configs import file, presets
from repa_fast.configs.config import TrainConfig
from tests.refusals import refused

pytest.importorskip("tyro")

from repa_fast.configs.flags import FLAG, explicit, flags_of, parse, parse_config

YAML = """
# by hand
learning-rate: 1e-3
mixed_precision: no
compile: yes
hidden_size: ~
depth: 3
enc_type: [dinov2-vit-b, clip-vit-L]
micro_batch: 4
ema_decay: 0.999
exp_name: another
resume: auto
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_yaml_is_read_as_the_kinds_of_the_flags_and_without_what_is_one_run_s(written):
    expected = {
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "compile": True,
        "hidden_size": None,
        "depth": 3,
        "enc_type": "dinov2-vit-b,clip-vit-L",
        "micro_batch": 4,
        "ema_decay": "0.999",
    }
    found = file.read(written(YAML))
    assert found == expected
    assert [type(found[name]) for name in expected] == [type(v) for v in expected.values()]


def test_a_run_s_args_json_is_read_also_of_an_earlier_version(written):
    saved = TrainConfig(exp_name="run", seed=3, resume="auto", init_from="x.pt").to_dict()
    text = json.dumps(saved | {"rollback": 2, "compile_mode": "default"})
    found = file.read(written(text, "args.json"))
    expected = saved | {"stop_on_spike": True}
    assert found == {k: v for k, v in expected.items() if k not in file.OF_ONE_RUN}


@pytest.mark.parametrize("name", ["pixels-64", "sit-xl2-sra"])
def test_a_preset_written_as_yaml_is_the_preset(name, written, capsys):
    assert cli.main(["presets", name, "--yaml"]) == 0
    path = written(capsys.readouterr().out)
    config = parse_config(["--config", str(path), "--exp-name", name])
    assert config == presets.get(name)
    if name == "pixels-64":
        assert "# Global batch size, over all processes" in path.read_text()


def test_flags_win_over_the_file_that_over_the_preset_that_over_the_defaults(written):
    path = written("batch_size: 20\nseed: 5\nlearning_rate: 3e-4")
    argv = ["--preset", "digits", "--config", str(path), "--seed=6", "--no-compile"]
    asked = parse(argv)
    config = asked.config
    assert (config.seed, config.batch_size, config.depth) == (6, 20, 6)
    assert (config.learning_rate, config.adam_beta1, config.exp_name) == (3e-4, 0.9, "digits")
    who = [asked.by.get(name) for name in ("seed", "compile", "batch_size", "depth", "adam_beta1")]
    assert who == [FLAG, FLAG, f"--config {path}", "--preset digits", None]


def test_a_file_s_encoders_are_not_for_another_alignment(written):
    path = written("enc_type: clip-vit-L\nexp_name: x")
    argv = ["--config", str(path), "--exp-name", "x"]
    assert parse_config(argv).enc_type == "clip-vit-L"
    assert parse_config([*argv, "--align", "sra"]).enc_type == "none"


def test_flags_that_are_given_are_seen_however_they_are_written():
    argv = ["--seed", "1", "--no-verify", "--exp-name=--model", "--data_dir", "d", "--x=3"]
    assert explicit(argv) == {"seed", "verify", "exp_name", "data_dir"}


def test_flags_of_a_config_are_those_that_differ_from_what_is_left_out():
    config = TrainConfig(exp_name="x", seed=3, verify=False)
    assert flags_of(config) == ["--exp-name=x", "--no-verify", "--seed=3"]
    assert flags_of(config, TrainConfig(seed=3, compile=True)) == [
        "--exp-name=x", "--no-verify", "--no-compile",
    ]  # fmt: skip


WRONG = {
    "learning_rate: fast": "learning_rate is 'fast', expected float",
    "seed: 1.5": "seed is '1.5', expected int",
    "compile: perhaps": "compile is 'perhaps', expected bool",
    "mixed_precision: fp8": "mixed_precision is 'fp8', expected",
    "depth: [1, [2]]": r"depth is \['1', \['2'\]\], expected",
    "learnign_rate: 1": "'learnign_rate' is no flag of train.py; did you mean learning_rate",
    "{1: [": "it is no YAML: ",
    "- seed": r"it holds \['seed'\], expected flags and values",
    "": "it holds None, expected flags and values",
    "[" * 5000: "it is no YAML: ",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:20])
def test_what_is_no_config_is_refused_in_one_line_that_names_the_file(text, written):
    refused(partial(file.read, written(text)), f"--config .*run.yaml: {WRONG[text]}")


def test_a_file_that_is_not_there_or_no_json_is_refused(written, tmp_path):
    refused(partial(file.read, written("{", "args.json")), "--config .*args.json: .*JSON")
    refused(partial(file.read, tmp_path / "none.yaml"), "--config .*none.yaml does not exist")
    refused(lambda: cli.load("presets")[0](presets.PresetsConfig(yaml=True)), "the name of one")


def test_a_run_without_a_name_is_told_which_preset_fits_its_data(tmp_path, digits_dir, capsys):
    assert cli.main(["train", "--data-dir", digits_dir]) == 2
    words = "expected --exp-name NAME (or a --preset); --preset pixels-32 fits the 1500 images of"
    assert words in capsys.readouterr().err
    assert cli.main(["train", "--data-dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.endswith("(or a --preset)\n")
