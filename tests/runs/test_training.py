"""A run that is stopped or left alone in the middle of training ends its step, saves, and says where it stands."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit.files import read_json

from .conftest import LOAD, PARAMETERS, START, Ended, write_notebook

# the signal comes from the middle of step 3: its forward has been computed, its weights have not changed
TRAIN = """
import os, pathlib, signal
step = trainer.training_step

def signal_in_the_third(model, inputs, *rest):
    loss = step(model, inputs, *rest)
    if trainer.state.global_step == 2 and not pathlib.Path("sent").exists():
        pathlib.Path("sent").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.{name})
    return loss

trainer.training_step = signal_in_the_third
trainer.train()
"""


def check_stopped(ended: Ended) -> None:
    """The step in which the signal came is whole, and no later one was taken."""
    record = ended.record
    step = record["stopped_at_step"]
    assert 3 <= step <= 10  # the third, or a later one on a machine where the kernel hears late
    checkpoint = ended.folder / "checkpoints" / f"checkpoint-{step}"
    assert read_json(checkpoint / "trainer_state.json")["global_step"] == step
    assert (checkpoint / "adapter_model.safetensors").stat().st_size > 0
    for status in (ended.status, read_json(Path("elsewhere/status.json"))):
        assert (status["running"], status["step"], status["checkpoint_at"]) == (False, step, step)


def test_sigterm_in_the_middle_of_a_step_ends_it_with_a_checkpoint(
    execute: Callable[..., Ended], settings: dict, record_case: Any
) -> None:
    case = record_case(what="run", point="the middle of a step", action="SIGTERM")
    ended = execute(START, LOAD, TRAIN.format(name="SIGTERM"), "print('never')", settings=settings)
    record = ended.record
    assert (record["state"], record["stopped_by"], record["exit_code"]) == ("stopped", "SIGTERM", 143)
    check_stopped(ended)
    assert ended.statuses() == ["completed", "completed", "completed", "pending"]
    log = (ended.folder / "logs" / "training.log").read_text()
    line = r"^step +1/400  loss \d+\.\d{4}  lr \d\.\d\de[+-]\d\d  gradient \d+\.\d{3}  \d+ tokens/s  \d+ s, \d+ s left$"
    assert re.search(line, log, re.MULTILINE), log
    case["happened"] = "the step ended, checkpoint written; recorded as stopped"


@pytest.mark.slow
def test_a_training_whose_supervisor_is_killed_saves_too(
    settings: dict, project_folder: Path, record_case: Any
) -> None:
    case = record_case(what="run", point="the middle of a step", action="`kill -9` of its supervisor")
    write_notebook(PARAMETERS, START, LOAD, TRAIN.format(name="SIGKILL"), "print('never')")
    command = [sys.executable, "-m", "forgekit", "run", "toy.ipynb", "--name", "toy"]
    sets = [f"{name}={value}" for name, value in settings.items()]
    path = os.pathsep.join((str(project_folder), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run([*command, "--set", *sets], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    assert done.returncode == -9
    ended = Ended(Path("runs/toy").absolute(), 0)
    deadline = time.monotonic() + 60
    while ended.record["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ended.record["stopped_by"] == "the death of its supervisor"
    check_stopped(ended)
    assert ended.statuses() == ["completed", "completed", "failed", "pending"]
    case["happened"] = "the step ended, checkpoint written; the kernel recorded the end and ended"
