"""Batches of the next step, made ready while one is computed: the same rows, errors where they belong, the same training."""

import shutil
import threading
import time
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from forgekit.train import exact
from forgekit.train.order import Order, SeededRows
from forgekit.train.read_ahead import ReadAhead, take
from tests.train.test_checkpoint_order import Noisy


class Loader:
    """Asks for the batches of an epoch as torch's loader does, and has one more read after each."""

    def __init__(self, rows: Any, order: Order, skip: int = 0):
        self.threads: list[str] = []
        self.reader = ReadAhead(SeededRows(rows, order), self.collate, order, 2)
        self.loader = torch.utils.data.DataLoader(self.reader, batch_size=2, sampler=order, collate_fn=take)

    def collate(self, rows: list[Any]) -> Any:
        self.threads.append(threading.current_thread().name)
        if any(number == 3 and self.fails for number, _ in rows):
            raise ValueError("row 3 is wrong")
        return rows

    fails = False

    def read(self, ahead: bool) -> list[Any]:
        found = []
        for batch in self.loader:
            found.append(batch)
            if ahead:
                self.reader.start()
                self.reader.wait()
        return found


def test_the_batches_are_the_same_and_come_from_the_other_thread() -> None:
    order = Order(5, 7)
    plain, ahead = Loader(Noisy(), order), Loader(Noisy(), order)
    for epoch in (0, 1, 0):  # the last one again: a training that begins anew
        order.epoch = epoch
        assert ahead.read(True) == plain.read(False)
    assert set(plain.threads) == {"MainThread"}
    assert [name.startswith("read-ahead") for name in ahead.threads] == [False, True, True] * 3
    assert not ahead.reader.ready

    ahead.reader.start()
    thread = ahead.reader.thread
    ahead.reader.close()
    assert thread._shutdown and not ahead.reader.ready and ahead.reader.thread is None


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    order = Order(5, 7)
    loader = Loader(Noisy(), order)
    loader.fails = True
    numbers = list(order)
    place = numbers.index(3) // 2
    reader, batches = loader.reader, [numbers[start : start + 2] for start in range(0, 5, 2)]
    for batch in batches[:place]:
        reader.__getitems__(batch)
        reader.start()
        reader.wait()
    with pytest.raises(ValueError, match="row 3 is wrong"):
        reader.__getitems__(batches[place])


def test_a_row_that_cannot_be_read_is_the_next_steps_error() -> None:
    class Torn(Noisy):
        def __getitem__(self, number: int) -> Any:
            if number == 3:
                raise OSError("gone")
            return super().__getitem__(number)

    order = Order(5, 7)
    reader = Loader(Torn(), order).reader
    numbers = list(order)
    start = numbers.index(3) // 2 * 2
    assert start, "in the first batch nothing is read ahead"
    reader.__getitems__(numbers[start - 2 : start])
    reader.start()
    with pytest.raises(OSError, match="gone"):
        reader.__getitems__(numbers[start : start + 2])


def test_a_loader_that_passes_batches_by_goes_on_from_there() -> None:
    order = Order(9, 7)
    loader = Loader(Noisy(), order)
    numbers = list(order)
    expected = [SeededRows(Noisy(), order)[number] for number in numbers]
    reader = loader.reader
    for start in (4, 6, 8, 2):
        assert reader.__getitems__(numbers[start : start + 2]) == expected[start : start + 2]
        reader.start()
        reader.wait()


class NoteReady(TrainerCallback):
    """Notes, while the optimiser is at work, batches that are not ready: nothing may go on in the other thread then."""

    def __init__(self, trainer: Any, unready: list[Any]):
        self.trainer, self.unready = trainer, unready

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.reader:
            self.unready += [batch for batch in self.trainer.reader.ready.values() if not batch.done()]


def note_collating(trainer: Any, threads: list[str], batches: list[Any]) -> None:
    collator = trainer.data_collator

    def collate(rows: list[Any]) -> Any:
        time.sleep(0.05)  # longer than what is left to do in a step
        threads.append(threading.current_thread().name)
        if rows[0]["messages"][0]["content"][0]["text"] in prompts:
            batches.append((trainer.order.epoch, *(row["messages"][0]["content"][0]["text"] for row in rows)))
        return collator(rows)

    prompts = {row["messages"][0]["content"][0]["text"] for row in trainer.train_dataset}
    trainer.data_collator = collate


def test_a_training_that_reads_ahead_is_the_same_training(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, two epochs whose last step is a short one, and scores between; resumed in the middle of the second."""
    settings = {
        "train.per_device_train_batch_size": 7, "train.gradient_accumulation_steps": 2, "train.max_steps": 8,
        "adapter.lora_dropout": 0.2, "data.validation": 10, "train.eval_steps": 2, "train.save_steps": 2,
    }  # fmt: skip
    histories = []
    for ahead in (False, True):
        monkeypatch.setattr(exact.ExactTraining, "reads_ahead", lambda self, ahead=ahead: ahead)
        trainer = make_run(settings, f"run-{ahead}")
        threads, batches, unready = [], [], []
        note_collating(trainer, threads, batches)
        trainer.add_callback(NoteReady(trainer, unready))
        trainer.train()
        assert len(batches) == len({*batches}) == 16, "each once, and none for a step that is not taken"
        assert not any(unready) and (not ahead or trainer.reader.thread is None)
        histories.append([{k: v for k, v in entry.items() if k in ("step", "loss", "eval_loss")} for entry in trainer.state.log_history])  # fmt: skip
        assert any(name.startswith("read-ahead") for name in threads) is ahead
        assert (trainer.reader is not None) is ahead
    assert histories[0] == histories[1] and len(histories[0]) > 8
    trainer.run.finish("crashed")
    shutil.rmtree(trainer.checkpoints.folder / "checkpoint-8")
    again = make_run(settings, "run-True")
    again.train()
    found = {entry["step"]: entry["loss"] for entry in again.state.log_history if "loss" in entry}
    assert found == {entry["step"]: entry["loss"] for entry in histories[0] if "loss" in entry}


def test_operations_are_counted_as_transformers_counts_them(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    walks = []
    counted = Trainer.floating_point_ops
    monkeypatch.setattr(Trainer, "floating_point_ops", lambda self, inputs: walks.append(1) or counted(self, inputs))
    trainer = make_run()
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.floating_point_ops(batch) == counted(trainer, batch) > 0
    assert len(walks) == 1 and trainer.state.total_flos > 0
    assert trainer.floating_point_ops({}) == 0


class Outer(torch.nn.Module):
    """A model that wraps another one, as PEFT's does."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def get_base_model(self) -> Any:
        return self.inner


def test_a_model_that_was_taken_out_of_training_comes_back() -> None:
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))
    outer = Outer(inner)
    wrapped = torch.nn.Sequential(outer)  # as DistributedDataParallel does
    for model in (inner, outer):
        model.eval()
        with exact.in_training_already(wrapped, outer):
            wrapped.train()
        assert outer.training and inner.training and inner[0].training and "train" not in vars(wrapped)


def test_a_model_in_training_is_not_walked_through() -> None:
    inner = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1))
    outer = Outer(inner)
    inner[0].eval()
    with exact.in_training_already(outer):
        assert outer.train() is outer and not inner[0].training
        outer.train(False)
    assert not inner[1].training and "train" not in vars(outer)
    outer.train = own = outer.train
    outer.train()
    with exact.in_training_already(outer):
        assert vars(outer)["train"] is not own
    assert vars(outer)["train"] == own
