"""Runs in one figure: their losses by step, and the score against each setting that differs."""

import math
from typing import TYPE_CHECKING, Any

from ..evaluate.metrics import find_metric
from .watch import HELD_OUT_LOSS, LOSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .results import Results

PANELS = 6  # settings drawn at most, those of the most different values
TICKS = 6  # values that are written below an axis each
LEGEND = 10  # runs named in the legend at most
WIDE = 8  # highest over lowest value from which an axis is logarithmic
BEST_COLOUR = "#1f5fa8"


def draw_results(results: "Results") -> "Figure":
    """Draw the curves on the left, held-out losses dashed, and a panel a setting on the right."""
    from matplotlib.figure import Figure

    names = choose_settings(results)
    rows, columns = max(1, math.ceil(len(names) / 2)), min(2, len(names))
    figure = Figure(figsize=(6 + 3 * columns, 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2 + columns)
    draw_curves(figure.add_subplot(grid[:, :2]), results)
    for place, name in enumerate(names):
        row, column = divmod(place, 2)
        draw_setting(figure.add_subplot(grid[row, 2 + column]), results, name)
    return figure


def choose_settings(results: "Results") -> list[str]:
    """Return the settings to draw: those in which scored runs differ, of most values first."""
    from ..table import write_value

    scored = results.scored
    if len(scored) < 2:
        return []
    values = {name: {write_value(row.get(name)) for row in scored} for name in results.changed}
    names = [name for name in results.changed if len(values[name]) > 1]
    return sorted(names, key=lambda name: -len(values[name]))[:PANELS]


def draw_curves(axes: Any, results: "Results") -> None:
    """Draw each run's loss, thin, and its held-out loss, dashed; the best run's in front."""
    from matplotlib import colormaps

    shown = [row["run"] for row in results.rows if any(results.curves[row["run"]].values())]
    colours = colormaps["viridis"]([0.9 * i / max(1, len(shown) - 1) for i in range(len(shown))])
    for place, (run, colour) in reversed(list(enumerate(zip(shown, colours, strict=True)))):
        curves = results.curves[run]
        label = run if place < LEGEND else None
        for name, style in ((LOSS, {"lw": 1.0, "alpha": 0.8}), (HELD_OUT_LOSS, {"ls": "--", "marker": ".", "lw": 1.2})):
            if curves[name]:
                steps = sorted(curves[name])
                axes.plot(steps, [curves[name][step] for step in steps], color=colour, label=label, **style)
                label = None
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.set_title("loss (line), held-out loss (dashed)", fontsize=9, loc="left")
    if shown:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1],
            labels[::-1],
            fontsize=7,
            title="the best first" if len(shown) > 1 else None,
            title_fontsize=7,
        )
    axes.spines[["top", "right"]].set_visible(False)


def draw_setting(axes: Any, results: "Results", name: str) -> None:
    """Draw the score of each run over its value of one setting; the best is marked."""
    from ..table import write_value

    assert results.score is not None
    scored = results.scored
    values: list[Any] = [row.get(name) for row in scored]
    places = values
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        number_axis(axes, sorted(set(values)))
    else:
        words = list(dict.fromkeys(map(write_value, values)))
        places = [words.index(write_value(value)) for value in values]
        axes.set_xticks(range(len(words)), [word[-24:] for word in words], rotation=20, ha="right")
        axes.set_xlim(-0.5, len(words) - 0.5)
    metric = None if results.score == HELD_OUT_LOSS else find_metric(results.score)
    scale = metric.scale if metric else 1
    for place, row in reversed([*zip(places, scored, strict=True)]):  # the first is the best, and stands in front
        height = row[results.score]
        low, high = (row.get(f"{results.score}_{bound}") for bound in ("low", "high"))
        spread = (
            None if low is None or high is None else [[scale * max(0, height - low)], [scale * max(0, high - height)]]
        )
        look = (
            {"fmt": "*", "ms": 11, "color": BEST_COLOUR}
            if row is scored[0]
            else {"fmt": "o", "ms": 5, "color": "#6b7280"}
        )
        axes.errorbar([place], [scale * height], spread, lw=1, capsize=2, **look)
    axes.set_xlabel(name, fontsize=8)
    axes.set_ylabel(metric.label if metric else "held-out loss", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def number_axis(axes: Any, values: list[float]) -> None:
    """Choose the scale of an axis of numbers, and write the values themselves below it where they are few."""
    if values[0] > 0 and values[-1] / values[0] >= WIDE:
        axes.set_xscale("log")
    if len(values) <= TICKS:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.15)
