"""Optuna's search: the same trials after a stop, weak runs ended early, the best found."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from forgekit.errors import ConfigError
from forgekit.sweep import search
from forgekit.sweep.job import Job
from forgekit.sweep.plan import Plan, plan_sweep
from forgekit.sweep.points import Point
from forgekit.sweep.run import show_plan

from .conftest import read_record, read_started, read_states, write_sweep
from .test_control import wait_for

pytestmark = pytest.mark.usefixtures("own_folder")

Sweep = Callable[..., int]
SEARCH = {
    "name": "find",
    "notebook": "toy.ipynb",
    "search": {
        "runs": 6,
        "first_draws": 3,
        "space": {
            "train.learning_rate": {"log_uniform": [1e-4, 2e-3]},
            "adapter.layers": [["mlp"], ["attention", "mlp"]],
            "adapter.r": {"integers": [4, 32]},
        },
    },
}


def prune(**how: object) -> dict:
    """The search with successive halving."""
    return SEARCH | {
        "settings": {"train.eval_steps": 5, "data.validation": 5},
        "search": SEARCH["search"] | {"prune": {"first_step": 10, "reduction": 2} | how},
    }


@pytest.fixture(autouse=True)
def optuna() -> object:
    return pytest.importorskip("optuna", reason="needs the extra `search`")


def open_study(optuna: object) -> object:
    return optuna.load_study(study_name="find", storage="sqlite:///runs/sweeps/find/search.db")  # type: ignore[attr-defined]


def test_a_search_draws_its_runs_and_learns_their_scores(sweep: Sweep, optuna: object) -> None:
    assert sweep({}, SEARCH) == 0
    assert read_started() == [f"find-{number:03d}" for number in range(6)]
    trials = open_study(optuna).get_trials()  # type: ignore[attr-defined]
    scores = [json.loads(Path("runs", f"find-{t.number:03d}", "metrics/scores.json").read_text()) for t in trials]
    assert [trial.value for trial in trials] == [found["metrics"]["json_equal"]["score"] for found in scores]
    settings = [run["settings"] for run in read_record("find")["runs"]]
    assert [point["train.learning_rate"] for point in settings] == [t.params["train.learning_rate"] for t in trials]
    assert {tuple(point["adapter.layers"]) for point in settings} <= {("mlp",), ("attention", "mlp")}
    assert len({point["train.learning_rate"] for point in settings}) == 6


def test_a_failed_trial_is_told_and_a_longer_search_goes_on_with_other_points(sweep: Sweep, optuna: object) -> None:
    assert sweep({"find-001": ["fail"]}, SEARCH, retries=0) == 1
    more = SEARCH | {"search": SEARCH["search"] | {"runs": 8}}
    assert sweep({}, more) == 1 and read_started()[6:] == ["find-006", "find-007"]
    trials = open_study(optuna).get_trials()  # type: ignore[attr-defined]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", *["COMPLETE"] * 6]
    assert len({trial.params["train.learning_rate"] for trial in trials}) == 8


def test_a_stopped_search_goes_on_with_the_same_points(sweep: Sweep, optuna: object) -> None:
    def stop() -> None:
        wait_for(lambda: Path("runs/find-002/status.json").exists())
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert sweep({"find-002": ["wait", "ok"]}, SEARCH) == 143
    stopper.join()
    assert read_states("find") == {"000": "completed", "001": "completed", "002": "stopped"}
    before = [run["settings"] for run in read_record("find")["runs"]]
    assert sweep({"find-002": ["wait", "ok"]}, SEARCH) == 0
    assert read_started() == [f"find-{number:03d}" for number in (0, 1, 2, 2, 3, 4, 5)]
    assert [run["settings"] for run in read_record("find")["runs"]][:3] == before
    assert {trial.state.name for trial in open_study(optuna).get_trials()} == {"COMPLETE"}  # type: ignore[attr-defined]


def test_weak_runs_are_ended_early_and_not_taken_up_again(
    sweep: Sweep, optuna: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("forgekit.sweep.control.LOOK_SECONDS", 0.05)
    assert sweep({"*": ["slow"]}, prune()) == 0
    states = read_states("find")
    trials = open_study(optuna).get_trials()  # type: ignore[attr-defined]
    weak = [f"{trial.number:03d}" for trial in trials if trial.state.name == "PRUNED"]
    assert weak and [name for name, state in states.items() if state == "pruned"] == weak
    assert all(json.loads(Path(f"runs/find-{name}/run.json").read_text())["state"] == "stopped" for name in weak)
    best = max((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    assert best.number not in map(int, weak) and "is not among the best" in capsys.readouterr().out
    assert sweep({"*": ["slow"]}, prune(), only_missing=True) == 0
    assert len(read_started()) == 6 and read_states("find") == states


def test_a_run_at_its_last_step_is_scored_and_not_ended(
    sweep: Sweep, optuna: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgekit.sweep.control.LOOK_SECONDS", 0.05)
    values = prune(first_step=30)  # the stand-in's losses stand at steps 10, 20 and 30
    settings = values["settings"] | {"train.max_steps": 30}
    assert sweep({"*": ["slow"]}, values | {"settings": settings}) == 0
    trials = open_study(optuna).get_trials()  # type: ignore[attr-defined]
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert not any(trial.intermediate_values.get(30) for trial in trials)
    assert any(trial.intermediate_values for trial in trials)


def test_a_study_of_another_space_is_refused(sweep: Sweep) -> None:
    assert sweep({}, SEARCH) == 0
    other = SEARCH | {"search": {"runs": 6, "space": {"adapter.r": [8, 16]}}}
    with pytest.raises(ConfigError, match="Give the sweep another name"):
        sweep({}, other)
    with pytest.raises(ConfigError, match="Give the sweep another name"):
        sweep({}, SEARCH | {"objective": {"direction": "minimize"}})


def test_pruning_needs_held_out_losses_or_takes_the_training_s() -> None:
    with pytest.raises(ConfigError, match="held_out_loss is measured during training"):
        plan_sweep(write_sweep(prune() | {"settings": {}}))
    assert plan_sweep(write_sweep(prune(by="loss") | {"settings": {}})).sweep.search is not None


def test_a_dry_run_shows_the_ranges() -> None:
    lines = show_plan(write_sweep(SEARCH)).splitlines()
    assert lines[0].startswith("a search of 6 runs, compared by json_equal (more is better), ")
    assert lines[2] == 'adapter.layers  choices [["mlp"], ["attention", "mlp"]]'


def test_without_optuna_the_extra_is_named(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'forgekit\[search\]'"):
        search.import_optuna()


# ---- points that cannot be run, files that changed -------------------------------------------------------------------


def test_a_drawn_point_that_is_invalid_fails_its_trial_and_the_search_goes_on(
    sweep: Sweep, optuna: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job, told = Plan.make_job, []

    def refuse(self: Plan, point: Point, has_gpu: bool) -> Job:
        if point.name == "find-002":
            told.append(point.name)
            raise ConfigError("train.max_length and adapter.r do not go together.")
        return make_job(self, point, has_gpu)

    monkeypatch.setattr(Plan, "make_job", refuse)
    assert sweep({}, SEARCH) == 1
    assert read_states("find") == {f"{n:03d}": "refused" if n == 2 else "completed" for n in range(6)}
    trials = open_study(optuna).get_trials()  # type: ignore[attr-defined]
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2 + ["FAIL"] + ["COMPLETE"] * 3
    assert sweep({}, SEARCH) == 1 and told == ["find-002"]


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_a_whole_number_is_not_drawn_as_a_fraction(kind: str) -> None:
    space = {"adapter.r": {kind: [4, 64]}}
    with pytest.raises(ConfigError, match=r"adapter.r is .*: it should be a whole number"):
        plan_sweep(write_sweep(SEARCH | {"search": {"runs": 3, "space": space}}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"train.seed": 5}}, r"settings was {}, and is {\"train.seed\": 5} now"),
        ({"recipe": "recipe.yaml"}, r"recipe was \[\], and is"),
        ({"objective": {"score": "exact_match"}}, r'score was "json_equal", and is "exact_match" now'),
        ({"search": SEARCH["search"] | {"space": SEARCH["search"]["space"] | {"adapter.layers": [["mlp"]]}}}, "space was"),
        ({"search": SEARCH["search"] | {"space": SEARCH["search"]["space"] | {"adapter.r": {"integers": [40, 50]}}}}, "space was"),
    ],
)  # fmt: skip
def test_a_search_does_not_go_on_with_a_file_that_was_changed(sweep: Sweep, changes: dict, words: str) -> None:
    begun = SEARCH | {"search": SEARCH["search"] | {"runs": 1}}
    assert sweep({}, begun) == 0
    with pytest.raises(ConfigError, match=words):
        sweep({}, begun | changes)
    assert len(read_started()) == 1


def test_a_recipe_that_was_changed_is_seen_in_the_completed_runs(sweep: Sweep) -> None:
    begun = SEARCH | {"search": SEARCH["search"] | {"runs": 1}}
    assert sweep({}, begun) == 0
    record = json.loads(Path("runs/find-000/run.json").read_text())
    record["settings"]["train.seed"] = {"value": 1, "from": "recipe.yaml"}
    Path("runs/find-000/run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="run find-000: train.seed: 1, now"):
        sweep({}, begun)


def test_a_value_outside_of_the_space_is_no_error_of_optuna_s(sweep: Sweep, optuna: object) -> None:
    begun = SEARCH | {"search": SEARCH["search"] | {"runs": 1}}
    assert sweep({}, begun) == 0
    study = open_study(optuna)
    changed = study.user_attrs["definition"]  # type: ignore[attr-defined]
    space = SEARCH["search"]["space"] | {"adapter.layers": [["attention"]]}
    changed["space"] = changed["space"] | {"adapter.layers": {"choices": [["attention"]]}}
    study.set_user_attr("definition", changed)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="Give the sweep another name"):
        sweep({}, begun | {"search": begun["search"] | {"space": space}})


def test_a_trial_that_was_only_half_drawn_is_drawn_to_its_end(sweep: Sweep, optuna: object) -> None:
    begun = SEARCH | {"search": SEARCH["search"] | {"runs": 1}}
    assert sweep({}, begun) == 0
    open_study(optuna).ask().suggest_float("train.learning_rate", 1e-4, 2e-3, log=True)  # type: ignore[attr-defined]
    assert sweep({}, begun | {"search": begun["search"] | {"runs": 2}}) == 0
    assert read_started() == ["find-000", "find-001"]


def test_a_search_counts_the_gpus_of_its_runs() -> None:
    plan = plan_sweep(write_sweep(SEARCH | {"settings": {"train.gpus": 2}}))
    assert plan.count_gpus() == 2
