"""What is refused, and how: rows of (call, words) beside the tests of what is accepted."""

import re
from collections.abc import Callable

import pytest


def refused(call: Callable[[], object], *words: str, error: type[Exception] = ValueError) -> str:
    """Return the message that `call` is refused with: one line, with every one of `words`.

    Args:
        call: what has to raise; a lambda or a partial, so that a table can hold it.
        words: regular expressions, each found somewhere in the message.
        error: the class that is raised.
    """
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"
    return message
