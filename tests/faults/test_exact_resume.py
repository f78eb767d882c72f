"""A training that is broken at any step and resumed gives the losses and weights of one that nothing disturbed, bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest

STEPS = 24
KILLS = 200
ONE = {"train.gradient_accumulation_steps": 1}  # 15 steps an epoch
FOUR = {"train.gradient_accumulation_steps": 4}  # 4 steps an epoch, the last one smaller
EVERY = 2  # train.save_steps


def break_and_resume(warm: Any, settings: Any, step: int, fault: str, first: str = "", second: str = "") -> None:
    """Break a training in an optimiser step, resume it, and compare it with one that was never broken.

    Args:
        fault: kill9, term, exception, or disk_full (files cannot grow any more).
        first, second: a defence to take out of the broken training, or of the resumed one.
    """
    losses, hashes = warm.uninterrupted(settings)
    run = warm.new_run()
    job: dict[str, Any] = {"settings": settings}
    noted = warm.folder / f"{run}.fault"
    if fault == "disk_full":
        broken = job | {"full_disk_at": step}
    else:
        point = f"before_step:{step}:{fault}" if ":" not in fault else fault
        broken = job | {"environment": {"FORGEKIT_FAULT": point, "FORGEKIT_FAULT_FILE": str(noted)}}
    status = warm.train(run, **broken, mutant=first)
    assert status == {"kill9": -9, "term": 0}.get(fault.rpartition(":")[2], 1), warm.log(run)
    if fault != "disk_full":
        assert len(noted.read_text(encoding="utf-8").splitlines()) == 1, "the fault struck once"
    assert warm.train(run, **job, mutant=second) == 0, warm.log(run)
    start = (warm.starts(run) + [0])[1] if len(warm.starts(run)) > 1 else 0
    reached = step if fault == "term" else step - 1
    assert 0 <= reached - start <= EVERY, "at most save_steps lost"
    found = warm.read_losses(run)
    assert {number for number, _ in found} == set(range(1, STEPS + 1))
    assert [(number, loss) for number, loss in found if losses[number] != loss] == [], "losses differ"
    assert warm.read_hashes(run) == hashes, "weights, moments, schedule or random numbers differ"
    warm.remove(run)


# first and last step, one with and one without a checkpoint before it, the last of an epoch and the first of the next
CHOSEN = (1, 2, 8, 15, 16, 24)


@pytest.mark.parametrize("step", CHOSEN)
def test_a_killed_training_resumes_exactly(warm: Any, step: int) -> None:
    break_and_resume(warm, ONE, step, "kill9")


@pytest.mark.parametrize("step", CHOSEN)
def test_a_terminated_training_resumes_exactly(warm: Any, step: int) -> None:
    break_and_resume(warm, FOUR if step in (8, 15) else ONE, step, "term")


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["kill9", "term", "exception", "disk_full"])
@pytest.mark.parametrize("settings", [ONE, FOUR], ids=["one", "four"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_every_step_and_every_fault(warm: Any, step: int, settings: Any, fault: str) -> None:
    break_and_resume(warm, settings, step, fault)


@pytest.mark.parametrize(
    "mutant", ["restart_schedule", "lose_random_numbers", pytest.param("draw_rows_together", marks=pytest.mark.faults)]
)
def test_a_resume_that_forgets_something_turns_it_red(warm: Any, mutant: str) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        break_and_resume(warm, ONE, 8, "kill9", second=mutant)


@pytest.mark.faults
def test_a_resume_that_forgets_the_epoch_turns_it_red(warm: Any) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        break_and_resume(warm, ONE, 18, "kill9", second="lose_the_epoch")


@pytest.mark.faults
def test_a_checkpoint_from_inside_a_step_turns_it_red(warm: Any) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        break_and_resume(warm, ONE, 8, "after_step:8:kill9", first="save_inside_the_step")


@pytest.mark.parametrize(
    "point",
    ["save_write", "save_rename", *(pytest.param(p, marks=pytest.mark.faults) for p in ("save_open", "save_fsync"))],
)
def test_a_training_killed_inside_a_save_resumes_exactly(warm: Any, point: str) -> None:
    """The fourth save is the one after step 8; the half of it is not taken."""
    break_and_resume(warm, ONE, 9, f"{point}:4:kill9")


@pytest.mark.faults
@pytest.mark.parametrize("point", ["row:20", "forward:9", "backward:9", "after_step:9"])
@pytest.mark.parametrize("fault", ["kill9", "exception"])
def test_a_training_broken_at_any_point_of_a_step_resumes_exactly(warm: Any, point: str, fault: str) -> None:
    """The twentieth row is read ahead, in the ninth step."""
    break_and_resume(warm, ONE, 9, f"{point}:{fault}")


@pytest.mark.faults
def test_a_training_killed_before_it_began_begins(warm: Any) -> None:
    break_and_resume(warm, ONE, 1, "load:1:kill9")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_hundred_kills_at_random_moments(warm: Any, record_property: Any) -> None:
    """Each life is resumed by itself, loses at most save_steps, and repeats the losses of the steps it does again."""
    generator = random.Random(3407)
    settings = {"train.max_steps": 100_000, "train.lr_scheduler_type": "constant", "train.save_steps": 3}
    run, reached, inside, resumes = warm.new_run(), 0, 0, 0
    checkpoints: Path = warm.path(run) / "checkpoints"
    while resumes < KILLS:
        before = len(warm.starts(run))
        assert warm.train(run, settings=settings, kill_after=generator.uniform(0.05, 1.5)) == -9, warm.log(run)
        inside += any(checkpoints.glob(".writing-*"))
        starts = warm.starts(run)
        assert len(starts) == before + 1
        if before:
            resumes += 1
            assert 0 <= reached - starts[-1] <= 3, "more than save_steps were lost"
        reached = max([reached, *(step for step, _ in warm.read_losses(run))])
    rows = warm.read_losses(run)
    found: dict[int, set[float]] = {}
    for step, loss in rows:
        found.setdefault(step, set()).add(loss)
    assert [step for step, losses in found.items() if len(losses) > 1] == [], "a step that was done again differs"
    assert found.keys() == set(range(1, reached + 1)) and inside
    again = f"{len(rows) - reached} of {reached} steps done again, each with the same loss"
    record_property(
        "kills", f"| `kill -9` at random moments, {inside} inside a save ({again}) | {resumes} | {resumes} |"
    )
