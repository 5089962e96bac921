"""A run that is resumed keeps its own config, but for flags; a finished one can be had again."""

import json
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("lance")
pytest.importorskip("tyro")

from repa_fast import cli
from repa_fast.configs.config import TrainConfig
from repa_fast.configs.flags import parse
from repa_fast.data.open import open_dataset
from repa_fast.train import checkpoint
from repa_fast.train.inherit import inherit
from repa_fast.train.report import read_metrics
from repa_fast.train.run import hints
from tests.refusals import refused
from tests.sealing import reseal
from tests.train.conftest import TINY, resumed, tiny_state

LOSSES = ("step", "loss", "denoise", "align/digits-vit", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
    """A run of 4 steps on the digits with flags of its own: folder of runs, words of its start."""
    folder = tmp_path_factory.mktemp("runs")
    own = TINY | {"learning_rate": 1e-3, "data_dir": digits_dir, "sampling_steps": 0}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in own.items()]
    words += ["--preset=digits", f"--output-dir={folder}", "--log-every=2"]
    assert cli.main(["train", *words, "--max-train-steps=4", "--exp-name=run"]) == 0
    return folder, words


def losses(folder, name) -> list[dict]:
    lines = read_metrics(folder / name / "metrics.jsonl")
    return [{key: line.get(key) for key in LOSSES} for line in lines]


def test_the_config_of_a_finished_run_gives_the_same_losses_bit_for_bit(finished):
    folder, _ = finished
    file = folder / "run" / "args.json"
    assert cli.main(["train", "--config", str(file), "--exp-name", "again"]) == 0
    assert losses(folder, "again") == losses(folder, "run") and len(losses(folder, "run")) == 2
    again, run = (json.loads((folder / n / "args.json").read_text()) for n in ("again", "run"))
    assert again == run | {"exp_name": "again"}


def test_what_is_left_out_stays_the_run_s_and_what_differs_is_listed(finished, tmp_path, capsys):
    folder, _ = finished
    (tmp_path / "more.yaml").write_text("weighting: lognormal\nkeep_last: 0")
    words = ["--preset=digits", f"--config={tmp_path / 'more.yaml'}", f"--output-dir={folder}"]
    words += ["--exp-name=run", "--resume=auto"]
    assert cli.main(["train", *words, "--max-train-steps=6", "--adam-beta2=0.99"]) == 0
    config = TrainConfig(**json.loads((folder / "run" / "args.json").read_text()))
    assert (config.learning_rate, config.hidden_size, config.batch_size) == (1e-3, 32, 12)
    assert (config.max_train_steps, config.adam_beta2, config.weighting) == (6, 0.99, "uniform")
    printed = capsys.readouterr().out
    table = printed[printed.index("flags that differ") :].splitlines()
    rows = [line.split(maxsplit=2) for line in table[2 : table.index("") if "" in table else 18]]
    by_flag = {row[0]: row[1:] for row in rows if row[0].startswith("--")}
    assert by_flag["--adam-beta2"][1].split() == ["0.99", "(flag)", "changed"]
    assert by_flag["--max-train-steps"] == ["4", by_flag["--max-train-steps"][1]]
    assert by_flag["--batch-size"][1].split() == ["48", "(--preset", "digits)", "kept"]
    assert by_flag["--weighting"][1].split()[0] == "'lognormal'"
    assert by_flag["--weighting"][1].endswith("kept")
    assert "--keep-last" not in by_flag and "--seed" not in by_flag


def test_a_run_goes_on_under_its_own_flags_alone(finished, capsys):
    folder, _ = finished
    saved = folder / "run" / "checkpoints" / "0000004"
    asked = parse(["--resume=auto", "--exp-name=run", f"--output-dir={folder}", "--no-verify"])
    config, table = inherit(asked, saved)
    run = checkpoint.read_settings(saved).config
    assert table == []
    own = {"resume": "auto", "verify": False, "output_dir": str(folder)}
    assert config == replace(run, **own)


def test_another_run_s_name_and_place_are_not_taken(finished):
    folder, _ = finished
    saved = folder / "run" / "checkpoints" / "0000004"
    config, _ = inherit(parse([f"--resume={saved}", "--exp-name=new", "--skip-steps=2"]), saved)
    assert (config.exp_name, config.output_dir, config.skip_steps) == ("new", "exps", 2)
    assert config.resume == str(saved) and config.learning_rate == 1e-3


def test_a_dataset_at_a_url_is_opened_only_if_it_is_asked_for(finished, tmp_path):
    folder, words = finished
    assert cli.main(["train", *words, "--max-train-steps=1", "--exp-name=far"]) == 0
    saved = folder / "far" / "checkpoints" / "0000001"
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"data_dir": "s3://theirs/data"}))
    reseal(saved)
    argv = ["--exp-name=far", "--resume=auto"]
    refused(lambda: inherit(parse(argv), saved), "s3://theirs/data.*expected --data-dir with that")
    config, _ = inherit(parse([*argv, "--data-dir=s3://theirs/data"]), saved)
    assert config.data_dir == "s3://theirs/data"


CANNOT = {
    "seed": 1,
    "batch_size": 24,
    "num_heads": 4,
    "enc_type": "none",
    "prediction": "noise",
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_a_run_cannot_change_is_refused(name, tmp_path):
    state = tiny_state()
    checkpoint.save(tmp_path, state)
    other = tiny_state(resume="auto", **{name: CANNOT[name]})
    words = "images_per_step 12, expected 24" if name == "batch_size" else f"{name} "
    words = "holds a SiT" if name == "enc_type" else f"is of a run with {words}"
    refused(partial(resumed, tmp_path, other), words)


def test_other_rows_are_another_order_of_the_data(tmp_path):
    state = tiny_state()
    state.rows = 1500
    checkpoint.save(tmp_path, state)
    for rows in (1500, 0):
        other = tiny_state(resume="auto")
        other.rows = rows
        assert resumed(tmp_path, other) is not None
    other.rows = 1499
    refused(partial(resumed, tmp_path, other), "dataset rows 1500, expected 1499.*--init-from")


def test_a_product_of_batches_may_be_split_otherwise(tmp_path):
    checkpoint.save(tmp_path, tiny_state())
    other = tiny_state(resume="auto", batch_size=4, gradient_accumulation_steps=3)
    assert resumed(tmp_path, other) is not None


REFUSED = {
    "--data-dir=nowhere": "no dataset at nowhere",
    "--resolution=32": "resolution is 32, expected 16",
    "--batch-size=4000": "--batch-size 1024 fits",
    "--enc-weights=none.safetensors": "brings its weights",
    "--resume=7": "no complete checkpoint of step 7",
    "--eval-every=1": "",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_refused_start_leaves_no_folder(flag, finished, tmp_path, capsys):
    _, words = finished
    argv = [*words, f"--output-dir={tmp_path / 'a' / 'b'}", "--exp-name=c/run", flag]
    argv += ["--eval-samples=2"] if flag == "--eval-every=1" else []
    assert cli.main(["train", *argv]) in (1, 2)
    assert REFUSED[flag] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_resume_leaves_the_run_as_it_is(finished, capsys):
    folder, words = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.distcp")}
    assert cli.main(["train", *words, "--exp-name=run", "--resume=auto", "--seed=9"]) == 2
    assert "seed 0, expected 9" in capsys.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*.distcp")}
    assert before == after and (folder / "run" / "args.json").exists()


def test_a_few_images_and_the_default_model_are_told_of_a_preset(digits_dir):
    dataset = open_dataset(digits_dir)
    words = "1500 images with SiT-XL/2, which is made for millions: --preset pixels-32 fits them"
    assert hints(TrainConfig(), dataset) == [words]
    assert hints(TrainConfig(model="SiT-B/2"), dataset) == []
