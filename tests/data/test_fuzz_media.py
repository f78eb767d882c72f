"""Damaged pictures and clips through load_data: nothing escapes, the counts add up, and memory stays small."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2 << 30  # bytes, the imports' 900 MB included
KINDS = {"image": 300, "audio": 200}


def main(checkpoint: str) -> None:
    """Load every case with load_data, each kind in a folder of its own; write what came of them to its found.json.

    One process for both kinds, as its imports take longer than its work.
    """
    from forgekit import load_config, load_processor

    settings = {"model.id": checkpoint, "model.load_in": "16bit", "model.max_length": 500, "data.max_bad": 1.0}
    config = load_config(None, settings | {"data.path": "rows.parquet"})
    processor = load_processor(config)
    processor.feature_extractor.max_seconds = 30.0  # as long as the released checkpoints hear
    for kind in KINDS:
        Path(kind).mkdir()
        os.chdir(kind)
        started = time.perf_counter()
        found = load_cases(kind, config, processor)
        found["seconds"] = time.perf_counter() - started
        found["memory"] = read_peak()
        Path("found.json").write_text(json.dumps(found))
        os.chdir("..")


def read_peak() -> int:
    """Return the most bytes that this process has held. getrusage would count what its parent held when it was started."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def load_cases(kind: str, config: Any, processor: Any) -> dict[str, Any]:
    """Make the cases of one kind, load them from a parquet file, and read each row that was kept."""
    import numpy as np
    from datasets import Dataset

    from forgekit import load_data
    from tests.data.damaged_media import make_clips, make_pictures

    cases = {"image": make_pictures, "audio": make_clips}[kind](Path())
    rows = {"number": range(len(cases)), "bytes": [case.data for case in cases], "path": [case.path for case in cases]}
    Dataset.from_dict({name: list(values) for name, values in rows.items()}).to_parquet("rows.parquet")

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
    return {
        "kept": kept,
        "names": [case.name for case in cases],
        "verdicts": [case.verdict for case in cases],
        "checks": [case.check for case in cases],
    }


@pytest.fixture(scope="module")
def results(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a process of its own has loaded every case."""
    folder = tmp_path_factory.mktemp("damaged")
    code = "import sys; from tests.data.test_fuzz_media import main; main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(("kind", "number"), KINDS.items())
def test_damaged_media_cost_a_row_and_nothing_more(kind: str, number: int, results: Path) -> None:
    found = json.loads((results / kind / "found.json").read_text())
    aside = [json.loads(line) for line in (results / kind / "quarantine.jsonl").read_text().splitlines()]
    refused = {int(row["source"].rpartition(":")[2]) - 1: row for row in aside}
    kept = {int(place): value for place, value in found["kept"].items()}
    assert len(refused) == len(aside) and not set(refused) & set(kept)
    assert len(kept) + len(refused) == len(found["names"]) == number
    assert all(row["code"] and 10 < len(row["reason"]) < 700 for row in aside)
    wrong: list[Any] = []
    for place, (name, verdict, check) in enumerate(
        zip(found["names"], found["verdicts"], found["checks"], strict=True)
    ):
        came = "kept" if place in kept else refused[place]["code"]
        if verdict and came != verdict:
            wrong.append((name, verdict, came, refused.get(place, {}).get("reason")))
        if came == verdict == "kept" and check and not is_near(kind, kept[place], check):
            wrong.append((name, check, kept[place]))
    assert not wrong
    assert found["memory"] < MEMORY
    print(f"{kind}: {len(kept)} kept, {len(refused)} set aside, {found['seconds']:.1f} s, {found['memory'] >> 20} MiB")


def is_near(kind: str, found: list[int], wanted: list[int]) -> bool:
    """Compare sizes exactly, and colours of lossy files and lengths of resampled clips to what rounding does to them."""
    if kind == "audio":
        return abs(found[0] - wanted[0]) <= 1
    return found[:2] == wanted[:2] and all(abs(a - b) <= 4 for a, b in zip(found[2:], wanted[2:], strict=True))
