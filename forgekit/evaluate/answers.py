"""Answering rows so that nothing is done twice: each row is written to a file as it is answered, and found there again.

    metrics/scores.partial.jsonl   one line a row, while rows are still being answered
    metrics/scores.json            all of them, in the order of the data; the other file is then gone

A line is found again by its key, a hash of the model (with its adapter), of the row and of what limits an answer. So a second
call goes on where the first ended, and after a step of training, or with other rows, it finds nothing and answers anew.
"""

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.messages import Messages, get_answer, get_text
from ..errors import DataError
from ..scrub import remove_known
from .fingerprint import digest, fingerprint_media, fingerprint_row
from .generate import generate_answers
from .loss import RowLosses, measure_rows, weigh_choices

if TYPE_CHECKING:
    from datasets import Dataset

Record = dict[str, Any]  # question, reference, media, prediction, choice, loss, tokens, seconds, key


@dataclass(frozen=True)
class Asked:
    """A row before it is answered; its media are read again when its turn comes."""

    place: int
    row: str  # hash
    length: int  # of the question, in tokens
    choices: tuple[str, ...]
    facts: Record  # question, reference, media

    def find_key(self, identity: str, config: Config) -> str:
        """Return the key of this row's record: a hash of the model, the row and the longest answer."""
        return digest(json.dumps([identity, config.evaluate.max_new_tokens, self.row]))


def ask_rows(processor: Any, dataset: "Dataset", config: Config) -> list[Asked]:
    """Look at the first `evaluate.rows` rows, one after the other. Raises DataError when there are none."""
    wanted = len(dataset) if config.evaluate.rows is None else min(config.evaluate.rows, len(dataset))
    if not wanted:
        raise DataError("There are no rows to score. Set data.test to a file, a number of rows or a share.")
    asked = []
    for place in range(wanted):
        example = dataset[place]
        chat = example["messages"]
        choices = tuple(example.get("choices") or config.evaluate.choices)
        row, length = fingerprint_row(chat, processor, choices)
        reference = get_answer(chat)
        facts = {"question": get_text(chat[-2]), "reference": reference, "media": fingerprint_media(chat)}
        if "choice" in config.evaluate.metric:
            check_choices(place, choices, reference)
        asked.append(Asked(place, row, length, choices, facts))
    return asked


def check_choices(place: int, choices: tuple[str, ...], reference: str) -> None:
    """Raise DataError for a row whose right answer cannot be chosen."""
    if reference not in choices:
        raise DataError(
            f"evaluate.metric: choice: the right answer of row {place + 1}, {reference!r}, is none of its choices "
            f"{list(choices)}. Name them in evaluate.choices, or let to_example return them: "
            "{'messages': [...], 'choices': [...]}."
        )


def answer_rows(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    config: Config,
    needs: set[str],
    losses: RowLosses,
    identity: str,
    path: Path | None,
) -> list[Record]:
    """Answer rows, those of similar length together, and return their records in the order of the data.

    Args:
        needs: what a record has to hold: prediction, choice, loss.
        losses: how the loss of rows is computed.
        identity: the model's fingerprint.
        path: the file that all records will stand in; None keeps nothing and finds nothing.

    Prints at most ten lines; they depend on the rows and not on the clock, so a notebook prints the same ones on every machine.
    """
    asked = ask_rows(processor, dataset, config)
    keys = {row.place: row.find_key(identity, config) for row in asked}
    found = {} if path is None else read_answered(path, needs)
    known = {row.place: found[keys[row.place]] for row in asked if keys[row.place] in found}
    if known:
        print(f"{len(known)} of {len(asked)} rows were answered by this model before", flush=True)
    size, shown = config.evaluate.per_device_eval_batch_size, len(known)
    left = sorted((row for row in asked if row.place not in known), key=lambda row: (row.length, row.place))
    for start in range(0, len(left), size):
        some = left[start : start + size]
        for row, record in zip(some, answer_batch(model, processor, dataset, some, config, needs, losses), strict=True):
            known[row.place] = {**record, "key": keys[row.place]}
        if path is not None:
            append_lines(find_partial(path), [known[row.place] for row in some])
        if len(known) - shown >= len(asked) / 10 and len(known) < len(asked):
            print(f"Answered {len(known)} of {len(asked)} rows", flush=True)
            shown = len(known)
    return [{**row.facts, **known[row.place]} for row in asked]


def answer_batch(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    some: list[Asked],
    config: Config,
    needs: set[str],
    losses: RowLosses,
) -> list[Record]:
    """Answer a few rows at once and measure how probable their right answers are."""
    started = time.monotonic()
    evaluate = config.evaluate
    chats: list[Messages] = [dataset[row.place]["messages"] for row in some]
    records: list[Record] = [
        {"loss": total / tokens, "tokens": tokens} for total, tokens in measure_rows(model, processor, chats, losses)
    ]
    if "prediction" in needs:
        for record, text in zip(
            records, generate_answers(model, processor, chats, evaluate.max_new_tokens), strict=True
        ):
            record["prediction"] = text
    if "choice" in needs:
        for record, row, chat in zip(records, some, chats, strict=True):
            size = evaluate.per_device_eval_batch_size
            weights = weigh_choices(model, processor, chat, list(row.choices), size, losses)
            best = max(range(len(weights)), key=weights.__getitem__)
            record |= {"choice": row.choices[best], "log_likelihoods": weights}
    seconds = (time.monotonic() - started) / len(some)
    return [{**record, "seconds": round(seconds, 4)} for record in records]


def find_partial(path: Path) -> Path:
    """Return the file beside `path` that grows row by row."""
    return path.with_name(f"{path.stem}.partial.jsonl")


def read_answered(path: Path, needs: set[str]) -> dict[str, Record]:
    """Return the records of both files by key; those that lack something are left out, as is a line cut short."""
    records: list[Any] = []
    if path.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # another program's file: it is written anew
            records += json.loads(path.read_text(encoding="utf-8"))["rows"]
    partial = find_partial(path)
    for line in partial.read_text(encoding="utf-8").splitlines() if partial.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:  # the process ended while it wrote this line
            continue
    fields = (*needs, "choice", "log_likelihoods", "loss", "tokens", "seconds", "key")
    return {
        record["key"]: {name: record[name] for name in fields if name in record}
        for record in records
        if isinstance(record, dict) and "key" in record and all(record.get(name) is not None for name in needs)
    }


def append_lines(path: Path, records: list[Record]) -> None:
    """Add records to a file, each a line; what stands behind the last whole line begins no new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
    with open(path, "a", encoding="utf-8") as file:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        file.write("\n" * bool(torn) + remove_known(lines))
