"""What a run says while it trains: a line a step in the log, status.json for other programs, a curve in a notebook."""

import base64
import io
import json
import logging
import math
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerState

from ..files import finite, write_json
from ..link import tell
from ..run_folder import Run, now
from ..scrub import scrub

FIGURE_SECONDS = 0.25  # at most four drawings a second
STATUS_SECONDS = 1.0


class Clock:
    """Seconds since training began, and how long the rest takes at the pace since this start; immune to clock changes."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first_step = 0

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def eta(self, step: int, total: int) -> float | None:
        """Return the seconds left, or None before the first step."""
        done = step - self.first_step
        return self.seconds() / done * (total - step) if done > 0 else None


class RunLog(TrainerCallback):
    """Writes logs/training.log (one plain line a logging step, printed too), logs/metrics.jsonl and training-stats.json.

    `progress`, a Progress that is told before, counts the tokens. A supervisor hears when a step begins and ends.
    """

    def __init__(self, run: Run, progress: Any = None):
        self.run, self.clock, self.progress = run, Clock(), progress
        self.folder = run.path / "logs"
        self.losses: list[tuple[int, float]] = []
        self.scores: list[tuple[int, float]] = []
        self.step_started = 0.0
        self.step_seconds: list[float] = []
        self.state = TrainerState()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and open the files; after a resume begin with the losses up to it."""
        self.state = state
        self.losses, self.scores = find_curve(state)
        self.folder.mkdir(parents=True, exist_ok=True)
        cut_half_line(self.folder / "metrics.jsonl")
        self.clock = Clock()
        self.clock.first_step = state.global_step
        self.write(f"training starts at step {state.global_step} of {state.max_steps}", stamp=f"{now()} ")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.step_started = time.monotonic()
        tell(step=state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long the step took, all its accumulated batches together."""
        self.step_seconds.append(time.monotonic() - self.step_started)
        tell(done=state.global_step, seconds=self.step_seconds[-1])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line for a step, or for a score on held-out rows."""
        logs = dict(logs or {})
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(
                scrub(json.dumps(finite({"step": state.global_step, "time": now(), **logs}), default=str) + "\n")
            )
        if "eval_loss" in logs:
            self.scores.append((state.global_step, logs["eval_loss"]))
            self.write(f"step {state.global_step:>5}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            loss = float(logs["loss"])
            self.losses.append((state.global_step, loss))
            eta = self.clock.eta(state.global_step, state.max_steps)
            self.write(
                f"step {state.global_step:>5}/{state.max_steps}  loss {loss:.4f}  lr {logs.get('learning_rate', math.nan):.2e}  "
                f"gradient {float(logs.get('grad_norm', math.nan)):.3f}  {self.speed()}{self.clock.seconds():.0f} s, {eta or 0:.0f} s left"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write metrics/training-stats.json."""
        tell(rest=True)
        seconds = self.clock.seconds()
        stats = {
            "steps": state.global_step,
            "epochs": state.epoch,
            "seconds": round(seconds, 2),
            "first_step_seconds": round(self.step_seconds[0], 3) if self.step_seconds else None,
            "median_step_seconds": round(median(self.step_seconds[1:]), 4) if self.step_seconds[1:] else None,
            "first_loss": self.losses[0][1] if self.losses else None,
            "last_loss": self.losses[-1][1] if self.losses else None,
            "best_held_out_loss": min((score for _, score in self.scores), default=None),
            "best_checkpoint": state.best_model_checkpoint and Path(state.best_model_checkpoint).name,
            "peak_gpu_memory_bytes": peak_gpu_memory(),
            "losses": self.losses,
            "held_out_losses": self.scores,
        }
        write_json(self.run.path / "metrics" / "training-stats.json", stats)
        self.run.update(training={name: value for name, value in stats.items() if not name.endswith("losses")})
        self.write(f"training ends after step {state.global_step}, {seconds:.1f} s", stamp=f"{now()} ")

    def speed(self) -> str:
        """Return the tokens a second since the last line, where they are counted."""
        tokens = self.progress and self.progress.latest.tokens_per_second
        return f"{tokens:.0f} tokens/s  " if tokens else ""

    def fail(self, error: BaseException) -> None:
        """Write what ended training; transformers calls no callback then."""
        if not isinstance(error, KeyboardInterrupt):
            self.write(f"{type(error).__name__}: {error}".rstrip(": "), stamp=f"{now()} ")
        self.on_train_end(None, self.state, None)

    def write(self, line: str, stamp: str = "") -> None:
        """Print a line and put it into logs/training.log, there with the time."""
        print(line, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "training.log", "a", encoding="utf-8") as file:
            file.write(scrub(f"{stamp}{line}\n"))


def find_curve(state: Any) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the losses and the held-out losses that a trainer's state remembers, each with its step."""
    history = state.log_history
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    return losses, [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]


def cut_half_line(path: Path) -> None:
    """Cut off a last line that a full disk or a killed process left half written; JSON lines behind it would be lost too."""
    whole = path.read_bytes() if path.exists() else b""
    if whole and not whole.endswith(b"\n"):
        os.truncate(path, whole.rfind(b"\n") + 1)


def peak_gpu_memory() -> int | None:
    """Return the most bytes that tensors took on the GPU in this process, or None without one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


class StatusFile(TrainerCallback):
    """Keeps status.json current, at most once a second, for programs that poll; `extra` is a second place for it."""

    def __init__(self, run: Run, extra: str | None = None):
        self.paths = [run.path / "status.json", *([Path(extra)] if extra else [])]
        self.status: dict[str, Any] = {}
        self.clock, self.written, self.state = Clock(), -math.inf, TrainerState()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that training runs."""
        self.state = state
        self.clock = Clock()
        self.clock.first_step = state.global_step
        self.status = {"started_at": now(), "checkpoint_at": None, "error": None, "loss": None, "learning_rate": None}
        self.write(state, running=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Note the newest loss and learning rate."""
        self.status |= {
            name: value for name, value in (logs or {}).items() if name in ("loss", "learning_rate", "eval_loss")
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write, unless a second has not passed."""
        if time.monotonic() - self.written >= STATUS_SECONDS:
            self.write(state, running=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step of the newest checkpoint."""
        self.status["checkpoint_at"] = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that training is over."""
        self.write(state, running=False)

    def fail(self, error: BaseException) -> None:
        """Say that training ended by an error; transformers calls no callback then."""
        self.status["error"] = f"{type(error).__name__}: {error}"
        self.write(self.state, running=False)

    def write(self, state: Any, running: bool) -> None:
        """Write the file in every place."""
        self.written = time.monotonic()
        value = {
            "running": running,
            "step": state.global_step,
            "total_steps": state.max_steps,
            "epoch": state.epoch,
            "total_epochs": state.num_train_epochs,
            "eta_seconds": self.clock.eta(state.global_step, state.max_steps),
            **self.status,
        }
        for path in self.paths:
            write_json(path, value)


class LiveCurve(TrainerCallback):
    """Draws the loss while the training cell runs: one matplotlib figure, updated in place, closed at the end."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []
        self.drawn = -math.inf
        self.figure: Any = None
        self.handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the figure."""
        from IPython.display import display
        from matplotlib.figure import Figure

        losses, self.scores = find_curve(state)
        self.steps, self.losses = [step for step, _ in losses], [loss for _, loss in losses]
        self.figure = Figure(figsize=(7, 3), layout="constrained")
        self.draw(state.max_steps)
        self.handle = display(self.picture(), raw=True, display_id=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add a point."""
        logs = logs or {}
        if "eval_loss" in logs:
            self.scores.append((state.global_step, logs["eval_loss"]))
        elif "loss" in logs:
            self.steps.append(state.global_step)
            self.losses.append(float(logs["loss"]))
        if time.monotonic() - self.drawn > FIGURE_SECONDS:
            self.show(state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw once more and say in words what the figure shows, for those who do not see it."""
        self.show(state.max_steps)
        if self.losses:
            print(
                f"Loss curve: from {self.losses[0]:.3f} at step {self.steps[0]} to {self.losses[-1]:.3f} at step {self.steps[-1]}, lowest {min(self.losses):.3f}."
            )

    def show(self, total: int) -> None:
        """Update the figure in the notebook."""
        self.drawn = time.monotonic()
        self.draw(total)
        if self.handle:
            self.handle.update(self.picture(), raw=True)

    def picture(self) -> dict[str, str]:
        """Return the figure as a notebook stores it, PNG and a word of text.

        IPython draws a figure itself only after pyplot was imported, which this package leaves to the user.
        """
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=100)
        return {
            "image/png": base64.b64encode(file.getvalue()).decode(),
            "text/plain": f"Loss curve, {len(self.losses)} points",
        }

    def draw(self, total: int) -> None:
        """Draw the points so far."""
        self.figure.clear()
        axes = self.figure.subplots()
        axes.plot(self.steps, self.losses, color="#1f5fa8", linewidth=1.5, label="training rows")
        if self.scores:
            axes.plot(*zip(*self.scores, strict=True), "o--", color="#b35300", label="held-out rows", clip_on=False)
            axes.legend(frameon=False)
        axes.set(xlabel="optimiser step", ylabel="loss, nats a token", xlim=(0, max(1, total)))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)


logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports its font cache on stderr otherwise
