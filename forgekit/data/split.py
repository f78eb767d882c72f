"""Held-out rows by content, so that the same question never stands on both sides, on any machine."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .messages import Messages
from .parts import fingerprint_turn

if TYPE_CHECKING:
    import numpy

DIGEST = 16  # bytes kept of a hash: among 2**40 rows two different ones are equal with a chance of 2**-49


def hash_prompt(messages: Messages, seed: int) -> str:
    """Return a stable hash of the turns before the first answer: text with case and white space folded, media by content."""
    return hash_turns(messages, seed)[0].hexdigest()


def hash_row(messages: Messages, seed: int) -> tuple[bytes, bytes]:
    """Return the first 16 bytes of two hashes: of the prompt (as `hash_prompt`), and of the whole row, letter by letter."""
    prompt, content = hash_turns(messages, seed)
    return prompt.digest()[:DIGEST], content.digest()[:DIGEST]


def hash_turns(messages: Messages, seed: int) -> tuple[Any, Any]:
    """Hash the turns before the first answer folded, and all turns as they are; the parts are decoded."""
    turns = [f"{message['role']}: {fingerprint_turn(message)}" for message in messages]
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = " ".join("\n".join(turns[:first]).lower().split())
    return hashlib.sha256(f"{seed}\n{prompt}".encode()), hashlib.sha256("\n".join(turns).encode())


def count_rows(wanted: int | float, total: int) -> int:
    """Turn a number of rows, or a share below 1 of `total`, into a number of rows."""
    return round(wanted * total) if isinstance(wanted, float) and wanted < 1 else int(wanted)


def count_held_out(wanted: int | float, total: int, setting: str) -> int:
    """Return how many of `total` rows are held out. Raises DataError when that is none of them, or all."""
    number = count_rows(wanted, total)
    if not 0 < number < total:
        raise DataError(
            f"{setting} is {wanted}: that is {number} of {total} rows. At least one row must be held out, and one left to learn from."
        )
    return number


def hold_out(hashes: "Sequence[str] | numpy.ndarray", sizes: dict[str, int]) -> dict[str, "numpy.ndarray"]:
    """Deal rows to held-out parts in the order of their hashes; rows with one hash stay together.

    Args:
        hashes: one a row, as text or an array of bytes.
        sizes: rows wanted for each part, for instance {"test": 100, "validation": 50}.

    Returns the row numbers of each part, and of what is left as "train", each ascending. Rows with the same hash make a
    part slightly larger than asked.
    """
    import numpy

    values = numpy.asarray(hashes, dtype=numpy.bytes_)
    order = numpy.argsort(values, kind="stable")
    ranked = values[order]
    ends = numpy.append(
        numpy.flatnonzero(ranked[1:] != ranked[:-1]) + 1, len(ranked)
    )  # behind each group of equal ones
    parts, start = {}, 0
    for name, size in sizes.items():
        reached = ends[numpy.searchsorted(ends, start + size)] if start + size <= len(ranked) else len(ranked)
        end = int(reached) if size > 0 else start
        parts[name], start = numpy.sort(order[start:end]), end
    return parts | {"train": numpy.sort(order[start:])}


def slice_rows(part: str, total: int, setting: str) -> "numpy.ndarray":
    """Return the row numbers that a slice such as "[:80%]" names, rounded as `datasets` does. Raises DataError."""
    import numpy
    from datasets import ReadInstruction

    try:
        found = ReadInstruction.from_spec(f"train{part}").to_absolute({"train": total})
        numbers = numpy.concatenate(
            [numpy.arange(piece.from_ or 0, total if piece.to is None else piece.to) for piece in found]
        )
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{setting}: {part} is no slice of {total} rows: {error}. Write for instance [:80%] or [100:200]."
        ) from None
    if not len(numbers):
        raise DataError(f"{setting}: the slice {part} of {total} rows holds no row.")
    return numbers


def find_overlap(
    name: str, prompts: "numpy.ndarray", contents: "numpy.ndarray", train: tuple["numpy.ndarray", "numpy.ndarray"]
) -> str:
    """Say how many rows of a held-out part also stand in the training rows; an empty text when none does.

    Args:
        prompts, contents: hashes of the held-out rows.
        train: the same of the training rows.
    """
    import numpy

    again = int(numpy.isin(prompts, train[0]).sum())
    if not again:
        return ""
    whole = int(numpy.isin(contents, train[1]).sum())
    rows = "1 row" if again == 1 else f"{again} rows"
    return (
        f"Note: {rows} of the {len(prompts)} in {name} ask{'s' * (again == 1)} what a row of train asks too ({whole} with the same answer), "
        f"so the score on {name} flatters the model. Take them out of one of the two, or let data.{name} be a number of rows: "
        "then rows are held out by content."
    )
