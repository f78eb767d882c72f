"""When memory runs out in training, the notebook is executed anew in a fresh kernel, with a smaller batch, at most twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit.files import read_json

from .conftest import LOAD, START, Ended

Execute = Callable[..., Ended]
# what `train` does when memory runs out: it notes the smaller batch and asks for a fresh process
RUN_OUT = """
from pathlib import Path
from forgekit.errors import FreshProcessError

kernels = Path("kernels")
kernels.write_text(kernels.read_text() + f"{{os.getpid()}}\\n" if kernels.exists() else f"{{os.getpid()}}\\n")
if len(kernels.read_text().split()) <= {times}:
    raise FreshProcessError("out of memory in step 3. A fresh process goes on.")
print("went on")
"""


def read_kernels() -> list[str]:
    return Path("kernels").read_text().split()


def test_after_memory_ran_out_a_fresh_kernel_goes_on_in_the_same_run(execute: Execute) -> None:
    ended = execute("import os", START, RUN_OUT.format(times=1), "print('the end')")
    record = ended.record
    assert (record["state"], record["error"], record["exit_code"]) == ("completed", None, 0)
    assert len(set(read_kernels())) == 2, "one process each"
    (attempt,) = record["attempts"]
    assert (attempt["state"], attempt["notebook"]) == ("failed", "notebook-1.ipynb")
    assert "FreshProcessError: out of memory in step 3" in attempt["error"]
    first = ended.read("notebook-1.ipynb")
    assert "This run failed" in first.cells[0].source and "pending" in str(first.cells[-1].metadata)
    assert set(ended.statuses()) == {"completed"} and "went on" in str(ended.cells)
    assert (ended.status["running"], ended.status["error"]) == (False, None)


def test_the_third_time_is_a_failure(execute: Execute) -> None:
    ended = execute("import os", START, RUN_OUT.format(times=9))
    record = ended.record
    assert (record["state"], record["exit_code"], len(set(read_kernels()))) == ("failed", 1, 3)
    assert len(record["attempts"]) == 2 and "FreshProcessError" in record["error"]


OUT_OF_MEMORY = """
import os, torch
compute = trainer.compute_loss

def need_memory(model, inputs, *rest, **options):
    if len(inputs["input_ids"]) > 1 and trainer.state.global_step >= 2:
        raise torch.OutOfMemoryError("out of memory")
    return compute(model, inputs, *rest, **options)

trainer.compute_loss = need_memory
trainer.train()
print("process", os.getpid())
"""


@pytest.mark.faults
def test_a_training_whose_memory_runs_out_goes_on_in_a_fresh_kernel_with_the_same_rows_a_step(
    execute: Execute, settings: dict, record_case: Any
) -> None:
    case = record_case(what="run", point="a step", action="out_of_memory")
    ended = execute(START, LOAD, OUT_OF_MEMORY, settings=settings | {"train.max_steps": 4, "train.save_steps": 1})
    record = ended.record
    assert (record["state"], record["exit_code"]) == ("completed", 0), record["error"]
    rows, accumulated = (record["settings"][f"train.{name}"]["value"] for name in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    (change,) = record["smaller_batches"]
    assert (change["step"], change["rows"], change["accumulated"]) == (3, rows // 2, accumulated * 2)
    assert [resume["step"] for resume in record["resumes"]] == [2] and len(record["attempts"]) == 1
    state = read_json(ended.folder / "checkpoints" / "checkpoint-4" / "trainer_state.json")
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]
    case["happened"] = "a fresh kernel went on with half the rows at once and the same rows a step; completed"
