"""What a run's folder tells of it while it runs and afterwards: how far it is, its losses by step, its scores."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import read_json

LOSS, HELD_OUT_LOSS = "loss", "held_out_loss"
LOGGED = {"loss": LOSS, "eval_loss": HELD_OUT_LOSS}  # names in metrics.jsonl -> names here


@dataclass
class Watch:
    """Follows one run's logs/metrics.jsonl; `curves` holds losses by step, after a resume those of the later attempt."""

    folder: Path
    curves: dict[str, dict[int, float]] = field(default_factory=lambda: {LOSS: {}, HELD_OUT_LOSS: {}})
    read_bytes: int = 0

    def read(self) -> "Watch":
        """Take the lines that were written since the last call."""
        path = self.folder / "logs" / "metrics.jsonl"
        try:
            if path.stat().st_size < self.read_bytes:  # begun anew
                self.read_bytes = 0
            with open(path, "rb") as file:
                file.seek(self.read_bytes)
                text = file.read()
        except OSError:  # not there yet
            return self
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self.read_bytes += len(whole)
        for line in whole.splitlines():
            self.take(line)
        return self

    def take(self, line: bytes) -> None:
        """Note one line; those of other things, and damaged ones, are passed over."""
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            return
        for name, curve in LOGGED.items():
            if isinstance(entry.get(name), int | float):
                self.curves[curve][step] = float(entry[name])

    def status(self) -> dict[str, Any]:
        """Return what status.json says, or nothing."""
        return read_if_there(self.folder / "status.json")


def read_if_there(path: Path) -> dict[str, Any]:
    """Return a JSON file's mapping, or an empty one."""
    try:
        found = read_json(path)
    except RunError:
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(folder: Path, name: str = "scores") -> dict[str, dict[str, float]]:
    """Return each metric's score and interval from a run's metrics/scores.json (or baseline.json)."""
    found = read_if_there(folder / "metrics" / f"{name}.json").get("metrics")
    return found if isinstance(found, dict) else {}


def read_score(folder: Path, name: str) -> float | None:
    """Return a run's score by a metric's name or `held_out_loss`, or None where it has none."""
    if name == HELD_OUT_LOSS:
        return read_if_there(folder / "metrics" / "training-stats.json").get("best_held_out_loss")
    return read_metrics(folder).get(name, {}).get("score")
