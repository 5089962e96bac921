"""The registry: lists of encoders and of their weight files, and what it refuses."""

from functools import partial

import pytest

from repa_fast import encoders
from repa_fast.encoders.registry import REGISTRY
from tests.refusals import refused


@pytest.mark.parametrize(
    "text, names",
    [
        ("none", []),
        ("NONE", []),
        ("dinov2-vit-b,digits-vit", ["dinov2-vit-b", "digits-vit"]),
        ("dinov2-vit-b, digits-vit", ["dinov2-vit-b", "digits-vit"]),
    ],
)
def test_a_list_keeps_its_order_and_none_is_no_encoder(text, names):
    assert [spec.name for spec in encoders.specs(text)] == names


@pytest.mark.parametrize(
    "enc_type, files, expected",
    [
        ("none", "", []),
        ("dinov2-vit-b,clip-vit-L", "", ["", ""]),
        ("dinov2-vit-b", "b.pth", ["b.pth"]),
        ("dinov2-vit-b,dinov2-vit-l", "b.pth, l.pth", ["b.pth", "l.pth"]),
        ("digits-vit,dinov2-vit-l", ",l.pth", ["", "l.pth"]),
    ],
)
def test_weight_files_go_with_their_encoders(enc_type, files, expected):
    assert encoders.weight_files(enc_type, files) == expected


UNKNOWN = r"encoder is '.*', expected one of .*dinov2-vit-b"
OTHER_COUNT = r"2 entries \(a.pth,b.pth\), expected \d.*"
BRINGS_ITS_OWN = r"digits-vit brings its weights.*got some\.pth"


@pytest.mark.parametrize(
    "call, words",
    [
        *(
            (partial(encoders.specs, text), UNKNOWN)
            for text in ("dino9", "", "digits-vit,", "digits-vit,none", "DINOV2-vit-b")
        ),
        *(
            (partial(encoders.weight_files, text, "a.pth,b.pth"), OTHER_COUNT + text)
            for text in ("none", "dinov2-vit-b", "dinov2-vit-s,dinov2-vit-b,dinov2-vit-l")
        ),
        (partial(encoders.specs, "digits-vit,digits-vit"), "expected each encoder once"),
        (partial(encoders.load, "digits-vit", 16, "cpu", "some.pth"), BRINGS_ITS_OWN),
    ],
)
def test_what_is_refused(call, words):
    refused(call, words)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_resolution_without_an_input_size_is_refused(name):
    spec = REGISTRY[name]
    known = ", ".join(map(str, spec.input_sizes))
    words = rf"{name}: resolution is 100, expected {known}: prepare images of that size$"
    for call in (spec.num_tokens, spec.input_size, partial(encoders.load, name, device="cpu")):
        refused(partial(call, resolution=100), words)
