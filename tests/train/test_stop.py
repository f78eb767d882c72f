"""Stop, Save now and interrupts: training ends or goes on with a whole checkpoint, and nothing of it is lost."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forgekit import add_adapter, load_data, load_model, sft_trainer, start_run
from forgekit.files import read_json
from forgekit.train import stop
from forgekit.train.stop import StopSwitch, catch_interrupt

# what transformers needs to go on exactly where it stopped
COMPLETE = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}  # fmt: skip


def make_trainer(config: Any, name: str) -> Any:
    model, processor = load_model(config)
    data = load_data(config, processor)
    trainer = sft_trainer(add_adapter(model, config), processor, data, config, start_run(config, name))
    trainer.switch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopSwitch))
    return trainer


def act(trainer: Any, step: int, action: Callable[[], Any]) -> None:
    """Do something in the middle of a step: its gradients are there, the optimiser has not used them."""
    from transformers import TrainerCallback

    class Actor(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                action()

    trainer.add_callback(Actor())


def read_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def find_checkpoints(trainer: Any) -> dict[str, set[str]]:
    return {path.name: {f.name for f in path.iterdir()} for path in Path(trainer.args.output_dir).glob("checkpoint-*")}


def check_stopped(trainer: Any, step: int) -> None:
    """Training ended after `step`, with one complete checkpoint and no error anywhere."""
    assert trainer.state.global_step == trainer.switch.stopped_at == step
    assert find_checkpoints(trainer).keys() == {f"checkpoint-{step}"}
    assert find_checkpoints(trainer)[f"checkpoint-{step}"] >= COMPLETE
    folder = Path(trainer.args.output_dir).parent
    assert read_json(folder / "run.json")["stopped_at_step"] == step
    status = read_json(folder / "status.json")
    assert (status["running"], status["step"], status["checkpoint_at"], status["error"]) == (False, step, step, None)
    assert f"Stopped as asked after step {step} of 4; checkpoint-{step} is complete." in (
        folder / "logs" / "training.log"
    ).read_text(encoding="utf-8")


SHORT = {"train.max_steps": 4, "adapter.lora_dropout": 0.1}


def test_save_now_goes_on_and_an_interrupted_training_resumes_to_the_same_weights(make_config: Any) -> None:
    config = make_config(SHORT)
    saved = make_trainer(config, "saved")
    act(saved, 2, saved.switch.save.set)
    saved.train()
    assert saved.state.global_step == 4 and saved.switch.stopped_at is None
    assert find_checkpoints(saved).keys() == {"checkpoint-2", "checkpoint-4"}  # asked for, and before the end
    assert find_checkpoints(saved)["checkpoint-2"] >= COMPLETE

    stopped = make_trainer(config, "interrupted")
    act(stopped, 2, lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.train().global_step == 2
    check_stopped(stopped, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped.train(resume_from_checkpoint=str(Path(stopped.args.output_dir) / "checkpoint-2"))
    assert stopped.state.global_step == 4 and stopped.switch.stopped_at is None
    weights = read_weights(stopped)
    assert all(torch.equal(weights[name], value) for name, value in read_weights(saved).items())


def test_without_the_switch_an_interrupt_tears_the_step(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    monkeypatch.setattr(stop, "catch_interrupt", lambda switch: contextlib.nullcontext())
    trainer = make_trainer(make_config(SHORT), "torn")
    act(trainer, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not find_checkpoints(trainer)


def test_the_last_weights_are_scored_before_the_best_are_put_back(make_config: Any) -> None:
    trainer = make_trainer(make_config({**SHORT, "data.validation": 4, "train.eval_steps": 2}), "scored")
    act(trainer, 3, trainer.switch.stop.set)
    trainer.train()
    assert trainer.state.global_step == trainer.switch.stopped_at == 3
    scores = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert scores.keys() == {2, 3}
    best = min(scores, key=lambda step: scores[step])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    log = (Path(trainer.args.output_dir).parent / "logs" / "training.log").read_text(encoding="utf-8")
    assert f"The model now has the weights of checkpoint-{best}, the best on held-out rows." in log


def make_switch() -> StopSwitch:
    return StopSwitch(run=None)  # type: ignore[arg-type]  # nothing is written here


def test_the_second_interrupt_ends_at_once_and_the_old_handler_comes_back() -> None:
    switch = make_switch()
    with pytest.raises(KeyboardInterrupt), catch_interrupt(switch):
        signal.raise_signal(signal.SIGINT)
        assert switch.stop.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not switch.stop.is_set()


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_interrupt(make_switch()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_leaves_the_handler_alone() -> None:
    seen: list[Any] = []

    def run() -> None:
        with catch_interrupt(make_switch()):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
