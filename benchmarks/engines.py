"""Run the text notebook headless through each engine on one checkpoint and print times and peak memory as a table.

    python -m benchmarks.engines CHECKPOINT [ROW ...]        rows: unsloth-bf16 unsloth-4bit huggingface-bf16 huggingface-4bit

Each row is one `forgekit run` of 20 optimiser steps in a process of its own (8 rows of the orders task a step). CHECKPOINT is
a Hub id or a folder; speed and memory do not depend on the values of the weights, so a random checkpoint of full size does.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forgekit.files import read_json
from forgekit.hardware import GIB

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "unsloth-bf16": {"model.engine": "unsloth", "model.load_in": "16bit"},
    "unsloth-4bit": {"model.engine": "unsloth", "model.load_in": "4bit"},
    "huggingface-bf16": {"model.engine": "huggingface", "model.load_in": "16bit"},
    "huggingface-4bit": {"model.engine": "huggingface", "model.load_in": "4bit"},
}
# 8 answers of 16 tokens: enough to see that scoring works; the steps are what is measured
COMMON = {"train.max_steps": 20, "evaluate.rows": 8, "evaluate.max_new_tokens": 16}


def run_row(checkpoint: str, name: str, runs: Path) -> str:
    """Run one row and return its line of the table."""
    settings = {"model.id": checkpoint, **COMMON, **ROWS[name]}
    command = [
        sys.executable,
        "-m",
        "forgekit",
        "run",
        str(ROOT / "notebooks/01_text.ipynb"),
        "--recipe",
        str(ROOT / "params/text.yaml"),
    ]
    command += ["--name", name, "--set", *(f"{key}={value}" for key, value in settings.items())]
    started = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "FORGEKIT_RUNS": str(runs)})
    seconds = time.monotonic() - started
    record = read_json(runs / name / "run.json")
    if done.returncode:
        return f"| {name} | {record['state']}: {record['error']} | | | | |"
    stats = read_json(runs / name / "metrics" / "training-stats.json")
    return (
        f"| {name} | {record['state']} | {stats['first_step_seconds']:.1f} s | {1000 * stats['median_step_seconds']:.0f} ms "
        f"| {stats['peak_gpu_memory_bytes'] / GIB:.2f} GiB | {seconds:.0f} s |"
    )


def main(arguments: list[str]) -> None:
    """Print the table."""
    import torch

    checkpoint, rows = arguments[0], arguments[1:] or list(ROWS)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in rows:
            lines.append(run_row(checkpoint, name, Path(folder)))
            print(lines[-1], flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {device}, torch {torch.__version__}: python -m benchmarks.engines {' '.join(arguments)}\n"
    )
    print(
        "| engine and weights | state | first step | median step | peak memory | whole run |\n|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
