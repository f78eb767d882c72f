"""One process of several that train together: python -m forgekit.train.worker SOCKET, started by the notebook's kernel.

It loads the same weights, makes the same trainer and takes the same steps on rows of its own. It writes nothing but its log, which
is its standard output, and decides nothing: when to stop, save and score is what the kernel says (`Group.agree`).
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..run_folder import Run, now

WATCH_SECONDS = 0.5


class SilentRun(Run):
    """The run as a worker sees it: nothing that it learns goes into run.json."""

    def update(self, **values: Any) -> None:
        """Keep values to oneself."""
        self.record.update(values)


def main(number: int) -> None:
    """Do the job that comes through the socket with this file number, and end this process."""
    parent, line = os.getppid(), Connection(number)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a cluster sends them to all; the kernel decides
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    code = 1
    try:
        first = json.loads(line.recv_bytes())
        sys.path[:] = [*dict.fromkeys([*sys.path, *first["path"]])]
        print(f"{now()} rank {first['rank']} of {first['size']}, process {os.getpid()}", flush=True)
        train(first, line.recv_bytes(), line)
        say(line, done=True)
        code = 0
    except BaseException as error:  # noqa: BLE001  # whatever it is, the kernel has to hear of it
        traceback.print_exc()
        report(line, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries' own endings wait for processes that may be gone


def watch_parent(parent: int) -> None:
    """End this process when the kernel has ended, however that was."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    print(f"{now()} the kernel, process {parent}, is gone", flush=True)
    os._exit(1)


def say(line: Connection, **message: Any) -> None:
    """Tell the kernel something; when it is gone, `watch_parent` sees to the rest."""
    try:
        line.send_bytes(json.dumps(message).encode())
    except OSError:
        return


def report(line: Connection, error: BaseException) -> None:
    """Tell the kernel of an error by its class and words; what is out of memory by whatever class is so by this one."""
    from .resume import is_out_of_memory

    memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
    say(line, error="OutOfMemoryError" if memory else type(error).__name__, words=str(error))


def train(first: dict[str, Any], rest: bytes, line: Connection) -> None:
    """Load, say so, and train.

    Args:
        first: rank, size, meeting (a file), checkpoint (a folder or None), rows and accumulated (over all processes), run
            (its folder).
        rest: the config, and the data: one data set a split, with the notebook's `to_example` in it.
    """
    import dill

    from ..adapter.lora import add_adapter
    from ..model.load import load_model
    from .group import join_group
    from .progress import Progress
    from .resume import set_batch
    from .sft import make_trainer

    job = dill.loads(rest)
    config, data = job["config"], job["data"]
    run = SilentRun(Path(first["run"]), {"name": Path(first["run"]).name})
    model, processor = load_model(config)
    trainer: Any = make_trainer(add_adapter(model, config), processor, data, config, run, [Progress()])
    trainer.args.load_best_model_at_end = False  # the kernel's model is the one that stays
    trainer.checkpoints.resumed = first["checkpoint"] and Path(first["checkpoint"])
    set_batch(trainer, first["rows"], first["accumulated"])
    say(line, ready=trainer.checkpoints.identity["base"])
    with join_group(
        trainer, first["rank"], first["size"], Path(first["meeting"]), first["find_unused"], first["sharded"]
    ):
        try:
            trainer.train(first["checkpoint"])
        except (
            BaseException
        ) as error:  # the kernel hears of it before the group is taken down, and knows whose fault it is
            report(line, error)
            raise


if __name__ == "__main__":
    main(int(sys.argv[1]))
