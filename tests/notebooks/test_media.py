"""The vision and audio notebooks, each executed once with its quick recipe: scores, towers, answers, films, stored outputs."""

import re
from pathlib import Path
from typing import Any

import pytest

from .conftest import EXPORTS, NOTEBOOKS, Finished, find_differences, find_output, run_notebook

# held-out rows, and points of exact match that the recipe gains at least
ROWS = {"vision": 200, "audio": 100}
POINTS = {"vision": 60, "audio": 50}
LONGEST_SECONDS = 180  # on two idle cores; `make test` may run beside other work, so only twice that fails


def get_run(kind: str, request: pytest.FixtureRequest) -> Finished:
    return request.getfixturevalue(f"{kind}_run")


def check_scores(kind: str, finished: Finished) -> None:
    before, after = finished.read("metrics/baseline.json"), finished.read("metrics/scores.json")
    assert len(before["rows"]) == len(after["rows"]) == ROWS[kind]
    for scores in (before, after):
        assert scores["exact_match"] == sum(r["prediction"] == r["reference"] for r in scores["rows"]) / ROWS[kind]
    assert 100 * (after["exact_match"] - before["exact_match"]) >= POINTS[kind]
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize("kind", ROWS)
def test_the_score_moves_far_on_rows_it_has_not_seen(kind: str, request: pytest.FixtureRequest) -> None:
    check_scores(kind, get_run(kind, request))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", ROWS)
def test_other_seeds_learn_as_well(kind: str, seed: int, project_folder: Path, tmp_path: Path) -> None:
    check_scores(kind, run_notebook(kind, project_folder, tmp_path, "--set", f"train.seed={seed}"))


@pytest.mark.parametrize("kind", ROWS)
def test_the_run_takes_minutes(kind: str, request: pytest.FixtureRequest) -> None:
    cells = [cell.metadata["papermill"]["duration"] for cell in get_run(kind, request).notebook.cells]
    assert sum(seconds or 0 for seconds in cells) < 2 * LONGEST_SECONDS


@pytest.mark.parametrize("kind", ROWS)
def test_every_tower_learned(kind: str, request: pytest.FixtureRequest) -> None:
    from safetensors import safe_open

    with safe_open(get_run(kind, request).folder / "models/lora/adapter_model.safetensors", "pt") as adapter:
        learned = {name: adapter.get_tensor(name).abs().max() > 0 for name in adapter.keys() if "lora_B" in name}  # noqa: SIM118
    for tower in (f"{kind}_tower", f"embed_{kind}", "language_model"):
        assert any(tower in name for name in learned), tower
    assert sum(learned.values()) > 0.9 * len(learned)


@pytest.mark.parametrize(("kind", "medium"), [("vision", "<img"), ("audio", "<audio")])
def test_five_answers_are_shown_with_what_was_asked(kind: str, medium: str, request: pytest.FixtureRequest) -> None:
    finished = get_run(kind, request)
    shown = find_output(finished, "fk.ComparePanel")
    assert shown.count(medium) == 5
    before, after = finished.read("metrics/baseline.json")["rows"], finished.read("metrics/scores.json")["rows"]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", shown, re.S)]
    for i in range(5):
        reference, first, last = after[i]["reference"], before[i]["prediction"], after[i]["prediction"]
        assert cells[5 * i + 1 : 5 * i + 4] == [reference, first, last]


@pytest.mark.parametrize("kind", ROWS)
def test_exports_are_verified_and_the_gates_pass(kind: str, request: pytest.FixtureRequest) -> None:
    finished = get_run(kind, request)
    record = finished.read("run.json")
    assert record["exports"] == EXPORTS and record["verified"] == dict.fromkeys(EXPORTS, True)
    assert len(record["gates"]) == 3 and set(record["gates"].values()) == {"passed"}
    shown = find_output(finished, "fk.check_gates")
    assert [gate for gate in record["gates"] if gate not in shown] == []


@pytest.mark.parametrize("kind", ROWS)
def test_the_gguf_file_answers_a_question_in_words(kind: str, request: pytest.FixtureRequest) -> None:
    finished = get_run(kind, request)
    (cell,) = [cell for cell in finished.notebook.cells if "fk.ask_gguf" in cell.source]
    assert "".join(output.get("text", "") for output in cell.outputs).strip()


def test_a_film_is_learned_from_and_answered(vision_run: Finished) -> None:
    assert vision_run.read("films/run.json")["state"] == "completed"
    assert vision_run.read("films/metrics/training-stats.json")["steps"] == 2
    assert find_output(vision_run, 'film_data["test"]').count("<img") == 4


@pytest.mark.parametrize("kind", ROWS)
def test_stored_outputs_are_those_of_this_execution(
    kind: str, project_folder: Path, request: pytest.FixtureRequest
) -> None:
    notebook: Any = get_run(kind, request).notebook
    differences = find_differences(project_folder / f"notebooks/{NOTEBOOKS[kind]}.ipynb", notebook, request.session)
    assert not differences, "\n".join(f"{cell}: {text}" for cell, text in differences.items()) + "\nmake outputs"
