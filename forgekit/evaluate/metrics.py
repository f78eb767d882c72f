"""Every metric by name: what it counts in a row, and what the counts of many rows make.

    rows  ──count──>  counts [rows, k]  ──sum over rows──>  [k]  ──finish──>  score

So a score of all rows, of one row and of a thousand drawn samples of rows come from the same counts, also where the score of
all is no mean of rows: BLEU, chrF, error rates, loss. All but loss and perplexity are shares: 0.98 is shown as 98 %.
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy

from ..config import Config
from ..errors import ConfigError, DataError
from . import matches

Rows = list[dict[str, Any]]  # reference, prediction, loss (a mean), tokens, choice, scores
Counts = numpy.ndarray


@dataclass(frozen=True)
class Metric:
    """One way to score rows. count: rows -> [rows, k]. finish: [..., k] -> [...]. finish_row: the same for a row of its own."""

    name: str
    title: str
    count: Callable[[Rows], Counts]
    finish: Callable[[Counts], Counts]
    finish_row: Callable[[Counts], Counts]
    higher: bool = True  # is more better?
    unit: str = "%"
    needs: str = "prediction"  # or choice, loss: what of a row has to be found out
    whole: bool = False  # one score of all rows, which is not the mean of theirs

    def score_rows(self, rows: Rows) -> list[float]:
        """Return the score of each row."""
        return [float(value) for value in self.finish_row(self.count(rows))]

    def score(self, rows: Rows) -> float:
        """Return the score of all rows."""
        return float(self.finish(self.count(rows).sum(0)))

    def write(self, value: float, sign: str = "") -> str:
        """Write a score as a person reads it: in per cent, or in nats."""
        return f"{value * self.scale:{sign}.{self.digits}f}"

    @property
    def scale(self) -> int:
        """What a score is multiplied by to be shown."""
        return 100 if self.unit == "%" else 1

    @property
    def digits(self) -> int:
        """Digits behind the point."""
        return 1 if self.unit == "%" else 3

    @property
    def label(self) -> str:
        """The title with its unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


def divide(counts: Counts) -> Counts:
    """Return the first count over the second: a mean, or a rate."""
    return counts[..., 0] / counts[..., 1]


def make_mean(name: str, title: str, compare: Callable[[str, str], float]) -> Metric:
    """Return a metric that is a mean over rows; a row that was scored keeps its score."""

    def count(rows: Rows) -> Counts:
        def value(row: dict[str, Any]) -> float:
            stored = row.get("scores", {}).get(name)
            return compare(row["prediction"], row["reference"]) if stored is None else stored

        return numpy.array([[value(row), 1.0] for row in rows])

    return Metric(name, title, count, divide, divide)


def count_errors(rows: Rows, characters: bool) -> Counts:
    """Return errors (substituted, deleted, inserted) and length of each reference, in characters or words."""
    import jiwer

    measure = jiwer.process_characters if characters else jiwer.process_words
    found = [measure(row["reference"], row["prediction"]) for row in rows]
    return numpy.array(
        [
            [o.substitutions + o.deletions + o.insertions, o.hits + o.substitutions + o.deletions]
            for o in found
        ],
        dtype=float,
    )  # fmt: skip


def make_sacrebleu(name: str, title: str) -> Metric:
    """Return BLEU (13a tokens, up to 4 words) or chrF (up to 6 characters, beta 2) of the whole set, as sacrebleu defines them."""

    def count(rows: Rows) -> Counts:
        found = load_sacrebleu(name)._extract_corpus_statistics(
            [row["prediction"] for row in rows], [[row["reference"] for row in rows]]
        )
        return numpy.array(found, dtype=float)

    def finish(counts: Counts, row: bool = False) -> Counts:
        scorer = load_sacrebleu(name, row)
        # sacrebleu gives whole corpora only; the counts that it adds up are its own, so the sums of drawn rows are too
        return numpy.apply_along_axis(lambda c: scorer._compute_score_from_stats(list(c)).score / 100, -1, counts)

    return Metric(name, title, count, finish, functools.partial(finish, row=True), whole=True)


@functools.cache
def load_sacrebleu(name: str, row: bool = False) -> Any:
    """Return sacrebleu's scorer; a single row is scored on the word lengths that it has (effective order)."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=row, force=True) if name == "bleu" else CHRF()


def count_loss(rows: Rows) -> Counts:
    """Return summed loss and tokens of each row."""
    return numpy.array([[row["loss"] * row["tokens"], row["tokens"]] for row in rows])


def count_choices(rows: Rows) -> Counts:
    """Return 1 for each row whose right answer was the most probable of its choices."""
    return numpy.array([[float(row["choice"] == row["reference"]), 1.0] for row in rows])


def power(counts: Counts) -> Counts:
    """Return the perplexity: e to the mean loss."""
    return numpy.exp(divide(counts))


def make_errors(name: str, title: str, characters: bool) -> Metric:
    """Return an error rate over all rows: errors by the length of the references."""
    return Metric(
        name, title, functools.partial(count_errors, characters=characters), divide, divide, False, whole=True
    )


KNOWN = {
    metric.name: metric
    for metric in (
        make_mean("exact_match", "exact match", matches.match_exactly),
        make_mean("normalized_match", "match, normalised", matches.match_normalized),
        make_mean("token_f1", "token F1", matches.overlap_tokens),
        make_mean("contains", "right answer inside", matches.find_inside),
        make_mean("json_equal", "JSON equal", matches.match_json),
        make_mean("rouge_l", "ROUGE-L", matches.measure_rouge_l),
        make_errors("cer", "character errors", characters=True),
        make_errors("wer", "word errors", characters=False),
        make_sacrebleu("bleu", "BLEU"),
        make_sacrebleu("chrf", "chrF"),
        Metric("choice", "right choice", count_choices, divide, divide, needs="choice"),
        Metric("loss", "loss", count_loss, divide, divide, False, "nats a token", "loss", whole=True),
        Metric("perplexity", "perplexity", count_loss, power, power, False, "", "loss", whole=True),
    )
}


def find_metrics(config: Config) -> list[Metric]:
    """Return the metrics that are computed: those asked for, exact match where there are answers, and the loss.

    Raises ConfigError when a function of the user's cannot be imported.
    """
    return [find_metric(name, config) for name in name_metrics(config)]


def name_metrics(config: Config) -> list[str]:
    """Return the names of the metrics that are computed; nothing of the user's is imported."""
    names = list(config.evaluate.metric)
    answered = any(name not in KNOWN or KNOWN[name].needs == "prediction" for name in names)
    return names + [name for name in ("exact_match",) * answered + ("loss",) if name not in names]


def find_metric(name: str, config: Config | None = None) -> Metric:
    """Return a metric; without a config one that can only be read from rows that were scored with it."""
    if name in KNOWN:
        return KNOWN[name]
    if name == "regex":
        pattern = config.evaluate.pattern if config else None
        return make_mean(name, "pattern", functools.partial(matches.match_pattern, pattern=pattern or "(?!)"))
    return make_mean(name, name.partition(":")[2], import_function(name) if config else refuse)


def refuse(prediction: str, reference: str) -> float:
    """Stand for a function that is not there."""
    raise DataError("These rows were not scored with this metric; score them again.")


def import_function(name: str) -> Callable[[str, str], float]:
    """Return the user's function of (prediction, reference); more is better. Modules are looked for in the current folder too.

    Raises ConfigError when it is not there.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"evaluate.metric: {name} cannot be imported: {error}. It names a function of (prediction, reference) in "
            f"{module.replace('.', '/')}.py, in the current folder ({os.getcwd()}) or installed."
        ) from None

    @functools.wraps(found)
    def compare(prediction: str, reference: str) -> float:
        value = found(prediction, reference)
        if not isinstance(value, int | float | numpy.number):
            raise ConfigError(f"evaluate.metric: {name} returned {value!r}; it must be a number, 1 for a right answer.")
        return float(value)

    return compare


def describe_source(name: str) -> str:
    """Return a metric's name, and for a function of the user's its code too, so that a changed one is another metric."""
    return (
        name
        if name in KNOWN or name == "regex"
        else f"{name} {inspect.getsource(inspect.unwrap(import_function(name)))}"
    )
