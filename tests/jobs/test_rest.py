"""A run started, watched, stopped, gone on with and fetched over the job API of a real JupyterLab."""

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest

from forgekit.run_folder import read_json

from .conftest import START, Server, wait_for, write_notebook

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


@pytest.fixture
def recipe(folder: Path, tiny_folder: Path, orders_file: Path) -> str:
    """A recipe in the server's folder, by its path from there."""
    path = folder / "params" / "small.yaml"
    path.parent.mkdir()
    settings: dict[str, Any] = {
        "data": {"path": str(orders_file)},
        "model": {"id": str(tiny_folder), "engine": "huggingface", "device": "cpu", "load_in": "16bit", "max_length": 256},
        "train": {"max_steps": 40, "save_steps": 10, "learning_rate": 0.1, "gradient_accumulation_steps": 1},
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    return "params/small.yaml"


def test_a_run_is_started_stopped_gone_on_with_and_fetched(server: Server, folder: Path, recipe: str) -> None:
    write_notebook(folder / "notebooks" / "deep" / "train.ipynb", START, TRAIN)
    given = {"recipe": recipe, "run_name": "first", "train.learning_rate": "2e-3", "settings.adapter.layers": "[attention]"}  # fmt: skip
    first = server.post("notebooks/deep/train.ipynb", **given)["job_id"]
    waiting = server.post("notebooks/deep/train.ipynb", recipe=recipe)["job_id"]
    wrong = server.post("notebooks/deep/train.ipynb", **{"train.max_stepz": "3", "lr": "1", "train.seed": "seven"})
    # what is wrong with a job shows at once, all of it, and nothing waits behind it
    refused = server.job(wrong["job_id"])
    assert refused["status"] == "FAILED"
    assert "train.max_stepz: no such parameter or setting. Did you mean train.max_steps?" in refused["status_message"]
    assert "lr: no such" in refused["status_message"]
    # one at a time, and a job that waits says so
    server.wait(first, "IN_PROGRESS")
    assert server.job(waiting)["status"] == "QUEUED"
    assert server.ask(f"scheduler/jobs/{waiting}", "PATCH", {"status": "STOPPED"}) is None
    assert server.job(waiting)["status"] == "STOPPED"

    run = folder / "runs" / "first"
    wait_for(lambda: (run / "status.json").exists() and read_json(run / "status.json")["step"] >= 2)
    server.ask(f"scheduler/jobs/{first}", "PATCH", {"status": "STOPPED"})
    stopped = server.wait(first, "STOPPED")
    step = read_json(run / "run.json")["stopped_at_step"]
    assert 2 <= step < 40 and (run / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors").is_file()
    words = f"The run was stopped by SIGTERM after step {step}. A job with run_name first goes on."
    assert stopped["status_message"].startswith(words)

    second = server.post("notebooks/deep/train.ipynb", **given)["job_id"]
    job = server.wait(second, "COMPLETED", "FAILED")
    assert (job["status"], job["status_message"]) == ("COMPLETED", None)
    assert job["end_time"] > job["start_time"] > 0 and not job["downloaded"]
    assert read_json(run / "run.json")["state"] == "completed"
    # values have arrived with their types
    assert read_json(run / "parameters.json")["settings"] == {
        "train.learning_rate": 0.002,
        "adapter.layers": ["attention"],
    }

    assert server.ask(f"scheduler/jobs/{second}/download_files") is None
    job = server.job(second)
    files = {file["file_format"]: folder / file["file_path"] for file in job["job_files"]}
    assert job["downloaded"] and files.keys() == {"ipynb", "html", "run.json", "metrics.jsonl", "input"}
    assert read_json(files["run.json"]) == read_json(run / "run.json")
    steps = [json.loads(line)["step"] for line in files["metrics.jsonl"].read_text().splitlines()]
    assert steps[0] == 1 and steps[-1] == 40
    executed = nbformat.read(files["ipynb"], as_version=4)
    assert executed.metadata.papermill["exception"] is None and "step    40/40" in json.dumps(executed)
    assert "step    40/40" in files["html"].read_text(encoding="utf-8")
    assert set(os.listdir(folder)) == {"notebooks", "params", "runs", "jobs"}
    assert os.listdir(folder / "notebooks" / "deep") == ["train.ipynb"]


def test_the_form_gets_one_environment_and_a_token_is_not_stored(server: Server, folder: Path) -> None:
    write_notebook(folder / "toy.ipynb", START)
    (environment,) = server.ask("scheduler/runtime_environments")
    assert environment["name"] == "forgekit" and "forgekit run" in environment["description"]
    assert [each["name"] for each in environment["output_formats"]] == ["ipynb", "html", "run.json", "metrics.jsonl"]
    features = server.ask("scheduler/config")["supported_features"]
    assert {name for name, there in features.items() if there} >= {"stop_job", "delete_job", "output_formats"}
    token = "hf_" + "Q7" * 17
    answer = server.post("toy.ipynb", **{"data.path": token})
    assert "looks like a token" in answer["message"] and token not in json.dumps(answer)
    assert server.ask("scheduler/jobs")["total_count"] == 0
    # parameter values are data: what is Python stays text, and is refused where a number is wanted
    code = "__import__('pathlib').Path('hacked').touch()"
    job = server.job(server.post("toy.ipynb", **{"train.max_steps": code, "x = 1\nimport os": "1"})["job_id"])
    assert job["status"] == "FAILED" and "no such parameter" in job["status_message"]
    job = server.job(server.post("toy.ipynb", **{"train.max_steps": code})["job_id"])
    assert job["status"] == "FAILED" and "it should be a whole number" in job["status_message"]
    assert not list(folder.parent.rglob("hacked"))
