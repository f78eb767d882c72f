"""Runs side by side: settings that differ, scores, losses, times; of a sweep, or of all runs of a run root.

runs/sweeps/NAME/results.csv  results.parquet  results.png     the same table twice, and the figure
"""

import base64
import html
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..evaluate.metrics import find_metric
from ..files import read_json, write_bytes, write_text
from ..run_folder import SWEEPS, find_run_root, shorten_path
from ..scrub import scrub
from .entry import ENDED, RECORD
from .plan import NO_DIFFERENCE
from .points import shorten_names
from .watch import HELD_OUT_LOSS, Watch, read_if_there, read_metrics, read_score

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

GIB = 2**30


@dataclass(frozen=True, repr=False)
class Results:
    """Runs to compare, the best first. `rows`: one mapping a run; `changed`: settings that differ; `score`: what decides."""

    place: Path
    rows: list[dict[str, Any]]
    changed: list[str]
    score: str | None
    maximize: bool
    curves: dict[str, dict[str, dict[int, float]]] = field(
        default_factory=dict
    )  # run -> loss, held_out_loss -> by step
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # run -> all settings by dotted name

    @property
    def frame(self) -> "pandas.DataFrame":
        """Every column, as it stands in results.csv."""
        import pandas

        return pandas.DataFrame(self.rows)

    @property
    def table(self) -> "pandas.DataFrame":
        """The columns that a person compares by, the best run first; shares in per cent."""
        from ..table import Table

        rows = [self.shorten(row) for row in self.rows]
        return Table([{name: "" if value is None else value for name, value in row.items()} for row in rows])

    def shorten(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the short form of a row."""
        from ..table import write_value

        short = {"run": row["run"], "state": row["state"]}
        short |= {title: write_value(row.get(name)) for name, title in shorten_names(self.changed).items()}
        scored = any(self.score and other.get(self.score) is not None for other in self.rows)
        if scored and self.score and self.score != HELD_OUT_LOSS:
            metric = find_metric(self.score)
            value, low, high = (row.get(f"{self.score}{end}") for end in ("", "_low", "_high"))
            if any(other.get("before") is not None for other in self.rows):
                short[f"before: {metric.label}"] = row.get("before") and round(row["before"] * metric.scale, 3)
            short[metric.label] = None if value is None else round(value * metric.scale, 3)
            short["95 %"] = "" if low is None or high is None else f"{metric.write(low)} to {metric.write(high)}"
        for name, title in ((HELD_OUT_LOSS, "held-out loss"), ("steps", "steps"), ("seconds", "seconds")):
            if any(other.get(name) is not None for other in self.rows):
                short[title] = None if row.get(name) is None else round(row[name], 4 if name == HELD_OUT_LOSS else 0)
        return short | ({"error": row["error"]} if any(other.get("error") for other in self.rows) else {})

    @property
    def scored(self) -> list[dict[str, Any]]:
        """The rows whose runs came to their end with a score, the best first; of the others a score says less."""
        return [row for row in self.rows if self.score and row.get(self.score) is not None and row["state"] in ENDED]

    @property
    def differences(self) -> "pandas.DataFrame":
        """Every setting in which the runs differ, one column a run."""
        from ..table import Table, write_value

        names = [row["run"] for row in self.rows]
        values = {run: [write_value(self.settings.get(run, {}).get(name)) for name in self.changed] for run in names}
        return Table(Table(values, index=self.changed or None).rename_axis("setting"))

    def figure(self) -> "Figure":
        """Draw the losses by step, and the score against each setting that differs."""
        from .figure import draw_results

        return draw_results(self)

    def show_figure(self) -> None:
        """Show the figure in a notebook, with its sentence for those who do not see it."""
        from IPython.display import display

        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=80)
        picture = base64.b64encode(file.getvalue()).decode()
        bundle = {"image/png": picture, "text/plain": f"Losses by step, and the score by setting: {self.sentence}"}
        display(
            bundle if any(any(curves.values()) for curves in self.curves.values()) else {"text/plain": self.sentence},
            raw=True,
        )

    @property
    def sentence(self) -> str:
        """What stands here, in words: how many runs, which is best, or why there is nothing to compare."""
        where = shorten_path(self.place)
        if not self.rows:
            return f"There is nothing to compare: no runs in {where}. `forgekit sweep` or `forgekit run` makes some."
        scored = self.scored
        words = (
            f"{len(self.rows)} runs in {where}"
            if len(self.rows) > 1
            else f"One run in {where}: nothing to compare it with"
        )
        if len(scored) > 1:
            words += f", {len(scored)} with a score; best by {self.score} ({'more' if self.maximize else 'less'} is better): {scored[0]['run']}"
        return f"{words}."

    def __repr__(self) -> str:
        return "\n".join([self.sentence, *([self.table.to_string(index=False)] if self.rows else [])])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.sentence)}</p>{self.table._repr_html_() if self.rows else ''}"


def read_results(place: str | Path = "") -> Results:
    """Read a sweep's results, or those of all runs of a run root.

    Args:
        place: a sweep's name or folder; the folder of runs; "" takes the run root: $FORGEKIT_RUNS, else `runs` in the
            current folder or one of the two above it.

    Raises RunError when there is neither a sweep nor a folder of that name.
    """
    root = find_runs_nearby()
    folder = next((path for path in (Path(place), root / SWEEPS / place) if (path / RECORD).is_file()), None)
    if place == "":
        folder = root
    elif folder is None:
        folder = Path(place)
        if not folder.is_dir():
            raise RunError(f"no sweep and no folder {str(place)!r}: there is none in {root / SWEEPS} or {Path.cwd()}.")
    folder = folder.absolute()
    return read_sweep_results(folder) if (folder / RECORD).is_file() else read_runs(folder)


def find_runs_nearby() -> Path:
    """Return the run root of a notebook that has no recipe: the nearest `runs`."""
    if os.environ.get("FORGEKIT_RUNS"):
        return find_run_root(None)
    places = [folder / "runs" for folder in (Path.cwd(), *list(Path.cwd().parents)[:2])]
    return next((place for place in places if place.is_dir()), places[0])


def read_sweep_results(folder: Path) -> Results:
    """Read what a sweep has made so far."""
    record = read_json(folder / RECORD)
    root = folder.parent.parent
    rows = []
    for run in record["runs"]:
        row = describe_run(root / run["name"], record["score"])
        own = {name: run["settings"].get(name) for name in record["settings"]}
        # the sweep knows more than the run: that it was pruned, or that it still waits
        rows.append({"run": run["name"], "state": run["state"], **own} | {k: v for k, v in row.items() if k not in ("run", "state", *own)})  # fmt: skip
        rows[-1] |= {"attempts": run["attempts"], "error": row.get("error") or run.get("reason")}
    for name in {name for row in rows for name in record["settings"] if row.get(name) is None} - {"recipe"}:
        for row in rows:  # a list names only what is another than the recipe's
            if row[name] is None:
                row[name] = read_settings(root / row["run"]).get(name)
    return make_results(folder, root, rows, record["settings"], record["score"], record["direction"] == "maximize")


def read_runs(root: Path) -> Results:
    """Read all runs that stand in a folder, whoever made them, in the order in which they began."""
    folders = sorted(path.parent for path in root.glob("*/run.json"))
    records = {folder: read_if_there(folder / "run.json") for folder in folders}
    folders.sort(key=lambda folder: str(records[folder].get("started_at", "")))
    metrics = [read_settings(folder).get("evaluate.metric") for folder in folders]
    named = [names[0] for names in metrics if names]
    score = max(named, key=named.count) if named else None
    settings = {folder: read_settings(folder) for folder in folders}
    changed = find_differences(list(settings.values()))
    rows = []
    for folder in folders:
        row = describe_run(folder, score)
        rows.append({"run": row["run"], "state": row["state"], **{n: settings[folder].get(n) for n in changed}} | row)
    return make_results(root, root, rows, changed, score, score is None or find_metric(score).higher)


def make_results(
    place: Path, root: Path, rows: list[dict[str, Any]], changed: list[str], score: str | None, maximize: bool
) -> Results:
    """Sort rows, the best first and what did not come to its end below, and add curves and settings."""

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float, float]:
        value, loss = row.get(score) if score else None, row.get(HELD_OUT_LOSS)
        sign = -1 if maximize else 1
        return (
            row["state"] not in ENDED,
            value is None,
            0.0 if value is None else sign * value,
            math.inf if loss is None else loss,
        )

    rows = sorted(rows, key=rank)
    curves = {row["run"]: Watch(root / row["run"]).read().curves for row in rows}
    settings = {row["run"]: read_settings(root / row["run"]) for row in rows}
    return Results(place, rows, changed, score, maximize, curves, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return a run's settings by dotted name."""
    found = read_if_there(folder / "run.json").get("settings", {})
    return {name: entry.get("value") for name, entry in found.items() if name not in NO_DIFFERENCE}


def find_differences(settings: list[dict[str, Any]]) -> list[str]:
    """Return the settings that are not the same in all runs that have any."""
    settings = [values for values in settings if values]
    names = dict.fromkeys(name for values in settings for name in values)
    return [name for name in names if len({json.dumps(values.get(name)) for values in settings}) > 1]


def describe_run(folder: Path, score: str | None) -> dict[str, Any]:
    """Return one run's columns; those that it does not have are missing."""
    record, stats = read_if_there(folder / "run.json"), read_if_there(folder / "metrics" / "training-stats.json")
    row: dict[str, Any] = {"run": folder.name, "state": record.get("state", "waiting")}
    for name, values in read_metrics(folder).items():
        row |= {name: values.get("score"), f"{name}_low": values.get("low"), f"{name}_high": values.get("high")}
    if score:
        row["before"] = read_metrics(folder, "baseline").get(score, {}).get("score")
    row |= {HELD_OUT_LOSS: read_score(folder, HELD_OUT_LOSS), "training_loss": stats.get("last_loss")}
    row |= {name: stats.get(name) for name in ("steps", "seconds", "median_step_seconds")}
    memory = stats.get("peak_gpu_memory_bytes")
    row |= {"peak_gpu_memory_gib": memory and round(memory / GIB, 3)}
    times = {name: record.get(name) for name in ("started_at", "finished_at")}
    return row | times | {"attempts": 1 + len(record.get("attempts", [])), "error": record.get("error")}


# ---- files -----------------------------------------------------------------------------------------------------------


def write_results(folder: Path) -> None:
    """Write a sweep's results.csv, results.parquet and results.png, each whole or not at all."""
    results = read_sweep_results(folder)
    if not results.rows:
        return
    # one kind a column: a list of layers or a recipe's name is text, and so is a column that holds both
    frame = results.frame.apply(lambda column: column if is_plain(column) else column.map(write_cell))
    frame = frame.map(lambda value: scrub(value) if isinstance(value, str) else value)
    write_text(folder / "results.csv", frame.to_csv(index=False), scrub)
    file = io.BytesIO()
    frame.to_parquet(file, index=False)
    write_bytes(folder / "results.parquet", file.getvalue())
    file = io.BytesIO()
    results.figure().savefig(file, format="png", dpi=100)
    write_bytes(folder / "results.png", file.getvalue())


def is_plain(column: Any) -> bool:
    """Say whether a column holds numbers alone, or truth values alone."""
    kinds = {type(value) for value in column if value is not None}
    return kinds <= {int, float} or kinds == {bool}


def write_cell(value: Any) -> str | None:
    """Return a value as text."""
    return value if value is None or isinstance(value, str) else json.dumps(value)
