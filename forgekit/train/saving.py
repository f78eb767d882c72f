"""When a checkpoint is saved, what goes into it, and what comes back out of it: the part of a training that its files do not hold."""

import functools
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..faults import strike
from .checkpoint import read_manifest, rotate, write_whole
from .identity import Identity
from .trial import changed


class Checkpoints(TrainerCallback):
    """Saves after an optimiser step: every `save_steps`, every `minutes`, for a new best score and at the end of training.

    The best and the newest checkpoints stay; older ones go once a new one has been read back.
    """

    def __init__(self, trainer: Any, identity: Identity, minutes: float | None):
        self.trainer, self.identity, self.minutes = trainer, identity, minutes
        self.folder = Path(trainer.args.output_dir)
        self.resumed: Path | None = None
        self.saved_at = time.monotonic()
        self.loss_before: Any = None  # inside a step: the loss added up before it
        self.lost: Any = None  # the sizes of the weights, where those that learned are gone with other processes
        self.stepping = False  # from the first weight that the optimiser changes to the step's number

    # ---- when -------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; after a resume put back what transformers forgets."""
        self.saved_at, self.stepping, self.loss_before = time.monotonic(), False, None
        self.trainer.step_losses.clear()
        if self.resumed:
            state.compute_steps(args, state.max_steps)  # the settings of now, not those in the checkpoint
            self.find_best(state)
            put_back_losses(self.trainer, read_manifest(self.resumed)["since_log"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the order of rows which epoch it is."""
        order = self.trainer.order
        order.epoch = state.global_step // -(-len(order) // count_rows(args))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the loss so far: what a broken step has added to it does not count."""
        self.loss_before = self.trainer._tr_loss.detach().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the step is whole; ask for a checkpoint when the last one is old, and after the last step."""
        self.stepping, self.loss_before = False, None
        old = self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes
        control.should_save |= old or state.global_step >= state.max_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Ask for a checkpoint of the best weights; transformers compares the score only after this."""
        score = (metrics or {}).get("eval_loss")
        control.should_save |= score is not None and (state.best_metric is None or score < state.best_metric)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that weights change from here on."""
        strike("before_step")
        self.stepping = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pass the fault point: all weights have changed, and neither schedule nor step number say so yet."""
        strike("after_step")

    # ---- what -------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this moment, which must not lie inside an optimiser step. Raises RunError.

        Where several processes train together each calls this, gives its part, and the first one writes.
        """
        trainer, state = self.trainer, self.trainer.state
        path = self.folder / f"checkpoint-{state.global_step}"
        trainer.store_flos()
        whole = gather_whole(trainer)
        if trainer.group and trainer.group.rank:  # rank 0 alone writes
            return path
        self.find_best(state, path)
        about = {
            "step": state.global_step,
            "batch": {"rows": trainer.args.per_device_train_batch_size, "accumulated": trainer.args.gradient_accumulation_steps * trainer.args.world_size},
            "since_log": note_losses(trainer, trainer._tr_loss if self.loss_before is None else self.loss_before),
            "identity": self.identity,
        }  # fmt: skip
        write_whole(path, functools.partial(self.write, whole=whole), about)
        rotate(self.folder, {path.name, Path(state.best_model_checkpoint or "").name})
        self.saved_at = time.monotonic()
        return path

    def write(self, folder: Path, whole: dict[str, Any] | None = None) -> None:
        """Write weights, optimiser, schedule, random numbers and the trainer's state.

        transformers' own way would add training_args.bin, a pickle that holds the Hub token in clear, and the tokenizer.

        Args:
            whole: weights and moments where the processes keep parts of them (`gather_whole`).
        """
        trainer = self.trainer
        if whole:
            trainer.group.shards.model.save_pretrained(str(folder), state_dict=whole["weights"])
        else:
            trainer.model.save_pretrained(str(folder))
        strike("save_write")
        with changed([trainer.optimizer] if whole else [], "state_dict", lambda: (whole or {})["moments"]):
            trainer._save_optimizer_and_scheduler(str(folder))
        trainer._save_scaler(str(folder))
        trainer._save_rng_state(str(folder))
        for part in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(part, ExportableState):
                trainer.state.stateful_callbacks[type(part).__name__] = part.state()
        trainer.state.save_to_json(str(folder / "trainer_state.json"))

    def find_best(self, state: Any, new: Path | None = None) -> None:
        """Let the state name the checkpoint with the best score, where it stands now: a run's folder may have been moved."""
        best = self.folder / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if state.best_global_step and (best == new or best.is_dir()) else None


def gather_whole(trainer: Any) -> dict[str, Any] | None:
    """Return weights and the optimiser's state in rank 0's memory where processes keep parts of them; each has to call this."""
    if not (trainer.group and trainer.group.shards):
        return None
    from .sharded import gather_moments

    kept = trainer.group.rank == 0
    return {"weights": trainer.group.shards.gather(kept), "moments": gather_moments(trainer.optimizer, kept)}


def count_rows(args: Any) -> int:
    """Return the rows of one optimiser step, over all accumulated batches and all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def note_losses(trainer: Any, loss: Any) -> dict[str, Any]:
    """Return the loss added up since the last line of the log and over the whole training; a float's text in JSON is exact."""
    return {
        "loss": loss.item(),
        "step": trainer._globalstep_last_logged,
        "total": trainer._total_loss_scalar,
    }


def put_back_losses(trainer: Any, noted: dict[str, Any]) -> None:
    """Go on adding where the checkpoint was taken, so that the next line of the log is the mean over all of its steps."""
    trainer._tr_loss.fill_(noted["loss"])
    trainer._globalstep_last_logged, trainer._total_loss_scalar = noted["step"], noted["total"]
