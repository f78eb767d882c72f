"""Rows that a library reads: parquet and Arrow files, data sets of the Hub (whole or streamed), built-in tasks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .rows import TableRows, make_scratch

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TABLE_FILES = {".parquet": "parquet", ".arrow": "arrow"}
SAMPLE = "sample:"


def leave_encoded(table: Any) -> Any:
    """Let media columns of a table or a stream give their bytes: decoded in `data/parts`, where a bad file costs a row."""
    import datasets

    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Audio | datasets.Video):
            table = table.cast_column(name, type(feature)(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image | datasets.Audio):
            table = table.cast_column(name, datasets.List(type(feature.feature)(decode=False)))
    return table


def read_table(path: Path) -> "Dataset":
    """Read a parquet or Arrow file. Raises DataError when it is none, half of one, or has no rows."""
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    kind = TABLE_FILES[path.suffix.lower()]
    try:
        if kind == "arrow":
            table = leave_encoded(Dataset.from_file(str(path)))
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


def read_sample(path: str) -> TableRows:
    """Make the rows of a built-in task."""
    from datasets import Dataset

    from .samples import SAMPLES

    name = path.removeprefix(SAMPLE)
    if name not in SAMPLES:
        raise DataError(
            f"data.path: there is no built-in task {name!r}. There are: {', '.join(SAMPLE + known for known in SAMPLES)}."
        )
    return TableRows("train", leave_encoded(Dataset.from_list(SAMPLES[name]())))


def read_hub(path: str, split: str, name: str) -> TableRows:
    """Load a split of a Hub data set, for instance "train" or "train[:80%]". Raises DataError with a remedy."""
    return TableRows(name, leave_encoded(ask_hub(path, split, streaming=False)))


def ask_hub(path: str, split: str, streaming: bool) -> Any:
    """Call datasets.load_dataset; its many errors become one sentence."""
    import datasets

    try:
        return datasets.load_dataset(path, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path: {path} ({split}) cannot be loaded from the Hub: {first.rstrip('.')}. If it is a file, check its name and folder."
        ) from error


def read_stream(path: str, split: str, first: int, end: int, name: str) -> TableRows:
    """Take the rows from number `first` up to `end` of a Hub data set without loading the rest of it."""
    stream = ask_hub(path, split, streaming=True)
    table = save_stream(leave_encoded(stream).skip(first).take(end - first))
    if len(table) == 0:
        raise DataError(f"data.path: {path} ({split}) gave no rows from row {first} on.")
    print(f"Read {len(table)} rows of {path} ({split}) as a stream, from row {first}.")
    return TableRows(name, table)


def save_stream(stream: "IterableDataset") -> "Dataset":
    """Write a stream's rows to an Arrow file that lives as long as the process, so that they do not fill the memory."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    path = make_scratch() / "stream.arrow"
    with ArrowWriter(path=str(path), features=stream.features) as writer:
        for row in stream:
            writer.write(row)
        rows, _ = writer.finalize()
    return Dataset.from_file(str(path)) if rows else Dataset.from_dict({})
