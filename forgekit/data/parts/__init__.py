"""The kinds of thing a turn can hold. Each kind is one file; nothing outside this folder knows any of them by name.

A kind's file says

    check(part)               the part in its one form, or BadRow; looks at types alone
    load(part, wanted)        the parts that the model is given, decoded: itself, or a film's pictures and sound
    FEED                      how decoded parts reach the model, or None for text
    show(part)                (text, HTML) for a person
    fingerprint(part)         a text that is equal for equal content, of a decoded part (a film is decoded into others)

and a feed says which placeholder the chat template writes, which tokens it stands for, and how values become tensors.
"""

from collections.abc import Mapping
from typing import Any

from ..clean import BadRow
from . import audio, image, text, video
from .source import Wanted

KINDS: dict[str, Any] = {"text": text, "image": image, "audio": audio, "video": video}
FEEDS = {name: kind.FEED for name, kind in KINDS.items() if kind.FEED}


def check_part(part: Any) -> dict[str, Any]:
    """Return one part in its one form; keys that Arrow filled with None for other kinds are taken away."""
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise BadRow("wrong_type", f"a part is {{'type': 'text', 'text': ...}}, not {repr(part)[:80]}")
    kind = KINDS.get(part["type"])
    if kind is None:
        raise BadRow("unknown_part", f"a part of type {part['type']!r}; known are {', '.join(KINDS)}")
    return kind.check({name: value for name, value in part.items() if value is not None})


def load_parts(
    messages: list[dict[str, Any]], frames: int = video.FRAMES, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Return the messages with every part decoded, as the model is given them. Raises BadRow for media that cannot be.

    Args:
        frames: pictures taken from a film.
        seconds: longer clips become several parts of at most this length, in the same turn (`count_pieces` tells how
            many); None: they are refused.
    """
    wanted = Wanted(frames, seconds)
    return [
        {
            **message,
            "content": [loaded for part in message["content"] for loaded in KINDS[part["type"]].load(part, wanted)],
        }
        for message in messages
    ]


def find_longest_piece(long_clips: str, processor: Any) -> float | None:
    """Return `load_parts`' seconds for data.long_clips: what the model hears when it says split, else None."""
    takes_sound = long_clips == "split" and FEEDS["audio"].tokens(processor)
    return audio.longest(processor) if takes_sound else None


def count_pieces(messages: list[dict[str, Any]]) -> tuple[int, int]:
    """Return (clips that were split, parts that they became) of decoded messages."""
    pieces = [part for message in messages for part in message["content"] if "pieces" in part]
    return sum(part["piece"] == 1 for part in pieces), len(pieces)


def describe_pieces(clips: int, pieces: int) -> str:
    """Return the sentence that tells of split clips."""
    return f"Long clips split (data.long_clips): {clips} became {pieces} parts, each with soft tokens of its own."


def fingerprint_turn(message: Mapping[str, Any]) -> str:
    """Return a text that is equal for turns of equal content; the parts are decoded."""
    return "".join(KINDS[part["type"]].fingerprint(part) for part in message["content"])


def find_values(messages: list[dict[str, Any]], name: str) -> list[Any]:
    """Return the decoded values of one kind, in the order in which the chat template writes their placeholders."""
    return [part[FEEDS[name].value] for message in messages for part in message["content"] if part["type"] == name]


def show_part(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return one part for a person: (plain text, HTML)."""
    return KINDS[part["type"]].show(part)
