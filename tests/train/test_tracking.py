"""Trackers get what metrics.jsonl gets, and nothing that they do reaches the training."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forgekit import load_config
from forgekit.errors import ConfigError
from forgekit.run_folder import Run
from forgekit.tracker_settings import check_installed
from forgekit.train import tracking
from forgekit.train.trackers import follow
from forgekit.train.tracking import Tracking

TOKEN = "hf_" + "Q7" * 17
# trackers of a user's, in a file beside the notebook
TRACKERS = (
    """
import json, os, pathlib, sys, time

class Recorder:
    def __init__(self, folder, run, settings, step):
        self.file = pathlib.Path(folder) / "lines"
        self.write({"settings": settings, "environment": dict(os.environ)})
    def write(self, value):
        with open(self.file, "a") as file:
            file.write(json.dumps(value) + "\\n")
    def log(self, values, step, seconds):
        self.write([step, values])
    def close(self):
        self.write("closed")

class Raises(Recorder):
    def log(self, values, step, seconds):
        raise OSError("no route to host")

class Sleeps(Recorder):
    def log(self, values, step, seconds):
        time.sleep(600)

class Blocks(Recorder):
    def __init__(self, folder, run, settings, step):
        sys.modules["__main__"].ORPHAN_SECONDS = 0.2
        print("blocks", flush=True)
        while True:
            pass

def raise_at_start(**options):
    raise RuntimeError("no licence, the key is """
    + TOKEN
    + """")

def leave(**options):
    os._exit(7)
"""
)
BAD = ("raise_at_start", "leave", "Raises", "Sleeps", "Blocks")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module `mine` with the trackers above; those that a training leaves until Python ends are ended with the test."""
    (tmp_path / "mine.py").write_text(TRACKERS)
    monkeypatch.syspath_prepend(tmp_path)
    registered: list[Callable[[], None]] = []
    monkeypatch.setattr(tracking.atexit, "register", registered.append)
    yield
    for end in registered:
        end()


@pytest.fixture
def track(own: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Returns a function: names of trackers -> a Tracking without a training, its state, and what it has said."""
    made: list[Tracking] = []

    def make(*names: str, settings: Any = None) -> Any:
        said: list[str] = []
        found = Tracking(names, Run(tmp_path / "run", {}), settings or {"train.max_steps": 4}, said.append)
        made.append(found)
        state = SimpleNamespace(global_step=0, is_world_process_zero=True)
        found.on_train_begin(None, state, None)
        return SimpleNamespace(callback=found, state=state, said=said, folder=tmp_path / "run" / "logs")

    yield make
    for each in made:
        each.kill()


def log(tracked: Any, step: int, **values: Any) -> float:
    """Log values as a trainer does; return the seconds that it took."""
    tracked.state.global_step = step
    began = time.monotonic()
    tracked.callback.on_log(None, tracked.state, None, logs=values)
    return time.monotonic() - began


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def wait_for(said: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return said()


# ---- in a training ---------------------------------------------------------------------------------------------------


def test_a_training_with_bad_trackers_is_the_training_without(make_run: Any, own: None, monkeypatch: Any) -> None:
    spent: list[float] = []
    on_log = Tracking.on_log

    def measure(self: Any, *args: Any, **kwargs: Any) -> None:
        began = time.monotonic()
        on_log(self, *args, **kwargs)
        spent.append(time.monotonic() - began)

    monkeypatch.setattr(Tracking, "on_log", measure)
    history = []
    for name, trackers in (("plain", ()), ("tracked", [f"mine:{bad}" for bad in BAD])):
        trainer = make_run({"train.max_steps": 6, "train.report_to": trackers}, name)
        spent.clear()
        began = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - began
        history.append([{key: entry[key] for key in ("step", "loss", "grad_norm")} for entry in trainer.state.log_history if "loss" in entry])  # fmt: skip
    assert history[0] == history[1] and len(history[0]) == 6
    assert len(spent) == 7 and sum(spent) < 0.1 * (seconds - tracking.END_SECONDS)
    log = (trainer.run.path / "logs" / "training.log").read_text()
    dropped = {line.split()[1]: line for line in log.splitlines() if line.startswith("tracker ")}
    assert {name.partition(":")[2] for name in dropped} == set(BAD)
    assert len([line for line in log.splitlines() if line.startswith("tracker ")]) == len(BAD)
    assert "is dropped, because it ended: RuntimeError: no licence" in dropped["mine:raise_at_start"]
    assert "is dropped, because it ended: OSError: no route to host" in dropped["mine:Raises"]
    assert "still writing" in dropped["mine:Sleeps"] and "still writing" in dropped["mine:Blocks"]
    assert TOKEN not in log


def test_event_files_hold_the_values_of_metrics_jsonl(make_run: Any) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install forgekit[tensorboard]")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    trainer = make_run({"train.report_to": "tensorboard", "train.eval_steps": 2, "data.validation": 4})
    trainer.train()
    (tracked,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Tracking)]
    wait_for(lambda: not tracked.trackers or tracked.trackers[0].has_ended())
    (file,) = (trainer.run.path / "logs" / "tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.tag.startswith(("train/", "eval/")):
                assert abs(event.wall_time - time.time()) < 600
                found[event.step, value.tag] = value.tensor.float_val[0]
    expected = {}
    for row in read_lines(trainer.run.path / "logs" / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "time"):
                tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                expected[row["step"], tag] = np.float32(value)
    assert found == expected
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= {tag for _, tag in found}
    assert {step for step, tag in found if tag == "train/loss"} == {1, 2, 3, 4}


# ---- one process -----------------------------------------------------------------------------------------------------


def test_a_tracker_that_does_not_read_is_dropped_once_and_nobody_waits(track: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tracking, "QUEUE_BYTES", 4096)
    tracked = track("mine:Sleeps")
    pid = tracked.callback.trackers[0].process.pid
    seconds = [log(tracked, step, loss=1.0) for step in range(1, 1000)]
    assert tracked.said == [f"tracker mine:Sleeps is dropped, because it has fallen behind. {tracking.KEPT}"]
    assert tracked.callback.trackers == [] and is_gone(pid)
    assert max(seconds) < 1 and sum(seconds) < 2


def test_values_arrive_by_transformers_names_and_the_tracker_is_closed(track: Any) -> None:
    tracked = track("mine:Recorder")
    log(tracked, 3, loss=0.25, eval_loss=0.5, grad_norm=float("nan"), count=np.float32(2), note="fine")
    tracked.callback.on_train_end(None, tracked.state, None)
    file = tracked.folder / "mine.Recorder" / "lines"
    wait_for(lambda: read_lines(file)[-1] == "closed")
    assert read_lines(file)[1] == [3, {"train/loss": 0.25, "eval/loss": 0.5, "train/count": 2.0, "train/note": "fine"}]
    assert read_lines(file)[0]["settings"] == {"train.max_steps": 4}


def test_no_token_reaches_a_tracker(track: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery staple")
    tracked = track("mine:Recorder", settings={"data.path": f"https://me:{TOKEN}@example.org/rows.jsonl"})
    log(tracked, 1, **{"note": f"sent with {TOKEN}", f"by {TOKEN}": 1, "pass": "correct horse battery staple"})
    tracked.callback.on_train_end(None, tracked.state, None)
    file = tracked.folder / "mine.Recorder" / "lines"
    wait_for(lambda: read_lines(file)[-1] == "closed")
    written = "".join(path.read_text() for path in tracked.folder.rglob("*") if path.is_file())
    assert "(token removed)" in written and TOKEN not in written and "correct horse" not in written
    environment = read_lines(file)[0]["environment"]
    assert {"HF_TOKEN", "MY_SERVICE_PASSWORD"}.isdisjoint(environment) and "PATH" in environment


def test_ending_takes_two_seconds_at_most_and_leaves_no_process(track: Any, monkeypatch: Any) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(tracking.atexit, "register", registered.append)
    tracked = track("mine:Blocks", "mine:Sleeps")
    pids = [tracker.process.pid for tracker in tracked.callback.trackers]
    log(tracked, 1, loss=1.0)
    began = time.monotonic()
    tracked.callback.on_train_end(None, tracked.state, None)
    assert time.monotonic() - began < tracking.END_SECONDS + 1
    assert len(tracked.said) == 2 and all("may do so until this process ends" in line for line in tracked.said)
    began = time.monotonic()
    registered[0]()  # as Python does when it ends
    assert time.monotonic() - began < tracking.END_SECONDS + 1
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_tracker_that_hangs_does_not_outlive_a_killed_training(own: None, tmp_path: Path) -> None:
    start = {"folder": str(tmp_path / "out"), "run": "run", "settings": {}, "step": 0}
    code = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'forgekit.train.trackers', 'mine:Blocks'], stdin=subprocess.PIPE, text=True)\n"
        f"child.stdin.write({json.dumps(json.dumps({'start': start}))} + chr(10)); child.stdin.flush()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    path = os.pathsep.join(name for name in sys.path if name)
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    lines = [parent.stdout.readline().strip(), parent.stdout.readline().strip()]
    lines.remove("blocks")
    pid = int(lines[0])
    assert Path(f"/proc/{pid}").exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: is_gone(pid))
    parent.stdout.close()


def is_gone(pid: int) -> bool:
    """A process without a parent that collects it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ---- what is written -------------------------------------------------------------------------------------------------


def make_lines(folder: Path, step: int, losses: dict[int, float]) -> list[str]:
    """What a training sends to a tracker that starts behind a step."""
    start = {"folder": str(folder), "run": "first", "settings": {"train.max_steps": 4}, "step": step}
    logged = [{"step": at, "time": 1.8e9 + at, "values": {"loss": loss}} for at, loss in losses.items()]
    return [json.dumps(message) for message in ({"start": start}, *logged, {"end": True})]


def test_after_a_resume_tensorboard_hides_the_steps_that_were_taken_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install forgekit[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow("tensorboard", make_lines(tmp_path, 0, {1: 0.5, 2: 0.25, 3: 9.0}))
    time.sleep(1.1)  # the files' names hold the second, and are read in their order
    follow("tensorboard", make_lines(tmp_path, 2, {3: 0.125, 4: 0.0625}))
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    losses = [(event.step, event.wall_time, event.value) for event in found.Scalars("train/loss")] if "train/loss" in found.Tags()["scalars"] else []  # fmt: skip
    losses = losses or [
        (event.step, event.wall_time, event.tensor_proto.float_val[0]) for event in found.Tensors("train/loss")
    ]
    assert losses == [(step, 1.8e9 + step, 0.5**step) for step in (1, 2, 3, 4)]
    assert b"train.max_steps: 4" in found.Tensors("settings")[0].tensor_proto.string_val[0]


def test_trackio_keeps_a_run_in_its_folder_and_goes_on_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("trackio", reason="needs trackio: pip install forgekit[trackio]")
    environment = tracking.make_environment()
    for lines in (make_lines(tmp_path, 0, {1: 0.5, 2: 0.25}), make_lines(tmp_path, 2, {3: 0.125})):
        command = [sys.executable, "-m", "forgekit.train.trackers", "trackio"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True, env=environment, capture_output=True)
    assert [path.name for path in tmp_path.glob("*.db")] == ["forgekit.db"]
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    code = "import json; from trackio.sqlite_storage import SQLiteStorage as s; print(json.dumps([s.get_runs('forgekit'), s.get_logs('forgekit', 'first')]))"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runs, logs = json.loads(read.stdout.splitlines()[-1])
    assert runs == ["first"]
    assert [(entry["step"], entry["train/loss"]) for entry in logs] == [(1, 0.5), (2, 0.25), (3, 0.125)]


# ---- settings --------------------------------------------------------------------------------------------------------


def test_report_to_takes_one_name_a_list_or_a_function_and_refuses_others() -> None:
    for value, found in (
        ("tensorboard", ("tensorboard",)),
        (["trackio", "mine:make"], ("trackio", "mine:make")),
        ([], ()),
    ):
        assert load_config(None, {"train.report_to": value}).train.report_to == found
    with pytest.raises(ConfigError, match=r"train.report_to.*nearest to 'tensorbord': tensorboard"):
        load_config(None, {"train.report_to": ["tensorbord"]})
    for wrong in (["trackio", "trackio"], "wandb", 3):
        with pytest.raises(ConfigError, match="or module:function of your own"):
            load_config(None, {"train.report_to": wrong})


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install forgekit\[trackio\]"):
        check_installed(["trackio", "mine:make"])
