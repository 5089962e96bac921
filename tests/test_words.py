"""Values and errors in messages: short, in one line, whatever they are."""

import argparse
import collections

import pytest

from repa_fast.words import first_line, one_line, rate, short


def doubled(kind, times: int = 40):
    """Two of two of two: 2**40 of them, in forty lists."""
    value = kind([("a", 1)]) if kind is collections.OrderedDict else kind()
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        (10**5000, "an integer of 16610 bits"),
        (float("nan"), "nan"),
        ("a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
        ([1, 2], "[1, 2]"),
        (None, "None"),
        (b"\xff" * 100, None),
        (collections.OrderedDict(a=1), "a OrderedDict"),
        (argparse.Namespace(x=doubled(list)), "a Namespace"),
        (doubled(list), None),
        (doubled(collections.OrderedDict), None),
        ({"x" * 1000: "y" * 1000}, None),
    ],
    ids=range(12),
)
def test_a_value_is_shown_in_short(value, text):
    shown = short(value)
    assert len(shown) <= 70 and shown.isprintable()
    assert text is None or shown == text


def test_errors_are_one_line():
    assert one_line(ValueError("a\n  b\x07")) == "a b?"
    assert one_line(ValueError()) == "ValueError"
    assert first_line(ValueError("first\nadvice")) == "first"


@pytest.mark.parametrize(
    "speed, text",
    [(0.85, "0.85"), (1.3, "1.3"), (57.21, "57.2"), (0.01234, "0.0123"), (3.0, "3")]
    + [(99.96, "100"), (435.4, "435"), (12345.6, "12346")],
)
def test_a_rate_has_three_digits_or_all_of_them(speed, text):
    assert rate(speed) == f"{text} images/s"
