"""Where each split's rows come from: a file, a folder, the Hub, a built-in task, or a list in memory."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .columns import read_csv
from .lines import read_json, read_json_lines
from .media_folder import METADATA, find_metadata, read_media_folder
from .rows import TableRows, TextRows
from .tables import SAMPLE, TABLE_FILES, leave_encoded, read_hub, read_sample, read_stream, read_table

if TYPE_CHECKING:
    from ..config import Config

SPLITS = ("train", "validation", "test")
READERS = {".jsonl": read_json_lines, ".json": read_json, ".csv": read_csv, ".tsv": read_csv}
KINDS = (*READERS, *TABLE_FILES)
SLICE = re.compile(r"(?P<name>.*?)(?P<slice>\[-?\d*%?:-?\d*%?\])$")
Given = Sequence[Any] | Mapping[str, Any] | None  # rows in memory, or rows for each split


@dataclass(frozen=True)
class Source:
    """One split's rows: splits with the same `key` share one source, which is read once; `slice` is taken of its good rows."""

    key: str
    open: Callable[[], TableRows | TextRows] = field(compare=False)
    slice: str = ""  # for instance [:80%], as `datasets` writes it


def find_source(config: "Config", name: str, rows: Given = None) -> Source | None:
    """Find where the rows of "train", "validation" or "test" come from; None when they are cut from the training rows.

    Args:
        rows: rows in memory, which stand in for data.path.

    Raises DataError for a file, folder or split that is not there.
    """
    wanted = getattr(config.data, name)
    if isinstance(rows, Mapping):
        return Source(f"rows:{name}", lambda: open_list(name, rows[name])) if name in rows else None
    if not isinstance(wanted, str):
        return find_base(config, name, rows) if name == "train" else None
    match = SLICE.match(wanted)
    what, part = (match["name"], match["slice"]) if match else (wanted, "")
    folder = find_folder(config)
    if is_file_name(what) or (folder and find_in_folder(folder, what)):
        return find_file_source(config, name, what, part, folder)
    if rows is None and is_hub(config):
        return find_hub_source(config, name, what, part)
    if what == "train" and part:
        base = find_base(config, "train", rows)
        return Source(base.key, base.open, part)
    here = "the rows are given in memory" if rows is not None else f"{config.data.path} is no Hub data set"
    raise DataError(
        f"data.{name}: {wanted!r} is neither a file (jsonl, json, csv, parquet) nor a slice such as train[:80%] nor, as {here}, a split."
    )


def find_base(config: "Config", name: str, rows: Given) -> Source:
    """Return the rows in memory or behind data.path. Raises DataError when there are none, or both."""
    path = config.data.path
    if rows is not None:
        if path is not None:
            raise DataError(
                f"rows are given in memory, and data.path is {path}. Leave out one of the two (data.path: none)."
            )
        return Source("rows", lambda: open_list("train", rows))
    if path is None:
        raise DataError(
            "data.path is not set: name a file, a Hub id or a built-in task, for instance sample:orders, or give load_data(..., rows=[...])."
        )
    if path.startswith(SAMPLE):
        return Source(path, lambda: read_sample(path))
    if is_hub(config):
        return find_hub_source(config, name, "train", "")
    folder = find_folder(config)
    if folder and not find_metadata(folder) and not is_saved(folder):
        return find_file_source(config, name, "train", "", folder)
    return find_file_source(config, name, path, "", folder)


def is_hub(config: "Config") -> bool:
    """Say whether data.path names a data set of the Hub."""
    path = config.data.path
    return path is not None and not path.startswith(SAMPLE) and not is_file_name(path) and find_folder(config) is None


def is_file_name(path: str) -> bool:
    """Say whether a text names a file: by its ending, or because it exists."""
    return Path(path).suffix.lower() in KINDS or Path(path).expanduser().exists()


def list_places(config: "Config", path: str) -> list[Path]:
    """Return where a relative path may stand: in the current folder, or beside the recipe or its folder."""
    first = Path(path).expanduser()
    beside = config.recipe and not first.is_absolute()
    return [first, *([config.recipe.parent / path, config.recipe.parent.parent / path] if beside else [])]  # type: ignore[union-attr]


def find_folder(config: "Config") -> Path | None:
    """Return the folder that data.path names, or None when it names none."""
    path = config.data.path
    if path is None or path.startswith(SAMPLE):
        return None
    return next((place for place in list_places(config, path) if place.is_dir()), None)


def find_in_folder(folder: Path, what: str) -> Path | None:
    """Return what a folder holds under a name: the file, a file of that name with a known ending, or a folder."""
    names = [what, *(f"{what}{ending}" for ending in KINDS)]
    if what == "validation":
        names += [f"val{ending}" for ending in KINDS]
    return next((folder / name for name in names if (folder / name).exists()), None)


def find_file_source(config: "Config", name: str, what: str, part: str, folder: Path | None) -> Source:
    """Return a file's or folder's rows: as named, or below the folder that data.path names. Raises DataError."""
    below = find_in_folder(folder, what) if folder and what != config.data.path else None
    setting = (
        f"data.{name}" if what != config.data.path and isinstance(getattr(config.data, name), str) else "data.path"
    )
    if below is None and folder and what == "train":
        raise DataError(
            f"{setting}: {folder} is a folder without {' or '.join(METADATA)}, and holds no train file "
            f"({', '.join(f'train{ending}' for ending in KINDS)}). Name one file, or write such a file into it."
        )
    place = below or find_path(config, what, setting)
    return Source(str(place.resolve()), lambda: open_path(place, name), part)


def find_path(config: "Config", path: str, setting: str) -> Path:
    """Return the path: as given, in the current folder, or beside the recipe's folder. Raises DataError."""
    places = list_places(config, path)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        looked = ", ".join(str(place.absolute().parent) for place in places)
        raise DataError(f"{setting}: {path} does not exist (looked in {looked}).")
    return found


def find_hub_source(config: "Config", name: str, split: str, part: str) -> Source:
    """Return a Hub data set's split, whole or streamed."""
    path = str(config.data.path)
    if not config.data.streaming:
        return Source(f"{path}:{split}{part}", lambda: read_hub(path, split + part, name))
    first, end = find_range(config, name, part)
    return Source(f"{path}:{split}:{first}:{end}", lambda: read_stream(path, split, first, end, name))


def find_range(config: "Config", name: str, part: str) -> tuple[int, int]:
    """Return which rows of a stream are read: those of the slice, else the first ones, as many as are asked for."""
    data = config.data
    match = re.fullmatch(r"\[(\d*):(\d+)\]", part)
    if match:
        return int(match[1] or 0), int(match[2])
    sizes = [
        data.train,
        *(size for size in (data.validation, data.test) if size is not None and not isinstance(size, str)),
    ]
    if part or name != "train" or not all(isinstance(size, int) for size in sizes):
        raise DataError(
            f"data.streaming reads the first rows alone, so their number must be known: set data.{name} to a slice such as "
            "train[:5000], or data.train (and data.test, data.validation) to numbers of rows."
        )
    return 0, sum(size for size in sizes if isinstance(size, int))


def open_list(name: str, rows: Any) -> TableRows:
    """Take rows in memory: a list of dicts, or a `datasets.Dataset`."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return TableRows(name, leave_encoded(rows))
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Sequence):
        raise DataError(f"rows should be a list of dicts or a Dataset, not {type(rows).__name__}.")
    if not rows:
        raise DataError(f"The list of {name} rows is empty.")
    return TableRows.from_list(name, rows)


def open_path(path: Path, name: str) -> TableRows | TextRows:
    """Open a file or folder. Raises DataError when it is empty, of a kind that is not known, or cannot be read."""
    try:
        return open_folder(path, name) if path.is_dir() else open_file(path, name)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def open_file(path: Path, name: str) -> TableRows | TextRows:
    """Open a file by its ending."""
    suffix = path.suffix.lower()
    if suffix not in KINDS:
        raise DataError(f"{path} ends in {suffix or 'nothing'}; known kinds are {', '.join(KINDS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Write one row on each line, or name another file.")
    if path.name in METADATA:
        return read_media_folder(path)
    rows = TableRows(name, read_table(path)) if suffix in TABLE_FILES else TextRows(path, READERS[suffix])
    rows.folder = path.parent
    return rows


def open_folder(path: Path, name: str) -> TableRows | TextRows:
    """Open a folder: with a metadata file, or one that `Dataset.save_to_disk` wrote."""
    metadata = find_metadata(path)
    if metadata:
        return open_file(metadata, name)
    if is_saved(path):
        from datasets import Dataset

        return TableRows(name, leave_encoded(Dataset.load_from_disk(str(path))))
    raise DataError(f"{path} is a folder without {' or '.join(METADATA)}. Name one file in it ({', '.join(KINDS)}).")


def is_saved(folder: Path) -> bool:
    """Say whether `Dataset.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
