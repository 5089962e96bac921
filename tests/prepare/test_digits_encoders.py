"""The program that trained the two digits nets: what it writes, and that it learns."""

from importlib.resources import files

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from repa_fast.prepare import digits_encoders as program

pytest.importorskip("sklearn")
pytest.importorskip("timm")


def read(path):
    """Weights and metadata of a file."""
    with safe_open(str(path), "pt") as file:
        return load_file(str(path)), file.metadata()


@pytest.mark.parametrize(
    "net, least", [pytest.param("digits-vit", 0.6, marks=pytest.mark.heavy), ("digits-judge", 0.2)]
)
def test_a_net_is_trained_and_written_as_the_packaged_one(net, least, tmp_path):
    program.main(["--net", net, "--out", str(tmp_path / "out"), "--epochs", "2"])
    weights, metadata = read(tmp_path / "out" / f"{net}.safetensors")
    packaged, known = read(files("repa_fast.encoders") / "weights" / f"{net}.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in weights.items()} == {
        name: (t.shape, t.dtype) for name, t in packaged.items()
    }
    assert {t.dtype for t in weights.values()} == {torch.float16}
    assert metadata.keys() == known.keys() and "2 epochs" in metadata["recipe"]
    assert least < float(metadata["accuracy"]) <= float(known["accuracy"])  # chance is 0.1


def test_fewer_epochs_than_the_warm_up_needs_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        program.main(["--net", "digits-vit", "--out", str(tmp_path), "--epochs", "1"])
    assert "--epochs is 1, expected at least 2" in capsys.readouterr().err


def test_views_stay_grey_images_of_the_same_shape():
    torch.manual_seed(0)
    images = program.load_split("val")[0][:8].float()
    for change in (program.warp, program.corrupt):
        changed = change(images)
        assert changed.shape == images.shape and not torch.equal(changed, images)
        assert changed.min() >= 0 and changed.max() <= 255.01
        assert (changed - changed[:, :1]).abs().max() < 1e-3


def test_the_contrast_is_least_where_both_views_agree_and_images_differ():
    apart = torch.eye(4).repeat(2, 1)
    same = torch.ones(8, 4)
    mixed = torch.cat([torch.eye(4), torch.eye(4).roll(1, 0)])
    losses = [program.nt_xent(x, temperature=0.3) for x in (apart, same, mixed)]
    assert losses[0] < losses[1] < losses[2]
    assert losses[1].item() == pytest.approx(torch.tensor(7.0).log().item())  # 7 equal answers


def test_redundancy_is_nothing_for_channels_of_variance_one_that_do_not_go_together():
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[:, None]  # (4, 1, 2)
    assert program.token_redundancy(signs).item() == pytest.approx(0, abs=1e-4)
    assert program.token_redundancy(0 * signs).item() == pytest.approx(0.99, abs=1e-6)
    together = program.token_redundancy(signs[..., :1].expand(-1, -1, 2))
    assert together.item() == pytest.approx(2 / program.WIDTH**2, abs=1e-4)
