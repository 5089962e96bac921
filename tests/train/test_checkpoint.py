import json

import pytest
import torch

from repa_fast.checkpoint import layout as weights
from repa_fast.checkpoint import writer
from repa_fast.train import checkpoint
from repa_fast.train.step import synthetic_batch, train_step


@pytest.fixture
def trained(make_state):
    state = make_state()
    batch, _ = synthetic_batch(state, 12)
    for _ in range(2):
        train_step(state, batch)
    return state, batch


def everything(state) -> dict[str, torch.Tensor]:
    tensors = {f"model.{k}": v for k, v in state.model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.state_dict().items()}
    for index, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    tensors["metrics"] = state.metrics.sums
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_round_trip_restores_every_tensor_and_counter(trained, make_state, tmp_path):
    state, batch = trained
    checkpoint.save(tmp_path, state)
    other = make_state()
    other.optimizer.zero_grad()
    checkpoint.load(checkpoint.path_of(tmp_path, 2), other)
    assert_equal(everything(other), everything(state))
    assert (other.step, other.micro_batch) == (2, state.micro_batch)
    train_step(state, batch)
    train_step(other, batch)
    assert_equal(everything(other), everything(state))


def test_marker_is_written_last_and_half_written_directories_are_ignored(
    trained, tmp_path, monkeypatch
):
    state, _ = trained
    checkpoint.save(tmp_path, state)
    state.step = 3

    def crash(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_marker", crash)
        patched.setattr(writer.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(checkpoint.CheckpointFailed, match=r"0000003 .*no space.*0000002"):
            checkpoint.save(tmp_path, state)
    assert checkpoint.path_of(tmp_path, 3).exists()
    assert checkpoint.steps(tmp_path) == [2]
    with pytest.raises(ValueError, match=r"0000003 is not a complete checkpoint"):
        checkpoint.load(checkpoint.path_of(tmp_path, 3), state)
    leftover = checkpoint.path_of(tmp_path, 3) / "leftover"
    leftover.touch()
    checkpoint.save(tmp_path, state)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert not leftover.exists()


def test_saving_a_step_again_leaves_it_as_it_is(trained, tmp_path):
    state, _ = trained
    target = checkpoint.save(tmp_path, state)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    checkpoint.save(tmp_path, state)
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_flags_win_over_the_checkpoints_hyperparameters(trained, make_state, tmp_path):
    state, _ = trained
    checkpoint.save(tmp_path, state)
    other = make_state(learning_rate=1e-5)
    checkpoint.load(checkpoint.path_of(tmp_path, 2), other)
    assert other.optimizer.param_groups[0]["lr"] == 1e-5


def test_frozen_position_embedding_is_parameter_0_without_state(trained):
    state, _ = trained
    assert state.optimizer.param_groups[0]["params"][0] is state.model.pos_embed
    assert 0 not in state.optimizer.state_dict()["state"]


def test_checkpoint_holds_the_config_and_official_names(trained, tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    state, _ = trained
    target = checkpoint.save(tmp_path, state)
    assert json.loads((target / "config.json").read_text()) == state.config.to_dict()
    stored = FileSystemReader(target).read_metadata().state_dict_metadata
    assert {f"model.{name}" for name in state.model.state_dict()} <= stored.keys()
    assert {f"ema.{name}" for name in state.model.state_dict()} <= stored.keys()


def test_load_ema_reads_the_average_alone(trained, make_state, tmp_path):
    state, _ = trained
    target = checkpoint.save(tmp_path, state)
    model = make_state().model
    weights.load_ema(target, model)
    for name, value in state.ema.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    (target / checkpoint.MARKER).unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        weights.load_ema(target, model)


def test_fp16_scaler_state_is_restored(make_state, tmp_path):
    state = make_state(mixed_precision="fp16")
    batch, _ = synthetic_batch(state, 12)
    train_step(state, batch)
    state.scaler.update(256.0)
    checkpoint.save(tmp_path, state)
    other = make_state(mixed_precision="fp16")
    checkpoint.load(checkpoint.path_of(tmp_path, 1), other)
    assert other.scaler.get_scale() == 256.0


def test_saving_before_the_first_step_moves_nothing(make_state, tmp_path):
    state = make_state()
    with torch.no_grad():
        for average in state.ema.parameters():
            average.add_(1)
    expected = [p.clone() for p in state.ema.parameters()]
    checkpoint.save(tmp_path, state)
    for average, before in zip(state.ema.parameters(), expected, strict=True):
        assert torch.equal(average, before)
    assert {float(s["step"]) for s in state.optimizer.state.values()} == {0.0}
