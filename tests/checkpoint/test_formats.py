import argparse
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from repa_fast.checkpoint import formats
from repa_fast.eval.info import InfoConfig, info
from repa_fast.models.sit import SiT
from repa_fast.testing import randomise
from tests.refusals import refused

ARGUMENTS = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 4}
ARGUMENTS |= {"num_heads": 2, "encoder_depth": 2, "z_dims": (12,), "projector_dim": 16}
ARGUMENTS |= {"num_classes": 5}


def model(seed: int = 0, **overrides) -> SiT:
    torch.manual_seed(seed)
    made = SiT(**ARGUMENTS | overrides)
    randomise(made)
    return made


def learned_sigma(state: formats.State) -> formats.State:
    """The state dict of an original SiT or DiT: twice the output channels, no projectors."""
    state = {n: t for n, t in state.items() if not n.startswith("projectors.")}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (4, 4))  # P * P patches of C channels
        state[name] = torch.cat([rows, torch.randn_like(rows)], dim=1).flatten(0, 1)
    return state


def assert_equal(actual: formats.State, expected: formats.State) -> None:
    assert actual.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(actual[n], t)] == []


@pytest.fixture(scope="module")
def state() -> formats.State:
    return model().state_dict()


def test_every_kind_of_file_gives_its_average_or_its_weights(tmp_path, state):
    contents = {"model": model(1).state_dict(), "ema": state, "opt": {}, "steps": 7}
    contents["args"] = argparse.Namespace(a=1)
    torch.save(contents, tmp_path / "0000007.pt")
    torch.save(state, tmp_path / "last.pt")
    save_file(state, tmp_path / "last.safetensors")
    for name in ("0000007.pt", "last.pt", "last.safetensors"):
        assert_equal(formats.read_weights(tmp_path / name), state)


def test_names_of_older_code_of_ddp_and_of_sras_head_become_ours(state):
    """`decoder_blocks` follow the encoder's blocks."""
    stored = {"module.ap_head.linear1.weight": torch.zeros(2)}
    for name, tensor in state.items():
        index = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        key = name.replace(f"blocks.{index}", f"decoder_blocks.{index - 2}") if index >= 2 else name
        stored[f"module.{key}"] = tensor
    assert "module.decoder_blocks.1.attn.qkv.weight" in stored
    assert_equal(formats.normalise(stored), state)


def bomb(kind: type) -> list:
    """A few hundred bytes whose text is 2^40 long."""
    inner = kind([1])
    for _ in range(40):
        inner = kind([inner, inner])
    return inner


class Hostile:
    def __reduce__(self):
        return (print, ("code ran",))


DAMAGED = "is damaged, or neither .safetensors nor of torch.save$"
FILES = [
    ({"ema": Hostile()}, "x.pt holds code: it names print, expected tensors and plain values$"),
    ({"args": Path()}, r"x.pt holds code: it names pathlib[._]\w+"),
    (b"not weights", DAMAGED),
    (b"", DAMAGED),
    (b"PK\x03\x04" + bytes(99), DAMAGED),
    (torch.zeros(3), "x.pt holds a Tensor, expected a dictionary$"),
    ([torch.zeros(3)], "x.pt holds a list, expected a dictionary$"),
    (None, "x.pt is not a file$"),
    *[({"steps": v}, "x.pt: steps is .*, expected an integer") for v in ("7", None, 7.0, True, -1)],
    ({"steps": torch.zeros(3, 3)}, "x.pt: steps is a Tensor, expected an integer from 0 to 2"),
    ({"steps": 10**30}, "x.pt: steps is 1000000000000000000000000000000, expected an integer"),
    ({"steps": 10**600}, "x.pt: steps is an integer of 1994 bits"),
    ({"steps": bomb(list)}, r"x.pt: steps is \[\[.*, expected an integer"),
    ({"steps": argparse.Namespace(x=bomb(list))}, "x.pt: steps is a Namespace"),
    ({0: torch.zeros(3), "pos_embed": 3}, "x.pt: not the weights of a SiT or DiT: pos_embed, x_em"),
    ({"ema": [torch.zeros(3)]}, "x.pt: not the weights of a SiT or DiT"),
]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("content, words", FILES, ids=[words for _, words in FILES])
def test_files_without_weights_are_refused_in_one_line(tmp_path, capsys, content, words, old):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    refused(lambda: formats.read_weights(path), words)
    assert "code ran" not in capsys.readouterr().out


def test_safetensors_that_are_none_and_scripts_are_refused_in_one_line(tmp_path, state):
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    whole = path.read_bytes()
    for content in (b"", b"not weights", whole[:-1], whole[:50], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        refused(lambda: formats.read_file(path), rf"x\.safetensors {DAMAGED}")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
    refused(lambda: formats.read_file(tmp_path / "x.pt"), "is a TorchScript archive, which holds")


def zipped(path: Path, out: Path, compression: int) -> None:
    with zipfile.ZipFile(path) as given, zipfile.ZipFile(out, "w", compression) as archive:
        for member in given.infolist():
            archive.writestr(member.filename, given.read(member))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_packed_anew_are_read_rightly_and_flipped_bits_are_seen(
    tmp_path, state, compression
):
    torch.save(state, tmp_path / "x.pt")
    packed = tmp_path / "packed.pt"
    zipped(tmp_path / "x.pt", packed, compression)
    for path in (tmp_path / "x.pt", packed):
        assert_equal(formats.read_weights(path), state)
    with zipfile.ZipFile(packed) as archive:
        member = max(archive.infolist(), key=lambda one: one.file_size)
    whole = packed.read_bytes()
    at = member.header_offset + member.compress_size // 2
    packed.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    words = f"packed.pt is damaged: {member.filename} has a wrong checksum$"
    if compression == zipfile.ZIP_DEFLATED:  # it may end before its checksum
        words = "packed.pt is damaged"
    refused(lambda: formats.read_weights(packed), words)


BIAS = "final_layer.linear.bias"
UNREAL = {  # of 16 biases
    "sparse_coo, expected a dense": lambda t: t.to_sparse(),
    "on meta, expected a dense": lambda t: t.to("meta"),
    "quantized, expected a dense": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "of complex64, expected floating": lambda t: t + 1j,
    "of bool, expected floating": lambda t: t > 0,
    "of int64, expected floating": lambda t: t.long(),
    "of float8_e5m2, expected floating": lambda t: t.to(torch.float8_e5m2),
    "has NaN or infinite values": lambda t: t / torch.arange(16).sub(3).clamp(max=0),
    "has NaN or infinite": lambda t: torch.full((), torch.nan).expand(16),
}


@pytest.mark.filterwarnings("ignore:torch.quantize:DeprecationWarning", "ignore:.*quantized")
@pytest.mark.parametrize("words", UNREAL)
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path, state, words):
    torch.save({**state, BIAS: UNREAL[words](state[BIAS])}, tmp_path / "x.pt")
    for read in (formats.read_weights, lambda path: info(InfoConfig(path=str(path)))):
        refused(partial(read, tmp_path / "x.pt"), rf"x\.pt: {BIAS} (is )?{words}")


def test_great_finite_values_are_weights(state):
    """Their sum is not finite in fp32."""
    formats.normalise({**state, BIAS: torch.full((16,), 3e38)})
    formats.normalise({**state, BIAS: torch.full((16,), 6e4, dtype=torch.float16)})


AMBIGUOUS = [
    ({f"module.{BIAS}": torch.zeros(16)}, f"{BIAS} is there with and without module., expected"),
    ({"blocks.9.a": torch.zeros(1), "decoder_blocks.4.a": torch.zeros(1)}, "the numbers of blocks"),
    ({BIAS: torch.zeros(()).expand(2**34, 16)}, "tensors are of 10995.* bytes .most of them fi"),
    ({"x": torch.zeros(()).expand(2**20, 2**20, 2**20)}, "most of them x"),
    ({f"x{n}": torch.zeros(2**12).expand(2**10, 2**12) for n in range(80)}, "tensors are of 13"),
]


@pytest.mark.parametrize("more, words", AMBIGUOUS, ids=[words for _, words in AMBIGUOUS])
def test_two_under_one_name_and_values_that_are_not_there_are_refused(state, more, words):
    refused(lambda: formats.normalise({**state, **more}), words)


NOT_OURS = "not the weights of a SiT or DiT: "
MISSHAPEN = [
    *[(name, (), rf"{NOT_OURS}{name} missing, or with other axes") for name in formats.AXES],
    ("pos_embed", (16,), NOT_OURS),
    ("pos_embed", (1, 0, 32), "0 positions in pos_embed, expected a square"),
    ("pos_embed", (1, 15, 32), "15 positions in pos_embed, expected a square"),
    (formats.LABELS, (0, 32), f"0 rows in {formats.LABELS}, expected one a class and one more"),
    (formats.LABELS, (1, 32), f"1 rows in {formats.LABELS}, expected one a class"),
    ("x_embedder.proj.weight", (32, 4, 2, 1), "patches of 2x1 pixels, expected a square"),
    ("x_embedder.proj.weight", (0, 4, 2, 2), "width 0 and 4 channels, expected some"),
    ("x_embedder.proj.weight", (32, 4, 0, 0), "patches of 0 pixels"),
    ("final_layer.linear.weight", (15, 32), "15 outputs"),
    ("final_layer.linear.bias", (15,), "outputs with 15 biases"),
    ("t_embedder.mlp.0.weight", (32, 8), "8 features of time, expected 256"),
    ("a\n\x1b[1mb", (3,), r"also has 1: a \?\[1mb\."),
    ("projectors.0.4.weight", (), r"1: projectors.0.4.weight \(\), expected \(12, 16\)"),
    ("blocks.0.attn.qkv.weight", (1,), r"other shapes 1: blocks.0.attn.qkv.weight \(1,\), exp"),
]


@pytest.mark.parametrize("name, shape, words", MISSHAPEN)
def test_tensors_of_other_shapes_are_refused_by_name(state, name, shape, words):
    for given in (state, learned_sigma(state)):
        origin = "repa" if given is state else "sit"
        if name in given or origin == "repa":
            changed = {**given, name: torch.zeros(shape)}

            def load(changed=changed, origin=origin):
                formats.load_exactly(model(), formats.normalise(changed, origin), "x")

            refused(load, words)
    no_blocks = {name: t for name, t in state.items() if not name.startswith("blocks.")}
    refused(lambda: formats.normalise(no_blocks), "depth 0, expected blocks")
    refused(lambda: formats.normalise([1]), "the weights are a list, expected tensors by name")


def test_what_is_no_model_of_ours_is_refused(state):
    stranger, original = {"conv1.weight": torch.zeros(1)}, learned_sigma(state)
    for given, options, words in (
        (stranger, {}, "not the weights of a SiT or DiT: pos_embed, x_emb"),
        (original, {}, "has 8 channels, expected 4: .*original SiT or DiT"),
        ({}, {"prediction": "velocity"}, "prediction is 'velocity', expected one of v, score, noi"),
    ):
        refused(partial(formats.normalise, given, **options), words)


@pytest.mark.parametrize("prediction, sign", [("v", -1), ("score", 1), ("noise", 1)])
def test_original_sit_is_turned_exactly(state, prediction, sign):
    """v(x, t) = -v_SiT(x, 1 - t) for the same input; a score or noise keeps its sign."""
    state = {n: t.double() for n, t in learned_sigma(state).items()}
    original, ours = (model(z_dims=()).double().eval() for _ in range(2))
    original.load_state_dict(formats.normalise(state, "dit"))  # the first half of its channels
    formats.load_exactly(ours, formats.normalise(state, "sit", prediction=prediction), "x")
    x = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    t, y = torch.linspace(0, 1, 6, dtype=torch.float64), torch.arange(6) % 5
    expected = sign * original(x, 1 - t, y)[0]
    assert expected.abs().max() > 1e-3
    assert torch.allclose(ours(x, t, y)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["v", "score", "noise"])
def test_time_that_runs_our_way_leaves_every_prediction_as_it_is(tmp_path, state, prediction):
    state = {n: t for n, t in state.items() if not n.startswith("projectors.")}
    torch.save(state, tmp_path / "x.pt")
    for origin in ("repa", "dit"):
        assert_equal(formats.read_weights(tmp_path / "x.pt", origin, prediction=prediction), state)


def test_a_wrong_size_says_what_differs_and_what_the_file_seems_to_be():
    with torch.device("meta"):
        big = SiT(depth=12, hidden_size=384, num_heads=6, z_dims=()).state_dict()
    words = (
        r"^file\.pt does not fit the model, it lacks 6: projectors\.0\.0\.weight, ",
        r"; also has 80: blocks\.4\.attn\.qkv\.weight, .*, \.\.\.; ",
        r"has other shapes \d+: .*x_embedder\.proj\.bias \(384,\), expected \(32,\), ",
        r"seems to hold a SiT-S/2 \(depth 12, width 384",
        "the model is a SiT .depth 4, width 32, patch 2; 8x8x4 latents; 5 classes",
    )
    message = refused(lambda: formats.load_exactly(model(), big, "file.pt"), *words)
    assert len(message) < 1500


def test_init_takes_everything_but_what_must_differ(state):
    target = model(1, num_classes=7, input_size=16, z_dims=(12, 20))
    own = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    notes = formats.initialise_from(target, state, "x.pt")
    assert len(notes) == 3
    assert "8x8 patches" in notes[0] and "4x4" in notes[0]
    assert "7 classes" in notes[1] and "5" in notes[1]
    assert "(12, 20)" in notes[2]
    fresh = ("pos_embed", formats.LABELS, "projectors.")
    for name, tensor in target.state_dict().items():
        expected = own[name] if name.startswith(fresh) else state[name]
        assert torch.equal(tensor, expected), name
    same = model(1)
    assert formats.initialise_from(same, state, "x.pt") == []
    assert_equal(same.state_dict(), state)
    with pytest.raises(ValueError, match="does not fit the model"):
        formats.initialise_from(model(hidden_size=48), state, "x.pt")
