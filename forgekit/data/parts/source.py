"""Where media come from: a path, bytes, or what `datasets` makes of either. One way to open them, one way to fail."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..clean import BadRow

NAME = 120  # letters of a path that are repeated in a reason


@dataclass(frozen=True)
class Wanted:
    """What is asked of the kinds while they decode.

    frames: pictures taken from a film.
    seconds: longer clips become several parts of at most this length; None: they are refused.
    """

    frames: int = 4
    seconds: float | None = None


def find_source(source: Any, what: str) -> Any:
    """Return path or bytes out of a `datasets` row, {"bytes", "path"}, and anything else as it is. Refuses addresses."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if isinstance(source, str) and ("://" in source or source.startswith("data:")):
        raise BadRow(
            "url",
            f"a {what} at an address ({source[:80]}); fetch it first, so that a run does not depend on the network",
        )
    return source


def is_file_like(source: Any) -> bool:
    """Say whether a source is a path or bytes."""
    return isinstance(source, str | Path | bytes)


@contextmanager
def decoding(source: Any, what: str) -> Iterator[None]:
    """Turn whatever a decoder raises inside the block into a BadRow that names the source."""
    name = f" {str(source)[:NAME]}" if isinstance(source, str | Path) else ""
    try:
        yield
    except (BadRow, MemoryError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 - on damaged bytes a decoder raises whatever it stumbles over
        text = str(error)[:300] or type(error).__name__
        raise BadRow("corrupt_media", f"the {what}{name} cannot be decoded: {text}") from None


@contextmanager
def open_source(source: Any, what: str) -> Iterator[BinaryIO]:
    """Open a path or bytes for reading, inside `decoding`. Raises BadRow for what is missing, no file, or empty."""
    if isinstance(source, bytes):
        size = len(source)
    else:
        path = Path(source).expanduser()
        if not path.is_file():  # opening a pipe would wait for ever
            code, why = ("corrupt_media", "is no file") if path.exists() else ("missing_media", "does not exist")
            raise BadRow(code, f"the {what} {str(source)[:NAME]} {why}")
        size = path.stat().st_size
    if size == 0:
        raise BadRow("empty_media", f"the {what} is empty (0 bytes)")
    with io.BytesIO(source) if isinstance(source, bytes) else open(path, "rb") as file:
        yield file
