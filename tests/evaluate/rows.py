"""Scores of made-up rows, scored as evaluate_model scores them, without a model."""

from pathlib import Path
from typing import Any

from forgekit import Scores
from forgekit.config import load_config
from forgekit.evaluate.metrics import find_metrics
from forgekit.evaluate.scores import score_rows


def make_row(number: int, reference: str, prediction: str, loss: float = 1.0, tokens: int = 4) -> dict[str, Any]:
    """A row as answer_rows returns it."""
    found = {"question": f"question {number}", "reference": reference, "prediction": prediction, "media": None}
    return found | {"loss": loss, "tokens": tokens, "seconds": 0.5, "key": f"key {number}"}


def make_scores(pairs: list[tuple[str, str]], settings: dict[str, Any] | None = None, losses: Any = None) -> Scores:
    """Score pairs of (right answer, answer)."""
    config = load_config(None, {"model.load_in": "16bit", **(settings or {})})
    rows = [make_row(i, *pair, **({"loss": losses[i]} if losses else {})) for i, pair in enumerate(pairs)]
    return score_rows(rows, find_metrics(config), {"model": "m"}, 1.0)


def answer_right(right: int, of: int) -> list[tuple[str, str]]:
    """So many right answers, the first ones, of so many rows."""
    return [(f"a{i}", f"a{i}" if i < right else "no") for i in range(of)]


def write_scores(folder: Path, before: Scores, after: Scores) -> None:
    """Put both where a run has them."""
    before.save(folder / "metrics" / "baseline.json")
    after.save(folder / "metrics" / "scores.json")
