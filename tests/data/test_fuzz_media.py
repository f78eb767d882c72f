"""Damaged pictures and clips through load_data: nothing escapes, the counts add up, and memory stays small."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2 << 30  # bytes


def main(kind: str, checkpoint: str, folder: Path) -> None:
    """Load every case of a kind with load_data, in a folder of its own; write what came of them to found.json."""
    import numpy as np
    from datasets import Dataset

    from forgekit import load_config, load_data, load_processor
    from tests.data.damaged_media import make_clips, make_pictures

    cases = {"image": make_pictures, "audio": make_clips}[kind](folder)
    rows = {"number": range(len(cases)), "bytes": [case.data for case in cases], "path": [case.path for case in cases]}
    Dataset.from_dict({name: list(values) for name, values in rows.items()}).to_parquet("rows.parquet")
    settings = {"model.id": checkpoint, "model.load_in": "16bit", "model.max_length": 500}
    config = load_config(None, settings | {"data.path": "rows.parquet", "data.max_bad": 1.0})
    processor = load_processor(config)
    processor.feature_extractor.max_seconds = 30.0  # as long as the released checkpoints hear
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()

    def to_example(row: dict[str, Any]) -> dict[str, Any]:
        part = {"type": kind, kind: {"bytes": row["bytes"], "path": row["path"]}}
        content = [part, {"type": "text", "text": str(row["number"])}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}

    table = load_data(config, processor, to_example, Path("quarantine.jsonl"))["train"]
    kept = {}
    for row in table:
        part, number = row["messages"][0]["content"]
        value = part[kind]
        corner = [*value.size, *value.getpixel((0, 0))] if kind == "image" else [len(value)]
        assert kind == "image" or (value.dtype == np.float32 and np.isfinite(value).all())
        kept[int(number["text"])] = corner
    found = {
        "kept": kept,
        "names": [case.name for case in cases],
        "verdicts": [case.verdict for case in cases],
        "checks": [case.check for case in cases],
        "seconds": time.perf_counter() - started,
        "before": before,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    Path("found.json").write_text(json.dumps(found))


@pytest.mark.parametrize(("kind", "number"), [("image", 300), ("audio", 200)])
def test_damaged_media_cost_a_row_and_nothing_more(kind: str, number: int, tiny_folder: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.data.test_fuzz_media import main; main(sys.argv[1], sys.argv[2], Path())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(tiny_folder)], cwd=tmp_path, env=env, timeout=300, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    aside = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    refused = {int(row["source"].rpartition(":")[2]) - 1: row for row in aside}
    kept = {int(place): value for place, value in found["kept"].items()}
    assert len(refused) == len(aside) and not set(refused) & set(kept)
    assert len(kept) + len(refused) == len(found["names"]) == number
    assert all(row["code"] and 10 < len(row["reason"]) < 700 for row in aside)
    wrong = []
    for place, (name, verdict, check) in enumerate(
        zip(found["names"], found["verdicts"], found["checks"], strict=True)
    ):
        came = "kept" if place in kept else refused[place]["code"]
        if verdict and came != verdict:
            wrong.append((name, verdict, came, refused.get(place, {}).get("reason")))
        if came == verdict == "kept" and check:
            # colours of lossy files move a little, and a resampled clip may be a sample longer
            near = all(abs(a - b) <= (8 if i > 1 else kind == "audio") for i, (a, b) in enumerate(zip(kept[place], check, strict=True)))  # fmt: skip
            wrong += [] if near else [(name, check, kept[place])]
    assert not wrong
    assert found["memory"] < MEMORY
    print(f"{kind}: {len(kept)} kept, {len(refused)} set aside, {found['seconds']:.1f} s, {found['memory'] >> 20} MiB")
