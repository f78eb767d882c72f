"""What a training goes on from, and what it refuses to go on from; the steps themselves are compared in tests/faults."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from forgekit.config import Config
from forgekit.errors import RunError
from forgekit.files import read_json
from forgekit.train import saving
from forgekit.train.checkpoint import list_checkpoints, rotate, verify_checkpoint
from forgekit.train.resume import choose_checkpoint


def names(trainer: Any) -> list[str]:
    return [path.name for path in list_checkpoints(trainer.checkpoints.folder)]


def read_weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture
def stopped(make_run: Any) -> Any:
    """A training of four steps whose last checkpoint is that of step 2, its lock given back."""
    trainer = make_run()
    trainer.train()
    trainer.run.finish("crashed")
    shutil.rmtree(trainer.checkpoints.folder / "checkpoint-4")
    return trainer


def test_a_training_resumes_by_itself_and_says_and_records_it(stopped: Any, make_run: Any, capsys: Any) -> None:
    again = make_run()
    capsys.readouterr()
    again.train()
    printed = capsys.readouterr().out
    assert "Resuming from checkpoint-2 of run." in printed and "training starts at step 2 of 4" in printed
    assert equal(read_weights(again), read_weights(stopped))
    assert [resume["step"] for resume in read_json(again.run.path / "run.json")["resumes"]] == [2]
    stats = read_json(again.run.path / "metrics" / "training-stats.json")
    assert [step for step, _ in stats["losses"]] == [1, 2, 3, 4], "the curve begins at the first step"


def test_a_training_that_was_at_its_end_takes_no_further_step(make_run: Any) -> None:
    done = make_run()
    done.train()
    done.run.finish("failed")  # behind the training, say while scoring
    again = make_run()
    assert again.train().global_step == 4
    assert equal(read_weights(again), read_weights(done))


def test_never_keeps_the_old_checkpoints_aside(stopped: Any, make_run: Any) -> None:
    again = make_run({"train.resume": "never"})
    again.train()
    assert verify_checkpoint(again.run.path / "checkpoints-before-1" / "checkpoint-2") is None
    assert names(again) == ["checkpoint-2", "checkpoint-4"] and "resumes" not in again.run.record


def test_a_named_checkpoint_is_taken_whole_or_not_at_all(stopped: Any, make_run: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(stopped.checkpoints.folder / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-2")
    other = make_run({"train.resume": str(copy)}, name="other")
    other.train()
    assert equal(read_weights(other), read_weights(stopped))
    (copy / "rng_state.pth").write_bytes(b"")
    for wanted, reason in (
        (str(copy), "rng_state.pth has 0 bytes"),
        ("checkpoint-9", "there is no checkpoint checkpoint-9"),
    ):
        with pytest.raises(RunError, match=f"train.resume: .*{reason}"):
            other.train(resume_from_checkpoint=wanted)


def change_row(stopped: Any, patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    path = Path(settings["data.path"])
    path.write_text(
        path.read_text(encoding="utf-8").replace('"completion": "', '"completion": "x', 1), encoding="utf-8"
    )


def change_version(stopped: Any, patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    patch.setattr("forgekit.train.identity.find_versions", lambda: {"python": "3.0", "papermill": "0.1"})


def change_rate(stopped: Any, patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    settings["train.learning_rate"] = 1e-3


def change_base(stopped: Any, patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = Path(settings["model.id"]) / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    weights[name] = weights[name] * 1.001
    save_file(weights, file, metadata={"format": "pt"})


CHANGES = {
    "dataset": (change_row, r"dataset: train was 60 rows, \w+, is 60 rows, \w+"),
    "versions": (change_version, r"versions: .*python was 3\.\d+\.\d+, is 3\.0"),
    "config": (change_rate, r"config: train.learning_rate was 0.002, is 0.001"),
    "base": (change_base, r"base: weights was \w+, is \w+"),
}


@pytest.fixture
def own_files(text_folder: Path, orders_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings that name copies of the checkpoint and the rows, which a test may change."""
    rows = tmp_path / "own.jsonl"
    lines = [{"prompt": f"Question {number}?", "completion": f"{number} it is"} for number in range(60)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"model.id": str(shutil.copytree(text_folder, tmp_path / "own-model")), "data.path": str(rows)}


@pytest.mark.parametrize("name", CHANGES)
def test_another_training_is_refused_by_name_unless_that_is_allowed(
    make_run: Any, own_files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = make_run(own_files | {"train.max_steps": 2})
    first.train()
    first.run.finish("crashed")
    change, sentence = CHANGES[name]
    changed = own_files | {"train.max_steps": 2}
    change(first, monkeypatch, changed)
    again = make_run(changed)
    with pytest.raises(
        RunError, match=f"(?s)checkpoint-2 is of another training.*{sentence}.*train.allow_drift: .{name}."
    ):
        again.train()
    assert names(again) == ["checkpoint-2"]
    others = again.config.change({"train.allow_drift": [other for other in CHANGES if other != name]})
    with pytest.raises(RunError, match="another training"):
        choose_checkpoint(again, others, None, print)
    said: list[str] = []
    allowed = again.config.change({"train.allow_drift": [name]})
    assert choose_checkpoint(again, allowed, None, said.append) == again.checkpoints.folder / "checkpoint-2"
    assert len(said) == 1 and f"checkpoint-2: accepted change of {name}: " in said[0]


def test_what_only_says_or_keeps_something_may_change(stopped: Any, make_run: Any) -> None:
    again = make_run({"train.logging_steps": 2, "train.save_steps": 1, "train.save_minutes": 60.0, "evaluate.rows": 3})
    again.train()
    assert equal(read_weights(again), read_weights(stopped)) and names(again) == ["checkpoint-3", "checkpoint-4"]


def test_a_resume_between_two_lines_of_the_log_loses_no_loss(make_run: Any) -> None:
    settings = {"train.logging_steps": 4, "train.max_steps": 8}
    whole = make_run(settings, "whole")
    result = whole.train()
    whole.run.finish()
    shutil.rmtree(whole.checkpoints.folder / "checkpoint-8")  # checkpoint-6 is left: two steps since the last line
    again = make_run(settings, "whole")
    assert again.train().training_loss == result.training_loss
    assert again.state.log_history[:2] == whole.state.log_history[:2]


def test_only_files_of_the_manifest_are_unpickled_and_no_code_of_theirs_runs(
    stopped: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    load, read = torch.load, []

    def note(file: Any, *args: Any, **kwargs: Any) -> Any:
        read.append((Path(file), kwargs.get("weights_only")))
        return load(file, *args, **kwargs)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle was read")

    again = make_run()
    monkeypatch.setattr(torch, "load", note)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    again.train()
    resumed = again.checkpoints.folder / "checkpoint-2"
    assert {path.name for path, _ in read} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {path.parent for path, _ in read} == {resumed} and {safe for _, safe in read} == {True}


def test_no_token_and_no_pickle_of_the_arguments_is_saved(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "notARealToken" * 2
    monkeypatch.setenv("HF_TOKEN", token)
    trainer = make_run()
    trainer.args.hub_token = token
    trainer.train()
    files = [file for file in trainer.run.path.rglob("*") if file.is_file()]
    assert files and not [file for file in files if token.encode() in file.read_bytes()]
    assert not [file for file in files if file.name == "training_args.bin"]
    trainer._save(str(trainer.run.path / "stock"))  # transformers' own way: the check above can fail
    assert token.encode() in (trainer.run.path / "stock" / "training_args.bin").read_bytes()


def test_the_clock_saves_too(make_run: Any) -> None:
    often = make_run({"train.save_steps": None, "train.save_minutes": 1e-9}, "often")
    often.train()
    assert names(often) == ["checkpoint-3", "checkpoint-4"]
    seldom = make_run({"train.save_steps": None, "train.save_minutes": "none"}, "seldom")
    seldom.train()
    assert names(seldom) == ["checkpoint-4"], "before the end"
    assert Config().train.save_minutes == 5


def check_failed_save(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third save fails: the two checkpoints before it are both still there."""
    monkeypatch.setenv("FORGEKIT_FAULT", "save_rename:3:no_space")
    monkeypatch.setattr("forgekit.faults.passed", {})
    trainer = make_run({"train.save_steps": 1})
    with pytest.raises(RunError, match="checkpoint-3 could not be written: No space left"):
        trainer.train()
    assert names(trainer) == ["checkpoint-1", "checkpoint-2"], "one was rotated away for nothing"
    assert "checkpoint-2 is the newest one" in read_json(trainer.run.path / "status.json")["error"]


def test_older_checkpoints_go_only_when_the_new_one_was_read_back(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_failed_save(make_run, monkeypatch)


def test_rotating_first_turns_that_red(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.write_whole

    def rotate_first(path: Path, *args: Any) -> None:
        rotate(path.parent, (), kept=1)
        write(path, *args)

    monkeypatch.setattr(saving, "write_whole", rotate_first)
    with pytest.raises(AssertionError, match="rotated away for nothing"):
        check_failed_save(make_run, monkeypatch)


def test_the_best_checkpoint_stays_and_is_found_after_a_move(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"data.validation": 4, "train.eval_steps": 1, "train.save_steps": 2, "train.max_steps": 6}

    def score(trainer: Any) -> None:
        def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": abs(2.0 - trainer.state.global_step)}  # best at step 2
            trainer.log(dict(metrics))
            trainer.control = trainer.callback_handler.on_evaluate(
                trainer.args, trainer.state, trainer.control, metrics
            )
            return metrics

        trainer.evaluate = evaluate

    trainer = make_run(settings)
    score(trainer)
    monkeypatch.setenv("FORGEKIT_FAULT", "before_step:6:exception")
    monkeypatch.setattr("forgekit.faults.passed", {})
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    assert names(trainer) == ["checkpoint-2", "checkpoint-4"]
    trainer.run.finish("failed")
    moved = trainer.run.path.rename(trainer.run.path.with_name("moved"))
    again = make_run(settings, "moved")
    score(again)
    again.train()
    assert names(again) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert again.state.best_model_checkpoint == str(moved / "checkpoints" / "checkpoint-2")


def test_rows_that_are_varied_at_random_are_the_same_data_set_again(make_run: Any) -> None:
    import random

    def vary(row: dict[str, Any]) -> dict[str, Any]:
        turns = [("user", f"{random.random()} {row['prompt']}"), ("assistant", row["completion"])]
        return {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}

    first, second = (make_run(name=name, to_example=vary).checkpoints.identity["dataset"] for name in ("a", "b"))
    assert first == second
    assert first != make_run(name="c").checkpoints.identity["dataset"]
