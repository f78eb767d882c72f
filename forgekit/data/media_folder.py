"""A folder of pictures, clips or films with a metadata file that says what belongs to each of them.

    photos/metadata.jsonl   {"file_name": "cat.png", "text": "a cat"}     (or metadata.csv with the same columns)
    photos/cat.png
    ->  {"image": "photos/cat.png", "text": "a cat"}

The layout is that of `datasets`' imagefolder, audiofolder and videofolder. The metadata file is read line by line here, so
that a bad line or a missing file costs its row, with a reason, and not the run.
"""

import json
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .clean import BadRow
from .columns import read_csv
from .lines import Line, read_json_lines
from .rows import TextRows

METADATA = {"metadata.jsonl": read_json_lines, "metadata.csv": read_csv}
NAME = "file_name"


def find_metadata(folder: Path) -> Path | None:
    """Return the folder's metadata file, or None."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def read_media_folder(metadata: Path) -> TextRows:
    """Return the rows of a metadata file, each with its file under the name of its kind."""
    folder, reader = metadata.parent, METADATA[metadata.name]

    def read(file: BinaryIO, path: Path) -> Iterator[Line]:
        named: set[str] = set()
        for number, row, text in reader(file, path):
            if isinstance(row, BadRow):
                yield number, row, text
                continue
            put = put_files(row, folder)
            if not isinstance(put, BadRow):
                named |= {value for key, value in row.items() if key == NAME or key.endswith(f"_{NAME}")}
            yield number, put, "" if isinstance(put, BadRow) else json.dumps(put)
        report_unnamed(folder, named)

    return TextRows(metadata, read, folder)


def put_files(row: dict[str, Any], folder: Path) -> dict[str, Any] | BadRow:
    """Return the row with file_name as a column of the file's kind, and x_file_name as a column x."""
    done: dict[str, Any] = {}
    for key, value in row.items():
        if key != NAME and not key.endswith(f"_{NAME}"):
            done[key] = value
        elif not isinstance(value, str) or not value:
            return BadRow("wrong_type", f"{key} should name a file, not {value!r:.80}")
        elif key != NAME:
            done[key.removesuffix(f"_{NAME}")] = str(folder / value)
        else:
            kind = find_kind(value)
            if kind is None:
                return BadRow("wrong_type", f"{value!r:.80} ends like no picture, clip or film")
            done[kind] = str(folder / value)
    return done if len(done) == len(row) else BadRow("duplicate_key", "two columns would get one name")


def find_kind(name: str) -> str | None:
    """Return "image", "audio" or "video" by the file's ending, or None."""
    kind = (mimetypes.guess_type(name)[0] or "").partition("/")[0]
    extra = {".flac": "audio", ".opus": "audio", ".ogg": "audio", ".m4a": "audio", ".webp": "image", ".mkv": "video"}
    found = extra.get(Path(name).suffix.lower(), kind)
    return found if found in ("image", "audio", "video") else None


def report_unnamed(folder: Path, named: set[str]) -> None:
    """Say how many media files of the folder no line of the metadata names: they would be left out without a word."""
    used = {(folder / name).resolve() for name in named}
    files = (file for file in folder.rglob("*") if file.is_file() and find_kind(file.name))
    left = sorted(file.name for file in files if file.resolve() not in used)
    if left:
        print(
            f"Note: {len(left)} media files in {folder} stand in no line of its metadata (first: {left[0]}); they are left out."
        )
