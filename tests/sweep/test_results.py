"""Runs side by side: of a sweep, of any folder; tables, figure, files that are whole or the earlier ones."""

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from forgekit.errors import RunError
from forgekit.sweep import results
from forgekit.sweep.results import Results, read_results, write_results
from forgekit.sweep.watch import Watch

from .conftest import NAMES

pytestmark = pytest.mark.usefixtures("own_folder")


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(name: str, score: float | None, state: str = "completed", **settings: Any) -> Path:
    """A run's folder with what a comparison reads of it."""
    folder = Path("runs", name)
    settings = {"train.learning_rate": 0.001, "evaluate.metric": ["json_equal", "exact_match"]} | settings
    record = {"state": state, "started_at": f"2026-01-01T00:00:{len(list(Path('runs').glob('*'))):02d}+00:00"}
    error = None if state == "completed" else f"ValueError in {name}"
    shown = {key: {"value": value, "from": "--set"} for key, value in settings.items()}
    write(folder / "run.json", record | {"settings": shown, "error": error})
    (folder / "logs").mkdir()
    lines = [{"step": s, key: 2 - s / 10} for s in (1, 2, 3) for key in ("loss", "eval_loss")]
    (folder / "logs/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if score is not None:
        values = {"score": score, "low": score - 0.1, "high": score + 0.1}
        write(folder / "metrics/scores.json", {"metrics": {"json_equal": values, "loss": values}})
        write(folder / "metrics/baseline.json", {"metrics": {"json_equal": {"score": 0.0, "low": 0.0, "high": 0.1}}})
        write(folder / "metrics/training-stats.json", {"best_held_out_loss": 1.7, "steps": 3, "seconds": 9.4})
    return folder


def write_sweep_record(names: list[str], settings: list[str], points: list[dict], **changes: Any) -> Path:
    runs = [{"name": n, "settings": p, "state": "completed", "attempts": 1, "reason": None} for n, p in zip(names, points, strict=True)]  # fmt: skip
    record = {"name": "rates", "score": "json_equal", "direction": "maximize", "settings": settings, "runs": runs}
    write(Path("runs/sweeps/rates/sweep.json"), record | changes)
    return Path("runs/sweeps/rates")


def names(found: Results) -> list[str]:
    return [row["run"] for row in found.rows]


@pytest.fixture
def rates() -> Path:
    """A sweep of three completed runs, the second the best."""
    for name, score in zip(NAMES, (0.5, 0.8, 0.2), strict=True):
        write_run(name, score, **{"train.learning_rate": float(name.rpartition("-")[2])})
    points = [{"train.learning_rate": float(name.rpartition("-")[2])} for name in NAMES]
    return write_sweep_record(NAMES, ["train.learning_rate"], points)


# ---- a sweep ---------------------------------------------------------------------------------------------------------


def test_a_sweep_is_found_by_name_and_folder_and_the_best_stands_first(rates: Path) -> None:
    for place in ("rates", rates, str(rates.absolute())):
        found = read_results(place)
        assert names(found) == [NAMES[1], NAMES[0], NAMES[2]] and found.changed == ["train.learning_rate"]
    assert "best by json_equal (more is better): rates-learning_rate-0.001." in found.sentence
    table = found.table
    assert [*table.columns] == ["run", "state", "learning_rate", "before: JSON equal, %", "JSON equal, %", "95 %", "held-out loss", "steps", "seconds"]  # fmt: skip
    assert list(table.iloc[0]) == [NAMES[1], "completed", "0.001", 0.0, 80.0, "70.0 to 90.0", 1.7, 3, 9]
    assert "<table>" in found._repr_html_() and "80" in repr(found)


def test_less_is_better_where_the_sweep_says_so(rates: Path) -> None:
    record = json.loads((rates / "sweep.json").read_text())
    write(rates / "sweep.json", record | {"direction": "minimize"})
    assert names(read_results("rates")) == [NAMES[2], NAMES[0], NAMES[1]]


def test_only_a_run_that_came_to_its_end_is_best(rates: Path) -> None:
    record = json.loads((rates / "sweep.json").read_text())
    record["runs"][1]["state"], record["runs"][0]["state"] = "pruned", "gates_failed"
    write(rates / "sweep.json", record)
    found = read_results("rates")
    assert names(found) == [NAMES[0], NAMES[2], NAMES[1]] and [row["run"] for row in found.scored] == names(found)[:2]
    assert f"2 with a score; best by json_equal (more is better): {NAMES[0]}." in found.sentence


def test_settings_that_end_alike_are_told_apart(rates: Path) -> None:
    points = [{"data.path": f"rows{i}", "adapter.path": f"weights{i}", "adapter.r": i} for i in range(3)]
    write_sweep_record(NAMES, ["data.path", "adapter.path", "adapter.r"], points)
    table = read_results("rates").table.set_index("run")
    assert [*table.columns][1:4] == ["data.path", "adapter.path", "r"]
    assert list(table.loc[NAMES[2]])[1:4] == ["rows2", "weights2", "2"]


def test_csv_and_parquet_hold_the_same_and_the_figure_is_a_picture(rates: Path) -> None:
    write_results(rates)
    csv, parquet = pandas.read_csv(rates / "results.csv"), pandas.read_parquet(rates / "results.parquet")
    assert [*csv.columns] == [*parquet.columns] and [*csv["json_equal"]] == [*parquet["json_equal"]] == [0.8, 0.5, 0.2]
    assert parquet["train.learning_rate"].dtype == float and parquet["held_out_loss"].dtype == float
    assert (rates / "results.png").read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in rates.iterdir()} == {
        "sweep.json",
        *(f"results.{e}" for e in ("csv", "parquet", "png")),
    }


def test_values_of_all_kinds_become_one_column_each(rates: Path) -> None:
    points = [{"adapter.layers": ["mlp"], "data.train": 8}, {"data.train": "file.jsonl"}, {"adapter.use_dora": True}]
    record = {"settings": ["adapter.layers", "data.train", "adapter.use_dora"]}
    write_sweep_record(NAMES, record["settings"], points)
    write_results(rates)
    parquet = pandas.read_parquet(rates / "results.parquet").set_index("run")
    assert parquet.loc[NAMES[0], "adapter.layers"] == '["mlp"]' and parquet.loc[NAMES[0], "data.train"] == "8"
    assert parquet.loc[NAMES[2], "adapter.use_dora"]


def test_tokens_and_home_folders_stay_out_of_the_results(rates: Path) -> None:
    token, home = "hf_" + "a1B2" * 9, str(Path.home())
    file = Path("runs", NAMES[0], "run.json")
    write(file, json.loads(file.read_text()) | {"error": f"{token} in {home}/x"})
    write_results(rates)
    assert (
        token not in (rates / "results.csv").read_text()
        and token.encode() not in (rates / "results.parquet").read_bytes()
    )
    error = pandas.read_parquet(rates / "results.parquet").set_index("run").loc[NAMES[0], "error"]
    assert error.endswith("in ~/x")


def test_a_full_disk_leaves_the_earlier_files(rates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(rates)
    before = {path.name: path.read_bytes() for path in rates.iterdir()}

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    write_run("new", 0.9)
    monkeypatch.setattr(results.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_results(rates)
    with pytest.raises(OSError, match="No space left"):
        results.write_bytes(rates / "results.png", b"half")
    assert {path.name: path.read_bytes() for path in rates.iterdir()} == before


def test_the_figure_draws_every_curve_and_a_panel_a_setting(rates: Path) -> None:
    found = read_results("rates")
    curves, panel = found.figure().axes
    assert len(curves.lines) == 6 and panel.get_xlabel() == "train.learning_rate"
    heights = sorted(
        line.get_ydata()[0] for line in panel.lines if len(line.get_xdata()) == 1 and line.get_marker() in "o*"
    )
    assert heights == pytest.approx([20, 50, 80])


# ---- any runs --------------------------------------------------------------------------------------------------------


def test_runs_that_no_sweep_made_are_compared_by_their_own_settings(rates: Path) -> None:
    write_run("by-hand", 0.9, **{"train.learning_rate": 0.001, "adapter.r": 32})
    write_run("broken", None, "failed")
    found = read_results()
    assert names(found) == ["by-hand", NAMES[1], NAMES[0], NAMES[2], "broken"]
    assert found.changed == ["train.learning_rate", "adapter.r"] and found.score == "json_equal"
    assert list(found.differences.loc["adapter.r"]) == ["32", "", "", "", ""]
    assert "ValueError in broken" in found.table.to_string()


def test_a_sweep_s_folder_is_no_run(rates: Path) -> None:
    assert "sweeps" not in names(read_results()) and len(read_results().rows) == 3


def test_nothing_and_one_run_are_said_in_words() -> None:
    found = read_results()
    assert (
        found.sentence == "There is nothing to compare: no runs in runs. `forgekit sweep` or `forgekit run` makes some."
    )
    assert found.sentence in repr(found) and found.rows == [] and found.table.empty and found.differences.empty
    write_run("alone", 0.5)
    found = read_results()
    assert "JSON equal, %" in found.table.columns
    (Path("runs") / "alone" / "metrics/scores.json").unlink()
    assert [*read_results().table.columns] == ["run", "state", "held-out loss", "steps", "seconds"]
    assert found.sentence == "One run in runs: nothing to compare it with." and len(found.figure().axes) == 1


def test_a_place_that_is_neither_is_refused() -> None:
    with pytest.raises(RunError, match="no sweep and no folder 'nowhere'"):
        read_results("nowhere")


def test_the_nearest_folder_of_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    write_run("first", 0.5)
    Path("notebooks").mkdir()
    monkeypatch.chdir("notebooks")
    monkeypatch.delenv("FORGEKIT_RUNS")
    assert names(read_results()) == ["first"]


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_a_log_is_read_as_it_grows_and_half_lines_wait() -> None:
    watch, file = Watch(Path("run")), Path("run/logs/metrics.jsonl")
    assert watch.read().curves == {"loss": {}, "held_out_loss": {}}
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert watch.read().curves["loss"] == {1: 2.0}
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\nnot json\n{"step": 3, "loss": 1.5}\n')
    assert watch.read().curves["loss"] == {1: 2.0, 3: 1.5}
    file.write_text('{"step": 1, "loss": 9.0}\n')  # begun anew
    assert watch.read().curves["loss"] == {1: 9.0, 3: 1.5}
