"""Stands in for `forgekit run`: `stand_in.py --name N [--steps S] [--seconds T] [--code C] [--deaf]`, without libraries or a notebook.

It takes the run's lock, counts steps and keeps the count as its checkpoint, writes each into logs/metrics.jsonl, saves and
exits with 143 on SIGTERM, and ends when whoever started it is gone. `--deaf` does neither of the two.
"""

import argparse
import json
import os
import platform
import select
import signal
import sys
import time
from pathlib import Path

from forgekit.errors import RunNameError
from forgekit.run_lock import lock_folder

parser = argparse.ArgumentParser()
parser.add_argument("--name", required=True)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--seconds", type=float, default=0.05)
parser.add_argument("--save", type=float, default=0.0)
parser.add_argument("--code", type=int, default=0)
parser.add_argument("--deaf", action="store_true")
options = parser.parse_args()

folder = Path(os.environ["FORGEKIT_RUNS"]) / options.name
folder.mkdir(parents=True, exist_ok=True)
try:
    lock = lock_folder(folder)
except RunNameError as error:
    print(error)
    sys.exit(2)
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: None if options.deaf else stopped.append("SIGTERM"))
parent = int(os.environ["FORGEKIT_PARENT"])
checkpoint, events = folder / "checkpoint", folder / "events.jsonl"


def tell(what: str) -> None:
    with open(events, "a") as file:
        file.write(json.dumps({"what": what, "pid": os.getpid(), "at": time.monotonic()}) + "\n")


begun = int(checkpoint.read_text()) if checkpoint.exists() else 0
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RAY_AUTH_TOKEN", "WORD")}
(folder / "seen.json").write_text(json.dumps(seen | {"machine": platform.node(), "folder": os.getcwd()}))
print(f"from step {begun}", flush=True)
tell("begin")
for step in range(begun + 1, options.steps + 1):
    time.sleep(options.seconds)
    if not options.deaf and select.select([parent], [], [], 0)[0]:
        stopped.append("parent")
    if stopped:
        break
    (folder / "logs").mkdir(exist_ok=True)
    with open(folder / "logs" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
    checkpoint.write_text(str(step))
if stopped:
    time.sleep(options.save)
    tell(f"saved after {stopped[0]}")
    sys.exit(143)
tell("end")
sys.exit(options.code)
