"""What the base scores on the same rows, computed once; and whether a second, general set lost more than it may.

The base is the model in memory with its adapter switched off, so no second copy is loaded. Its scores depend on model, rows
and metric alone, so they are looked for before they are computed: in the run's own file, then in those of the other runs
beside it, the newest first. The key inside the file says what it holds.

    runs/second/metrics/baseline.json   <- copied from runs/first/metrics/baseline.json, when both keys are equal
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError, DataError, RunError
from ..files import read_json, write_json
from ..run_folder import Run, shorten_path
from ..scrub import remove_known
from .answers import ask_rows
from .comparison import Comparison, compare_scores
from .fingerprint import fingerprint_model
from .loss import RowLosses, sum_losses
from .scores import Scores, evaluate_model, make_key, read_scores

if TYPE_CHECKING:
    from datasets import Dataset

BASELINE, REGRESSION = "baseline.json", "regression.json"


def score_baseline(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    config: Config,
    run: Run,
    name: str = BASELINE,
    losses: RowLosses = sum_losses,
) -> Scores:
    """Score the base on held-out rows, or find its scores in this run or in one beside it; written to metrics/baseline.json.

    The adapter is off meanwhile. With load_in: full there is none, so call this before training.
    """
    path = run.path / "metrics" / name
    with without_adapter(model):
        key = predict_key(model, processor, dataset, config)
        found = find_scores(path, key)
        if found is None:
            return evaluate_model(model, processor, dataset, config, path, losses)
    scores = read_scores(found)
    if found != path:
        print(f"The base was scored on these rows before: {shorten_path(found)}")
        write_json(path, asdict(scores) | {"found_in": str(found.relative_to(run.path.parent))}, remove_known)
    return scores


@contextlib.contextmanager
def without_adapter(model: Any) -> Any:
    """Switch a model's adapter off, and on again; a model without one stays as it is."""
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield


def predict_key(model: Any, processor: Any, dataset: "Dataset", config: Config) -> dict[str, Any]:
    """Return the key that the scores of this model on these rows would have."""
    identity = fingerprint_model(model)
    rows = [{"key": row.find_key(identity, config)} for row in ask_rows(processor, dataset, config)]
    return make_key(rows, identity, config)


def find_scores(path: Path, key: dict[str, Any]) -> Path | None:
    """Return the file with this key: the run's own, else the newest of the runs beside it."""
    beside = [file for file in path.parent.parent.parent.glob(f"*/metrics/{path.name}") if file != path]
    beside.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    for file in (path, *beside):
        try:
            if file.is_file() and read_json(file).get("key") == key:
                return file
        except (RunError, AttributeError):  # half a file of a run that broke, or of another program
            continue
    return None


def check_regression(
    model: Any, processor: Any, dataset: "Dataset", config: Config, run: Run, losses: RowLosses = sum_losses
) -> Comparison:
    """Score base and tuned model on a second, general set, and write metrics/regression.json for the gate no-regression.

    Args:
        dataset: the general rows, from `load_general`.

    Returns the comparison; its verdict is the gate's. Raises ConfigError without evaluate.regression, and for load_in: full
    unless `score_baseline(..., name="regression-baseline.json")` was called on these rows before training.
    """
    limits = config.evaluate.regression
    if not limits:
        raise ConfigError("evaluate.regression is not set: {path: general.jsonl, drop: 0.02}.")
    settings = change_for_regression(config)
    folder, name = run.path / "metrics", "regression-baseline.json"
    if hasattr(model, "disable_adapter"):
        before = score_baseline(model, processor, dataset, settings, run, name, losses)
    elif (folder / name).is_file():
        before = read_scores(folder / name)
    else:
        raise ConfigError(
            "evaluate.regression compares with the base, and model.load_in: full has overwritten it. Call "
            f"score_baseline(model, processor, rows, config, run, {name!r}) before training."
        )
    after = evaluate_model(model, processor, dataset, settings, folder / "regression-scores.json", losses)
    found = compare_scores(before, after)
    write_json(folder / REGRESSION, {"path": limits["path"], "drop": limits["drop"], **describe_change(found)})
    return found


def change_for_regression(config: Config) -> Config:
    """Return the settings with the metric and number of rows of evaluate.regression."""
    limits = config.evaluate.regression
    names = {"evaluate.metric": limits.get("metric"), "evaluate.rows": limits.get("rows")}
    return config.change({name: value for name, value in names.items() if value is not None}, "evaluate.regression")


def load_general(config: Config, processor: Any) -> "Dataset":
    """Return the rows of evaluate.regression's path, in whatever known format they are. Raises DataError."""
    from ..data.load import load_data

    limits = config.evaluate.regression
    if not limits:
        raise DataError("evaluate.regression is not set: {path: general.jsonl, drop: 0.02}.")
    print(f"General set {limits['path']}: ", end="")
    # what the task's own rows are like and how they are split says nothing here, nor what training wants of them
    task = [
        f"data.{name}" for name in ("format", "template", "train", "validation", "test", "save_splits", "streaming")
    ]
    task += [f"train.{name}" for name in type(config.train).model_fields]
    settings = config.change({"data.path": limits["path"]}, "evaluate.regression", task)
    return load_data(settings, processor)["train"]


def describe_change(found: Comparison) -> dict[str, Any]:
    """Return the figures of the metric that decides, for a file."""
    change = found.change
    return {
        "metric": change.metric.name,
        "higher_is_better": change.metric.higher,
        "before": change.before,
        "after": change.after,
        "difference": change.difference,
        "low": change.low,
        "high": change.high,
        "rows": len(found.after.rows),
        "better": change.better,
        "worse": change.worse,
        "p": change.p,
    }
