"""What a run says while it trains: status.json, training.log, metrics.jsonl, and a loss that is no number."""

import base64
import json
import random
import types
from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_config, load_data, load_model, sft_trainer, start_run
from forgekit.errors import ModelError
from forgekit.files import read_json
from forgekit.run_folder import Run

FIELDS = {
    "running", "step", "total_steps", "epoch", "total_epochs", "loss", "learning_rate", "eta_seconds", "started_at",
    "checkpoint_at", "error",
}  # fmt: skip


def make_trainer(config: Any) -> tuple[Any, Run]:
    model, processor = load_model(config)
    run = start_run(config, "run")
    return sft_trainer(add_adapter(model, config), processor, load_data(config, processor), config, run), run


def watch(trainer: Any, path: Path) -> list[dict[str, Any]]:
    """Return a list that holds, after training, what a reader of status.json saw at the end of each step."""
    from transformers import TrainerCallback

    seen: list[dict[str, Any]] = []

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(read_json(path))

    trainer.add_callback(Watcher())
    return seen


@pytest.fixture
def trained(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Any, list[Any], Path]:
    """A run of four steps with a score after each second one, its files and what status.json said meanwhile."""
    monkeypatch.setattr("forgekit.train.callbacks.STATUS_SECONDS", 0.0)
    extra = tmp_path / "elsewhere" / "status.json"
    config = make_config(
        {
            "train.max_steps": 4,
            "train.eval_steps": 2,
            "data.validation": 8,
            "train.status_file": str(extra),
        }
    )
    trainer, run = make_trainer(config)
    seen = watch(trainer, run.path / "status.json")
    trainer.train()
    return run, trainer, seen, extra


def test_status_is_written_during_training_and_says_when_it_is_over(trained: Any) -> None:
    run, _, seen, extra = trained
    assert [(status["running"], status["step"]) for status in seen] == [(True, 1), (True, 2), (True, 3), (True, 4)]
    assert all(status.keys() >= FIELDS for status in seen)
    assert [status["checkpoint_at"] for status in seen] == [None, None, 2, 2]
    assert seen[0]["loss"] is None and seen[1]["loss"] > 0 and seen[1]["eta_seconds"] > 0
    last = read_json(run.path / "status.json")
    assert (last["running"], last["step"], last["total_steps"], last["checkpoint_at"]) == (False, 4, 4, 4)
    assert last["error"] is None and last["eta_seconds"] == 0
    assert read_json(extra) == last


def test_log_has_one_line_a_step_and_one_a_score(trained: Any) -> None:
    run, trainer, _, _ = trained
    lines = (run.path / "logs" / "training.log").read_text().splitlines()
    assert "training starts at step 0 of 4" in lines[0] and "training ends after step 4" in lines[-1]
    steps = [line for line in lines if line.startswith("step") and "held-out" not in line]
    scores = [line for line in lines if "held-out loss" in line]
    assert [line.split()[1] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert [line.split()[1] for line in scores] == ["2/4", "4/4"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [line.split()[3] for line in steps] == [f"{loss:.4f}" for loss in logged]
    assert len(lines) == 8


def test_metrics_hold_every_figure_as_json_lines(trained: Any) -> None:
    run, trainer, _, _ = trained
    rows = [json.loads(line) for line in (run.path / "logs" / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        expected = [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]
        assert expected and [(row["step"], row[key]) for row in rows if key in row] == expected


def test_run_json_says_where_the_base_came_from(trained: Any, tiny_folder: Path) -> None:
    source = read_json(trained[0].path / "run.json")["model"]
    assert source == {"id": str(tiny_folder), "revision": None, "loaded": str(tiny_folder), "commit": None}


def test_stats_are_those_of_the_run(trained: Any) -> None:
    run, trainer, _, _ = trained
    stats = read_json(run.path / "metrics" / "training-stats.json")
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    scores = [[entry["step"], entry["eval_loss"]] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert stats["losses"] == losses and stats["held_out_losses"] == scores
    assert (stats["steps"], stats["first_loss"], stats["last_loss"]) == (4, losses[0][1], losses[-1][1])
    assert stats["best_held_out_loss"] == min(score for _, score in scores)
    assert read_json(run.path / "run.json")["training"]["steps"] == 4


def test_the_log_keeps_no_token_and_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerState

    from forgekit.train.callbacks import RunLog

    monkeypatch.setenv("FORGEKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "what only this variable says 1")
    monkeypatch.setenv("HOME", "/home/someone")
    token = "hf_" + "a1B2" * 9
    run = start_run(load_config(), "logged")
    log = RunLog(run)
    log.folder.mkdir()
    log.write(f"{token} what only this variable says 1 /home/someone/x")
    log.on_log(None, TrainerState(), None, {"note": token})
    lines = [(run.path / "logs" / name).read_text(encoding="utf-8") for name in ("training.log", "metrics.jsonl")]
    assert lines[0] == "(token removed) (token removed) ~/x\n"
    assert json.loads(lines[1])["note"] == "(token removed)"


def test_logging_steps_thins_the_log(make_config: Any) -> None:
    trainer, run = make_trainer(make_config({"train.max_steps": 4, "train.logging_steps": 2}))
    trainer.train()
    lines = (run.path / "logs" / "training.log").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["2/4", "4/4"]


def test_a_loss_that_is_no_number_stops_training_and_is_said_everywhere(
    make_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, run = make_trainer(make_config({"train.max_steps": 20}))
    name, weight = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"The loss is nan at step 1, .* lower train\.learning_rate"):
        trainer.train()
    assert trainer.state.global_step == 0, name
    status = read_json(run.path / "status.json")
    assert status["running"] is False and status["error"].startswith("ModelError: The loss is nan at step 1")
    assert "The loss is nan" in (run.path / "logs" / "training.log").read_text()
    assert "The loss is nan" in (printed := capsys.readouterr().out) and "loss 0.0000" not in printed
    assert read_json(run.path / "metrics" / "training-stats.json")["steps"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_status_tells_of_an_error_and_the_error_goes_on(make_config: Any, error: BaseException) -> None:
    trainer, run = make_trainer(make_config())
    collator = trainer.data_collator

    def fail_at_the_second_batch(examples: list[Any], batches: list[int] = []) -> Any:  # noqa: B006  # counts the calls
        batches.append(1)
        if len(batches) > 4:
            raise error
        return collator(examples)

    trainer.data_collator = fail_at_the_second_batch
    with pytest.raises(type(error)):
        trainer.train()
    status = read_json(run.path / "status.json")
    assert status["running"] is False and status["error"] == f"{type(error).__name__}: {error}"


def test_the_curve_ends_with_a_sentence(make_config: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from forgekit.train import callbacks

    shown = []

    class Handle:
        def update(self, bundle: dict[str, str], raw: bool) -> None:
            shown.append(bundle)

    monkeypatch.setattr("IPython.display.display", lambda bundle, raw, display_id: shown.append(bundle) or Handle())
    trainer, _ = make_trainer(make_config({"train.max_steps": 3}))
    curve = callbacks.LiveCurve()
    trainer.add_callback(curve)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert f"Loss curve: from {losses[0]:.3f} at step 1 to {losses[-1]:.3f} at step 3" in capsys.readouterr().out
    (line,) = curve.figure.axes[0].lines
    assert line.get_ydata() == pytest.approx(losses)
    pictures = [base64.b64decode(bundle["image/png"]) for bundle in shown]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert shown[-1]["text/plain"] == "Loss curve, 3 points" and pictures[-1] != pictures[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the monotonic clock shows; the time of day jumps about and must not matter."""
    from forgekit.train import callbacks

    shown = [100.0]
    hands = types.SimpleNamespace(monotonic=lambda: shown[0], time=lambda: random.uniform(0, 1e9))
    monkeypatch.setattr(callbacks, "time", hands)
    return shown


def test_the_time_left_counts_steps_and_seconds_since_this_start(clock: list[float]) -> None:
    from forgekit.train.callbacks import Clock

    watch = Clock()
    watch.first_step = 10  # resumed there
    assert watch.eta(10, 30) is None
    clock[0] += 8.0
    assert (watch.eta(14, 30), watch.seconds()) == (32.0, 8.0)


def test_status_is_written_at_most_once_a_second(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forgekit.train import callbacks

    written: list[float] = []
    monkeypatch.setattr(callbacks, "write_json", lambda path, value: written.append(clock[0]))
    status = callbacks.StatusFile(types.SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
    state = types.SimpleNamespace(global_step=0, max_steps=60, epoch=0.0, num_train_epochs=1)
    status.on_train_begin(None, state, None)
    for _ in range(28):
        clock[0] += 0.125
        status.on_step_end(None, state, None)
    assert written == [100.0, 101.0, 102.0, 103.0]
    status.on_train_end(None, state, None)
    assert len(written) == 5, "the end is always said"
