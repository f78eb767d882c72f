"""What is looked at before every optimiser step: whether loss and gradient are numbers, and whether the gradient is of a usual length."""

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from ..errors import ModelError
from .order import Order

UNUSUAL = 100  # times as long as the median of the last hundred
UNUSUAL_TOLD = 5  # of which so many are told
RECENT = 10  # steps of which so many unusual ones, UNUSUAL_TOLD, end the compiling
SCALE_STEPS = 20  # float16 starts with losses scaled by 65536 and halves that at each overflow: below 1 after 17


class StepGuards:
    """Stands among the bases of a trainer's class (exact.py).

    order: which rows are learned from when. overflows: steps in turn that float16's scaler left out. lengths: of the last gradients.
    unusual: how many were far longer than usual. recent: which of the last steps had one. say: writes a line into the log.
    """

    order: Order
    overflows: int
    lengths: deque[float]
    unusual: int
    recent: deque[bool]
    say: Callable[[str], None] = staticmethod(print)

    def start_guards(self) -> None:
        """Forget what earlier steps were like."""
        self.overflows, self.lengths, self.unusual = 0, deque(maxlen=100), 0
        self.recent = deque(maxlen=RECENT)

    def check_finite(self, losses: list[Any], norm: Any) -> None:
        """Raise ModelError, naming the rows, when a loss or the gradient's length is no number; the weights are still good.

        In float16 a gradient that is too large is no error: the scaler leaves the step out and halves its scale.
        """
        import torch

        numbers = torch.stack(
            [*(loss.float() for loss in losses), torch.as_tensor(norm, device=losses[0].device).float()]
        )
        *found, length = numbers.tolist()
        if all(map(math.isfinite, (*found, length))):
            self.overflows = 0
            self.notice(length)
            return
        bad = [number for number, loss in enumerate(found) if not math.isfinite(loss)]
        trainer: Any = self
        if not bad and trainer.accelerator.scaler is not None:
            self.overflows += 1
            if self.overflows < SCALE_STEPS:
                return
        rows, size = self.find_step_rows(), trainer.args.train_batch_size
        if bad:
            what = f"The loss is {found[bad[0]]}"
            rows = [row for number in bad for row in rows[number * size : (number + 1) * size]]
        else:
            what = f"The gradient's length is {length}"
        raise ModelError(
            f"{what} at step {trainer.state.global_step + 1}, so training stopped before the weights were changed. Rows of this step: "
            f"{', '.join(name_rows(trainer.train_dataset, rows))}. Look at them, or lower train.learning_rate; in float16 set "
            "model.dtype: bfloat16 or float32."
        )

    def find_step_rows(self) -> list[int]:
        """Return the numbers of the rows that this optimiser step learns from, of all processes."""
        trainer: Any = self
        args = trainer.args
        return self.order.find_rows(
            trainer.state.global_step, args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        )

    def notice(self, length: float) -> None:
        """Say so, a few times, when a gradient is far longer than those before: its rows are broken, or something that computes it is.

        One before is enough: the first step is not compiled, and where the compiler is wrong each later one may be too long.
        """
        usual = median(self.lengths) if self.lengths else 0.0
        self.recent.append(bool(usual) and length > UNUSUAL * usual)
        if not self.recent[-1] or self.unusual == UNUSUAL_TOLD:  # what was told so often is usual here
            self.lengths.append(length)
            return
        self.unusual += 1
        trainer: Any = self
        last = " No more of this is told" if self.unusual == UNUSUAL_TOLD else ""
        if sum(self.recent) == UNUSUAL_TOLD and self.stop_compiling():
            last += ", and layers are not compiled any more"
        last += "." if last else ""
        self.say(
            f"step {trainer.state.global_step + 1}: the gradient is {length / usual:.0f} times as long as usual. Rows: "
            f"{', '.join(name_rows(trainer.train_dataset, self.find_step_rows()))}. Look at them; where other rows do it each time, set "
            f"train.compile: off.{last}"
        )

    def stop_compiling(self) -> bool:
        """Compute the next steps uncompiled, if layers are compiled; say whether they are."""
        from .fast_path import get_fast_path

        trainer: Any = self
        path = get_fast_path(trainer.model)
        if path is None or not path.compiled:
            return False
        path.stop_compiling(f"{UNUSUAL_TOLD} gradients were more than {UNUSUAL} times as long as usual")
        return True


def name_rows(dataset: Any, rows: list[int]) -> list[str]:
    """Return where rows came from, file:line, or their numbers in the training rows, counted from 0, where that is not known."""
    if "source" not in getattr(dataset, "column_names", ()):
        return [f"train row {row}" for row in rows]
    return list(dataset.with_format(None)[rows]["source"])
