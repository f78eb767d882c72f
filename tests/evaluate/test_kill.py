"""A process that scores rows is killed by the system, not by an exception; the next one goes on where it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCORE = """
import sys
from pathlib import Path

import forgekit as fk

settings = {"data.test": 40, "evaluate.rows": 40, "evaluate.max_new_tokens": 24, "evaluate.per_device_eval_batch_size": 2}
config = fk.load_config("params/text_quick.yaml", settings)
model, processor = fk.load_model(config)
data = fk.load_data(config, processor, lambda row: {"messages": [
    {"role": "user", "content": row["message"]}, {"role": "assistant", "content": str(row["order"])}
]})
path = Path(sys.argv[1]) if len(sys.argv) > 1 else None
scores = fk.evaluate_model(model, processor, data["test"], config, path)
print("LOSS", repr(scores.loss), len(scores.rows))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCORE, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_process_loses_no_answer(tmp_path: Path) -> None:
    path, partial = tmp_path / "scores.json", tmp_path / "scores.partial.jsonl"
    process = start(str(path))
    try:
        while process.poll() is None and not (partial.exists() and len(partial.read_bytes().splitlines()) >= 10):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL and not path.exists()
    kept = [json.loads(line) for line in partial.read_text().splitlines()]
    assert 10 <= len(kept) < 40
    printed = start(str(path)).communicate()[0]
    assert f"\n{len(kept)} of 40 rows were answered by this model before\n" in printed
    rows = json.loads(path.read_text())["rows"]
    answered = {row["key"]: row for row in rows}
    assert all(answered[row["key"]]["seconds"] == row["seconds"] for row in kept)  # the very same, not answered again
    assert (
        start().communicate()[0].splitlines()[-1] == printed.splitlines()[-1]
    )  # loss as of one whole call, bit for bit
