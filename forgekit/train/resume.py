"""Goes on where a run's newest whole checkpoint was taken, and with half the batch where the memory did not suffice."""

import functools
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FreshProcessError, RunError
from ..link import is_supervised
from ..run_folder import Run, now
from .checkpoint import find_newest, find_step, list_checkpoints, read_manifest, verify_checkpoint
from .identity import check_drift

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import Config

HALVINGS = 2


def resume_training(trainer: Any, config: "Config", run: Run, say: "Callable[[str], None]" = print) -> None:
    """Let `trainer.train` begin at the checkpoint that `train.resume`, or its own argument, names.

    When the memory does not suffice it goes on from the last step with half the micro-batch and twice the accumulation, at
    most twice in a run, and says so in run.json: in a fresh process under a supervisor, else in this one.
    """
    train = trainer.train

    @functools.wraps(train)
    def train_on(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checkpoint = choose_checkpoint(trainer, config, resume_from_checkpoint, say)
        if checkpoint:
            say(f"Resuming from {checkpoint.name} of {checkpoint.parent.parent.name}.")
            note_resume(run, checkpoint)
        while True:
            changes = run.record.get("smaller_batches", [])
            if checkpoint:
                take_batch(trainer, read_manifest(checkpoint)["batch"], say)
            else:
                seed_training(config)
            if changes:  # it may have run out before there was a checkpoint
                take_batch(trainer, changes[-1], say)
            trainer.checkpoints.resumed = checkpoint
            try:
                return train(str(checkpoint) if checkpoint else None, *args, **kwargs)
            except RuntimeError as error:
                rows = trainer.args.per_device_train_batch_size
                if not is_out_of_memory(error) or len(changes) >= HALVINGS or rows == 1:
                    raise
            # here, because until now the error held the tensors that did not fit
            checkpoint = start_smaller(trainer, run, say)

    trainer.train = train_on


def seed_training(config: "Config") -> None:
    """Let the dropout of a training depend on its seed alone, whatever drew random numbers since the trainer was made."""
    from transformers import set_seed

    set_seed(config.train.seed)


def choose_checkpoint(
    trainer: Any, config: "Config", asked: str | bool | None, say: "Callable[[str], None]"
) -> Path | None:
    """Return the checkpoint to begin at, or None for the first step.

    Args:
        asked: of `trainer.train`: True is auto, False is never, a path is a path, None is what train.resume says.

    Raises RunError when none of several is whole, when the one that was named is not, and when it is of another training.
    """
    wanted = config.train.resume if asked is None else asked
    folder = trainer.checkpoints.folder
    if wanted in ("never", False):
        keep_aside(folder, say)
        return None
    checkpoint = find_newest(folder, say) if wanted in ("auto", True) else find_named(str(wanted), folder)
    if checkpoint:
        identity = read_manifest(checkpoint).get("identity", {})
        for sentence in check_drift(identity, trainer.checkpoints.identity, config.train.allow_drift, checkpoint.name):
            say(f"{checkpoint.name}: {sentence}")
    return checkpoint


def find_named(name: str, folder: Path) -> Path:
    """Return the checkpoint that was named, by its path or by its name in the run's folder. Raises RunError."""
    path = Path(name).expanduser().absolute()
    path = path if path.is_dir() else folder / name
    if not path.is_dir():
        raise RunError(
            f"train.resume: there is no checkpoint {name}; it should be auto, never, or a checkpoint's folder."
        )
    if problem := verify_checkpoint(path):
        raise RunError(f"train.resume: {path.name} is not whole: {problem}.")
    return path


def keep_aside(folder: Path, say: "Callable[[str], None]") -> None:
    """Move the checkpoints of an earlier training out of the way."""
    if list_checkpoints(folder):
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}-before-{n}").exists())
        aside = folder.with_name(f"{folder.name}-before-{number}")
        folder.rename(aside)
        say(f"train.resume: never; the checkpoints of before are kept in {aside.name}.")


def note_resume(run: Run, checkpoint: Path) -> None:
    """Put the resume into run.json."""
    resumes = [*run.record.get("resumes", []), {"step": find_step(checkpoint), "at": now()}]
    run.update(resumes=resumes)


# ---- memory ---------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether the GPU's memory, or the machine's, did not suffice."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def start_smaller(trainer: Any, run: Run, say: "Callable[[str], None]") -> Path | None:
    """Halve the micro-batch, double the accumulation, and return the checkpoint to go on from, None at the first step.

    Weights, moments and schedule are those of the last whole step, unless memory ran out while the optimiser changed them:
    or processes shared them: then it is the newest checkpoint on disk. Raises RunError when there is none, and FreshProcessError under a supervisor,
    which starts the notebook anew.
    """
    import torch

    args, checkpoints = trainer.args, trainer.checkpoints
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    before = args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = max(size for size in range(1, before[0] // 2 + 1) if before[0] % size == 0)
    set_batch(trainer, rows, before[1] * before[0] // rows)
    step = trainer.state.global_step
    words = (
        f"Out of memory in step {step + 1} with {before[0]} rows at once; going on with {rows} rows at once, "
        f"{args.gradient_accumulation_steps} times before a step: {before[0] * before[1]} rows a step, as before."
    )
    say(words)
    change = {"step": step + 1, "rows": rows, "accumulated": args.gradient_accumulation_steps, "at": now()}
    run.update(smaller_batches=[*run.record.get("smaller_batches", []), change])
    whole = not checkpoints.stepping and checkpoints.lost is None
    saved = checkpoints.save() if step and whole else None
    if is_supervised():
        raise FreshProcessError(f"{words} A fresh process goes on.")
    if whole:
        return saved
    checkpoint = find_newest(checkpoints.folder, say)
    if checkpoint is None:
        when = "while the optimiser changed the weights" if checkpoints.stepping else "with the weights shared out"
        raise RunError(
            f"Memory ran out {when}, and there is no checkpoint yet: start again, with train.per_device_train_batch_size: {rows} and "
            f"train.gradient_accumulation_steps: {args.gradient_accumulation_steps}."
        )
    return checkpoint


def take_batch(trainer: Any, batch: dict[str, int], say: "Callable[[str], None]") -> None:
    """Go on with the micro-batch of the checkpoint, when it is a part of the same rows a step."""
    args = trainer.args
    mine = args.per_device_train_batch_size, args.gradient_accumulation_steps
    its = batch["rows"], batch["accumulated"]
    if its[0] * its[1] == mine[0] * mine[1] and its[0] < mine[0]:
        set_batch(trainer, *its)
        say(f"{its[0]} rows at once, {its[1]} times before a step, as when the checkpoint was written.")


def set_batch(trainer: Any, rows: int, accumulated: int) -> None:
    """Set the rows of a forward pass and how many of those make a step."""
    trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps = rows, accumulated
    trainer._train_batch_size = trainer.args.train_batch_size
