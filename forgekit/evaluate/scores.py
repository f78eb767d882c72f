"""Scores on held-out rows: what the model answers, how good the answers are, and how probable the right ones are to it."""

import html
import math
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.show import show_turn
from ..errors import RunError
from ..files import read_json, write_json
from ..scrub import remove_known
from .answers import Record, answer_rows, find_partial
from .fingerprint import digest, fingerprint_model
from .intervals import bound_score
from .loss import RowLosses, sum_losses
from .metrics import KNOWN, Metric, describe_source, find_metric, find_metrics

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset


NUMBERS = ("exact_match", "loss", "score", "low", "high")  # JSON has null where one of them is not a number


@dataclass(frozen=True, repr=False)
class Scores:
    """The scores of one model on some rows.

    exact_match: share of rows answered exactly; loss: mean negative log-likelihood of the right answers in nats a token.
    metric: the one that decides. metrics: each one's score with the bounds of its 95 % interval.
    """

    exact_match: float
    loss: float
    tokens: int  # learned tokens that the loss is a mean of
    seconds: float
    # question, reference, prediction, right, score, scores, loss, tokens, seconds, media (a hash), key (of model and row)
    rows: list[dict[str, Any]] = field(repr=False)
    metric: str = "exact_match"
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> score, low, high
    key: dict[str, Any] = field(default_factory=dict)  # what the scores depend on: model, rows, metrics, max_new_tokens

    @property
    def score(self) -> float:
        """The score by the metric that decides: a share, or nats a token."""
        return self.metrics[self.metric]["score"] if self.metrics else self.exact_match

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model hesitates between: e to the loss."""
        return math.exp(min(self.loss, 700.0))

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, asdict(self), remove_known)  # answers are compared with what they were

    def table(self) -> "pandas.DataFrame":
        """Return each metric with its score and interval."""
        from ..table import Table

        rows = [describe_score(find_metric(name), values) for name, values in self.metrics.items()]
        return Table(Table(rows, columns=["metric", "score", "95 % interval"]).set_index("metric"))

    def __repr__(self) -> str:
        found = [describe_score(find_metric(name), values) for name, values in self.metrics.items()]
        found = found or [("exact match, %", f"{100 * self.exact_match:.1f}", ""), ("loss, nats a token", f"{self.loss:.3f}", "")]  # fmt: skip
        lines = [f"  {title:<22}{score:>8}{f'   ({bounds})' if bounds else ''}" for title, score, bounds in found]
        return "\n".join([f"Scores of {len(self.rows)} rows, {self.seconds:.0f} s", *lines])

    def _repr_html_(self) -> str:
        head = f"{len(self.rows)} rows, {self.tokens} learned tokens, {self.seconds:.0f} s; {self.metric} decides"
        return f"<p>{html.escape(head)}</p>{self.table()._repr_html_()}"


def describe_score(metric: Metric, values: dict[str, float]) -> tuple[str, str, str]:
    """Return label, score and interval as they are shown."""
    return (
        metric.label,
        metric.write(values["score"]),
        f"{metric.write(values['low'])} to {metric.write(values['high'])}",
    )


def evaluate_model(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    config: Config,
    path: Path | None = None,
    losses: RowLosses = sum_losses,
) -> Scores:
    """Answer held-out rows greedily and score them by `evaluate.metric`, `evaluate.rows` of them at most.

    Args:
        dataset: rows that read as {"messages": [...]}; the last assistant turn is the reference.
        path: where the scores and every answer are written, for instance run.path / "metrics/baseline.json". A second call
            for the same model and rows goes on where the first ended (answers.py).
        losses: another way to the loss of rows.

    Returns Scores, in the order of the rows. Raises ConfigError for a metric that cannot be imported, DataError for rows
    that cannot be scored by it.
    """
    started = time.monotonic()
    metrics = find_metrics(config)
    identity = fingerprint_model(model)
    needs = {metric.needs for metric in metrics}
    rows = answer_rows(model, processor, dataset, config, needs, losses, identity, path)
    for row in rows:
        row.setdefault("prediction", row.get("choice", ""))
    scores = score_rows(rows, metrics, make_key(rows, identity, config), time.monotonic() - started)
    if path:
        scores.save(path)
        find_partial(path).unlink(missing_ok=True)
    return scores


def make_key(rows: list[Record], identity: str, config: Config) -> dict[str, Any]:
    """Return what scores depend on; equal keys mean equal scores."""
    return {
        "model": identity,
        "rows": digest(" ".join(row["key"] for row in rows)),
        "metric": [describe_source(name) for name in config.evaluate.metric],
        "pattern": config.evaluate.pattern,
        "max_new_tokens": config.evaluate.max_new_tokens,
    }


def score_rows(rows: list[Record], metrics: list[Metric], key: dict[str, Any], seconds: float) -> Scores:
    """Score answered rows by each metric; the first one decides."""
    main, found, by_row = metrics[0], {}, []
    for metric in metrics:
        counts = metric.count(rows)
        low, high = bound_score(metric, counts)
        found[metric.name] = {"score": float(metric.finish(counts.sum(0))), "low": low, "high": high}
        by_row.append([float(value) for value in metric.finish_row(counts)])
    for i, row in enumerate(rows):
        row["scores"] = {metric.name: values[i] for metric, values in zip(metrics, by_row, strict=True)}
        row["score"] = row["scores"][main.name]
        row["right"] = is_right(row, main)
    tokens = sum(row["tokens"] for row in rows)
    answered = any(metric.needs != "loss" for metric in metrics)
    exact = KNOWN["exact_match"].score(rows) if answered else math.nan
    return Scores(exact, found["loss"]["score"], tokens, seconds, rows, main.name, found, key)


def is_right(row: Record, main: Metric) -> bool:
    """Say whether a row counts as answered rightly: by the metric that decides where it says yes or no, else exactly."""
    if main.higher and not main.whole and row["score"] in (0.0, 1.0):
        return row["score"] == 1.0
    return row["prediction"] == row["reference"]


def read_scores(path: Path) -> Scores:
    """Read what `Scores.save` wrote. Raises RunError when it is no such file."""
    saved = read_json(path)
    names = [field.name for field in fields(Scores)]
    if not isinstance(saved, dict) or not saved.keys() >= set(names[:5]):
        raise RunError(f"{path} holds no scores; evaluate_model writes them.")
    values = {name: saved[name] for name in names if name in saved}
    rows = values["rows"]
    for numbers in (values, *values.get("metrics", {}).values(), *rows, *(row.get("scores", {}) for row in rows)):
        restore_numbers(numbers, (*NUMBERS, *values.get("metrics", {})))
    return Scores(**values)


def restore_numbers(values: dict[str, Any], names: tuple[str, ...]) -> None:
    """Put NaN where JSON had to write null."""
    for name in names:
        if name in values and values[name] is None:
            values[name] = math.nan


def show_answers(
    before: Scores, after: Scores, number: int = 5, dataset: "Dataset | None" = None
) -> "pandas.DataFrame":
    """Return the first rows as a table: question, right answer, answer before, answer after, and whether it is right now.

    Args:
        dataset: the rows that were scored; with it the question is shown whole, with its pictures and players.
    """
    from ..table import Table

    number = min(number, len(after.rows))
    questions: list[Any] = [row["question"] for row in after.rows[:number]]
    if dataset is not None:
        questions = [show_turn(dataset[i]["messages"][-2]) for i in range(number)]
    rows = [
        {
            "question": question,
            "right answer": a["reference"],
            "before": b["prediction"],
            "after": a["prediction"],
            "right": "yes" if a["right"] else "no",
        }
        for question, b, a in zip(questions, before.rows[:number], after.rows[:number], strict=True)
    ]
    return Table(rows)
