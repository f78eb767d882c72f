"""Did the loss fall, stay down and level out? Judged from the losses of a training, as training-stats.json holds them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

FEWEST = 6  # logged losses below which nothing is said about their course
CLIMB = 0.25  # of the whole fall, and twice what scatter explains: more than that back up from the lowest is diverging
LATE = 0.5  # of the whole fall: more than that in the last quarter is not converged


@dataclass(frozen=True)
class Course:
    """The course of a loss: what is wrong with it, one sentence in any case, and the figures."""

    problems: tuple[str, ...]
    summary: str
    numbers: dict[str, Any]


def judge_losses(stats: Mapping[str, Any]) -> Course:
    """Judge the training losses, and the held-out ones where there are any.

    Single batches scatter, so means over a fifth of the losses are compared (three at least): the first, the lowest, the
    one that ends where the last quarter begins, and the last.
    """
    losses = [loss for _, loss in stats["losses"]]
    held_out = [loss for _, loss in stats.get("held_out_losses") or ()]
    lost = sum(loss is None or not math.isfinite(loss) for loss in (*losses, *held_out))
    if lost:
        return Course((f"{lost} of the losses are no numbers",), "the loss was lost", {"losses": len(losses)})
    if len(losses) < FEWEST:
        why = f"only {len(losses)} losses were logged, and {FEWEST} are needed to judge their course (train.logging_steps)"
        return Course((why,), why, {"losses": len(losses)})
    size = max(3, len(losses) // 5)
    windows = [fmean(losses[start : start + size]) for start in range(len(losses) - size + 1)]
    first, lowest, last = windows[0], min(windows), windows[-1]
    late = windows[max(0, 3 * len(losses) // 4 - size)]
    fall, scatter = first - lowest, pstdev(losses[-size:]) / math.sqrt(size)
    numbers = {"first_loss": first, "lowest_loss": lowest, "last_loss": last, "loss_at_three_quarters": late}
    problems = []
    if last >= first:
        problems.append(f"the loss did not fall ({first:.4g} -> {last:.4g})")
    elif last - lowest > max(CLIMB * fall, 2 * scatter):
        problems.append(f"the loss climbed again, from {lowest:.4g} to {last:.4g} (diverging)")
    elif late - last > LATE * fall:
        problems.append(
            f"the loss was still falling fast, {late:.4g} -> {last:.4g} in the last quarter (not converged)"
        )
    if held_out:
        numbers |= {"first_held_out_loss": held_out[0], "best_held_out_loss": min(held_out)}
    return Course(tuple(problems), f"loss {first:.4g} -> {last:.4g}", numbers)
