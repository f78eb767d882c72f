"""What a comparison of an export with the trained model found: each figure beside its bound, kept as verify.json."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ..files import read_json, write_json


@dataclass(frozen=True)
class Check:
    """One figure and the bound that it has to keep."""

    name: str
    value: float
    bound: float
    held: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.4g} (bound {self.bound:g})"


def at_most(name: str, value: float, bound: float) -> Check:
    """Return a check that holds up to the bound; a value that is no number fails."""
    return Check(name, value, bound, value <= bound)


def at_least(name: str, value: float, bound: float) -> Check:
    """Return a check that holds from the bound on; a value that is no number fails."""
    return Check(name, value, bound, value >= bound)


@dataclass(frozen=True)
class Verdict:
    """All checks of one export; verified when every one held.

    score, merged_score: the task's score of the export and of the merged model on the same rows, where they were measured.
    """

    checks: tuple[Check, ...]
    file_bytes: int  # of the weights that were written
    expected_bytes: int
    rows: int = 0  # compared
    tokens: int = 0
    score: float | None = None
    merged_score: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether every check held, of which there must be some."""
        return bool(self.checks) and all(check.held for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks if not check.held]

    def add(self, *checks: Check, **values: Any) -> Self:
        """Return the verdict with further checks and figures."""
        return replace(self, checks=(*self.checks, *checks), **values)

    def describe(self) -> str:
        """Return one line: verified, or what failed with value and bound."""
        if self.verified:
            return f"verified ({len(self.checks)} checks)"
        return f"NOT VERIFIED, {len(self.failed)} of {len(self.checks)} checks failed: " + "; ".join(
            map(str, self.failed)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what verify.json holds."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "notes"}
        return {"verified": self.verified, **values, **self.notes}

    def save(self, path: Path) -> None:
        """Write verify.json beside the export; a figure that is no number becomes null and its check stands as failed."""
        write_json(place_verdict(path), self.to_dict())


def place_verdict(path: Path) -> Path:
    """Return where the verdict of an export stands: in its folder, or beside its file as model-Q8_0.verify.json."""
    return path.with_suffix(".verify.json") if path.suffix == ".gguf" else path / "verify.json"


def read_verdict(path: Path) -> dict[str, Any] | None:
    """Return what verify.json of an export says, or None where there is none."""
    file = place_verdict(path)
    return read_json(file) if file.is_file() else None


def write_summary(folder: Path) -> None:
    """Write verify.json of a folder whose files have a verdict each: verified when all are, sizes added up.

    The scores are those of the file that lost most against the merged model.
    """
    found = {file.name.removesuffix(".verify.json"): read_json(file) for file in sorted(folder.glob("*.verify.json"))}
    checks = [
        {**check, "name": f"{name}: {check['name']}"} for name, saved in found.items() for check in saved["checks"]
    ]
    summary: dict[str, Any] = {"verified": all(saved["verified"] for saved in found.values()), "checks": checks}
    summary |= {key: sum(saved[key] for saved in found.values()) for key in ("file_bytes", "expected_bytes")}
    scored = [
        saved for saved in found.values() if saved.get("score") is not None and saved.get("merged_score") is not None
    ]
    if scored:
        worst = max(scored, key=lambda saved: abs(saved["merged_score"] - saved["score"]))
        summary |= {"score": worst["score"], "merged_score": worst["merged_score"]}
    write_json(folder / "verify.json", summary)
