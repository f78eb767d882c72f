"""Text, the kind that every turn can hold."""

import html
from collections.abc import Mapping
from typing import Any

from ..clean import BadRow
from .source import Wanted

FEED = None  # the chat template writes it


def check(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"type": "text", "text": ...}. Raises BadRow for what no file of text can hold."""
    if not isinstance(part.get("text"), str):
        raise BadRow("wrong_type", f"a text part holds a string, not {type(part.get('text')).__name__}")
    if "\0" in part["text"] or not can_encode(part["text"]):
        raise BadRow("not_text", "the text holds a NUL or half a character (a lone surrogate)")
    return {"type": "text", "text": part["text"]}


def can_encode(text: str) -> bool:
    """Say whether a text can be written as UTF-8; a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load(part: dict[str, Any], wanted: Wanted) -> list[dict[str, Any]]:
    """Return the part as it is."""
    return [part]


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the text, and the text with its line breaks kept."""
    return part["text"], f"<span style='white-space:pre-wrap'>{html.escape(part['text'])}</span>"


def fingerprint(part: Mapping[str, Any]) -> str:
    """Return the text."""
    return part["text"]
