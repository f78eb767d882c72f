"""From a recipe's data section to checked examples in splits; what cannot be learned from is set aside with its reason."""

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .check import SPLIT_SEED, MediaOptions, check_source, load_row, media_options
from .clean import BadRow, Quarantine
from .detect import find_format
from .formats import ToExample
from .messages import Messages
from .randomness import own_random_numbers
from .read import SPLITS, Given, Source, find_source
from .rows import Kept, Row
from .save import save_splits
from .split import count_held_out, count_rows, find_overlap, hold_out, slice_rows

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset, DatasetDict

    from ..config import Config

SAMPLE_ROWS = 100  # looked at to find the format
Parts = dict[str, tuple[str, "numpy.ndarray"]]  # split -> its source and the numbers of its rows there


def load_data(
    config: "Config",
    processor: Any,
    to_example: ToExample | None = None,
    quarantine_file: Path | None = None,
    rows: Given = None,
) -> "DatasetDict":
    """Read, convert, check and split the rows.

    Args:
        processor: from `load_processor`; rows are measured in its tokens.
        to_example: turns one row into {"messages": [...]}, with "choices" too where evaluate.metric is choice; without it the
            format is detected, or taken from data.format.
        quarantine_file: where the rows set aside are written as JSON lines, for instance run.path / "quarantine.jsonl"; with
            data.save_splits the splits are written beside it, as data/splits/train.jsonl and so on.
        rows: rows in memory in place of data.path: a list of dicts, a `datasets.Dataset`, or one of these for each split.

    Returns a DatasetDict with "train" and, where asked for, "validation" and "test". Reading a row gives
    {"messages": [...]}, converted at that moment, with pictures and sound decoded.

    Raises:
        DataError: nothing to read, no known format, or a larger share of bad rows than data.max_bad.
    """
    if config.data.save_splits and not quarantine_file:
        raise DataError(
            "data.save_splits needs a place: give load_data the run's folder as run.path / 'quarantine.jsonl'."
        )
    found = {name: find_source(config, name, rows) for name in SPLITS}
    sources = {name: source for name, source in found.items() if source}
    if "train" not in sources:
        raise DataError(f"There are no train rows: the rows given are for {', '.join(sources)}.")
    quarantine = Quarantine()
    kept: dict[str, Kept] = {}
    for name, source in sources.items():
        if source.key not in kept:
            opened = source.open()
            items: Iterable[Row] = opened
            if to_example is None:
                sample, items = look_ahead(iter(opened))
                to_example = find_format(config, sample)
            with own_random_numbers(
                SPLIT_SEED
            ):  # a to_example that draws at random is checked the same in every process
                kept[source.key] = check_source(name, opened, items, to_example, processor, config, quarantine)
    if quarantine_file and len(quarantine):
        quarantine.write(quarantine_file)
    quarantine.check(config.data.max_bad)
    parts = cut_splits(config, sources, kept)
    print(
        f"Rows: {', '.join(f'{len(part)} {name}' for name, (_, part) in parts.items())}; {len(quarantine)} set aside.{quarantine.describe()}"
    )
    assert to_example is not None
    media = media_options(config, processor)
    if quarantine_file and config.data.save_splits:
        save_splits(quarantine_file.parent / "data" / "splits", kept, parts, to_example, media)
    return make_splits({name: make_table(kept[key], part, to_example, media) for name, (key, part) in parts.items()})


def make_splits(tables: dict[str, "Dataset"]) -> "DatasetDict":
    """Return a DatasetDict that says how to have a split when it is asked for one that is not there."""
    from datasets import DatasetDict

    class Splits(DatasetDict):
        def __missing__(self, name: str) -> "Dataset":
            raise DataError(
                f"There are no {name!r} rows (there are: {', '.join(self)}). Set data.{name} to a file, a number of rows or "
                "a share, for instance 0.1; a score needs rows that were not learned from."
            )

    return Splits(tables)


def look_ahead(items: Iterable[Row]) -> tuple[list[dict[str, Any]], Iterable[Row]]:
    """Return the first rows that could be read, and all items from the first on."""
    iterator, seen, sample = iter(items), [], []
    for item in iterator:
        seen.append(item)
        if not isinstance(item[1], BadRow):
            sample.append(item[1])
        if len(sample) == SAMPLE_ROWS:
            break
    return sample, chain(seen, iterator)


def make_table(kept: Kept, numbers: "numpy.ndarray", to_example: ToExample, media: MediaOptions) -> "Dataset":
    """Return some of the good rows as a table whose rows become messages when they are read."""
    decode, folder = kept.decode, kept.folder

    def convert(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        examples = [to_example(row) for row in decode(batch)]
        choices = [example.get("choices") for example in examples]
        messages: list[Messages] = [load_row(example, folder, media) for example in examples]
        return {"messages": messages, **({"choices": choices} if any(choices) else {})}

    # by content, so that a checkpoint knows its rows again in another process
    fingerprint = hashlib.sha256(kept.contents[numbers].tobytes()).hexdigest()[:32]
    return kept.table.with_transform(convert).select(numbers, new_fingerprint=fingerprint)


def cut_splits(config: "Config", sources: dict[str, Source], kept: dict[str, Kept]) -> Parts:
    """Take slices, hold out rows of the training rows where a number or share was asked for, and limit those."""
    import numpy

    parts: Parts = {}
    for name, source in sources.items():
        total = len(kept[source.key].table)
        rows = slice_rows(source.slice, total, f"data.{name}") if source.slice else numpy.arange(total)
        parts[name] = (source.key, rows)
    key, train = parts["train"]
    if not sources["train"].slice:  # the rows that are not in another split's slice
        others = [rows for name, (other, rows) in parts.items() if name != "train" and other == key]
        train = numpy.setdiff1d(train, numpy.concatenate(others)) if others else train
    data, sizes = config.data, {}
    for name, wanted in (("test", data.test), ("validation", data.validation)):
        if name not in parts and not isinstance(wanted, str) and wanted is not None:
            sizes[name] = count_held_out(wanted, len(train), f"data.{name}")
    dealt = hold_out(kept[key].prompts[train], sizes)
    report_overlap(kept, {name: part for name, part in parts.items() if name != "train"}, (key, train[dealt["train"]]))
    learned = train[dealt["train"]]
    if not len(learned):
        raise DataError(f"No row is left to learn from: {len(train)} rows, all held out (data.test, data.validation).")
    if isinstance(data.train, int | float):
        learned = learned[: max(1, count_rows(data.train, len(learned)))]
    parts |= {"train": (key, learned)} | {name: (key, train[dealt[name]]) for name in sizes}
    return {name: parts[name] for name in SPLITS if name in parts}


def report_overlap(kept: dict[str, Kept], held_out: Parts, train: tuple[str, "numpy.ndarray"]) -> None:
    """Say how many rows of the given held-out splits also stand in the training rows."""
    learned = kept[train[0]].prompts[train[1]], kept[train[0]].contents[train[1]]
    for name, (key, rows) in held_out.items():
        note = find_overlap(name, kept[key].prompts[rows], kept[key].contents[rows], learned)
        if note:
            print(note)
