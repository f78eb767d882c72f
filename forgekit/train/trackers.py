"""A tracker's own process: takes lines from a training and hands them to TensorBoard, trackio or a function of the user's.

    training ── {"start": ...} {"step": 3, "time": ..., "values": {...}} ... {"end": true} ──> python -m forgekit.train.trackers NAME

Everything that may be slow, block or raise happens here, where nobody waits for it.
"""

import importlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

ORPHAN_SECONDS = 10.0  # what may still be written after the training's process is gone
Values = dict[str, float | str]


class Tracker(Protocol):
    """What a tracker is asked to do. Names of values are those of transformers' own integrations: train/loss, eval/loss."""

    def log(self, values: Values, step: int, seconds: float) -> None:
        """Take the values of a step, logged `seconds` after 1970."""

    def close(self) -> None:
        """Write what is not yet written."""


class TensorBoardTracker:
    """Event files, written by TensorBoard's own writer: neither TensorFlow nor torch is imported."""

    def __init__(self, folder: Path, run: str, settings: dict[str, Any], step: int):
        """Open an event file in `folder`; values of later steps from before a resume are hidden by TensorBoard."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event = Event
        self.writer = EventFileWriter(str(folder))
        if step:
            self.write(time.time(), step + 1, session_log=SessionLog(status=SessionLog.START))
        self.log({"settings": "\n".join(f"    {name}: {value}" for name, value in settings.items())}, step, time.time())

    def log(self, values: Values, step: int, seconds: float) -> None:
        """Write scalars, and texts through the text plugin."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.util.tensor_util import make_tensor_proto

        text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        found = [
            Summary.Value(tag=name, simple_value=value)
            if isinstance(value, int | float)
            else Summary.Value(tag=name, metadata=text, tensor=make_tensor_proto([value.encode()]))
            for name, value in values.items()
        ]
        self.write(seconds, step, summary=Summary(value=found))
        self.writer.flush()

    def write(self, seconds: float, step: int, **what: Any) -> None:
        """Write one event."""
        self.writer.add_event(self.event(wall_time=seconds, step=step, **what))

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class TrackioTracker:
    """A database in `folder`, without a Space, a server or the network; `trackio show` reads it."""

    def __init__(self, folder: Path, run: str, settings: dict[str, Any], step: int):
        """Open the run in trackio's project `forgekit`; after a resume the same run goes on."""
        os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        import trackio

        self.run = trackio.init(
            "forgekit", name=run, config=settings, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, values: Values, step: int, seconds: float) -> None:
        """Hand the values to trackio's writer."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait for trackio's writer."""
        self.run.finish()


KNOWN: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoardTracker, "trackio": TrackioTracker}


def open_tracker(name: str, start: dict[str, Any]) -> Tracker:
    """Return a tracker by its name; `module:function` is called with folder, run, settings and step, as the classes above."""
    module, _, function = name.partition(":")
    make: Callable[..., Tracker] = getattr(importlib.import_module(module), function) if function else KNOWN[name]
    folder = Path(start["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    return make(folder=folder, run=start["run"], settings=start["settings"], step=start["step"])


def name_value(name: str) -> str:
    """Return a logged name as transformers' integrations write it: eval_loss -> eval/loss, loss -> train/loss."""
    found = re.match(r"(eval|test)_(.+)", name)
    return f"{found[1]}/{found[2]}" if found else f"train/{name}"


def follow(name: str, lines: Iterable[str]) -> None:
    """Serve one training until its last line."""
    tracker: Tracker | None = None
    for line in lines:
        message = json.loads(line)
        if "start" in message:
            tracker = open_tracker(name, message["start"])
        elif "values" in message and tracker:
            values = {name_value(key): value for key, value in message["values"].items()}
            tracker.log(values, message["step"], message["time"])
        elif "end" in message:
            break
    if tracker:
        tracker.close()


def leave_with_parent(parent: int) -> None:
    """End this process some seconds after the training's has gone, also when the tracker never returns."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def main() -> None:
    """Follow the training on the other end of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the training; a notebook's Interrupt reaches both
    threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    os.nice(10)  # the training comes first where both want the processor
    follow(sys.argv[1], sys.stdin)


if __name__ == "__main__":
    main()
