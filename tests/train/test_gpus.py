"""Several processes that train together, on a CPU through gloo: the same curve as one, and one end for all of them."""

import json
from pathlib import Path
from typing import Any

import pytest


def read_losses(trainer: Any) -> list[float]:
    lines = (trainer.run.path / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def read_weights(trainer: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def find_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    return max(float((value - right[name]).abs().max()) for name, value in left.items())


EVEN = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2, "adapter.lora_dropout": 0.0}


def test_two_processes_take_the_steps_of_one(make_run: Any) -> None:
    one, two = make_run(EVEN, "one"), make_run(EVEN | {"train.gpus": 2}, "two")
    one.train()
    two.train()
    assert read_losses(two) == pytest.approx(read_losses(one), abs=1e-5)
    assert find_difference(read_weights(one), read_weights(two)) < 1e-4
