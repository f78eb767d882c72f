"""The splits as files, to read, to compare and to hand on: data/splits/train.jsonl and so on.

    {"source": "rows.jsonl:12", "messages": [{"role": "user", "content": [{"type": "image", "image": "photos/cat.png"}, ...]}, ...]}

Media that came as a path stay that path; others are named by the SHA-256 of their decoded content.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import open_whole
from ..scrub import remove_known
from .check import MediaOptions
from .formats import ToExample
from .messages import Messages, check_example, find_media
from .parts import fingerprint_turn, load_parts
from .rows import BATCH, Kept

if TYPE_CHECKING:
    import numpy


def save_splits(
    folder: Path,
    kept: dict[str, Kept],
    parts: dict[str, tuple[str, "numpy.ndarray"]],
    to_example: ToExample,
    media: MediaOptions,
) -> None:
    """Write each split's rows as JSON lines."""
    for name, (key, numbers) in parts.items():
        good = kept[key]
        with open_whole(folder / f"{name}.jsonl", remove_known) as file:
            for start in range(0, len(numbers), BATCH):
                chosen = numbers[start : start + BATCH].tolist()
                rows = good.decode(good.table[chosen])
                for place, row in zip(good.places(chosen), rows, strict=True):
                    messages = find_media(check_example(to_example(row)), good.folder)
                    line = {"source": place, "messages": name_media(messages, media)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def name_media(messages: Messages, media: MediaOptions) -> Messages:
    """Put a path or a hash in the place of each medium."""
    return [{**turn, "content": [name_part(part, media) for part in turn["content"]]} for turn in messages]


def name_part(part: dict[str, Any], media: MediaOptions) -> dict[str, Any]:
    """Return a part that JSON can hold."""
    kind = part["type"]
    value = part[kind]
    if isinstance(value, str | Path):
        return {"type": kind, kind: str(value)}
    [turn] = load_parts([{"role": "user", "content": [part]}], **media)
    return {"type": kind, kind: f"sha256:{fingerprint_turn(turn)}"}
