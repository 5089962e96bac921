"""Lance tables at a path or at an object store's URL: opening, reading, and what went wrong."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repa_fast.contracts import looks_like_url
from repa_fast.failure import Failure
from repa_fast.words import first_line, one_line

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

# A request is repeated, after waits that grow to 15 s, until either limit; the environment wins:
# OBJECT_STORE_CLIENT_MAX_RETRIES and OBJECT_STORE_CLIENT_RETRY_TIMEOUT. Lance repeats the whole
# 16 times over when rows are read (4 times its throttle's 4) and 6 times when a table is opened:
# a run rides out about 3 minutes without its store, and a wrong address is reported in 1 minute.
MAX_RETRIES = 100
RETRY_SECONDS = 10

ADVICE = (
    "check the bucket's name, the endpoint (AWS_ENDPOINT_URL; one with http:// needs "
    "AWS_ALLOW_HTTP=true), the credentials (AWS_ACCESS_KEY_ID and so on) and the network; "
    "OBJECT_STORE_CLIENT_RETRY_TIMEOUT sets the seconds that a request is repeated for"
)


NULL = -128
"""Where a value of int8 is null; features as int8 are at least -127."""


class StoreError(Failure):
    """The store failed while rows were read; no ValueError, since no row is known to be bad."""


class NoTable(ValueError):
    """There is no table where one was looked for."""


class TableError(ValueError):
    """A table is damaged so that Lance panics."""


def is_url(uri: str | Path) -> bool:
    """Return whether `uri` is an object store's, not a path."""
    return "://" in str(uri) or looks_like_url(uri)


def open_table(uri: str | Path, split: str) -> "tuple[lance.LanceDataset, str]":
    """Open the table URI/SPLIT.lance, else the table `uri`; also return where it was found.

    Raises:
        NoTable: there is no such table.
        ValueError: it is damaged, or its store cannot be reached or refuses.
    """
    import lance

    remote = is_url(uri)
    base = str(uri).rstrip("/") if remote else str(Path(uri))
    inside = f"{base}/{split}.lance" if remote else str(Path(uri) / f"{split}.lance")
    options = {"client_max_retries": str(MAX_RETRIES), "client_retry_timeout": str(RETRY_SECONDS)}
    for candidate in (inside, base):
        start = time.monotonic()
        try:
            with no_panic(candidate):
                table = lance.dataset(candidate, storage_options=options if remote else None)
            return table, candidate
        except TableError:
            raise
        except (ValueError, OSError) as error:
            reason = error
        if remote and "was not found" not in str(reason):
            raise ValueError(_failure(candidate, "cannot open it", start, reason)) from reason
    images = f"--data-dir {base}" if not remote and Path(base).is_dir() else "--data-dir IMAGES"
    raise NoTable(
        f"no dataset at {base} (looked for {inside} and for a Lance table); "
        f"`repa-fast prepare images {images} --out DIR` makes one of a folder of images"
    ) from reason


def take(
    table: "lance.LanceDataset", uri: str, indices: list[int], columns: list[str]
) -> "pa.Table":
    """Return the rows at `indices`, in that order.

    Raises:
        StoreError: a store failed, and all its retries too.
        TableError: the table is damaged.
    """
    with _reading(uri, f"cannot read {len(indices)} rows"):
        return table.take(indices, columns=columns)


def read_column(table: "lance.LanceDataset", uri: str, name: str) -> "pa.ChunkedArray":
    """Return a whole column, in one scan; raises as `take`."""
    with _reading(uri, f"cannot read the column {name}"):
        return table.to_table(columns=[name])[name]


@contextmanager
def _reading(uri: str, what: str) -> Iterator[None]:
    """Raise StoreError where a store fails, which says `what` failed; TableError as `no_panic`."""
    start = time.monotonic()
    try:
        with no_panic(uri):
            yield
    except (ValueError, OSError) as error:
        if not is_url(uri) or isinstance(error, TableError):
            raise
        raise StoreError(_failure(uri, what, start, error)) from error


@contextmanager
def no_panic(uri: str) -> Iterator[None]:
    """Raise TableError where Lance panics, which by itself is no Exception (PyO3's class)."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TableError(
            f"{uri} is damaged, expected a Lance table ({first_line(error)})"
        ) from error


@contextmanager
def unwrapped(batches: Iterator) -> Iterator[Iterator]:
    """Yield `batches` for Lance to read; what they raise comes out as it is, not as Lance's."""
    raised: list[Exception] = []

    def through() -> Iterator:
        try:
            yield from batches
        except Exception as error:
            raised.append(error)
            raise

    try:
        yield through()
    except Exception:
        if raised:
            raise raised[0] from None
        raise


def to_lists(array: np.ndarray) -> "pa.FixedSizeListArray":
    """Convert an array (B, ...) to B lists."""
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array[0].size)


def from_lists(column: "pa.ChunkedArray", shape: tuple[int, ...]) -> np.ndarray:
    """Convert B lists to an array (B, *shape); what is null becomes NaN, or `NULL` of int8."""
    lists = column.combine_chunks()
    size = lists.type.list_size
    values = lists.values.slice(lists.offset * size, len(lists) * size)
    null = NULL if lists.type.value_type == "int8" else np.nan
    if values.null_count:
        values = values.fill_null(null)
    array = values.to_numpy(zero_copy_only=False).reshape(len(lists), *shape)
    if lists.null_count:
        array = array.copy()
        array[lists.is_null().to_numpy(zero_copy_only=False)] = null
    return array


def _failure(uri: str, what: str, start: float, error: Exception) -> str:
    """Describe a failure since `start`; Lance's own text says what the last request met."""
    reason = re.sub(r"(, /\S+\.rs:\d+:\d+)+$", "", one_line(error))  # lines of Lance's source
    return f"{uri}: {what}, given up after {time.monotonic() - start:.1f} s: {reason}; {ADVICE}"
