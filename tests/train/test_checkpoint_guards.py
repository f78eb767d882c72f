"""What is looked at before every optimiser step, and what happens when memory does not suffice."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from forgekit.errors import FreshProcessError, ModelError
from forgekit.files import read_json
from forgekit.train.exact import ExactTraining
from forgekit.train.fast_path import get_fast_path
from forgekit.train.order import Order
from forgekit.train.step_guards import SCALE_STEPS, UNUSUAL_TOLD


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forgekit.faults.passed", {})


def read_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def note_rows(trainer: Any) -> list[list[str]]:
    """Return a list that holds, in order, the prompts of every batch that was made."""
    seen, collator = [], trainer.data_collator

    def note(examples: list[Any]) -> Any:
        seen.append([example["messages"][0]["content"][0]["text"] for example in examples])
        return collator(examples)

    trainer.data_collator = note
    return seen


def find_lines(trainer: Any, prompts: list[str]) -> list[str]:
    """Return file:line of rows, by their prompts."""
    lines = Path(trainer.config.data.path).read_text(encoding="utf-8").splitlines()
    return [
        f"short.jsonl:{number}" for prompt in prompts for number, line in enumerate(lines, 1) if f'"{prompt}"' in line
    ]


def check_nan_stops(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the second batch of step 3 is NaN: no weight has changed since step 2, and the batch's rows are named."""
    settings = {"train.gradient_accumulation_steps": 2, "adapter.lora_dropout": 0.0}
    whole = make_run(settings | {"train.max_steps": 2, "train.lr_scheduler_type": "constant"}, "two")
    whole.train()
    monkeypatch.setenv("FORGEKIT_FAULT", "forward:6:nan")
    trainer = make_run(settings | {"train.lr_scheduler_type": "constant"}, "nan")
    seen = note_rows(trainer)
    with pytest.raises(ModelError, match="The loss is nan at step 3, so training stopped before the weights") as caught:
        trainer.train()
    assert all(torch.equal(value, read_weights(trainer)[name]) for name, value in read_weights(whole).items())
    named = str(caught.value).split("Rows of this step: ")[1].split(". Look")[0].split(", ")
    assert named == find_lines(trainer, seen[5]) and len(named) == 2
    assert "The loss is nan at step 3" in (trainer.run.path / "logs" / "training.log").read_text(encoding="utf-8")


def test_a_loss_that_is_no_number_stops_before_the_step_and_names_the_rows(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_nan_stops(make_run, monkeypatch)


def test_without_the_guard_the_weights_are_lost(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExactTraining, "check_finite", lambda self, losses, norm: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_nan_stops(make_run, monkeypatch)


def test_a_gradient_that_is_no_number_stops_too(make_run: Any) -> None:
    trainer = make_run({"train.gradient_accumulation_steps": 2})
    seen = note_rows(trainer)
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ModelError, match="The gradient's length is (nan|inf) at step 1") as caught:
        trainer.train()
    assert all(line in str(caught.value) for line in find_lines(trainer, seen[0] + seen[1]))


class HalfPrecision(ExactTraining):
    """Just what `check_finite` looks at, with float16's scaler."""

    def __init__(self) -> None:
        import types

        self.prepare(Order(10, 0), None)
        self.accelerator = types.SimpleNamespace(scaler="one")
        self.args = types.SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=1, world_size=1)
        self.state = types.SimpleNamespace(global_step=0)
        self.train_dataset = list(range(10))
        self.model = torch.nn.Linear(1, 1)


def test_in_float16_an_overflow_is_left_to_the_scaler_until_it_never_ends() -> None:
    trainer, good, inf = HalfPrecision(), torch.tensor(1.0), torch.tensor(float("inf"))
    for _ in range(SCALE_STEPS - 1):
        trainer.check_finite([good], inf)
    trainer.check_finite([good], good)
    for _ in range(SCALE_STEPS - 1):
        trainer.check_finite([good], inf)
    with pytest.raises(ModelError, match=r"length is inf at step 1.*train row \d, train row \d"):
        trainer.check_finite([good], inf)
    with pytest.raises(ModelError, match="loss is inf"):
        trainer.check_finite([inf], good)


def test_a_gradient_far_longer_than_usual_is_told_with_its_rows() -> None:
    trainer, lines = HalfPrecision(), []
    trainer.say = lines.append
    for length in (0.0, 20.0, *range(1, 10)):  # nothing is usual yet, a zero says nothing, and the rest is
        trainer.check_finite([torch.tensor(1.0)], torch.tensor(length))
    trainer.state.global_step = 2
    for length in (400.0, 650.0, 500.0):  # medians of 5, 5.5 and 5.5
        trainer.check_finite([torch.tensor(1.0)], torch.tensor(length))
    rows = ", ".join(f"train row {row}" for row in trainer.order.find_rows(2, 2))
    assert lines[0].startswith(f"step 3: the gradient is 118 times as long as usual. Rows: {rows}. Look at them;")
    assert len(lines) == 1 and list(trainer.lengths)[-2:] == [400.0, 500.0]
    for _ in range(2 * UNUSUAL_TOLD):
        trainer.notice(1e9)
    assert len(lines) == UNUSUAL_TOLD and lines[-1].endswith("No more of this is told.")
    assert trainer.lengths[-1] == 1e9  # it is usual by now


def test_one_step_is_enough_to_know_what_is_usual() -> None:
    """The first one is not compiled, and what is wrong with compiled ones is told at the second."""
    trainer, lines = HalfPrecision(), []
    trainer.say = lines.append
    for length in (2.9e4, 3.4e6, 3e4):
        trainer.check_finite([torch.tensor(1.0)], torch.tensor(length))
    assert len(lines) == 1 and "117 times as long as usual" in lines[0] and "train.compile: off" in lines[0]


def test_gradients_that_stay_too_long_end_the_compiling(make_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:  # fmt: skip
    """A mistake of a compiler that shows now and then passes the comparison of its layers: here it begins with the fourth step."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainer = make_run({"train.max_steps": 3 + UNUSUAL_TOLD + 2, "train.compile": "on", "train.save_steps": 100})
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    path: list[Any] = []

    def spoil(gradient: Any) -> Any:
        path[:] = [get_fast_path(trainer.model)]
        return gradient + 1e5 * (path[0].compiles and trainer.state.global_step >= 3)

    weight.register_hook(spoil)
    trainer.train()
    said, log = capsys.readouterr().out, (trainer.run.path / "logs" / "training.log").read_text(encoding="utf-8")
    assert log.count("times as long as usual. Rows: ") == UNUSUAL_TOLD
    assert log.count("No more of this is told, and layers are not compiled any more.") == 1
    why = f"{UNUSUAL_TOLD} gradients were more than 100 times as long as usual"
    assert said.count(f"fast path: not compiled any more, because {why}") == 1
    assert read_json(trainer.run.path / "run.json")["fast_path"]["why_not_compiled"] == why
    lengths = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert max(lengths[:3] + lengths[-2:]) < 1e3 < min(lengths[3:-2])


def test_an_odd_step_now_and_then_does_not_end_it() -> None:
    trainer, ended = HalfPrecision(), []
    trainer.say, trainer.stop_compiling = (lambda line: None), (lambda: ended.append(True) or True)  # type: ignore[method-assign]
    for step in range(20 * UNUSUAL_TOLD):
        trainer.notice(1e3 if step % 20 == 10 else 1.0)
    assert trainer.unusual == UNUSUAL_TOLD and not ended
    trainer.start_guards()
    for step in range(20):
        trainer.notice(1e3 if step > 2 and step % 2 else 1.0)
    assert ended == [True]


def test_a_training_s_log_has_that_line(make_run: Any) -> None:
    trainer = make_run({"train.max_steps": 3})
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    weight.register_hook(lambda gradient: gradient + 1e5 * (trainer.state.global_step == 1))
    trainer.train()
    log = (trainer.run.path / "logs" / "training.log").read_text(encoding="utf-8")
    assert re.search(r"step 2: the gradient is \d+ times as long as usual\. Rows: short.jsonl:\d", log)


def train_in_small_memory(make_run: Any, fits: int, name: str) -> tuple[Any, list[int], Any]:
    """Train with four rows at once in a memory that takes `fits` rows; return the trainer, batch sizes and the last losses."""
    settings = {"train.per_device_train_batch_size": 4, "adapter.lora_dropout": 0.0}
    trainer = make_run(settings, name)
    compute, sizes = trainer.compute_loss, []

    def need_memory(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = len(inputs["input_ids"])
        if rows > fits and trainer.state.global_step >= 2:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(rows)
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = need_memory
    trainer.train()
    return trainer, sizes, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_out_of_memory_goes_on_with_half_the_rows_at_once_and_the_same_rows_a_step(make_run: Any, capsys: Any) -> None:
    _, sizes, expected = train_in_small_memory(make_run, 4, "large")
    assert sizes == [4] * 4
    for fits, name in ((2, "half"), (1, "quarter")):
        trainer, sizes, losses = train_in_small_memory(make_run, fits, name)
        assert sizes == [4, 4] + [fits] * (8 // fits)
        assert losses == pytest.approx(expected, rel=1e-5) and trainer.state.global_step == 4
        changes = read_json(trainer.run.path / "run.json")["smaller_batches"]
        assert [(change["step"], change["rows"], change["accumulated"]) for change in changes] == [
            (3, 2, 2),
            (3, 1, 4),
        ][: 3 - fits]
        assert "Out of memory in step 3 with 4 rows at once; going on with 2 rows at once" in capsys.readouterr().out


def test_out_of_memory_at_one_row_is_an_error_and_a_later_resume_keeps_the_smaller_batch(make_run: Any) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        train_in_small_memory(make_run, 0, "none")
    trainer, _, _ = train_in_small_memory(make_run, 2, "half")
    trainer.run.finish("crashed")
    again = make_run({"train.per_device_train_batch_size": 4, "adapter.lora_dropout": 0.0}, "half")
    again.train(resume_from_checkpoint="checkpoint-2")
    assert (again.args.per_device_train_batch_size, again.args.gradient_accumulation_steps) == (2, 2)


def test_memory_that_ends_at_three_sizes_is_an_error(make_run: Any) -> None:
    trainer = make_run({"train.per_device_train_batch_size": 8})
    tried = []

    def need_memory(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tried.append(len(inputs["input_ids"]))
        raise torch.OutOfMemoryError("out of memory")

    trainer.compute_loss = need_memory
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert tried == [8, 4, 2]


def test_memory_that_ends_inside_the_optimiser_goes_back_to_the_disk(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights have changed then and others have not."""
    trainer = make_run({"train.per_device_train_batch_size": 4})
    create, failed = trainer.create_optimizer, []

    def create_and_fail(*args: Any) -> Any:
        optimizer = create(*args)
        step = optimizer.step

        def fail_once(*inner: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 3 and not failed:
                failed.append(True)
                raise torch.OutOfMemoryError("out of memory")
            return step(*inner, **kwargs)

        if not failed:
            optimizer.step = fail_once
        return optimizer

    trainer.create_optimizer = create_and_fail
    trainer.train()
    assert failed and trainer.state.global_step == 4
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert trainer.checkpoints.resumed.name == "checkpoint-2"


def test_under_a_supervisor_a_fresh_process_takes_the_smaller_batch_also_without_a_checkpoint(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forgekit.train.resume.is_supervised", lambda: True)
    monkeypatch.setenv("FORGEKIT_FAULT", "forward:1:out_of_memory")
    settings = {"train.per_device_train_batch_size": 4}
    first = make_run(settings)
    with pytest.raises(
        FreshProcessError, match="in step 1 with 4 rows at once; going on with 2 rows .* A fresh process"
    ):
        first.train()
    first.run.finish("failed")
    monkeypatch.delenv("FORGEKIT_FAULT")
    again = make_run(settings)
    assert again.train().global_step == 4
    assert (again.args.per_device_train_batch_size, again.args.gradient_accumulation_steps) == (2, 2)
    assert len(read_json(again.run.path / "run.json")["smaller_batches"]) == 1
