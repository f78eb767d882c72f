"""What `sft_trainer` adds to TRL's trainer, so that a training resumes exactly; step_guards.py looks at each step before.

With a `group`, several processes take each step together: the same rows, the same losses, and decisions that rank 0 makes.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data.collate import IGNORE
from ..data.randomness import kept_random_numbers
from ..faults import strike
from ..link import tell
from .order import Order, SeededRows
from .read_ahead import ReadAhead, take
from .step_guards import StepGuards


class ExactTraining(StepGuards):
    """Stands before a transformers trainer among the bases of a class; `prepare` completes it.

    checkpoints: when and how they are saved. step_losses: of the batches since the last optimiser step, on their device. step_rows: of
    the same batches, where several processes train: whether anything is learned from each, and its tokens as TRL counts them. reader:
    where a GPU computes, collates the batches of the next step meanwhile. operations: floating-point operations of a token, as
    transformers counts them. group: while several processes train together.
    """

    checkpoints: Any
    step_losses: list[Any]
    reader: ReadAhead | None = None
    operations: int | None = None
    step_rows: list[tuple[Any, int]]
    group: Any = None

    def prepare(self, order: Order, checkpoints: Any) -> None:
        """Set what is needed."""
        self.order, self.checkpoints = order, checkpoints
        self.step_losses, self.step_rows = [], []
        self.start_guards()

    # ---- rows -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.group is None:
            return self.order
        from .share import Share

        trainer: Any = self
        return Share(self.order, trainer.args.train_batch_size, self.group.rank, self.group.size)

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        from .trial import changed

        trainer: Any = self
        rows, collate = dataset, trainer.data_collator
        with contextlib.ExitStack() as stack:
            if self.group:
                from .share import collate_shared

                stack.enter_context(self.group.own_loader(trainer))
                collate = collate_shared(collate)
            if is_training:
                rows = SeededRows(dataset, self.order)
                if self.reads_ahead():
                    size = trainer.args.train_batch_size
                    rows = self.reader = ReadAhead(rows, collate, self._get_train_sampler(), size)
                    collate = take
            stack.enter_context(changed([trainer], "data_collator", collate))
            return super()._get_dataloader(rows, *args, is_training=is_training, **kwargs)  # type: ignore[misc]

    def reads_ahead(self) -> bool:
        """Say whether rows are made ready while a batch is computed: on a CPU both would wait for the same cores."""
        trainer: Any = self
        return trainer.args.device.type == "cuda"

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the supervisor that a step begins: reading its rows may hang, too."""
        trainer: Any = self
        tell(step=trainer.state.global_step + 1)
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score without drawing from training's random numbers: a score more or less changes no dropout."""
        with kept_random_numbers(), self.group.alone(self) if self.group else contextlib.nullcontext():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self.reader:
                self.reader.close()

    # ---- decisions --------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.agree()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        self.agree()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        if self.group:
            metrics = self.group.share(metrics)
            self.agree()
        return metrics

    def agree(self) -> None:
        """Take over what rank 0 decided."""
        if self.group:
            trainer: Any = self
            self.group.agree(trainer.control)

    # ---- weights that are shared out --------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Share the weights out first: a checkpoint's have been read by now, and each process optimises its part."""
        if self.group and self.group.shards:
            self.group.shards.shard()
        return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.group and self.group.shards):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        import torch

        from .sharded import load_moments

        trainer: Any = self
        load_moments(trainer.optimizer, Path(checkpoint) / "optimizer.pt")
        trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_best_model(self) -> None:
        if not (self.group and self.group.shards):  # else once they are whole again (`share_out`)
            super()._load_best_model()  # type: ignore[misc]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:  # transformers would take one step more
            trainer.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        # one file, as one process writes it: with several, dropout depends on no earlier random number
        trainer: Any = self
        from .trial import changed

        with changed([trainer.args] if self.group else [], "distributed_state", None):
            super()._save_rng_state(output_dir)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.group is None:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    # ---- guards -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Pass the fault point `forward`."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return found if return_outputs else strike("forward", found)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the batch's loss."""
        trainer: Any = self
        with contextlib.ExitStack() as stack:
            stack.enter_context(in_training_already(model, trainer.model))
            if self.group:
                self.group.seed_batch(self.order.seed, trainer.state.global_step, len(self.step_losses))
                # TRL would gather its figures here, and all wait for the slowest at each batch (exchange_losses)
                stack.enter_context(self.group.alone(trainer))
                self.step_rows = self.step_rows if self.step_losses else []
                before, learned = trainer._total_train_tokens, (inputs["labels"] != IGNORE).any()
            loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        strike("backward", model)
        if self.group:
            self.step_rows.append((learned, trainer._total_train_tokens - before))
        self.step_losses.append(loss)
        if self.reader and trainer.state.global_step + 1 < trainer.state.max_steps:
            self.reader.start()
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Return what transformers counts, its count of the weights taken once (benchmarks/trainer.py)."""
        trainer: Any = self
        ids = inputs.get(getattr(trainer.model, "main_input_name", "input_ids"))
        if ids is None:
            return 0
        if self.operations is None:
            self.operations = super().floating_point_ops(inputs) // ids.numel()  # type: ignore[misc]
        return self.operations * ids.numel()

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        norm = norm.full_tensor() if self.group and self.group.shards else norm
        losses, self.step_losses = self.step_losses, []
        self.check_finite(self.exchange_losses(losses), norm)
        if self.reader:
            self.reader.wait()
        return norm

    def exchange_losses(self, losses: list[Any]) -> list[Any]:
        """Return the losses of the whole step's batches, in the order of its rows; the log's figures become those of all processes.

        The others have to be there for it, so a step whose gradients lack somebody's part changes no weight.
        """
        if self.group is None:
            return losses
        import torch

        trainer: Any = self
        noted, number = trainer._metrics["train"], len(losses)
        names = [name for name in sorted(noted) if name != "num_tokens"]  # TRL's figures of a batch: entropy, accuracy
        own_tokens = [tokens for _, tokens in self.step_rows]
        learned = torch.stack([some for some, _ in self.step_rows]).tolist()
        mine = [torch.stack(losses).double().tolist(), learned, own_tokens, *(noted[name][-number:] for name in names)]
        found = self.group.gather([float(value) for part in mine for value in part])
        every, learned, tokens, *figures = [
            merge(numbers[start : start + number] for numbers in found) for start in range(0, len(found[0]), number)
        ]
        trainer._tr_loss += sum(every) / self.group.size - sum(mine[0])
        # a batch of rows that fill up a round is nobody's
        for name, values in zip(names, figures, strict=True):
            noted[name][-number:] = itertools.compress(values, learned)
        trainer._total_train_tokens += int(sum(itertools.compress(tokens, learned))) - sum(own_tokens)
        if "num_tokens" in noted:
            noted["num_tokens"] = [trainer._total_train_tokens]
        return [torch.tensor(loss, device=losses[0].device) for loss in every]


def merge(shares: Iterable[list[float]]) -> list[float]:
    """Return the processes' figures of a step's batches in the order of its rows: batch k is process k modulo their number's."""
    return [value for batches in zip(*shares, strict=True) for value in batches]


@contextlib.contextmanager
def in_training_already(*models: Any) -> Iterator[None]:
    """Let the first model's `train()` do nothing inside, if all of them and what they wrap are in training.

    transformers calls it for each batch, and it walks through all modules: 4,700 of E2B with an adapter (benchmarks/trainer.py).
    """
    inner = [model.get_base_model() for model in models if hasattr(model, "get_base_model")]
    if not all(model.training for model in (*models, *inner)):
        yield
        return
    outer, whole = vars(models[0]), models[0].train
    own = {"train": whole} if "train" in outer else {}
    outer["train"] = lambda mode=True: models[0] if mode else whole(mode)
    try:
        yield
    finally:
        del outer["train"]
        outer |= own
