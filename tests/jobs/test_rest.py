"""A run started, watched, stopped, gone on with and fetched over the job API of a real JupyterLab."""

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest

from forgekit.files import read_json

from .conftest import START, Server, wait_for, write_notebook

# without torch: the first attempt waits to be stopped, the second goes through
WAIT = """
import time

logs = run.path / "logs"
logs.mkdir(exist_ok=True)
with open(logs / "metrics.jsonl", "a") as file:
    file.write('{"step": 1}\\n')
if not run.record.get("attempts"):
    (run.path / "waits").touch()
    time.sleep(120)
print("arrived with", config.train.max_steps, config.adapter.layers)
"""
TRAIN = """
import time

processor = fk.load_processor(config)
data = fk.load_data(config, processor)
model, processor = fk.load_model(config)
trainer = fk.sft_trainer(fk.add_adapter(model, config), processor, data, config, run)
step = trainer.training_step

def take_time(*batch):
    if not run.record.get("attempts"):  # the first attempt is there to be stopped
        time.sleep(0.3)
    return step(*batch)

trainer.training_step = take_time
trainer.train()
"""


def write_recipe(folder: Path, settings: dict[str, Any]) -> str:
    """Write a recipe into the server's folder; return its path from there."""
    path = folder / "params" / "small.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings))
    return "params/small.yaml"


def fetch(server: Server, job: str) -> dict[str, Path]:
    """Download a job's outputs; return where they are, by format."""
    assert not server.job(job)["downloaded"]
    assert server.ask(f"scheduler/jobs/{job}/download_files") is None
    described = server.job(job)
    assert described["downloaded"]
    return {file["file_format"]: server.folder / file["file_path"] for file in described["job_files"]}


def test_jobs_wait_run_stop_go_on_and_are_fetched(server: Server) -> None:
    folder = server.folder
    recipe = write_recipe(folder, {"train": {"max_steps": 40, "seed": 5}})
    path = "notebooks/deep/toy.ipynb"
    write_notebook(folder / path, START, WAIT)
    given = {"recipe": recipe, "run_name": "first", "train.max_steps": "7", "settings.adapter.layers": "[attention]"}
    first = server.post(path, **given)["job_id"]
    waiting = server.post(path, recipe=recipe)["job_id"]
    # what is wrong with a job shows at once, all of it, and nothing waits behind it
    wrong = server.post(path, **{"train.max_stepz": "3", "lr": "1"})["job_id"]
    refused = server.job(wrong)
    assert refused["status"] == "FAILED" and refused["end_time"]
    assert "train.max_stepz: no such parameter or setting. Did you mean train.max_steps?" in refused["status_message"]
    assert "lr: no such" in refused["status_message"]
    # one at a time, and a job that waits says so
    server.wait(first, "IN_PROGRESS")
    assert server.job(waiting)["status"] == "QUEUED"
    assert server.ask(f"scheduler/jobs/{waiting}", "PATCH", {"status": "STOPPED"}) is None
    assert server.job(waiting)["status"] == "STOPPED"

    run = folder / "runs" / "first"
    wait_for((run / "waits").exists)
    server.ask(f"scheduler/jobs/{first}", "PATCH", {"status": "STOPPED"})
    stopped = server.wait(first, "STOPPED")
    words = "The run was stopped by SIGTERM. A job with run_name first goes on. Its files: "
    assert stopped["status_message"] == words + str(run)
    assert read_json(run / "run.json")["state"] == "stopped"

    second = server.post(path, **given)["job_id"]
    job = server.wait(second, "COMPLETED", "FAILED")
    assert (job["status"], job["status_message"]) == ("COMPLETED", None)
    assert job["end_time"] > job["start_time"] > 0
    # values have arrived with their types, as data
    handed = read_json(run / "parameters.json")
    assert handed["settings"] == {"train.max_steps": 7, "adapter.layers": ["attention"]}
    assert handed["recipe"] == str(folder / recipe)

    files = fetch(server, second)
    assert files.keys() == {"ipynb", "html", "run.json", "metrics.jsonl", "input"}
    assert read_json(files["run.json"]) == read_json(run / "run.json")
    assert files["run.json"].read_text().count('"completed"') == 1
    assert files["metrics.jsonl"].read_text() == '{"step": 1}\n' * 2
    executed = nbformat.read(files["ipynb"], as_version=4)
    assert executed.metadata.papermill["exception"] is None
    assert "arrived with 7 ('attention',)" in json.dumps(executed)
    assert "arrived with 7" in files["html"].read_text(encoding="utf-8")
    # the notebook ran where it stands, and everything is below the server's folder
    assert set(os.listdir(folder)) == {"notebooks", "params", "runs", "jobs"}
    assert os.listdir(folder / "notebooks" / "deep") == ["toy.ipynb"]


def test_the_form_gets_one_environment_and_a_token_is_not_stored(server: Server) -> None:
    path = "notebooks/toy.ipynb"
    write_notebook(server.folder / path, START)
    (environment,) = server.ask("scheduler/runtime_environments")
    assert environment["name"] == "forgekit" and "forgekit run" in environment["description"]
    assert [each["name"] for each in environment["output_formats"]] == ["ipynb", "html", "run.json", "metrics.jsonl"]
    features = server.ask("scheduler/config")["supported_features"]
    assert {name for name, there in features.items() if there} >= {"stop_job", "delete_job", "output_formats"}
    token, before = "hf_" + "Q7" * 17, server.ask("scheduler/jobs")["total_count"]
    answer = server.post(path, **{"data.path": token})
    assert "looks like a token" in answer["message"] and token not in json.dumps(answer)
    assert server.ask("scheduler/jobs")["total_count"] == before
    # parameter values are data: what is Python stays text, and is refused where a number is wanted
    code = "__import__('pathlib').Path('hacked').touch()"
    job = server.job(server.post(path, **{"train.max_steps": code, "x = 1\nimport os": "1"})["job_id"])
    assert job["status"] == "FAILED" and "no such parameter" in job["status_message"]
    job = server.job(server.post(path, **{"train.max_steps": code})["job_id"])
    assert job["status"] == "FAILED" and "it should be a whole number" in job["status_message"]
    assert not list(server.folder.parent.rglob("hacked"))


@pytest.mark.slow
def test_a_training_is_stopped_with_a_checkpoint_and_a_second_job_goes_on(
    server: Server, tiny_folder: Path, orders_file: Path
) -> None:
    folder = server.folder
    settings: dict[str, Any] = {
        "data": {"path": str(orders_file)},
        "model": {"id": str(tiny_folder), "engine": "huggingface", "device": "cpu", "load_in": "16bit", "max_length": 256},
        "train": {"max_steps": 40, "save_steps": 10, "learning_rate": 0.1, "gradient_accumulation_steps": 1},
    }  # fmt: skip
    given = {"recipe": write_recipe(folder, settings), "run_name": "trained", "train.learning_rate": "2e-3"}
    write_notebook(folder / "notebooks" / "train.ipynb", START, TRAIN)
    first = server.post("notebooks/train.ipynb", **given)["job_id"]
    run = folder / "runs" / "trained"
    wait_for(lambda: (run / "status.json").exists() and read_json(run / "status.json")["step"] >= 2, 240)
    server.ask(f"scheduler/jobs/{first}", "PATCH", {"status": "STOPPED"})
    stopped = server.wait(first, "STOPPED")
    step = read_json(run / "run.json")["stopped_at_step"]
    assert 2 <= step < 40 and (run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()
    assert f"stopped by SIGTERM after step {step}." in stopped["status_message"]

    second = server.post("notebooks/train.ipynb", **given)["job_id"]
    job = server.wait(second, "COMPLETED", "FAILED")
    assert (job["status"], job["status_message"]) == ("COMPLETED", None)
    files = fetch(server, second)
    steps = [json.loads(line)["step"] for line in files["metrics.jsonl"].read_text().splitlines()]
    assert (steps[0], steps[-1]) == (1, 40)
    settled = read_json(files["run.json"])["settings"]["train.learning_rate"]
    assert (settled["value"], settled["from"]) == (0.002, "--set")
    assert "step    40/40" in files["html"].read_text(encoding="utf-8")
