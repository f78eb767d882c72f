"""The figures that a panel shows of a running training are those of the training."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run
from forgekit.train import progress
from forgekit.train.progress import Progress, Snapshot


def test_snapshots_follow_the_log_and_count_learned_tokens_alone(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    config = make_config({"train.max_steps": 3, "train.eval_steps": 2, "data.validation": 4})
    model, processor = load_model(config)
    data, run = load_data(config, processor), start_run(config, "run")
    trainer = sft_trainer(add_adapter(model, config), processor, data, config, run)
    (watch,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Progress)]
    seen: list[Snapshot] = []
    tokens: list[int] = []
    step = trainer.training_step

    class Reader(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append(watch.latest)

    def count(model: Any, inputs: Any, *args: Any) -> Any:
        tokens.append(int(inputs["attention_mask"].sum()))
        return step(model, inputs, *args)

    trainer.training_step = count
    trainer.add_callback(Reader())
    seconds = itertools.count()  # each look at the clock is a second later
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    trainer.train()

    seen.append(watch.latest)
    assert [s.step for s in seen] == [0, 1, 2, 3] and watch.latest.total == 3
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [s.loss for s in seen] == [None, *losses]
    (score, *_) = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [s.held_out_loss for s in seen[:3]] == [None, None, score]
    assert [s.checkpoint for s in seen[:3]] == [None, None, 2]
    assert watch.latest.memory and watch.latest.memory_total and watch.latest.memory < watch.latest.memory_total

    # two looks at the clock lie between two logs: the step's end and the log itself; scoring and saving add none
    batches = len(tokens) // 3
    learned = [sum(tokens[i * batches : (i + 1) * batches]) for i in range(3)]
    assert [s.tokens_per_second for s in seen[1:]] == pytest.approx([number / 2 for number in learned])
    assert watch.hook is None and not trainer.model._forward_pre_hooks
