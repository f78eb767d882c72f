"""A training that is broken at any step and resumed gives the losses and weights of one that nothing disturbed, bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest

from .breaking import EXACT, FOUR, ONE, STEPS, break_and_resume

KILLS = 200
ENDS = {
    "kill9": "killed",
    "term": "stopped after its step, with a checkpoint",
    "exception": "ended by InjectedError",
    "disk_full": "ended by RunError",
}
# first and last step, one with and one without a checkpoint before it, the last of an epoch and the first of the next
CHOSEN = {("one", step, fault) for step in (1, 2, 8, 15, 16, 24) for fault in ("kill9", "term")}
CHOSEN ^= {("one", 8, "term"), ("four", 8, "term"), ("one", 15, "term"), ("four", 15, "term")}
CASES = [
    (accumulation, step, fault) for step in range(1, STEPS + 1) for accumulation in ("one", "four") for fault in ENDS
]


@pytest.mark.parametrize(
    ("accumulation", "step", "fault"),
    [
        pytest.param(*case, marks=() if case in CHOSEN else pytest.mark.faults, id="{}-{}-{}".format(*case))
        for case in CASES
    ],
)
def test_every_step_and_every_fault(warm: Any, accumulation: str, step: int, fault: str, record_case: Any) -> None:
    case = record_case(
        what="training", point=f"each step, {accumulation} batch{'es' * (accumulation == 'four')} a step", action=fault
    )
    settings = {"one": ONE, "four": FOUR}[accumulation]
    if fault == "disk_full":  # files cannot grow any more
        case["happened"] = break_and_resume(warm, settings, "", full_disk_at=step)
    else:
        case["happened"] = break_and_resume(warm, settings, f"before_step:{step}:{fault}")
    assert case["happened"] == f"{ENDS[fault]}; {EXACT}"


@pytest.mark.parametrize(
    "mutant", ["restart_schedule", "lose_random_numbers", pytest.param("draw_rows_together", marks=pytest.mark.faults)]
)
def test_a_resume_that_forgets_something_turns_it_red(warm: Any, mutant: str) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        break_and_resume(warm, ONE, "before_step:8:kill9", second=mutant)


@pytest.mark.faults
def test_a_resume_that_forgets_the_epoch_turns_it_red(warm: Any) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        break_and_resume(warm, ONE, "before_step:18:kill9", second="lose_the_epoch")


@pytest.mark.faults
def test_a_checkpoint_from_inside_a_step_turns_it_red(warm: Any) -> None:
    with pytest.raises(AssertionError, match="losses differ"):
        break_and_resume(warm, ONE, "after_step:8:kill9", first="save_inside_the_step")


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_two_hundred_kills_at_random_moments(warm: Any, record_case: Any) -> None:
    """Each life is resumed by itself, loses at most save_steps, and repeats the losses of the steps it does again."""
    case = record_case(what="training", point="random moments", action="kill9", times=KILLS)
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
    case["happened"] = "killed; resumed, every step that was done again with the same loss"
    case["note"] = f"{inside} inside a save; {len(rows) - reached} of {reached} steps done again"
