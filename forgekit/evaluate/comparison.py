"""Before and after on the same rows: how much better, how sure, on which rows most, and whether it could be chance."""

import base64
import html
import io
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .intervals import bound_difference, compare_signs
from .metrics import Metric, find_metric
from .scores import Scores

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

EXTREMES = 3  # rows shown of the worst and of the best


@dataclass(frozen=True)
class Change:
    """What one metric says of two models on the same rows. low, high: bounds of the 95 % interval of the difference.

    better, worse: rows that changed so. p: of the sign test between them; how often as uneven a split comes about by chance.
    """

    metric: Metric
    before: float
    after: float
    low: float
    high: float
    better: int
    worse: int
    p: float

    @property
    def difference(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def gain(self) -> float:
        """The difference, positive where the model became better."""
        return self.difference if self.metric.higher else -self.difference

    @property
    def gain_bounds(self) -> tuple[float, float]:
        """The interval of the gain."""
        return (self.low, self.high) if self.metric.higher else (-self.high, -self.low)

    def __str__(self) -> str:
        write = self.metric.write
        return (
            f"{self.metric.label}: {write(self.before)} before, {write(self.after)} after, change {write(self.difference, '+')} "
            f"(95 %: {write(self.low, '+')} to {write(self.high, '+')}); "
            f"rows: {self.better} better, {self.worse} worse, sign test p = {self.p:.2g}"
        )


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two models on the same rows; `changes` by metric, the first one decides. `worst` and `best` are row numbers from 0."""

    before: Scores
    after: Scores
    changes: dict[str, Change]
    worst: list[int]
    best: list[int]

    @property
    def change(self) -> Change:
        """The change of the metric that decides."""
        return self.changes[self.after.metric]

    @property
    def table(self) -> "pandas.DataFrame":
        """One row a metric: before, after, change, and the intervals of all three as text; shares are in per cent."""
        from ..table import Table

        rows = {change.metric.label: self.describe(name, change) for name, change in self.changes.items()}
        rows["rows"] = {"before": len(self.before.rows), "after": len(self.after.rows), "change": 0}
        return Table(rows).T.fillna("").pipe(Table)

    def describe(self, name: str, change: Change) -> dict[str, Any]:
        """Return one row of the table."""
        metric = change.metric
        found: dict[str, Any] = {}
        for when, scores in (("before", self.before), ("after", self.after)):
            values = scores.metrics[name]
            found[when] = round(values["score"] * metric.scale, 3)
            found[f"{when}, 95 %"] = f"{metric.write(values['low'])} to {metric.write(values['high'])}"
        found["change"] = round(change.difference * metric.scale, 3)
        found["change, 95 %"] = f"{metric.write(change.low, '+')} to {metric.write(change.high, '+')}"
        return found

    @property
    def extremes(self) -> "pandas.DataFrame":
        """The rows that lost most and those that gained most by the metric that decides, with their answers."""
        from ..table import Table

        metric, found = self.change.metric, []
        for word, places in (("worse", self.worst), ("better", self.best)):
            for i in places:
                b, a = self.before.rows[i], self.after.rows[i]
                change = metric.write(a["scores"][metric.name] - b["scores"][metric.name], "+")
                answers = {"right answer": a["reference"], "before": b["prediction"], "after": a["prediction"]}
                found.append({"row": i + 1, "became": f"{word}, {change}", "question": a["question"], **answers})
        return Table(found)

    def figure(self) -> "Figure":
        """Draw both scores with their intervals on the left, and what became of the rows on the right."""
        from matplotlib.figure import Figure

        change = self.change
        metric = change.metric
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        scores, rows = figure.subplots(1, 2, width_ratios=(1, 2))
        for place, (name, side) in enumerate((("before", self.before), ("after", self.after))):
            score, low, high = (side.metrics[metric.name][key] * metric.scale for key in ("score", "low", "high"))
            spread = [[max(0.0, score - low)], [max(0.0, high - score)]]
            scores.errorbar([place], [score], spread, fmt="os"[place], ms=7, capsize=5, color=COLOURS[place])
            scores.annotate(name, (place, score), (9, 0), textcoords="offset points", va="center", fontsize=9)
        scores.set(xlim=(-0.5, 1.8), xticks=[], ylabel=metric.label)
        by_row = [[row["scores"][metric.name] for row in side.rows] for side in (self.before, self.after)]
        if set(by_row[0]) | set(by_row[1]) <= {0.0, 1.0}:
            draw_counts(rows, by_row[0], by_row[1])
        else:
            draw_changes(rows, metric, difference_by_row(metric, self.before, self.after))
        rows.set_title(f"rows: {change.better} better, {change.worse} worse", fontsize=9, loc="left")
        for axes in (scores, rows):
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        return "\n".join([self.table.to_string(), str(self.change)])

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=100)
        words = html.escape(str(self.change), quote=True)
        picture = f"<img alt='{words}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
        rows = f"<p>The rows that changed most</p>{self.extremes._repr_html_()}" if self.worst or self.best else ""
        return f"{self.table._repr_html_()}<p>{words}</p>{picture}{rows}"


def draw_counts(axes: Any, before: list[float], after: list[float]) -> None:
    """Draw how many rows are right before and after, for a metric that says yes or no."""
    pairs = Counter(zip(before, after, strict=True))
    kinds = {"became right": (0, 1), "became wrong": (1, 0), "stayed right": (1, 1), "stayed wrong": (0, 0)}
    numbers = [pairs[kind] for kind in kinds.values()]
    bars = axes.barh([*kinds], numbers, color=[COLOURS[1], COLOURS[2], COLOURS[0], COLOURS[0]])
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="rows", xlim=(0, 1.15 * max(numbers)))


def draw_changes(axes: Any, metric: Metric, differences: list[float]) -> None:
    """Draw the change of each row, those that lost most first."""
    sign = 1 if metric.higher else -1
    values = sorted((metric.scale * value for value in differences), key=lambda value: sign * value)
    colours = [COLOURS[1] if sign * value > 0 else COLOURS[2] for value in values]
    axes.bar(range(1, len(values) + 1), values, width=1.0, color=colours)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="rows, those that lost most first", ylabel=f"change, {metric.unit or metric.title}")


COLOURS = ("#6b7280", "#1f5fa8", "#b35300")  # before, better, worse: apart for every kind of colour vision


def compare_scores(before: Scores, after: Scores) -> Comparison:
    """Compare two models on the same rows: differences with intervals, sign test, worst and best rows; shown as table and figure.

    The metrics are those that both were scored by. Raises DataError when the rows differ.
    """
    check_same_rows(before, after)
    names = [after.metric, *(name for name in after.metrics if name != after.metric)]
    names = [name for name in names if name in before.metrics]
    if after.metric not in names:
        raise DataError(f"before was not scored by {after.metric}; score both with the same evaluate.metric.")
    changes = {name: measure_change(find_metric(name), before, after) for name in names}
    metric = changes[after.metric].metric
    sign = 1 if metric.higher else -1
    gains = [sign * value for value in difference_by_row(metric, before, after)]
    order = sorted(range(len(gains)), key=lambda i: (gains[i], i))
    worst = [i for i in order if gains[i] < 0][:EXTREMES]
    best = [i for i in sorted(order, key=lambda i: (-gains[i], i)) if gains[i] > 0][:EXTREMES]
    return Comparison(before, after, changes, worst, best)


def check_same_rows(before: Scores, after: Scores) -> None:
    """Raise DataError when two scores are not of the same rows in the same order."""
    asked = [
        [(row["question"], row["reference"], row.get("media")) for row in scores.rows] for scores in (before, after)
    ]
    if asked[0] != asked[1]:
        raise DataError(
            f"before ({len(asked[0])} rows) and after ({len(asked[1])}) are scores of different rows; score the same ones, "
            "in the same order."
        )


def measure_change(metric: Metric, before: Scores, after: Scores) -> Change:
    """Measure the paired difference by one metric."""
    counts = metric.count(before.rows), metric.count(after.rows)
    low, high = bound_difference(metric, *counts)
    values = [[row["scores"][metric.name] for row in scores.rows] for scores in (before, after)]
    signs = compare_signs(values[0], values[1], metric.higher)
    return Change(metric, before.metrics[metric.name]["score"], after.metrics[metric.name]["score"], low, high, *signs)


def difference_by_row(metric: Metric, before: Scores, after: Scores) -> list[float]:
    """Return after - before of each row."""
    name = metric.name
    return [a["scores"][name] - b["scores"][name] for b, a in zip(before.rows, after.rows, strict=True)]
