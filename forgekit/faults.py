"""Breaks a run at a chosen place, to prove that it survives: FORGEKIT_FAULT=point:nth:action, off in normal use.

    FORGEKIT_FAULT=save_write:3:kill9     the process is killed while it writes its third checkpoint

A fault fires exactly once, also over restarts, when FORGEKIT_FAULT_FILE names a file: it gets a line before the fault
strikes, and a fault that stands there does not strike again. A test asserts that it holds one line.
"""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError

POINTS = (
    "load", "row", "forward", "backward", "before_step", "after_step", "save_open", "save_write", "save_fsync", "save_rename",
    "merge", "export",
)  # fmt: skip
ACTIONS = ("kill9", "term", "exception", "out_of_memory", "no_space", "nan", "hang")
NUMBERS = ("forward", "backward", "merge")  # the loss, the gradients, the sum of base and adapter: what can become NaN
HANG_SECONDS = 3600.0

passed: dict[str, int] = {}  # how often each point was passed in this process


class InjectedError(RuntimeError):
    """The exception of the action `exception`."""


class Fault(NamedTuple):
    """What is to go wrong, where, and at which passing of the place, counted from 1."""

    point: str
    nth: int
    action: str


def read_fault(text: str) -> Fault:
    """Return the fault that a text names. Raises ConfigError."""
    point, _, rest = text.partition(":")
    nth, _, action = rest.partition(":")
    if point not in POINTS or not nth.isdigit() or int(nth) < 1 or action not in ACTIONS:
        raise ConfigError(
            f"FORGEKIT_FAULT is {text!r}: it should be point:nth:action, with a point of {', '.join(POINTS)}, "
            f"a number from 1, and an action of {', '.join(ACTIONS)}."
        )
    if action == "nan" and point not in NUMBERS:
        raise ConfigError(f"FORGEKIT_FAULT is {text!r}: nan needs a point with numbers, {', '.join(NUMBERS)}.")
    return Fault(point, int(nth), action)


def strike(point: str, value: Any = None) -> Any:
    """Pass a point: return `value`, unless a fault waits here.

    `value` is what the action `nan` changes: a tensor, which comes back as NaN, or a model, whose first gradient becomes it.
    """
    text = os.environ.get("FORGEKIT_FAULT")
    if not text:
        return value
    passed[point] = passed.get(point, 0) + 1
    fault = read_fault(text)
    if (fault.point, fault.nth) != (point, passed[point]) or not note(text):
        return value
    return act(fault.action, value)


def note(text: str) -> bool:
    """Write the fault into FORGEKIT_FAULT_FILE, where one is named; return False when it stands there already."""
    name = os.environ.get("FORGEKIT_FAULT_FILE")
    if not name:
        return True
    path = Path(name)
    if path.exists() and text in path.read_text(encoding="utf-8").splitlines():
        return False
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")
        file.flush()
        os.fsync(file.fileno())
    return True


def act(action: str, value: Any) -> Any:
    """Do what the fault says."""
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if action == "exception":
        raise InjectedError("injected by FORGEKIT_FAULT")
    if action == "out_of_memory":
        import torch

        raise torch.OutOfMemoryError("injected by FORGEKIT_FAULT")
    if action == "no_space":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected by FORGEKIT_FAULT")
    if action == "hang":
        time.sleep(HANG_SECONDS)
    return spoil(value) if action == "nan" else value


def spoil(value: Any) -> Any:
    """Return a tensor full of NaN, or a model whose first gradient is."""
    import torch

    if not isinstance(value, torch.nn.Module):
        return value * float("nan")
    next(weight.grad for weight in value.parameters() if weight.grad is not None).fill_(float("nan"))
    return value
