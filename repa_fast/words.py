"""Messages, and what they say of values and errors, which may be a stranger's: one short line."""

import difflib
import reprlib
import sys
from collections.abc import Iterable


class _Short(reprlib.Repr):
    """reprlib's, which cuts off lists in lists, and calls no other class's repr."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_instance(self, value: object, level: int) -> str:
        """Return the text of a plain value, and of any other the kind: its text may have no end."""
        plain = value is None or type(value) in (bool, float, complex, bytes)
        return repr(value)[: self.maxother] if plain else f"a {type(value).__name__}"

    def repr_int(self, value: int, level: int) -> str:
        """Return a number; Python refuses the text of one of too many digits."""
        return str(value) if abs(value) < 10**60 else f"an integer of {value.bit_length()} bits"


_SHORT = _Short()


def one_line(text: object) -> str:
    """Return an error or another text in one line, without codes that could steer a terminal."""
    line = " ".join(str(text).split()) or type(text).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def first_line(error: Exception) -> str:
    """Return how an error's text begins: numpy's goes on with advice to unpickle what is given."""
    return one_line(str(error).partition("\n")[0][:100] or type(error).__name__)


def note(text: str) -> None:
    """Print a line on stderr at once."""
    print(f"repa-fast: {text}", file=sys.stderr, flush=True)


def rate(images_per_second: float) -> str:
    """Return a rate for people: three digits of it, all of them from 100 on."""
    digits = ".3g" if images_per_second < 100 else ".0f"
    return f"{images_per_second:{digits}} images/s"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that another one was probably meant to be; "" where none is near."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), "")


def some(names: Iterable[object], shown: int = 3) -> str:
    """Return the first few names in one line, with ", ..." where there are more."""
    names = list(names)
    listed = one_line(", ".join(map(str, names[:shown]))) if names else ""
    return listed + ", ..." * (len(names) > shown)


def short(value: object) -> str:
    """Return a value in one line of at most 70 characters, however large or deep it is."""
    return one_line(_SHORT.repr(value))[:70]
