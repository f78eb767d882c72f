"""A run's folder: one owner at a time, nothing written over."""

import os
from pathlib import Path

import pytest

from forgekit.config import Config, load_config
from forgekit.errors import RunError, RunNameError
from forgekit.files import read_json
from forgekit.run_folder import Run, check_name, find_run_root, start_run
from forgekit.run_lock import LOCK, lock_folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of runs, empty."""
    root = tmp_path / "runs"
    monkeypatch.setenv("FORGEKIT_RUNS", str(root))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_run_records_its_settings_with_origins_and_the_versions(runs: Path) -> None:
    run = start_run(load_config(None, {"train.seed": 5}), "first")
    record = read_json(runs / "first" / "run.json")
    assert (record["name"], record["state"], record["pid"], record["recipe"]) == ("first", "running", os.getpid(), "")
    assert record["settings"]["train.seed"] == {"value": 5, "from": "notebook"}
    assert record["settings"]["adapter.r"] == {"value": 16, "from": "default"}
    assert {"python", "torch", "transformers", "trl", "peft", "unsloth"} <= record["versions"].keys()
    run.finish()
    assert read_json(runs / "first" / "run.json")["state"] == "completed"


def test_finish_records_a_failure_with_its_reason(runs: Path) -> None:
    run = start_run(Config(), "first")
    run.update(exports={"adapter": "models/lora"})
    run.finish("failed", "out of memory")
    record = read_json(runs / "first" / "run.json")
    assert (record["state"], record["error"], record["exports"]) == (
        "failed",
        "out of memory",
        {"adapter": "models/lora"},
    )


def test_runs_stand_where_asked_else_beside_the_recipes_folder_else_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "project" / "params" / "text.yaml"
    recipe.parent.mkdir(parents=True)
    monkeypatch.delenv("FORGEKIT_RUNS", raising=False)
    assert find_run_root(recipe) == tmp_path / "project" / "runs"
    assert find_run_root(None) == tmp_path / "runs"
    monkeypatch.setenv("FORGEKIT_RUNS", "elsewhere")
    assert find_run_root(recipe) == tmp_path / "elsewhere"


def test_a_run_without_a_name_takes_the_time(runs: Path) -> None:
    name = start_run(Config()).path.name
    assert len(name) == len("20261121-142700") and name[8] == "-" and name.replace("-", "").isdigit()


@pytest.mark.parametrize("state", ["completed", "failed", "running"])
def test_the_name_of_a_run_that_is_there_is_refused_and_its_files_kept(state: str, runs: Path) -> None:
    start_run(Config(), "first").finish(state)
    before = (runs / "first" / "run.json").read_bytes()
    with pytest.raises(RunError) as caught:
        start_run(Config(), "first")
    assert str(caught.value) == (
        f"run 'first' exists and is {state}: {runs / 'first'}. Its files are kept; choose another run_name."
    )
    assert (runs / "first" / "run.json").read_bytes() == before


def test_a_run_inside_another_has_its_folder_in_it(runs: Path) -> None:
    outer = start_run(load_config(), "outer")
    inner = start_run(load_config(), "films", inside=outer)
    assert inner.path == outer.path / "films" and read_json(inner.path / "run.json")["state"] == "running"
    inner.finish()
    assert read_json(outer.path / "run.json")["state"] == "running"


@pytest.mark.parametrize("state", ["failed", "stopped", "crashed", "running"])
def test_a_run_that_did_not_complete_goes_on_when_that_is_asked_for(state: str, runs: Path) -> None:
    start_run(Config(), "first").finish(state, "why")
    for name in ("notebook.ipynb", "notebook.html", "result"):
        (runs / "first" / name).write_text("of the first attempt")
    run = start_run(Config(), "first", resume=True)
    (attempt,) = run.record["attempts"]
    assert (attempt["state"], attempt["error"], attempt["notebook"]) == (state, "why", "notebook-1.ipynb")
    assert run.record["state"] == "running" and "finished_at" not in run.record
    assert sorted(file.name for file in run.path.iterdir()) == [
        *(".lock", "notebook-1.html", "notebook-1.ipynb"),
        *("result", "run.json"),
    ]
    run.finish()
    with pytest.raises(RunNameError, match="exists and is completed"):
        start_run(Config(), "first", resume=True)


def test_a_folder_that_holds_something_else_is_refused_and_kept(runs: Path) -> None:
    (runs / "first").mkdir(parents=True)
    (runs / "first" / "thesis.txt").write_text("years")
    for resume in (False, True):
        with pytest.raises(RunNameError, match="exists and holds no run. Its files are kept"):
            start_run(Config(), "first", resume=resume)
    assert [file.name for file in (runs / "first").iterdir()] == ["thesis.txt"]


def test_under_forgekit_run_the_kernel_goes_on_with_the_run_that_was_begun(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(runs / "night", {"name": "night", "state": "running"}).update(notebook="01_text.ipynb")
    monkeypatch.setenv("FORGEKIT_RUN", "night")
    start_run(Config(), None)
    record = read_json(runs / "night" / "run.json")
    assert (record["notebook"], record["state"]) == ("01_text.ipynb", "running")
    assert "settings" in record


@pytest.mark.parametrize(
    "name", ["../up", "/abs", "a/b", ".hidden", "-x", "a b", "", "x" * 101, "a\n", "ü", None, 1.5, True]
)
def test_a_name_that_is_no_plain_folder_name_is_refused(name: object) -> None:
    with pytest.raises(RunError, match="use up to 100 letters, digits"):
        check_name(name)  # type: ignore[arg-type]


def test_no_run_stands_where_sweeps_do() -> None:
    with pytest.raises(RunError, match="run name 'sweeps': the folder of that name holds what sweeps write"):
        check_name("sweeps")
    assert check_name("sweeps-1") == "sweeps-1"


def test_a_name_that_papermill_made_a_number_of_is_taken(runs: Path) -> None:
    assert start_run(Config(), 20261121).path == runs / "20261121"


@pytest.mark.parametrize("place", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path below a file, and /proc, refuse the administrator too."""
    if place == "/proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc on this system")
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "runs" if place == "a file" else Path("/proc/runs")
    monkeypatch.setenv("FORGEKIT_RUNS", str(root))
    monkeypatch.delenv("FORGEKIT_RUN", raising=False)
    with pytest.raises(RunError) as caught:
        start_run(Config(), "first")
    assert str(caught.value).startswith(f"the run's folder {root / 'first'} cannot be written: ")
    assert str(caught.value).endswith("Set FORGEKIT_RUNS to a folder that can.")


def test_a_disk_that_fills_while_the_run_starts_is_one_sentence(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(RunError, match="first cannot be written: No space left on device. Set FORGEKIT_RUNS"):
        start_run(Config(), "first")


def test_finish_frees_the_lock(runs: Path) -> None:
    run = start_run(Config(), "first")
    with pytest.raises(RunError, match="in use by process"):
        lock_folder(run.path)
    run.finish()
    assert (run.path / LOCK).read_text() == ""  # without flock another machine sees the words alone
    lock_folder(run.path).close()
