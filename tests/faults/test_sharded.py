"""Several processes that keep parts of all weights (FSDP2, through gloo): the curve, the checkpoints and the model of one process.

AltUp's prediction weights are clamped closely, so that a clamp of the wrong numbers shows. As in test_gpus.py, an epoch's last step
has three batches.
"""

import json
import re
import shutil
from typing import Any

import pytest

from .test_gpus import find_difference, wait_for_end

STEPS = 8
FULL = {
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.learning_rate": 1e-4,
    "train.max_steps": STEPS,
    "model.load_in": "full",
    "export.formats": ["merged"],
}
TWO = {"train.gpus": 2}
RUN = {"FORGEKIT_FAULT": "after_step:6:kill9"}  # a checkpoint every second step: that of step 4 is there


@pytest.fixture(scope="module")
def train(warm: Any) -> Any:
    """Returns a function: further settings, and what else a job may hold -> the name of a run, which must succeed."""
    folder = warm.folder / "clamped"
    shutil.copytree(warm.folder / "model", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"altup_coef_clip": 0.02}), encoding="utf-8")

    def run(settings: dict[str, Any], name: str = "", code: int = 0, **job: Any) -> str:
        name = name or warm.new_run()
        found = warm.train(name, settings=FULL | {"model.id": str(folder)} | settings, **job)
        assert found == code, warm.log(name)
        return name

    return run


@pytest.fixture(scope="module")
def alone(train: Any) -> str:
    """A run of one process."""
    return train({})


@pytest.fixture(scope="module")
def together(train: Any) -> str:
    """The same run of two."""
    return train(TWO, mutant="tell_parts", look_back=True)


def read_curve(warm: Any, run: str) -> dict[str, float]:
    """Loss and length of the gradient, by step."""
    rows = [row for row in map(json.loads, warm.read_lines(run, "metrics.jsonl")) if "loss" in row]
    return {f"{name} {row['step']}": row[name] for row in rows for name in ("loss", "grad_norm")}


def read_checkpoint(warm: Any, run: str) -> dict[str, Any]:
    """Weights and moments of the last checkpoint."""
    import torch
    from safetensors.torch import load_file

    folder = warm.path(run) / "checkpoints" / f"checkpoint-{STEPS}"
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{name} {number}": value for number, values in state.items() for name, value in values.items()}
    return load_file(folder / "model.safetensors") | moments


def test_parts_of_weights_take_the_steps_of_whole_ones(warm: Any, alone: str, together: str) -> None:
    assert find_difference(read_curve(warm, alone), read_curve(warm, together)) < 1e-5
    assert find_difference(read_checkpoint(warm, alone), read_checkpoint(warm, together)) < 1e-4
    assert "whole again" in warm.log(together)


def test_a_checkpoint_of_parts_is_one_of_one_process(warm: Any, alone: str, together: str) -> None:
    import torch
    from safetensors import safe_open

    folders = [warm.path(run) / "checkpoints" / f"checkpoint-{STEPS}" for run in (alone, together)]
    assert len({tuple(sorted(file.name for file in folder.iterdir())) for folder in folders}) == 1
    weights = [safe_open(folder / "model.safetensors", "pt") for folder in folders]
    assert set(weights[0].keys()) == set(weights[1].keys()) and weights[0].metadata() == weights[1].metadata()
    one, two = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in folders)
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()


def test_each_process_keeps_half(warm: Any, together: str) -> None:
    found = []
    for text in (warm.log(together), "\n".join(warm.read_lines(together, "rank1.log"))):
        found.append([int(number) for number in re.findall(r"^parts (.*)", text, re.MULTILINE)[-1].split()])
    (weights, mine, moments, my_moments), (_, its, _, its_moments) = found
    assert mine + its == weights and my_moments + its_moments == moments > weights
    assert 0.4 < mine / weights < 0.6 and 0.4 < my_moments / moments < 0.6


def test_summed_gradients_are_found(warm: Any, alone: str, train: Any) -> None:
    run = train(TWO | {"train.max_steps": 2}, mutant="sum_gradients")
    right, wrong = read_curve(warm, alone), read_curve(warm, run)
    assert find_difference({name: right[name] for name in wrong}, wrong) > 1


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_of_parts_resumes(warm: Any, together: str, train: Any, gpus: int) -> None:
    run = train(TWO, code=-9, environment=RUN)
    assert wait_for_end(warm, run)
    train({"train.gpus": gpus}, run)
    assert warm.starts(run) == [0, 4]
    assert find_difference(read_curve(warm, run), read_curve(warm, together)) < 1e-5
    assert find_difference(read_checkpoint(warm, run), read_checkpoint(warm, together)) < 1e-5


def test_a_killed_run_of_one_goes_on_in_parts(warm: Any, alone: str, train: Any) -> None:
    run = train({}, code=-9, environment=RUN)
    train(TWO, run)
    assert warm.starts(run) == [0, 4]
    assert find_difference(read_curve(warm, run), read_curve(warm, alone)) < 1e-5
    assert find_difference(read_checkpoint(warm, run), read_checkpoint(warm, alone)) < 1e-5
