"""Held-out rows by content, so that the same question never stands on both sides, on any machine."""

import hashlib

from ..errors import DataError
from .messages import Messages
from .parts import fingerprint_turn


def hash_prompt(messages: Messages, seed: int) -> str:
    """Return a stable hash of the turns before the first answer: text with case and white space folded, media by content."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = "\n".join(f"{message['role']}: {fingerprint_turn(message)}" for message in messages[:first])
    return hashlib.sha256(f"{seed}\n{' '.join(prompt.lower().split())}".encode()).hexdigest()


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


def hold_out(hashes: list[str], sizes: dict[str, int]) -> dict[str, list[int]]:
    """Deal rows to held-out parts in the order of their hashes; rows with one hash stay together.

    Args:
        hashes: one a row.
        sizes: rows wanted for each part, for instance {"test": 100, "validation": 50}.

    Returns the row numbers of each part, and of what is left as "train", each ascending. Rows with the same hash make a
    part slightly larger than asked.
    """
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(hashes):
        rows.setdefault(value, []).append(number)
    parts: dict[str, list[int]] = {name: [] for name in (*sizes, "train")}
    for value in sorted(rows):
        part = next((name for name, size in sizes.items() if len(parts[name]) < size), "train")
        parts[part] += rows[value]
    return {name: sorted(numbers) for name, numbers in parts.items()}
