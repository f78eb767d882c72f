"""Ranges that settings are drawn from, by a seeded generator or by Optuna.

{uniform: [0, 0.2]}   {log_uniform: [1e-5, 1e-3]}   {integers: [4, 64]}   {choices: [8, 16, 32]}   [8, 16, 32]
"""

import json
import math
import random
from dataclasses import dataclass
from typing import Any, Literal

from ..conflicts import suggest

KINDS = ("uniform", "log_uniform", "integers", "choices")
DIGITS = 3  # a drawn number is rounded to so many, which keeps names and tables readable


@dataclass(frozen=True)
class Range:
    """Where one setting is drawn from; both bounds of numbers are included."""

    kind: Literal["uniform", "log_uniform", "integers", "choices"]
    values: tuple[Any, ...]  # low and high, or the choices

    def list_marks(self) -> tuple[Any, ...]:
        """Return values that stand for all: the bounds or choices, and a number between that is no whole one."""
        if self.kind not in ("uniform", "log_uniform"):
            return self.values
        low, high = self.values
        return (low, high, low + (high - low) / math.e)

    def draw(self, generator: random.Random) -> Any:
        """Return one value."""
        if self.kind == "choices":
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "integers":
            return generator.randint(low, high)
        if self.kind == "uniform":
            drawn = generator.uniform(low, high)
        else:
            drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
        return min(max(float(f"{drawn:.{DIGITS}g}"), low), high)

    def ask(self, name: str, trial: Any) -> Any:
        """Return the value that an Optuna trial suggests."""
        if self.kind == "choices":
            # Optuna keeps texts, numbers and None; a list of layers goes by its JSON
            labels = {json.dumps(value): value for value in self.values}
            return labels[trial.suggest_categorical(name, list(labels))]
        low, high = self.values
        if self.kind == "integers":
            return trial.suggest_int(name, low, high)
        return trial.suggest_float(name, low, high, log=self.kind == "log_uniform")


def check_range(value: Any) -> Any:
    """Return a Range. Raises ValueError, as pydantic wants it, for what is none."""
    if isinstance(value, Range):
        return value
    if isinstance(value, list | tuple):
        value = {"choices": value}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a list of choices, or one of {', '.join(KINDS)}, for instance {{log_uniform: [1e-5, 1e-3]}}")
    kind, given = next(iter(value.items()))
    if kind not in KINDS:
        raise ValueError(f"one of {', '.join(KINDS)}; {kind!r} is none.{suggest(str(kind), KINDS)}".rstrip("."))
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(f"{kind}: a list")
    if kind == "choices":
        return Range(kind, tuple(given))
    wanted = int if kind == "integers" else (int, float)
    numbers = all(isinstance(number, wanted) and not isinstance(number, bool) for number in given)
    if len(given) != 2 or not numbers or not given[0] < given[1] or not all(map(math.isfinite, given)):
        raise ValueError(
            f"{kind}: [lowest, highest], two {'whole ' if kind == 'integers' else ''}numbers, the lower first"
        )
    if kind == "log_uniform" and given[0] <= 0:
        raise ValueError("log_uniform: both above zero")
    return Range(kind, tuple(given))
