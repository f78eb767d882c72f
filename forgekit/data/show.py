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
CHIP = "border:1px solid currentColor;border-radius:9px;padding:0 6px;opacity:.75"  # many equal tokens as one piece
FOLDED = 4  # a run of more equal tokens is shown once, with its number


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


@dataclass(frozen=True)
class Piece:
    """A token as it is shown, or a run of equal ones, as the soft tokens of a picture or a clip are."""

    text: str
    learned: bool
    number: int = 1

    def __str__(self) -> str:
        return self.text if self.number == 1 else f"{self.text} x {self.number} "


def fold_runs(tokens: list[tuple[str, bool]]) -> list[Piece]:
    """Make one piece of each run of many equal tokens."""
    pieces: list[Piece] = []
    for (text, learned), run in itertools.groupby(tokens):
        number = len(list(run))
        pieces += [Piece(text, learned, number)] if number > FOLDED else [Piece(text, learned)] * number
    return pieces


def write_spans(pieces: list[Piece]) -> str:
    """Join pieces to text, each learned span in double brackets."""
    text, inside = "", False
    for piece in [*pieces, Piece("", False)]:
        text += ("[[" if piece.learned else "]]") if piece.learned != inside else ""
        text, inside = text + str(piece), piece.learned
    return text


def write_html(pieces: list[Piece]) -> str:
    """Join pieces to HTML, one span each, so that their borders can be seen."""
    return f"<div style='font-family:monospace;line-height:1.9'>{''.join(map(write_span, pieces))}</div>"


def write_span(piece: Piece) -> str:
    """Return one piece as HTML: learned, read only, or a chip with the number of its tokens."""
    style = LEARNED if piece.learned else CHIP if piece.number > 1 else CONTEXT
    title = f"{'learned' if piece.learned else 'read only'}{f', {piece.number} tokens' if piece.number > 1 else ''}"
    text = html.escape(str(piece).strip() if piece.number > 1 else piece.text).replace("\n", "⏎<br>")
    return f"<span title='{title}' style='{style};margin-right:1px'>{text}</span>"
