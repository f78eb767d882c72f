"""Convert, measure and hash the rows of one source; what cannot be learned from is set aside with its reason."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .clean import BadRow, Quarantine, make_printable
from .collate import check_rows, get_tokenizer
from .formats import ToExample
from .messages import Messages, check_example, find_media, get_text
from .parts import count_pieces, describe_pieces, find_longest_piece, load_parts
from .rows import BATCH, Kept, Row, TableRows, TextRows
from .split import DIGEST, hash_row

if TYPE_CHECKING:
    from ..config import Config

SPLIT_SEED = 3407  # held-out rows stay the same when train.seed changes, so that scores of several seeds compare
# rows between two lines of progress, at least; counted and not timed, so that a notebook prints the same on every machine
SHOWN = 5000
SHARE = 0.1  # of the source between two lines of progress, at least
MediaOptions = dict[str, Any]  # what `load_parts` is asked for
_threads_of: int | None = None  # the process in which the tokenizer's threads were started
Measure = Callable[[list[Messages]], list[BadRow | None]]


def check_source(
    name: str,
    rows: TableRows | TextRows,
    items: Iterable[Row],
    to_example: ToExample,
    processor: Any,
    config: "Config",
    quarantine: Quarantine,
) -> Kept:
    """Check every row of a source once; bad ones go to `quarantine`.

    Args:
        items: iter(rows), or the same with its first rows looked at already.

    Returns the good ones, with a hash of each one's prompt and content.
    """
    import numpy

    prompts, contents, done, shown, share = bytearray(), bytearray(), 0, 0, 0.0
    clips = pieces = 0
    measure, media = make_measure(processor, config), media_options(config, processor)
    for batch in batched(items, BATCH):
        converted = [(place, key, try_convert(to_example, row, place, rows.folder, media)) for place, row, key in batch]
        verdicts = iter(measure([found for *_, found in converted if not isinstance(found, BadRow)]))
        for place, key, found in converted:
            bad = found if isinstance(found, BadRow) else next(verdicts)
            if bad:
                quarantine.add(place, bad)
                continue
            assert not isinstance(found, BadRow)
            prompt, content = hash_row(found, SPLIT_SEED)
            split, made = count_pieces(found)
            clips, pieces = clips + split, pieces + made
            prompts += prompt
            contents += content
            rows.keep(key)
        done += len(batch)
        quarantine.seen += len(batch)
        if done - shown >= SHOWN and rows.share(done) - share >= SHARE and rows.share(done) < 1:
            print(f"Checking {name}: {rows.progress(done)}", flush=True)
            shown, share = done, rows.share(done)
    if clips:
        print(describe_pieces(clips, pieces))
    kept = rows.finish()
    kept.prompts, kept.contents = (numpy.frombuffer(bytes(found), f"S{DIGEST}") for found in (prompts, contents))
    return kept


def media_options(config: "Config", processor: Any) -> MediaOptions:
    """Return what `load_parts` is asked for beside the messages."""
    return {"frames": config.data.frames, "seconds": find_longest_piece(config.data.long_clips, processor)}


def batched(items: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Yield lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def make_measure(processor: Any, config: "Config") -> Measure:
    """Return a function: messages -> what is wrong with each, or None, measured in tokens as they will be trained on."""
    limit = config.model.max_length
    # No token stands for more letters than the longest one has (four times that, as a tokenizer may join letters first), so
    # a text of many megabytes need not be cut into tokens to know that it is too long.
    letters = limit * 4 * max(map(len, get_tokenizer(processor).get_vocab()))

    def measure(chats: list[Messages]) -> list[BadRow | None]:
        sizes = [sum(len(get_text(message).strip()) for message in messages) for messages in chats]
        fitting = [messages for messages, size in zip(chats, sizes, strict=True) if size <= letters]
        with tokenizer_threads():
            verdicts = iter(check_rows(fitting, processor, limit))
        return [next(verdicts) if size <= letters else refuse_size(size, limit) for size in sizes]

    return measure


@contextmanager
def tokenizer_threads() -> Iterator[None]:
    """Let the tokenizer use every core inside the block; forgekit keeps it to one elsewhere (`environment.py`).

    Not in a fork of a process that did so: the threads it started do not exist there, and it would wait for them.
    """
    global _threads_of
    name = "TOKENIZERS_PARALLELISM"
    before, _threads_of = os.environ.get(name), _threads_of or os.getpid()
    if _threads_of != os.getpid():
        yield
        return
    os.environ[name] = "true"
    try:
        yield
    finally:
        os.environ[name] = before or "false"


def refuse_size(size: int, limit: int) -> BadRow:
    """Return what is wrong with a text that is too long to be cut into tokens at all."""
    return BadRow("too_long", f"{size} characters, far more than the {limit} tokens of model.max_length can hold")


def try_convert(
    to_example: ToExample, row: Any, place: str, folder: Path | None, media: MediaOptions
) -> Messages | BadRow:
    """Convert one row and decode its media; return what is wrong with it when that cannot be."""
    if isinstance(row, BadRow):
        return row
    try:
        return load_row(call_to_example(to_example, row, place), folder, media)
    except BadRow as bad:
        return bad
    except RecursionError:
        return BadRow("too_deep", "lists or objects stand in each other too deeply")


def load_row(example: Any, folder: Path | None, media: MediaOptions) -> Messages:
    """Return an example's checked messages with their media decoded. Raises BadRow."""
    return load_parts(find_media(check_example(example), folder), **media)


def call_to_example(to_example: ToExample, row: Mapping[str, Any], source: str) -> Any:
    """Convert one row; a mistake in the user's to_example names the row that showed it."""
    try:
        return to_example(dict(row))
    except (BadRow, RecursionError):
        raise
    except KeyError as error:
        raise DataError(
            f"to_example needs the column {error}, which the row at {source} does not have. It has: {make_printable(', '.join(row))}. "
            "Change to_example in the notebook, or put to_example = None there to let the format be found."
        ) from error
    except Exception as error:  # it is the user's function, so anything can be wrong in it
        raise DataError(
            f"to_example failed on the row at {source}: {type(error).__name__}: {error}. The row: {make_printable(str(row)[:200])}"
        ) from error
