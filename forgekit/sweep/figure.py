"""Runs in one figure: their losses by step, and the score against each setting that differs."""

import math
from typing import TYPE_CHECKING, Any

from ..evaluate.metrics import find_metric
from .watch import HELD_OUT_LOSS, LOSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .results import Results

PANELS = 6  # settings drawn at most, those of the most different values
LEGEND = 10  # runs named in the legend at most
WIDE = 20  # highest over lowest value from which an axis is logarithmic
BEST_COLOUR = "#1f5fa8"


def draw_results(results: "Results") -> "Figure":
    """Draw the curves on the left, held-out losses dashed, and a panel a setting on the right."""
    from matplotlib.figure import Figure

    names = choose_settings(results)
    rows = max(1, math.ceil(len(names) / 2))
    figure = Figure(figsize=(11 if names else 6, 3.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 4 if names else 2)
    draw_curves(figure.add_subplot(grid[:, :2]), results)
    for place, name in enumerate(names):
        row, column = divmod(place, 2)
        draw_setting(figure.add_subplot(grid[row, 2 + column]), results, name)
    return figure


def choose_settings(results: "Results") -> list[str]:
    """Return the settings to draw: those in which scored runs differ, of most values first."""
    from ..table import write_value

    scored = find_scored(results)
    if len(scored) < 2:
        return []
    values = {name: {write_value(row.get(name)) for row in scored} for name in results.changed}
    names = [name for name in results.changed if len(values[name]) > 1]
    return sorted(names, key=lambda name: -len(values[name]))[:PANELS]


def find_scored(results: "Results") -> list[dict[str, Any]]:
    """Return the runs that have the score that decides."""
    return [row for row in results.rows if results.score and row.get(results.score) is not None]


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
    scored = find_scored(results)
    metric = None if results.score == HELD_OUT_LOSS else find_metric(results.score)
    scale = metric.scale if metric else 1
    values: list[Any] = [row.get(name) for row in scored]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        places = values
        if min(values) > 0 and max(values) / min(values) >= WIDE:
            axes.set_xscale("log")
    else:
        words = list(dict.fromkeys(map(write_value, values)))
        places = [words.index(write_value(value)) for value in values]
        axes.set_xticks(range(len(words)), [word[-24:] for word in words], rotation=20, ha="right", fontsize=7)
        axes.set_xlim(-0.5, len(words) - 0.5)
    heights = [row[results.score] * scale for row in scored]
    axes.plot(places, heights, "o", color="#6b7280", ms=5)
    axes.plot(places[:1], heights[:1], "*", color=BEST_COLOUR, ms=12)  # the first is the best
    axes.set_xlabel(name, fontsize=8)
    axes.set_ylabel(metric.label if metric else "held-out loss", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
