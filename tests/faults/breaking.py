"""Breaks a training or an export, lets it go on, compares it with one that nothing disturbed, and says what happened."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from forgekit.train.checkpoint import verify_checkpoint

STEPS = 24
EVERY = 2  # train.save_steps
ONE = {"train.gradient_accumulation_steps": 1}  # 15 steps an epoch
FOUR = {"train.gradient_accumulation_steps": 4}  # 4 steps an epoch, the last one smaller
STEADY = ONE | {"adapter.lora_dropout": 0.0}  # other batches draw other masks
EXACT = "resumed bit for bit"
SMALLER = "resumed with half the rows at once and the same rows a step"


def break_and_resume(
    warm: Any,
    settings: dict[str, Any],
    fault: str,
    first: str = "",
    second: str = "",
    between: Any = None,
    **broken: Any,
) -> str:
    """Break a training, resume it, compare it with one that was never broken, and return in words what happened.

    Args:
        fault: point:nth:action, or "" when `broken` holds what is to go wrong (see warm.py).
        first, second: a defence to take out of the broken training, or of the resumed one.
        between: is given the run's folder after it broke.
    """
    losses, hashes = warm.uninterrupted(settings)
    run = warm.new_run()
    ended = end_by(warm, run, fault, settings=settings, mutant=first, **broken)
    reached = max([0, *(step for step, _ in warm.read_losses(run))])
    check_checkpoints(warm.path(run))
    if between:
        between(warm.path(run))
    assert warm.train(run, settings=settings, mutant=second, supervised=bool(fault)) == 0, warm.log(run)
    start = warm.starts(run)[-1] if len(warm.starts(run)) > 1 else 0
    assert 0 <= reached - start <= EVERY, "at most save_steps lost"
    found = warm.read_losses(run)
    assert {number for number, _ in found} == set(range(1, STEPS + 1))
    smaller = warm.read_record(run).get("smaller_batches", [])
    if smaller:
        assert [(change["rows"], change["accumulated"]) for change in smaller] == [(1, 2)]
        assert dict(found) == pytest.approx(losses, rel=1e-3), "losses differ"
        assert [loss for number, loss in found if number <= reached] == [losses[n + 1] for n in range(reached)]
    else:
        assert [(number, loss) for number, loss in found if losses[number] != loss] == [], "losses differ"
        assert warm.read_hashes(run) == hashes, "weights, moments, schedule or random numbers differ"
    warm.remove(run)
    return f"{ended}; {SMALLER if smaller else EXACT}"


def end_by(warm: Any, run: str, fault: str, **job: Any) -> str:
    """Run a job until its fault ends it, once; return in words how."""
    noted = warm.folder / f"{run}.fault"
    if fault:
        job["environment"] = {"FORGEKIT_FAULT": fault, "FORGEKIT_FAULT_FILE": str(noted)}
    status = warm.train(run, supervised=bool(fault), **job)
    if fault:
        assert noted.exists() and noted.read_text(encoding="utf-8") == f"{fault}\n", "the fault did not strike once"
    return describe_end(status, warm)


def describe_end(status: int, warm: Any) -> str:
    """Say how a process ended, from its exit status and the last line that it printed."""
    if warm.stopped_by:
        assert "step" in warm.stopped_by or "time limit" in warm.stopped_by, warm.stopped_by
        return "found hung and ended" if "hung" in warm.stopped_by else "ended at the time limit"
    if status == 1:
        errors = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Interrupt))\b", warm.last_log(), re.MULTILINE)
        return f"ended by {errors[-1]}"
    return {0: "stopped after its step, with a checkpoint", -9: "killed", -15: "ended by SIGTERM"}[status]


def check_checkpoints(run: Path) -> None:
    """Every checkpoint that stands under its name is whole."""
    for path in (run / "checkpoints").glob("checkpoint-*"):
        assert verify_checkpoint(path) is None, path


# ---- exports ---------------------------------------------------------------------------------------------------------

FORMATS = {"export.formats": ["adapter", "merged"], "export.replace": True}
PLACES = {"adapter": "lora", "merged": "merged"}


def break_and_export(warm: Any, fault: str, **broken: Any) -> str:
    """Break an export, look at what stands there, export again, and return in words what happened."""
    whole = warm.exported(FORMATS)
    run = warm.new_run()
    status = end_by(warm, run, fault, settings=FORMATS, export=True, **broken)
    models = warm.path(run) / "models"
    standing = {name for name, place in PLACES.items() if (models / place).exists()}
    for name in standing:
        assert hash_export(models / PLACES[name]) == whole[name], f"{name} stands there and is not whole"
    unverified = sorted(path.name for path in (models / "unverified").glob("*"))
    assert not (set(unverified) & standing)
    assert warm.train(run, settings=FORMATS, export=True) == 0, warm.log(run)
    assert {name: hash_export(models / place) for name, place in PLACES.items()} == whole
    assert [file for file in models.rglob("*") if file.name.endswith(".part") or "unverified" in file.name] == []
    warm.remove(run)
    how = "kept as unverified" if unverified else f"{status}; no half export"
    return f"{how}; the next one equals an undisturbed one"


def hash_export(folder: Path) -> str:
    """Return a hash over the weights of an export, which says in verify.json that it is verified."""
    assert json.loads((folder / "verify.json").read_text(encoding="utf-8"))["verified"] is True
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
