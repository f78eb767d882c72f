"""How far a training is, in one value that the training thread replaces and any other thread may read."""

import time
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback

from ..hardware import memory_size
from .callbacks import Clock, peak_gpu_memory


@dataclass(frozen=True)
class Snapshot:
    """The figures of one moment. Losses in nats a token, memory in bytes; None where nothing is known yet."""

    step: int = 0
    total: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None  # read by the model while training, padding left out, scoring left out
    memory: int | None = None  # most that tensors took on the GPU; without one, what the process takes now
    memory_total: int | None = None
    on_gpu: bool = False
    checkpoint: int | None = None  # step of the newest


class Progress(TrainerCallback):
    """Keeps `latest`, a Snapshot, and a clock.

    Tokens are counted by a hook on the model's forward and stay on its device until a loss is logged, which waits for the
    device anyway: counting costs no step any time.
    """

    def __init__(self) -> None:
        self.latest = Snapshot()
        self.clock = Clock()
        self.tokens: Any = None
        self.hook: Any = None
        self.window = self.step_end = 0.0
        self.group: Any = None  # a `Group` while several processes train together

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start the clock and count tokens."""
        self.close()
        self.clock = Clock()
        self.clock.first_step = state.global_step
        self.latest = Snapshot(step=state.global_step, total=state.max_steps, **measure_memory())
        self.tokens = None
        self.window = self.step_end = time.monotonic()
        self.hook = model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Add the tokens of a batch that is learned from."""
        mask = kwargs.get("attention_mask")
        if module.training and mask is not None:
            number = mask.sum()
            self.tokens = number if self.tokens is None else self.tokens + number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step."""
        self.step_end = time.monotonic()
        self.latest = replace(self.latest, step=state.global_step, **measure_memory())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Note the figures, and how fast tokens went since the last time."""
        logs = logs or {}
        if "eval_loss" in logs:
            self.latest = replace(self.latest, held_out_loss=float(logs["eval_loss"]))
        elif "loss" in logs:
            now = time.monotonic()
            tokens = None if self.tokens is None else float(self.tokens)
            if self.group:
                tokens = sum(tokens for [tokens] in self.group.gather([tokens or 0.0]))
            self.latest = replace(
                self.latest,
                loss=float(logs["loss"]),
                learning_rate=logs.get("learning_rate"),
                tokens_per_second=tokens / (now - self.window) if tokens and now > self.window else None,
            )
            self.tokens, self.window = None, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the time that scoring took out of the tokens a second."""
        self.skip_pause()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the checkpoint, and leave its time out too."""
        self.skip_pause()
        self.latest = replace(self.latest, checkpoint=state.global_step)

    def skip_pause(self) -> None:
        """Move the window's start by the time since the last step ended, or since the last pause."""
        now = time.monotonic()
        self.window += now - max(self.step_end, self.window)
        self.step_end = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self.close()

    def close(self) -> None:
        """Take the hook off the model."""
        if self.hook:
            self.hook.remove()
            self.hook = None

    @property
    def eta_seconds(self) -> float | None:
        """Return the seconds left at the pace so far, or None before the first step."""
        return self.clock.eta(self.latest.step, self.latest.total)


def measure_memory() -> dict[str, Any]:
    """Return Snapshot's three fields about memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return {"memory": peak_gpu_memory(), "memory_total": total, "on_gpu": True}
    return {"memory": psutil.Process().memory_info().rss, "memory_total": memory_size(), "on_gpu": False}
