"""Several processes that train together, on a CPU through gloo: the same curve as one, and one end for all of them.

The epoch's 30 rows, two at once and four times before a step, leave three batches for its last step: a number that no two processes
share evenly. The rows' answers are of different lengths.
"""

import json
import re
import time
from typing import Any

import psutil
import pytest

STEPS = 24
# at ten times the rate this random model doubles a rounding with each step, in one process too
PLAIN = {
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.learning_rate": 1e-3,
    "adapter.lora_dropout": 0.0,
}
TWO = PLAIN | {"train.gpus": 2}


def read_weights(warm: Any, run: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(warm.path(run) / "checkpoints" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")


def find_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """The largest difference of two losses of one step, or of two weights."""
    assert left.keys() == right.keys()
    return max(
        float(abs(value - right[name]).max() if hasattr(value, "max") else abs(value - right[name]))
        for name, value in left.items()
    )


@pytest.fixture(scope="module")
def alone(warm: Any) -> str:
    """A run of one process."""
    run = warm.new_run()
    assert warm.train(run, settings=PLAIN) == 0, warm.log(run)
    return run


@pytest.fixture(scope="module")
def together(warm: Any) -> str:
    """The same run of two."""
    run = warm.new_run()
    assert warm.train(run, settings=TWO) == 0, warm.log(run)
    return run


def test_two_processes_take_the_steps_of_one(warm: Any, alone: str, together: str) -> None:
    assert find_difference(dict(warm.read_losses(alone)), dict(warm.read_losses(together))) < 1e-5
    assert find_difference(read_weights(warm, alone), read_weights(warm, together)) < 1e-4
    assert "2 processes train together: each 2 rows at once, 2 times before a step; 8 rows a step." in warm.log(
        together
    )


@pytest.mark.parametrize("mutant", ["take_means_of_ranks", pytest.param("learn_from_fillings", marks=pytest.mark.slow)])
def test_another_weight_of_tokens_is_another_curve(warm: Any, alone: str, mutant: str) -> None:
    run = warm.new_run()
    assert warm.train(run, settings=TWO, mutant=mutant) == 0, warm.log(run)
    assert find_difference(dict(warm.read_losses(run)), dict(warm.read_losses(alone))) > 1e-4


@pytest.fixture(scope="module")
def figures(warm: Any) -> Any:
    """Trains with TRL's loss and returns its figures of each step; the epoch's last step has a batch that fills up a round."""

    def train(settings: dict[str, Any], mutant: str = "use_trls_loss") -> list[dict[str, float]]:
        run = warm.new_run()
        assert warm.train(run, settings=settings | {"train.max_steps": 5}, mutant=mutant) == 0, warm.log(run)
        log = (warm.path(run) / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        return [{name: entry[name] for name in names} for entry in map(json.loads, log) if "loss" in entry]

    return train


@pytest.mark.parametrize("mutant", [None, pytest.param("gather_in_each_batch", marks=pytest.mark.slow)])
def test_the_log_of_two_is_that_of_one(figures: Any, mutant: str | None) -> None:
    alone = figures(PLAIN)
    together = figures(TWO, mutant) if mutant else figures(TWO)
    assert len(alone) == len(together) == 5 and alone[3]["num_tokens"] > alone[2]["num_tokens"] > 0
    differences = [find_difference(ours, theirs) for ours, theirs in zip(together, alone, strict=True)]
    assert (max(differences) < 1e-5) is (mutant is None), differences


@pytest.mark.slow
def test_dropout_does_not_depend_on_how_many_there_are(warm: Any) -> None:
    runs = []
    for gpus in (2, 4):
        runs.append(warm.new_run())
        settings = TWO | {"train.gpus": gpus, "adapter.lora_dropout": 0.3, "train.max_steps": 8}
        assert warm.train(runs[-1], settings=settings) == 0, warm.log(runs[-1])
    assert find_difference(*(dict(warm.read_losses(run)) for run in runs)) < 1e-5


@pytest.mark.slow
def test_a_batch_is_split_where_there_are_not_enough(warm: Any, alone: str) -> None:
    run = warm.new_run()
    settings = TWO | {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 1}
    assert warm.train(run, settings=settings) == 0, warm.log(run)
    assert "each 4 rows at once, 1 times before a step; 8 rows a step." in warm.log(run)
    assert find_difference(dict(warm.read_losses(run)), dict(warm.read_losses(alone))) < 1e-4


@pytest.mark.slow
def test_held_out_rows_score_the_same(warm: Any) -> None:
    scores = []
    for gpus in (1, 2):
        run = warm.new_run()
        settings = PLAIN | {"train.gpus": gpus, "data.validation": 5, "train.eval_steps": 2, "train.max_steps": 6}
        assert warm.train(run, settings=settings | {"train.early_stopping": 3}) == 0, warm.log(run)
        lines = map(json.loads, warm.read_lines(run, "metrics.jsonl"))
        scores.append({row["step"]: row["eval_loss"] for row in lines if "eval_loss" in row})
        assert len(scores[-1]) == 3
    assert find_difference(*scores) < 1e-5


def find_worker(warm: Any, run: str) -> int:
    return int(re.findall(r"rank 1 of 2, process (\d+)", "\n".join(warm.read_lines(run, "rank1.log")))[-1])


def wait_for_end(warm: Any, run: str, seconds: float = 5.0) -> bool:
    """Say whether the run's second process ended within some seconds; a forked one holds the run's lock until then."""
    worker, deadline = find_worker(warm, run), time.monotonic() + seconds
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not psutil.pid_exists(worker)


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_of_two_resumes_with_one_and_with_two(warm: Any, together: str, gpus: int) -> None:
    run = warm.new_run()
    fault = {"FORGEKIT_FAULT": "after_step:13:kill9", "FORGEKIT_FAULT_FILE": str(warm.folder / f"{run}.fault")}
    assert warm.train(run, settings=TWO, environment=fault) != 0 and wait_for_end(warm, run)
    assert warm.train(run, settings=PLAIN | {"train.gpus": gpus}) == 0, warm.log(run)
    assert warm.starts(run) in ([0, 12], [0, 13])
    losses = dict(warm.read_losses(run))
    if gpus == 2:
        assert losses == dict(warm.read_losses(together))
        numbers = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
        mine, whole = warm.read_hashes(run), warm.read_hashes(together)
        assert [mine[name] for name in numbers] == [whole[name] for name in numbers]
    assert find_difference(losses, dict(warm.read_losses(together))) < 1e-5


def test_a_killed_worker_ends_the_run_within_seconds(warm: Any) -> None:
    run = warm.new_run()
    code, ended = warm.train(run, settings=TWO, kill_worker_at=6), time.time()
    log = warm.log(run)
    assert code == 1 and ended - float(re.findall(r"killed at ([\d.]+)", log)[0]) < 5, log
    assert re.search(r"RunError: Process \d+, which trained as rank 1 of 2, was killed by SIGKILL", log), log
    assert warm.train(run, settings=TWO) == 0, warm.log(run)
    assert len(warm.starts(run)) == 2 and warm.starts(run)[1] >= 4


def test_a_killed_kernel_ends_its_workers(warm: Any) -> None:
    run = warm.new_run()
    fault = {"FORGEKIT_FAULT": "save_write:1:kill9"}  # which the first process alone comes by
    assert warm.train(run, settings=TWO, environment=fault) == -9
    assert wait_for_end(warm, run)


@pytest.mark.slow
def test_a_full_disk_ends_all(warm: Any) -> None:
    run = warm.new_run()
    assert warm.train(run, settings=TWO, environment={"FORGEKIT_FAULT": "save_write:2:no_space"}) == 1
    assert "RunError: checkpoint-4 could not be written" in warm.log(run)
    assert not psutil.pid_exists(find_worker(warm, run))


def test_a_signal_stops_all_after_the_same_step(warm: Any) -> None:
    run = warm.new_run()
    fault = {"FORGEKIT_FAULT": "save_write:3:term"}
    assert warm.train(run, settings=TWO, environment=fault) == 0, warm.log(run)
    assert "Stopped as asked after step 7 of 24; checkpoint-7 is complete." in warm.log(run)
    assert warm.read_lines(run, "rank1.log")[-1].startswith("fast path:")


@pytest.mark.slow
def test_a_loss_that_is_no_number_names_the_rows_of_all(warm: Any) -> None:
    run = warm.new_run()
    assert warm.train(run, settings=TWO, environment={"FORGEKIT_FAULT": "forward:5:nan"}) == 1
    found = re.search(r"ModelError: The loss is nan at step 3, .* Rows of this step: (.*)\. Look", warm.log(run))
    assert found and len(found[1].split(", ")) == 4, warm.log(run)  # two of each process


@pytest.mark.slow
def test_without_memory_all_go_on_with_half_a_batch(warm: Any, alone: str) -> None:
    run = warm.new_run()
    fault = {"FORGEKIT_FAULT": "forward:5:out_of_memory", "FORGEKIT_FAULT_FILE": str(warm.folder / f"{run}.fault")}
    assert warm.train(run, settings=TWO, environment=fault) == 0, warm.log(run)
    assert (
        "Out of memory in step 3 with 2 rows at once; going on with 1 rows at once, 8 times before a step"
        in warm.log(run)
    )
    assert find_difference(dict(warm.read_losses(run)), dict(warm.read_losses(alone))) < 1e-4


@pytest.mark.slow
def test_an_adapter_without_a_gradient_does_not_part_them(warm: Any) -> None:
    """transformers passes by an adapter on AltUp's correction while it trains; DDP would wait for its gradient."""
    runs = []
    for gpus in (1, 2):
        runs.append(warm.new_run())
        settings = PLAIN | {"train.gpus": gpus, "adapter.layers": ["attention", "altup"]}
        assert warm.train(runs[-1], settings=settings) == 0, warm.log(runs[-1])
    assert find_difference(*(dict(warm.read_losses(run)) for run in runs)) < 1e-5
    assert find_difference(*(read_weights(warm, run) for run in runs)) < 1e-4
