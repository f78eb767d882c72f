"""Look at an example as a person sees it, and as the model sees it: which tokens are learned."""

import html
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .collate import Markers, get_tokenizer, mark_learned, tokenize_rows
from .parts import show_part

LEARNED = "background:#1b5e20;color:#ffffff;border-radius:3px;padding:1px 2px 2px;border-bottom:2px solid #ffb300"
CONTEXT = "background:transparent;color:inherit;opacity:.75"


@dataclass(frozen=True)
class Picture:
    """Something to look at: HTML in a notebook, plain text elsewhere."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def show_example(example: Mapping[str, Any]) -> Picture:
    """Show the turns of one example, {"messages": [...]}: text, pictures, players for sound."""
    turns = [(message["role"], show_turn(message)) for message in example["messages"]]
    rows = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{role}</th><td style='text-align:left'>{turn.html}</td></tr>"
        for role, turn in turns
    )
    return Picture("\n".join(f"{role}: {turn.text}" for role, turn in turns), f"<table>{rows}</table>")


def show_turn(message: Mapping[str, Any]) -> Picture:
    """Show the parts of one turn."""
    parts = [show_part(part) for part in message["content"]]
    return Picture(" ".join(text for text, _ in parts), " ".join(html for _, html in parts))


def show_labels(example: Mapping[str, Any], processor: Any) -> Picture:
    """Show one example's tokens as the model reads them; learned ones are coloured and underlined, in text set in [[ ]].

    The tokens and the choice are the ones that the training batch has: both come from `data/collate.py`.
    """
    tokenizer = get_tokenizer(processor)
    ids = tokenize_rows([example["messages"]], processor)[0]
    learned = mark_learned(ids, Markers.find(tokenizer))
    pieces = fold_runs(
        [(tokenizer.convert_ids_to_tokens(t).replace("▁", " "), mark) for t, mark in zip(ids, learned, strict=True)]
    )
    head = f"{len(ids)} tokens, {sum(learned)} learned ({sum(learned) / len(ids):.0%})"
    return Picture(
        f"{head}\n{write_spans(pieces)}", f"<p>{head}; learned ones are coloured and underlined</p>{write_html(pieces)}"
    )


def fold_runs(pieces: list[tuple[str, bool]], longest: int = 4) -> list[tuple[str, bool]]:
    """Write a run of equal tokens, as a picture's or a clip's soft tokens are, as one piece with their number."""
    folded: list[tuple[str, bool]] = []
    for (piece, mark), run in itertools.groupby(pieces):
        number = len(list(run))
        folded += [(f"{piece} x {number} ", mark)] if number > longest else [(piece, mark)] * number
    return folded


def write_spans(pieces: list[tuple[str, bool]]) -> str:
    """Join tokens to text, each learned span in double brackets."""
    text, inside = "", False
    for piece, mark in [*pieces, ("", False)]:
        text += ("[[" if mark else "]]") if mark != inside else ""
        text, inside = text + piece, mark
    return text


def write_html(pieces: list[tuple[str, bool]]) -> str:
    """Join tokens to HTML, one span a token, so that their borders can be seen."""
    spans = "".join(
        f"<span title='{'learned' if mark else 'read only'}' style='{LEARNED if mark else CONTEXT};margin-right:1px'>"
        f"{html.escape(piece).replace(chr(10), '⏎<br>')}</span>"
        for piece, mark in pieces
    )
    return f"<div style='font-family:monospace;line-height:1.9'>{spans}</div>"
