"""The benchmarks' own code, on the built-in model and on made-up results: a GPU's minutes are too dear to find a slip there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gradients, memory
from benchmarks import slice as slice_benchmark
from benchmarks.rows import make_rows
from forgekit.adapter.memory import WORKSPACE
from forgekit.config import load_config
from forgekit.data.collate import get_tokenizer
from forgekit.data.messages import check_example
from forgekit.data.parts import load_parts
from forgekit.model.load import BUILT_IN, load_processor


@pytest.mark.slow
def test_the_memory_benchmark_runs_its_steps_and_goes_on_where_it_was(tmp_path: Path, project_folder: Path) -> None:
    out = tmp_path / "results.json"
    known = {"tiny:16bit:1x32:off": {"allocated": 2**30, "reserved": 2**30, "seconds": 1.0}}
    out.write_text(json.dumps(known))
    command = [sys.executable, "-m", "benchmarks.memory", str(out)]
    settings = ["--settings", "tiny:16bit:2x48:on,tiny:16bit:1x32:off"]
    done = subprocess.run([*command, *settings], cwd=project_folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert list(results) == ["tiny:16bit:1x32:off", "tiny:16bit:2x48:on"]
    assert results["tiny:16bit:1x32:off"] == known["tiny:16bit:1x32:off"]
    assert results["tiny:16bit:2x48:on"]["seconds"] > 0 and "| tiny | 16bit | 2x48 | on |" in done.stdout


def test_the_fit_finds_the_factors_that_made_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for setting in memory.SETTINGS:
        found = memory.predict(setting)
        workspace = WORKSPACE
        fixed = found.peak - found.kept - found.working
        allocated = fixed + 1.2 * (found.kept + found.working - workspace) + 0.25 * memory.GIB
        results[setting] = {"allocated": allocated, "reserved": allocated, "seconds": 1.0}
    memory.fit(results)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" settings")[0] for line in lines] == [f"huggingface, from {n}" for n in (20, 10, 10)]
    assert all("factor 1.200, WORKSPACE 0.250 GiB" in line and line.endswith("1.000 to 1.000") for line in lines)
    memory.print_table(results)
    assert "in 20 settings" in capsys.readouterr().out


def test_the_slice_benchmark_measures_compares_and_runs(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source, out = BUILT_IN["tiny"], tmp_path / "out"
    settings = {"model.id": str(source), "model.slice": {"skip": "20-24", "widths": 64}, "model.engine": "huggingface"}
    found = slice_benchmark.measure_slice(load_config(None, settings), out)
    assert found["disk_bytes"] > (out / "model.safetensors").stat().st_size > 1e6 and found["peak_gib_slicing"] > 0
    tensors = load_file(out / "model.safetensors")
    assert slice_benchmark.compare_tensors(source, out) == {"tensors_equal": len(tensors)}
    ran = slice_benchmark.run_forward(out, "float32", 1, 16)
    assert (ran["missing"], ran["unexpected"], ran["logits_finite"]) == ([], [], True)
    assert (ran["layers"], ran["widths"], ran["logits"][:2]) == (20, [64], [1, 16])
    name = "model.language_model.layers.3.mlp.down_proj.weight"
    save_file({**tensors, name: torch.roll(tensors[name], 1, 1)}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match=f"{name} is not the source's"):
        slice_benchmark.compare_tensors(source, out)


def test_the_table_of_the_fast_path_is_the_one_that_was_measured(project_folder: Path, tmp_path: Path) -> None:
    from benchmarks import fast_path_show

    rows = fast_path_show.read_rows(project_folder / "benchmarks/fast_path.jsonl")
    assert fast_path_show.make_table(rows) in (project_folder / "benchmarks/README.md").read_text(encoding="utf-8")
    fast_path_show.draw_chart(rows, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


SIDE = """
import sys, time
from pathlib import Path
turn, out, warm, measure = Path(sys.argv[1]), open(sys.argv[2], "a"), float(sys.argv[3]), float(sys.argv[4])
time.sleep(warm)
turn.with_suffix(".ready").touch()
while not turn.with_suffix(".go").exists():
    time.sleep(0.01)
print(turn.name, "from", time.time(), file=out, flush=True)
time.sleep(measure)
print(turn.name, "to", time.time(), file=out, flush=True)
"""


def test_sides_measure_one_after_the_other_when_all_are_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds to get warm and to measure stand in the places of checkpoint and side; one never gets warm, one never ends."""
    import argparse

    from benchmarks import fast_path

    out = tmp_path / "out"

    def command(group: fast_path.Group, options: argparse.Namespace, turn: Path) -> list[str]:
        return [sys.executable, "-c", SIDE, str(turn), str(out), group[0], group[1]]

    monkeypatch.setattr(fast_path, "make_command", command)
    options = argparse.Namespace(seconds=90, warm_seconds=10, turn_seconds=3, out=out)
    (tmp_path / "turns").mkdir()
    groups: list[fast_path.Group] = [("0", "0.3", []), ("1", "0.3", []), ("99", "0", []), ("0", "99", []), ("0", "0.3", [])]  # fmt: skip
    fast_path.run_in_turn(groups, options, tmp_path / "turns")
    lines = [line.split() for line in out.read_text().splitlines()]
    assert [(number, word) for number, word, _ in lines] == [
        ("0", "from"), ("0", "to"), ("1", "from"), ("1", "to"), ("3", "from"), ("4", "from"), ("4", "to"),
    ]  # fmt: skip
    times = [float(time) for *_, time in lines]
    assert times == sorted(times)
    printed = capsys.readouterr().out
    assert "but for 0, which ended here" in printed and "0 99 []: cut off" in printed


@pytest.mark.slow
def test_the_benchmark_of_exports_prints_each_kind_and_its_worst(project_folder: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.verify", "--steps", "1", "--seeds", "1"]
    done = subprocess.run(command, cwd=project_folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kinds = ("float32, bfloat16, adapter", "float32, float32, merged", "bfloat16, bfloat16, merged")
    assert all(f"| {kind} | 1 |" in done.stdout for kind in kinds)
    assert "bfloat16, bfloat16, merged: mean divergence, nats a token: worst of 1" in done.stdout


@pytest.mark.parametrize("medium", [None, "image", "audio"])
def test_rows_to_measure_with_are_examples(medium: str | None) -> None:
    processor = load_processor(load_config(None, {"model.id": "tiny", "model.load_in": "16bit"}))
    rows = make_rows(get_tokenizer(processor), 3, 50, medium)
    messages = [load_parts(check_example(row)) for row in rows]
    kinds = [medium, "text"] if medium else ["text"]
    assert [[part["type"] for part in turns[0]["content"]] for turns in messages] == 3 * [kinds]
    if medium == "image":
        assert {turns[0]["content"][0]["image"].size for turns in messages} == {(800, 600)}
    if medium == "audio":
        assert {len(turns[0]["content"][0]["audio"]) for turns in messages} == {160_000}


def test_the_gradients_of_all_sides_are_as_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gradients.SHAPES, "small", (2, 48, 0.5, "text", "16bit"))
    command = [str(BUILT_IN["tiny"]), "--shapes", "small", "--batches", "2", "--sides", "library", "forgekit-high"]
    assert gradients.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") and "small" in line for line in lines) == 4
    assert lines[-1] == "Batches whose lengths are more than three times apart: 0 of 2"
    found = iter([1.0, 1.1, 1.0, 1.0, 1.0, 900.0, 1.0, 1.0, 1.0])  # the fifth is no batch's
    monkeypatch.setattr(gradients, "measure", lambda *_: (0.5, next(found)))
    assert gradients.main(command) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("1 of 2")
