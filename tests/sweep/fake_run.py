"""Stands for `python -m forgekit run`: writes what a run's folder holds, in milliseconds, and ends as it was told to.

`behaviour.json` in the working folder: run -> what each attempt does: ok (also when nothing is said), fail, crash, gates,
usage, wait (until SIGTERM), slow (a third of a second). The score is 1 - |0.001 - learning rate| * 500.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

name = sys.argv[sys.argv.index("--name") + 1]
settings = dict(word.removeprefix("--set=").split("=", 1) for word in sys.argv if word.startswith("--set="))
settings = {key: json.loads(value) for key, value in settings.items()}
folder = Path(os.environ["FORGEKIT_RUNS"]) / name
folder.mkdir(parents=True, exist_ok=True)
attempt = int((folder / "attempt").read_text()) + 1 if (folder / "attempt").exists() else 1
(folder / "attempt").write_text(str(attempt))
with open("started.txt", "a") as file:
    file.write(
        f"{name} {attempt} gpu={os.environ.get('CUDA_VISIBLE_DEVICES')} threads={os.environ.get('OMP_NUM_THREADS')}\n"
    )
told = json.loads(Path("behaviour.json").read_text()) if Path("behaviour.json").exists() else {}
actions = told.get(name) or told.get("*") or ["ok"]
action = actions[min(attempt, len(actions)) - 1]
record = {"name": name, "started_at": f"2026-01-01T00:00:{attempt:02d}+00:00"}
rate = settings.get("train.learning_rate", 0.001)


def write(path: str, value: object) -> None:
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text(json.dumps(value))


def finish(state: str, code: int, error: str | None = None) -> None:
    shown = {key: {"value": value, "from": "--set"} for key, value in settings.items()}
    write("run.json", record | {"state": state, "settings": shown, "error": error, "exit_code": code})
    print(f"fake run {name}: {error or state}", flush=True)
    sys.exit(code)


def stop(number: int, frame: object) -> None:
    record["stopped_by"] = "SIGTERM"
    finish("stopped", 143)


signal.signal(signal.SIGTERM, stop)
write("run.json", record | {"state": "running", "pid": os.getpid()})
score = 1 - abs(0.001 - rate) * 500
for step in (10, 20, 30):
    with open((folder / "logs").mkdir(exist_ok=True) or folder / "logs" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "loss": 3 - score - step / 100}) + "\n")
        file.write(json.dumps({"step": step, "eval_loss": 3.1 - score - step / 100}) + "\n")
    if action == "slow":
        time.sleep(0.11)
write("status.json", {"running": True, "step": 30, "total_steps": 30})
if action == "wait":
    time.sleep(60)
if action == "fail":
    finish("failed", 1, "cell 4: ValueError: told to fail")
if action == "usage":
    print("forgekit: train.sede: no such setting", flush=True)
    sys.exit(2)
if action == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
write(
    "metrics/scores.json",
    {"metrics": {"json_equal": {"score": score, "low": score - 0.1, "high": min(1, score + 0.1)}}},
)
write(
    "metrics/training-stats.json",
    {"best_held_out_loss": 2.8 - score, "last_loss": 2.7 - score, "steps": 30, "seconds": 1.5},
)
finish("gates_failed" if action == "gates" else "completed", 3 if action == "gates" else 0)
