"""The text notebook, executed once without a browser: its score, its run's folder, its last words, its stored outputs.

`make outputs` executes the notebook and stores its outputs anew; `FORGEKIT_RUNS=$(mktemp -d) pytest --nbval
notebooks/01_text.ipynb` executes it and compares. The folder is a fresh one because a base that was scored in a run beside
is not scored again, and says so. Here the outputs of the one execution are compared by nbval's own functions.
"""

import html
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from .conftest import EXPORTS, Finished, collect_cells, find_differences, find_output, run_notebook

NOTEBOOK = "notebooks/01_text.ipynb"
LAYOUT = """
run.json plan.json status.json parameters.json notebook.ipynb notebook.html
logs/training.log logs/metrics.jsonl
metrics/baseline.json metrics/training-stats.json metrics/scores.json metrics/gates.json
models/lora/adapter_config.json models/lora/adapter_model.safetensors models/lora/README.md models/lora/verify.json
models/merged/config.json models/merged/model.safetensors models/merged/tokenizer.json models/merged/README.md
models/merged/verify.json
models/quantized/model-Q8_0.gguf models/quantized/model-Q8_0.verify.json models/quantized/verify.json
models/quantized/README.md
""".split()
GATES = ["baseline-established", "model-performance", "quantization-verified"]
FOLDERS = {"checkpoints", "logs", "metrics", "models"}


def check_scores(finished: Finished) -> None:
    """At most 10 of 100 answers right before, at least 50 points more after."""
    before, after = finished.read("metrics/baseline.json"), finished.read("metrics/scores.json")
    assert len(before["rows"]) == len(after["rows"]) == 100
    assert [row["question"] for row in before["rows"]] == [row["question"] for row in after["rows"]]
    for scores in (before, after):
        assert scores["exact_match"] == sum(row["prediction"] == row["reference"] for row in scores["rows"]) / 100
    assert before["exact_match"] <= 0.10
    assert after["exact_match"] >= before["exact_match"] + 0.50
    assert after["loss"] < before["loss"]


# ---- the run --------------------------------------------------------------------------------------------------------


def test_the_tuned_model_answers_rows_it_has_not_seen(text_run: Finished) -> None:
    check_scores(text_run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds_learn_as_well(seed: int, project_folder: Path, tmp_path: Path) -> None:
    finished = run_notebook("text", project_folder, tmp_path, "--set", f"train.seed={seed}")
    assert finished.read("run.json")["settings"]["train.seed"] == {"value": seed, "from": "--set"}
    check_scores(finished)


def test_record_says_completed_with_settings_and_scores(text_run: Finished) -> None:
    record = text_run.read("run.json")
    assert (record["name"], record["state"], record["error"]) == ("text", "completed", None)
    assert record["settings"]["model.id"] == {"value": "tiny", "from": "text_quick.yaml"}
    assert record["exports"] == EXPORTS
    assert record["verified"] == dict.fromkeys(EXPORTS, True)
    assert record["training"]["steps"] == record["settings"]["train.max_steps"]["value"]
    assert record["versions"]["transformers"] and record["finished_at"] > record["started_at"]


def test_run_folder_holds_what_is_promised_and_nothing_else(text_run: Finished) -> None:
    missing = [name for name in LAYOUT if not (text_run.folder / name).is_file()]
    assert not missing
    assert {path.name for path in text_run.folder.iterdir() if path.is_dir()} == FOLDERS
    top = {path.name for path in text_run.folder.iterdir() if path.is_file()} - {".lock"}
    assert top == {name for name in LAYOUT if "/" not in name}
    assert text_run.read("status.json")["running"] is False


def find_training_cell(finished: Finished) -> nbformat.NotebookNode:
    return next(cell for cell in finished.notebook.cells if "trainer.train()" in cell.source)


def test_training_cell_holds_the_curve_and_its_summary(text_run: Finished) -> None:
    cell = find_training_cell(text_run)
    pictures = [output.data for output in cell.outputs if output.output_type == "display_data"]
    assert [sorted(data) for data in pictures] == [["image/png", "text/plain"]]
    assert re.search(r"Loss curve: from \d.* to \d.*, lowest \d", "".join(o.get("text", "") for o in cell.outputs))


# ---- is it better, and is the file the model? ------------------------------------------------------------------------


def test_the_score_table_has_intervals_for_every_metric(text_run: Finished) -> None:
    shown = find_output(text_run, "fk.compare_scores")
    after = text_run.read("metrics/scores.json")["metrics"]
    for metric, label in (("json_equal", "JSON equal, %"), ("exact_match", "exact match, %")):
        low, high = (f"{100 * after[metric][bound]:.1f}" for bound in ("low", "high"))
        row = re.search(rf"<tr><td[^>]*>{label}.*?</tr>", shown, re.S)
        assert row and f"{low} to {high}" in row.group(), (metric, row)
    assert "sign test p = " in shown and "data:image/png" in shown


def test_every_gate_of_the_recipe_passed_and_is_shown_with_its_reason(text_run: Finished) -> None:
    judged = text_run.read("metrics/gates.json")["gates"]
    assert [(gate["gate"], gate["verdict"]) for gate in judged] == [(name, "passed") for name in GATES]
    assert text_run.read("run.json")["gates"] == dict.fromkeys(GATES, "passed")
    texts = [find_output(text_run, "fk.check_gates"), read_ending(text_run)]
    texts += [(text_run.folder / place / "README.md").read_text() for place in ("models/lora", "models/quantized")]
    for text in texts:
        assert [
            gate["reason"] for gate in judged if html.escape(gate["reason"]) not in text and gate["reason"] not in text
        ] == []


def test_the_gguf_file_alone_gives_the_same_answer_through_llama_cpp(text_run: Finished) -> None:
    said = [
        "".join(output.get("text", "") for output in cell.outputs).strip().splitlines()[-1]
        for cell in text_run.notebook.cells
        if "answer = fk.generate_answer" in cell.source or "fk.ask_gguf" in cell.source
    ]
    assert said[0] == said[1] and json.loads(said[0])["item"] == "honey"


def test_notebook_and_page_carry_no_widgets(text_run: Finished) -> None:
    assert "widgets" not in text_run.notebook.metadata
    page = (text_run.folder / "notebook.html").read_text(encoding="utf-8")
    assert "widget-view" not in page
    (curve,) = [o.data["image/png"] for o in find_training_cell(text_run).outputs if o.output_type == "display_data"]
    assert curve.strip() in page and "exact match, %" in page


# ---- what the terminal shows ----------------------------------------------------------------------------------------


def test_nothing_is_printed_that_a_user_cannot_act_on(text_run: Finished) -> None:
    assert text_run.done.stderr == ""
    noise = re.compile(r"warning|deprecat|\bit/s|without encryption|^[WI]\d{4} ", re.IGNORECASE | re.MULTILINE)
    assert not noise.search(text_run.done.stdout)


def read_ending(finished: Finished) -> str:
    return finished.done.stdout.split("\nRun text: completed\n", 1)[1]


def test_last_words_show_both_scores_and_five_answers(text_run: Finished) -> None:
    ending = read_ending(text_run)
    before, after = text_run.read("metrics/baseline.json"), text_run.read("metrics/scores.json")
    assert re.search(rf"exact match +{before['exact_match']:.1%} +{after['exact_match']:.1%}\n", ending)
    assert [words.strip() for words in re.findall(r"^  question  (.*)$", ending, re.M)] == [
        row["question"] for row in after["rows"][:5]
    ]
    answers = re.findall(r"^  after     (.*?)   \((right|right would be: .*)\)$", ending, re.M)
    assert answers == [
        (row["prediction"], "right" if row["right"] else f"right would be: {row['reference']}")
        for row in after["rows"][:5]
    ]
    assert len(re.findall(r"^  before    ", ending, re.M)) == 5


def test_every_path_of_the_last_words_exists(text_run: Finished) -> None:
    listed, opening = read_ending(text_run).split("Where things are\n")[1].split("\nOpen it in JupyterLab:")
    places = dict(re.findall(r"^  (run|notebook|as HTML|log|adapter|merged) +(.*)$", listed, re.M))
    assert list(places) == ["run", "notebook", "as HTML", "log", "adapter", "merged"]
    assert Path(places["run"]) == text_run.folder
    assert all(Path(place).exists() for place in places.values())
    *command, verb, notebook = shlex.split(opening)
    assert verb == "lab" and Path(notebook) == Path(places["notebook"])
    assert command in (["forgekit"], [sys.executable, "-m", "forgekit"])


# ---- stored outputs -------------------------------------------------------------------------------------------------


def test_stored_outputs_are_those_of_this_execution(
    text_run: Finished, project_folder: Path, request: pytest.FixtureRequest
) -> None:
    differences = find_differences(project_folder / NOTEBOOK, text_run.notebook, request.session)
    assert not differences, "\n".join(f"{cell}: {text}" for cell, text in differences.items()) + "\nmake outputs"


def change_first_digit(output: Any) -> None:
    """Change the first digit of an output's text, as another model, row or setting would."""
    holder, key = (output, "text") if output.output_type == "stream" else (output.data, "text/plain")
    holder[key] = re.sub(r"\d", lambda digit: str((int(digit.group()) + 1) % 10), holder[key], count=1)


def test_one_changed_output_turns_the_comparison_red(
    text_run: Finished, project_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    items = collect_cells(project_folder / NOTEBOOK, request.session)
    checked = [item.cell.id for item in items if item.options["check"] and item.cell.outputs]
    assert len(checked) >= 6  # settings, rows, example, labels, counts, score before
    red = []
    for cell_id in checked:
        mutant = nbformat.read(project_folder / NOTEBOOK, as_version=4)
        change_first_digit(next(cell for cell in mutant.cells if cell.id == cell_id).outputs[0])
        nbformat.write(mutant, tmp_path / "mutant.ipynb")
        red += find_differences(tmp_path / "mutant.ipynb", text_run.notebook, request.session)
    assert red == checked


@pytest.mark.slow
def test_nbval_by_its_own_command_agrees(project_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path))
    command = [sys.executable, "-m", "pytest", "--nbval", NOTEBOOK, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=project_folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
