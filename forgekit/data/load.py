"""From a recipe's data section to checked examples in splits; what cannot be learned from is set aside with its reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .clean import BadRow, Quarantine
from .collate import check_rows
from .formats import FORMATS, ToExample, detect_format
from .messages import Messages, check_example
from .parts import load_parts
from .read import read_split
from .split import count_held_out, count_rows, hash_prompt, hold_out

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..config import Config

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 3407  # held-out rows stay the same when train.seed changes, so that scores of several seeds compare
TEXT_COLUMNS = {"json", "source"}  # of rows that were read from lines of text
BATCH = 256  # rows tokenised together while checking
# rows between two lines of progress; counted and not timed, so that a notebook prints the same on every machine
SHOWN = 5000


def load_data(
    config: "Config", processor: Any, to_example: ToExample | None = None, quarantine_file: Path | None = None
) -> "DatasetDict":
    """Read, convert, check and split the rows.

    Args:
        processor: from `load_processor`; rows are measured in its tokens.
        to_example: turns one row into {"messages": [...]}; without it the format is detected, or taken from data.format.
        quarantine_file: where the rows set aside are written as JSON lines, for instance run.path / "quarantine.jsonl".

    Returns a DatasetDict with "train" and, where asked for, "validation" and "test". Reading a row gives
    {"messages": [...]}, converted at that moment, with pictures and sound decoded.

    Raises:
        DataError: nothing to read, no known format, or a larger share of bad rows than data.max_bad.
    """
    from datasets import DatasetDict

    quarantine, frames = Quarantine(), config.data.frames
    splits = {name: read_split(config, name, quarantine) for name in SPLITS}
    tables = {name: table for name, table in splits.items() if table is not None}
    to_example = to_example or find_format(config, tables["train"])
    kept: dict[str, Dataset] = {}
    hashes: dict[str, list[str]] = {}
    for name, table in tables.items():
        good, hashes[name] = check_table(name, table, to_example, processor, config, quarantine)
        kept[name] = table.select(good)
    if quarantine_file and quarantine.rows:
        quarantine.write(quarantine_file)
    quarantine.check(config.data.max_bad)
    kept = cut_splits(config, kept, hashes)
    print(
        f"Rows: {', '.join(f'{len(table)} {name}' for name, table in kept.items())}; {len(quarantine.rows)} set aside.{quarantine.describe()}"
    )

    def convert(batch: Mapping[str, list[Any]]) -> dict[str, list[Messages]]:
        return {"messages": [load_parts(check_example(to_example(row)), frames) for row in decode_rows(batch)]}

    return DatasetDict({name: table.with_transform(convert) for name, table in kept.items()})


def decode_rows(batch: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn a batch of columns back into rows; rows read from text files stand as JSON in one column."""
    if set(batch) == TEXT_COLUMNS:
        return [json.loads(text) for text in batch["json"]]
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def find_format(config: "Config", table: "Dataset", sample: int = 100) -> ToExample:
    """Return the conversion that data.format names, or that the first rows fit; say which and why."""
    name: str = config.data.format
    rows = decode_rows(table[:sample])
    if name == "auto":
        name = detect_format(rows)
        columns = ", ".join(rows[0])
        print(
            f"Format: {name}, as the first {len(rows)} rows have the columns {columns}. Another one: data.format, or to_example(row)."
        )
    return FORMATS[name][1]


def check_table(
    name: str, table: "Dataset", to_example: ToExample, processor: Any, config: "Config", quarantine: Quarantine
) -> tuple[list[int], list[str]]:
    """Convert and measure every row; return the numbers and prompt hashes of the good ones. Bad ones go to `quarantine`."""
    good: list[int] = []
    hashes: list[str] = []
    shown = 0
    from_text = set(table.column_names) == TEXT_COLUMNS
    for start in range(0, len(table), BATCH):
        batch = table[start : start + BATCH]
        sources = (
            batch["source"]
            if from_text
            else [f"{name}:{number}" for number in range(start + 1, min(start + BATCH, len(table)) + 1)]
        )
        found: list[tuple[int, str, Messages]] = []
        for offset, (row, source) in enumerate(zip(decode_rows(batch), sources, strict=True)):
            quarantine.seen += not from_text  # text rows were counted when they were read
            try:
                found.append(
                    (start + offset, source, load_parts(convert_row(to_example, row, source), config.data.frames))
                )
            except BadRow as bad:
                quarantine.add(source, bad)
        for (number, source, messages), bad_row in zip(
            found, check_rows([m for *_, m in found], processor, config.model.max_length), strict=True
        ):
            if bad_row:
                quarantine.add(source, bad_row)
            else:
                good.append(number)
                hashes.append(hash_prompt(messages, SPLIT_SEED))
        done = start + BATCH
        if done - shown >= max(SHOWN, len(table) / 10) and done < len(table):
            print(f"Checking {name}: {done} of {len(table)} rows", flush=True)
            shown = done
    return good, hashes


def convert_row(to_example: ToExample, row: dict[str, Any], source: str) -> Messages:
    """Convert one row; a mistake in the user's to_example names the row that showed it."""
    try:
        example = to_example(row)
    except BadRow:
        raise
    except KeyError as error:
        raise DataError(
            f"to_example needs the column {error}, which the row at {source} does not have. It has: {', '.join(row)}. "
            "Change to_example in the notebook, or put to_example = None there to let the format be found."
        ) from error
    except Exception as error:  # it is the user's function, so anything can be wrong in it
        raise DataError(
            f"to_example failed on the row at {source}: {type(error).__name__}: {error}. The row: {str(row)[:200]}"
        ) from error
    return check_example(example)


def cut_splits(config: "Config", tables: dict[str, "Dataset"], hashes: dict[str, list[str]]) -> dict[str, "Dataset"]:
    """Hold out rows of the training table where a number or share was asked for, and limit the training rows."""
    train, data = tables["train"], config.data
    sizes = {}
    for name, wanted in (("test", data.test), ("validation", data.validation)):
        if name not in tables and not isinstance(wanted, str) and wanted is not None:
            sizes[name] = count_held_out(wanted, len(train), f"data.{name}")
    parts = hold_out(hashes["train"], sizes)
    report_overlap(
        {name: hashes[name] for name in tables if name != "train"}, [hashes["train"][i] for i in parts["train"]]
    )
    if not parts["train"]:
        raise DataError(f"No row is left to learn from: {len(train)} rows, all held out (data.test, data.validation).")
    kept = parts["train"]
    if isinstance(data.train, int | float):
        kept = kept[: max(1, count_rows(data.train, len(kept)))]
    cut = (
        {"train": train.select(kept)}
        | {name: train.select(parts[name]) for name in sizes}
        | {n: t for n, t in tables.items() if n != "train"}
    )
    return {name: cut[name] for name in SPLITS if name in cut}


def report_overlap(held_out: dict[str, list[str]], train: list[str]) -> None:
    """Say how many prompts of the given held-out splits also stand in the training rows."""
    for name, values in held_out.items():
        twice = len(set(values) & set(train))
        if twice:
            print(f"Note: {twice} prompts of {name} also stand in train, so its score flatters the model.")
