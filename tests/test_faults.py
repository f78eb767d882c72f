"""FORGEKIT_FAULT: off in normal use, checked when it is on, and struck once."""

import errno
import signal
from pathlib import Path

import pytest
import torch

from forgekit import faults
from forgekit.errors import ConfigError
from forgekit.faults import InjectedError, read_fault, strike


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "passed", {})
    monkeypatch.delenv("FORGEKIT_FAULT", raising=False)
    monkeypatch.delenv("FORGEKIT_FAULT_FILE", raising=False)


def test_without_the_variable_nothing_happens_and_nothing_is_counted() -> None:
    assert [strike("forward", 5) for _ in range(3)] == [5, 5, 5] and not faults.passed


def test_a_fault_strikes_at_the_nth_passing_of_its_point_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEKIT_FAULT", "forward:3:exception")
    strike("backward")
    strike("forward")
    strike("forward")
    with pytest.raises(InjectedError):
        strike("forward")
    assert [strike("forward", number) for number in range(20)] == list(range(20))


def test_a_fault_that_stands_in_the_file_does_not_strike_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    noted = tmp_path / "struck"
    monkeypatch.setenv("FORGEKIT_FAULT", "load:1:exception")
    monkeypatch.setenv("FORGEKIT_FAULT_FILE", str(noted))
    with pytest.raises(InjectedError):
        strike("load")
    monkeypatch.setattr(faults, "passed", {})  # the process that goes on
    strike("load")
    assert noted.read_text(encoding="utf-8") == "load:1:exception\n"


@pytest.mark.parametrize(
    "text", ["forward", "forward:1", "forwards:1:kill9", "forward:0:kill9", "forward:x:kill9", "forward:1:die"]
)
def test_a_fault_that_does_not_exist_is_a_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FORGEKIT_FAULT", text)
    with pytest.raises(ConfigError, match="point:nth:action"):
        strike("load")


def test_every_action_does_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    slept: list[float] = []
    monkeypatch.setattr(faults.os, "kill", lambda pid, number: sent.append(number))
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    for action in ("kill9", "term", "hang"):
        faults.act(action, None)
    assert sent == [signal.SIGKILL, signal.SIGTERM] and slept == [faults.HANG_SECONDS]
    with pytest.raises(torch.OutOfMemoryError):
        faults.act("out_of_memory", None)
    with pytest.raises(OSError) as caught:
        faults.act("no_space", None)
    assert caught.value.errno == errno.ENOSPC
    assert torch.isnan(faults.act("nan", torch.tensor(2.0)))
    model = torch.nn.Linear(2, 1)
    model(torch.ones(2)).backward()
    assert faults.act("nan", model) is model and torch.isnan(model.weight.grad).all()
    assert {read_fault(f"merge:1:{action}").action for action in faults.ACTIONS} == set(faults.ACTIONS)


@pytest.mark.parametrize("point", [point for point in faults.POINTS if point not in faults.NUMBERS])
def test_nan_needs_a_point_with_numbers(point: str) -> None:
    with pytest.raises(ConfigError, match="nan needs a point with numbers, forward, backward, merge"):
        read_fault(f"{point}:1:nan")


def test_every_point_is_passed_somewhere_in_the_package(project_folder: Path) -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (project_folder / "forgekit").rglob("*.py"))
    assert {point: sources.count(f'strike("{point}"') for point in faults.POINTS} == dict.fromkeys(faults.POINTS, 1)
