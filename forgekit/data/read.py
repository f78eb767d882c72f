"""Rows from a file, the Hub or a built-in task, as a `datasets.Dataset`, with the file and line that each came from.

Lines of text formats are read here, because a reader that stops at the first bad line or guesses a common schema loses
rows without a word. Each becomes one JSON text in a column, so rows need not share a schema:

    {"json": '{"prompt": "...", "completion": "..."}', "source": "orders.jsonl:12"}
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .clean import BadRow, Quarantine

if TYPE_CHECKING:
    from datasets import Dataset

    from ..config import Config

SAMPLE = "sample:"
TABLE_FILES = {".parquet": "parquet", ".arrow": "arrow"}


def read_split(config: "Config", name: str, quarantine: Quarantine) -> "Dataset | None":
    """Read the rows of one split ("train", "validation", "test"), or None when it is to be cut from the training rows.

    A split that is text names a file or a split of the Hub data set; the training rows come from `data.path` otherwise.
    """
    wanted = getattr(config.data, name)
    if isinstance(wanted, str) and is_file_name(wanted):
        return read_file(find_file(config, wanted, f"data.{name}"), quarantine)
    path = config.data.path
    if path is None:
        if name != "train":
            return None
        raise DataError("data.path is not set: name a file, a Hub id or a built-in task, for instance sample:orders.")
    if path.startswith(SAMPLE) or is_file_name(path):
        if isinstance(wanted, str):
            raise DataError(
                f"data.{name}: {wanted!r} is neither a file (jsonl, json, csv, parquet) nor, as {path} is no Hub data set, a split."
            )
        if name != "train":
            return None
        return (
            read_sample(path)
            if path.startswith(SAMPLE)
            else read_file(find_file(config, path, "data.path"), quarantine)
        )
    if name != "train" and not isinstance(wanted, str):
        return None
    return read_hub(path, wanted if isinstance(wanted, str) else "train")


def is_file_name(path: str) -> bool:
    """Say whether a text names a file: by its ending, or because it exists."""
    return Path(path).suffix.lower() in (*READERS, *TABLE_FILES) or Path(path).expanduser().exists()


def find_file(config: "Config", path: str, setting: str) -> Path:
    """Return the file's path: as given, in the current folder, or beside the recipe's folder. Raises DataError."""
    places = [Path(path).expanduser()]
    if config.recipe and not places[0].is_absolute():
        places += [config.recipe.parent / path, config.recipe.parent.parent / path]
    for place in places:
        if place.is_file():
            return place
        if place.is_dir():
            raise DataError(
                f"{setting}: {place} is a folder. Name one file in it ({', '.join([*READERS, *TABLE_FILES])})."
            )
    raise DataError(
        f"{setting}: {path} does not exist (looked in {', '.join(str(place.absolute().parent) for place in places)})."
    )


def read_sample(path: str) -> "Dataset":
    """Make the rows of a built-in task."""
    from datasets import Dataset

    from .samples import SAMPLES

    name = path.removeprefix(SAMPLE)
    if name not in SAMPLES:
        raise DataError(
            f"data.path: there is no built-in task {name!r}. There are: {', '.join(SAMPLE + known for known in SAMPLES)}."
        )
    return leave_encoded(Dataset.from_list(SAMPLES[name]()))


def leave_encoded(table: "Dataset") -> "Dataset":
    """Let media columns give their bytes: decoded in `data/parts`, where a bad file costs a row and not the run."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def read_hub(path: str, split: str) -> "Dataset":
    """Load a split of a Hub data set. Raises DataError with a remedy when it cannot be had."""
    import datasets

    try:
        return leave_encoded(datasets.load_dataset(path, split=split))
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path: {path} ({split}) cannot be loaded from the Hub: {first.rstrip('.')}. If it is a file, check its name and folder."
        ) from error


def read_file(path: Path, quarantine: Quarantine) -> "Dataset":
    """Read a local file; lines that are no rows go to the quarantine with their number.

    Raises DataError when the file is empty or of a kind that is not known.
    """
    from datasets import Dataset

    suffix = path.suffix.lower()
    if suffix not in (*READERS, *TABLE_FILES):
        raise DataError(f"{path} ends in {suffix or 'nothing'}; known kinds are {', '.join([*READERS, *TABLE_FILES])}.")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes). Write one row on each line, or name another file.")
        if suffix in TABLE_FILES:
            return read_table(path)
        texts, sources = [], []
        for number, row in READERS[suffix](path):
            source = f"{path.name}:{number}"
            quarantine.seen += 1
            if isinstance(row, BadRow):
                quarantine.add(source, row)
            else:
                texts.append(json.dumps(row, ensure_ascii=False))
                sources.append(source)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not texts:
        raise DataError(f"{path} holds no row that can be read.{quarantine.describe()}")
    return Dataset.from_dict({"json": texts, "source": sources})


def read_table(path: Path) -> "Dataset":
    """Read a parquet or Arrow file. Raises DataError when it is none, half of one, or has no rows."""
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    kind = TABLE_FILES[path.suffix.lower()]
    try:
        if kind == "arrow":
            table = Dataset.from_file(str(path))
        elif pyarrow.parquet.read_metadata(path).num_rows:
            table = leave_encoded(Dataset.from_parquet(str(path)))
        else:  # datasets fails on such a file
            table = Dataset.from_dict({})
    except (DatasetGenerationError, pyarrow.ArrowException) as error:
        why = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is no whole {kind} file: {why}. Write or fetch it again.") from error
    if len(table) == 0:
        raise DataError(f"{path} holds no rows. Name another file.")
    return table


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (line number, row or what is wrong with it); empty lines are passed over."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                yield number, parse_row(line)


def parse_row(line: bytes) -> dict[str, Any] | BadRow:
    """Parse one line of JSON, or say why it is no row."""
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")  # a cut line then names a column of its own, not of the next
        row = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"no valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; thousands of [[[[
        return BadRow("broken_json", f"no valid JSON: {error}")
    return (
        row
        if isinstance(row, dict)
        else BadRow("not_an_object", f"a row is a JSON object, this is a {type(row).__name__}")
    )


def read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (position from 1, row) of a file that holds one JSON list; a file of JSON lines under this ending works too.

    Raises DataError for a list that breaks off or is broken: where a row of it ends can then only be guessed.
    """
    data = path.read_bytes()
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(
                f"{path}{where}: the JSON list is broken: {error}. Mend that line, or write one row on each line."
            ) from None
        yield from read_json_lines(path)
        return
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows, 1):
        yield (
            number,
            row
            if isinstance(row, dict)
            else BadRow("not_an_object", f"a row is a JSON object, this is a {type(row).__name__}"),
        )


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield (line number, row) of a CSV or TSV file with a header line; a row that spans lines counts as its last one.

    A quote that is not closed swallows lines: each of them is yielded as a bad row, so that the loss shows.
    """
    with open(path, encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            first = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                for number in range(first, reader.line_num + 1):
                    yield number, BadRow("broken_csv", f"{error}; a quote that opens on line {first} may not be closed")
                continue
            if header is None:
                header = check_header(values, path)
            elif values:
                yield reader.line_num, check_values(header, values)


def check_header(header: list[str], path: Path) -> list[str]:
    """Return the column names. Raises DataError when one stands twice, because one of the two would be lost."""
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the column {twice[0]!r} stands twice in the header. Rename one of the two.")
    return header


def check_values(header: list[str], values: list[str]) -> dict[str, Any] | BadRow:
    """Return the row, or what is wrong with it."""
    if len(values) != len(header):
        return BadRow("wrong_columns", f"the header has {len(header)} columns, this line has {len(values)}")
    if any(0xDC80 <= ord(letter) <= 0xDCFF for value in values for letter in value):
        return BadRow("not_utf8", "bytes that are not UTF-8")
    return dict(zip(header, values, strict=True))


READERS = {".jsonl": read_json_lines, ".json": read_json, ".csv": read_csv, ".tsv": read_csv}
