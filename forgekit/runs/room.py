"""Room on the disk that a run keeps for its last words: a full disk must not keep it from saying how it ended."""

import os
from pathlib import Path

NAME = ".room"
SIZE = 4 * 2**20  # bytes: run.json, status.json, gates and a notebook with figures


def keep_room(folder: Path) -> None:
    """Write a file that is given up at the end; of random bytes, because some file systems pack zeros."""
    (folder / NAME).write_bytes(os.urandom(SIZE))


def free_room(folder: Path) -> None:
    """Give it up."""
    (folder / NAME).unlink(missing_ok=True)
