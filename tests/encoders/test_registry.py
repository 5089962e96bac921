"""The registry: lists of encoders and of their weight files, and what it refuses."""

import pytest

from repa_fast import encoders
from repa_fast.encoders.registry import REGISTRY
from tests.refusals import refused


@pytest.mark.parametrize(
    "text, names",
    [
        ("none", []),
        ("None", []),
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
        ("dinov2-vit-b", "", [""]),
        ("dinov2-vit-b", "b.pth", ["b.pth"]),
        ("dinov2-vit-b,dinov2-vit-l", "b.pth, l.pth", ["b.pth", "l.pth"]),
        ("digits-vit,dinov2-vit-l", ",l.pth", ["", "l.pth"]),
    ],
)
def test_weight_files_go_with_their_encoders(enc_type, files, expected):
    assert encoders.weight_files(enc_type, files) == expected


@pytest.mark.parametrize("text", ["dino9", "", "digits-vit,", "digits-vit,none", "DINOV2-vit-b"])
def test_an_unknown_name_is_refused(text):
    refused(lambda: encoders.specs(text), r"encoder is '.*', expected one of .*dinov2-vit-b")


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_resolution_without_an_input_size_is_refused(name):
    words = rf"{name}: resolution is 100, expected"
    refused(lambda: encoders.spec(name).num_tokens(100), words)
    refused(lambda: encoders.load(name, 100, "cpu"), words)


@pytest.mark.parametrize("text", ["none", "dinov2-vit-b", "dinov2-vit-s,dinov2-vit-b,dinov2-vit-l"])
def test_as_many_weight_files_as_encoders(text):
    words = rf"2 entries \(a.pth,b.pth\), expected \d.*{text}"
    refused(lambda: encoders.weight_files(text, "a.pth,b.pth"), words)


def test_a_file_for_an_encoder_that_brings_its_own_is_refused():
    words = r"digits-vit brings its weights.*got some\.pth"
    refused(lambda: encoders.load("digits-vit", 16, "cpu", "some.pth"), words)


def test_an_encoder_can_be_named_once_only():
    refused(lambda: encoders.specs("digits-vit,digits-vit"), "expected each encoder once")
