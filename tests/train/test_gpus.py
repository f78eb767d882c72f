"""How the rows of a step are shared, what `train.gpus` refuses, and one training with a process of its own; tests/faults has the rest."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forgekit import load_config
from forgekit.errors import ConfigError, DataError, ModelError, RunError
from forgekit.train.order import Order, SeededRows
from forgekit.train.share import Blank, Share, collate_shared, split_batch
from forgekit.train.workers import rebuild_error


@pytest.mark.parametrize("rows", [1, 7, 16, 29, 30])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_shares_of_all_are_the_rows_of_one(rows: int, processes: int) -> None:
    order, batch = Order(rows, 3), 2
    order.epoch = 1
    shares = [Share(order, batch, rank, processes) for rank in range(processes)]
    assert len({-(-len(share) // batch) for share in shares}) == 1, "all take equally many batches"
    found = []
    for share in shares:
        numbers = list(share)
        assert len(numbers) == len(share)
        found.append([numbers[start : start + batch] for start in range(0, len(numbers), batch)])
    together = [row for batches in zip(*found, strict=True) for part in batches for row in part]
    assert [row for row in together if row >= 0] == list(order), "in their order"
    assert sum(row < 0 for row in together) < processes


def test_a_filling_row_is_read_and_teaches_nothing() -> None:
    import torch

    rows = SeededRows([{"messages": "first"}, {"messages": "second"}], Order(2, 0))
    assert rows[-2] == rows[1] and isinstance(rows[-2], Blank) and not isinstance(rows[1], Blank)
    collate = collate_shared(lambda examples: {"labels": torch.ones(len(examples), 3, dtype=torch.int64)})
    assert collate([rows[1], rows[-2]])["labels"].tolist() == [[1, 1, 1], [-100, -100, -100]]


def test_a_step_keeps_its_rows_whatever_their_number_of_processes() -> None:
    assert split_batch(2, 4, 2) == (2, 4) and split_batch(2, 4, 4) == (2, 4)
    assert split_batch(2, 4, 8) == (1, 8) and split_batch(16, 1, 4) == (4, 4)
    with pytest.raises(
        ConfigError, match=r"3 processes cannot share the 8 rows of an optimiser step .* Take 2, 4, 8 of them"
    ):
        split_batch(2, 4, 3)


def test_unsloth_is_refused_and_auto_means_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from forgekit import hardware

    with pytest.raises(ConfigError, match=r"train\.gpus is 2, and Unsloth trains in one process"):
        load_config(None, {"train.gpus": 2, "model.engine": "unsloth"})
    monkeypatch.setattr(hardware, "detect_hardware", lambda: hardware.Hardware("cuda", "some GPU", 1, True))
    settings = {"model.load_in": "16bit"}
    assert hardware.choose_engine(load_config(None, settings)) == "unsloth"
    assert hardware.choose_engine(load_config(None, settings | {"train.gpus": 2})) == "huggingface"


def test_the_command_takes_a_number_of_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    from forgekit.__main__ import main

    given = []
    record = SimpleNamespace(record={"exit_code": 0})
    monkeypatch.setattr("forgekit.runs.headless.run_notebook", lambda *words: given.append(words[2]) or record)
    monkeypatch.setattr("forgekit.runs.summary.print_summary", lambda run: None)
    assert main(["run", "some.ipynb", "--gpus", "2"]) == 0 and main(["run", "some.ipynb"]) == 0
    assert given == [{"train.gpus": 2}, {}]


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from forgekit.train import together

    monkeypatch.setattr(together, "choose_device", lambda config: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    together.check_gpus(load_config(None, {"train.gpus": 2}))
    with pytest.raises(ModelError, match=r"train\.gpus: 4 was asked for, and torch sees 2 GPUs"):
        together.check_gpus(load_config(None, {"train.gpus": 4}))


def test_arguments_that_a_cell_changed_are_refused_before_anybody_waits(make_run: Any) -> None:
    made = make_run({"train.gpus": 2, "train.gradient_accumulation_steps": 2})
    trainer = getattr(made, "trainer", made)
    trainer.args.max_steps = 3
    with pytest.raises(ConfigError, match=r"trainer\.args\.max_steps was changed after the trainer was made"):
        trainer.train()


def test_a_worker_gets_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from forgekit.train.workers import make_environment

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert make_environment(2, True)["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7f")
    assert make_environment(1, True)["CUDA_VISIBLE_DEVICES"] == "GPU-7f"
    assert make_environment(3, False)["CUDA_VISIBLE_DEVICES"] == "5, GPU-7f"  # a run on the CPU takes none


def test_what_may_be_left_without_a_gradient(make_config: Any) -> None:
    from forgekit.adapter.plan import plan_layers
    from forgekit.train.together import leaves_out

    found = {
        layers: leaves_out(plan_layers(make_config({"adapter.layers": [layers]})))
        for layers in ("attention", "altup", "vision")
    }
    assert found == {"attention": False, "altup": True, "vision": True}


def test_the_kernels_own_error_is_not_put_down_to_a_worker(tmp_path: Any) -> None:
    """A worker complains of the broken connection as soon as the group is taken down; by then the cause is known."""
    from forgekit.train import workers

    def break_off(words: str, reported: RunError | None) -> BaseException:
        with pytest.raises(Exception) as caught, workers.open_workers(tmp_path, lambda: None) as some, some.judge():
            some.failure = reported
            raise RuntimeError(words)
        return caught.value

    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.setattr(workers, "NOTICE_SECONDS", 0.01)
    try:
        assert str(break_off("the collator is wrong", None)) == "the collator is wrong"
        lost = RunError("Process 7 was killed")
        found = break_off("[gloo] Connection closed by peer", lost)
        assert found is lost
    finally:
        monkeypatched.undo()


def test_an_error_of_a_worker_is_the_same_error_here() -> None:
    import torch

    broken = rebuild_error(1, {"error": "DataError", "words": "cat.png"})
    assert type(broken) is DataError and str(broken) == "rank 1: cat.png"
    assert type(rebuild_error(1, {"error": "OutOfMemoryError", "words": "full"})) is torch.OutOfMemoryError
    other = rebuild_error(1, {"error": "ZeroDivisionError", "words": "division by zero"})
    assert type(other) is RunError and "Rank 1 failed, so training stopped: ZeroDivisionError: division by zero" in str(
        other
    )


def test_rows_that_cannot_be_handed_over_are_refused_with_a_remedy() -> None:
    from datasets import Dataset

    from forgekit.train.together import pack_job

    with open(__file__) as file:
        table = Dataset.from_dict({"row": [1]}).with_transform(lambda batch: {"row": [file.name]})
        data = {"train": table, "stream": (line for line in file)}
        with pytest.raises(ConfigError, match=r"train\.gpus: the rows cannot be handed to other processes"):
            pack_job(load_config(None), data)


def test_other_weights_than_the_workers_have_are_refused() -> None:
    from forgekit.train.together import check_base

    check_base({1: {"weights": "a"}}, {"base": {"weights": "a"}})
    with pytest.raises(ModelError, match="not the one that rank 1 loaded"):
        check_base({1: {"weights": "b"}}, {"base": {"weights": "a"}})


def test_two_processes_train_and_one_goes_on(make_run: Any, capsys: Any) -> None:
    """A real second process, which imports everything; the trainer scores alone afterwards."""
    import os

    def to_example(row: Any) -> Any:
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
        return {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}

    before = dict(os.environ)
    trainer = make_run(
        {"train.gpus": 2, "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2},
        to_example=to_example,
    )
    trainer.train()
    printed = capsys.readouterr().out
    assert "2 processes train together: each 2 rows at once, 1 times before a step; 4 rows a step." in printed
    assert "rank 1 of 2" in (trainer.run.path / "logs" / "rank1.log").read_text(encoding="utf-8")
    assert trainer.run.record["processes"] == {"number": 2, "rows": 2, "accumulated": 1}
    assert trainer.args.world_size == 1 and trainer.model_wrapped is trainer.model and trainer.group is None
    assert {name: value for name, value in os.environ.items() if before.get(name) != value} == {}
    assert "torch" in sys.modules
    assert trainer.evaluate(eval_dataset=trainer.train_dataset.select(range(2)))["eval_loss"] > 0


def test_the_logs_figures_are_those_of_one_process() -> None:
    """TRL's entropy and accuracy of each batch, in the order of the step's batches, and the tokens seen; a filling row counts nothing."""
    import torch

    from forgekit.train.exact import ExactTraining

    losses, entropies, tokens = ([1.0, 2.0], [4.0, 0.0]), ([5.0, 6.0], [7.0, 0.0]), ([10, 11], [12, 13])
    said: list[Any] = []

    class Process(ExactTraining):
        """One of two: batches 1 and 3 of the step, or 2 and a filling one."""

        def __init__(self, rank: int):
            self.group = SimpleNamespace(size=2, gather=self.tell)
            self.step_rows = [(torch.tensor(rank == 0 or number == 0), tokens[rank][number]) for number in range(2)]
            self._total_train_tokens = 100 + sum(tokens[rank])
            self._tr_loss = torch.tensor(0.5 + sum(losses[rank]), dtype=torch.float64)  # 0.5: of a step not logged yet
            figures = {"entropy": [9.0, *entropies[rank]], "num_tokens": [self._total_train_tokens]}
            self._metrics = {"train": {"mean_token_accuracy": [0.1, 0.2, 0.0 if rank else 0.3], **figures}}
            self.rank = rank

        def tell(self, mine: list[float]) -> list[list[float]]:
            said[self.rank] = mine
            return [list(numbers) for numbers in said]

    for _ in range(2):  # the first time round each only says its own
        said += [[0.0] * 10] * (2 - len(said))
        found = []
        for rank in range(2):
            process = Process(rank)
            found.append((process, process.exchange_losses([torch.tensor(loss) for loss in losses[rank]])))
    for process, every in found:
        assert [float(loss) for loss in every] == [1.0, 4.0, 2.0, 0.0]
        noted = process._metrics["train"]
        assert noted["entropy"] == [9.0, 5.0, 7.0, 6.0] and noted["num_tokens"] == [133]
        assert noted["mean_token_accuracy"] == [0.1, 0.2, 0.2, 0.3] and process._total_train_tokens == 133
        assert float(process._tr_loss) == pytest.approx(0.5 + 7 / 2)


@pytest.mark.gpu
@pytest.mark.parametrize("load_in", ["16bit", "full"])
def test_2_and_4_processes_on_a_gpu_take_the_steps_of_one(load_in: str, tmp_path: Path, project_folder: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    settings = f"tiny --one-gpu --gpus 1 2 4 --dtype float32 --load-in {load_in} --rows 4x256 --steps 12 --compile off"
    command = [sys.executable, "-m", "benchmarks.gpus", *settings.split(), "--out", str(rows)]
    done = subprocess.run(command, cwd=project_folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    differences = [json.loads(line)["loss_difference"] for line in rows.read_text().splitlines()]
    assert differences[0] is None and max(differences[1:]) < 1e-5, differences
