"""Pictures, clips and films that stand in columns of their own, beside the text of the turns.

    {"image": "cat.png", "question": "What is it?", "answer": "a cat"}
    ->  user: [image cat.png] What is it?

Where the turns say themselves where a medium stands, it is put there: a part {"type": "image"} without a value (as TRL and
the Hub's vision sets have it), or the text <image> (as LLaVA's rows have it). The others open the first question.
"""

import re
from collections.abc import Mapping
from typing import Any

from .clean import BadRow
from .parts import KINDS

MEDIA = tuple(name for name in KINDS if name != "text")
COLUMNS = {name: (name, f"{name}s") for name in MEDIA}
MARK = re.compile("|".join(f"<{name}>" for name in MEDIA))


def take_media(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the media of a row by kind: its column `image` or `images`, and so on."""
    taken = {}
    for kind, names in COLUMNS.items():
        values = [row[name] for name in names if row.get(name) is not None]
        taken[kind] = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return {kind: items for kind, items in taken.items() if items}


def add_media(example: Mapping[str, Any], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Put the media of a row's own columns into its turns. Raises BadRow when the turns ask for more, or some are left over."""
    media, messages = take_media(row), example.get("messages")
    if not media or not isinstance(messages, list):
        return example
    left = {kind: list(values) for kind, values in media.items()}
    turns = [
        {**turn, "content": fill_parts(turn.get("content"), left)} if isinstance(turn, Mapping) else turn
        for turn in messages
    ]
    over = {kind for kind in left if left[kind]}
    if any(left[kind] != media[kind] for kind in over):
        kind = next(kind for kind in over if left[kind] != media[kind])
        raise BadRow(
            "media_count", f"the row holds {len(media[kind])} of type {kind}, and its turns have places for fewer"
        )
    parts = [{"type": kind, kind: value} for kind in left for value in left[kind]]
    first = next(
        (i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and turn.get("role") in ("user", "human")), None
    )
    if parts and first is not None:
        content = turns[first]["content"]
        texts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
        turns[first] = {**turns[first], "content": [*parts, *texts]}
    return {"messages": turns}


def fill_parts(content: Any, left: dict[str, list[Any]]) -> Any:
    """Fill the places of a turn's content from the media that are left, which are used up."""
    if isinstance(content, str):
        return split_marks(content, left) if MARK.search(content) else content
    if not isinstance(content, list | tuple):
        return content
    return [fill_part(part, left) for part in content]


def fill_part(part: Any, left: dict[str, list[Any]]) -> Any:
    """Fill one part that has a kind and no value."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in left or any(part.get(key) is not None for key in (kind, "path", "url")):
        return part
    return {**part, kind: take_next(left, kind)}


def split_marks(text: str, left: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Turn a text with <image> and the like into parts."""
    parts: list[dict[str, Any]] = []
    start = 0
    for match in MARK.finditer(text):
        kind = match[0][1:-1]
        if kind in left:
            parts += [
                {"type": "text", "text": text[start : match.start()].strip()},
                {"type": kind, kind: take_next(left, kind)},
            ]
            start = match.end()
    parts.append({"type": "text", "text": text[start:].strip()})
    return [part for part in parts if part["type"] != "text" or part["text"]]


def take_next(left: dict[str, list[Any]], kind: str) -> Any:
    """Take the next medium of a kind. Raises BadRow when there is none left."""
    if not left[kind]:
        raise BadRow("media_count", f"the turns have more places of type {kind} than the row holds")
    return left[kind].pop(0)
