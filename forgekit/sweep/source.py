"""Where a sweep's points come from: a list that was known before, or a search that draws the next when there is room."""

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from .points import Point


class Source(Protocol):
    """Gives points one by one, and hears how their runs go."""

    def take(self) -> Point | None:
        """Return the next point, or None when there is none now."""

    def left(self) -> bool:
        """Say whether `take` still has points to give; the sweep is not over before."""

    def pruned(self, name: str) -> bool:
        """Say whether a run was ended early, now or in a sweep before this one."""

    def report(self, name: str, step: int, value: float) -> bool:
        """Hear a loss of a run at a step; return whether the run is to be ended early."""

    def close(self, name: str, score: float | None, pruned: bool) -> None:
        """Hear how a run ended; no score and not pruned: it failed."""


class Listed:
    """Points that are known before anything starts."""

    def __init__(self, points: Iterable[Point]):
        self.points = deque(points)

    def take(self) -> Point | None:
        """Return the next point of the list."""
        return self.points.popleft() if self.points else None

    def left(self) -> bool:
        """Say whether some of the list have not been taken."""
        return bool(self.points)

    def pruned(self, name: str) -> bool:
        """Nothing was."""
        return False

    def report(self, name: str, step: int, value: float) -> bool:
        """End nothing early."""
        return False

    def close(self, name: str, score: float | None, pruned: bool) -> None:
        """Take no notice."""
