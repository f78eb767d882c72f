"""Two real runs of a small random Gemma 3n, by the command: trained, compared, kept by a second call."""

import json
from pathlib import Path

import nbformat
import pandas
import pytest

from forgekit.__main__ import main

from .conftest import PARAMETERS, read_record, write_sweep

pytestmark = pytest.mark.usefixtures("own_folder")

START = """
import forgekit as fk

config = fk.load_config(recipe, settings)
run = fk.start_run(config, run_name)
"""
TRAIN = """
processor = fk.load_processor(config)
data = fk.load_data(config, processor)
model, processor = fk.load_model(config)
model = fk.add_adapter(model, config)
trainer = fk.sft_trainer(model, processor, data, config, run)
trainer.train()
"""


def test_two_tiny_runs_from_the_file_to_the_comparison(
    tiny_folder: Path, orders_file: Path, capsys: pytest.CaptureFixture
) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, START, TRAIN)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), "toy.ipynb")
    settings = {
        "data.path": str(orders_file), "data.train": 8, "data.validation": 4, "model.id": str(tiny_folder),
        "model.engine": "huggingface", "model.device": "cpu", "model.load_in": "16bit", "model.max_length": 256,
        "train.max_steps": 2, "train.eval_steps": 1, "train.gradient_accumulation_steps": 1,
    }  # fmt: skip
    write_sweep(
        {"name": "tiny", "notebook": "toy.ipynb", "settings": settings, "grid": {"train.learning_rate": [1e-4, 1e-2]}},
        objective={"score": "held_out_loss"},
    )
    code, printed = main(["sweep", "sweep.yaml", "--slots", "2"]), capsys.readouterr().out
    logs = "".join(file.read_text()[-3000:] for file in Path("runs/sweeps/tiny/logs").glob("*"))
    assert code == 0, printed + logs
    names = ["tiny-learning_rate-0.0001", "tiny-learning_rate-0.01"]
    assert [(run["name"], run["state"], run["attempts"]) for run in read_record("tiny")["runs"]] == [
        (name, "completed", 1) for name in names
    ]
    frame = pandas.read_parquet("runs/sweeps/tiny/results.parquet").set_index("run")
    for name in names:
        stats = json.loads(Path("runs", name, "metrics/training-stats.json").read_text())
        assert frame.loc[name, "held_out_loss"] == stats["best_held_out_loss"] and frame.loc[name, "steps"] == 2
    assert frame["held_out_loss"].is_monotonic_increasing and frame["held_out_loss"].nunique() == 2
    assert f"best by held_out_loss (less is better): {frame.index[0]}." in printed
    assert (Path("runs/sweeps/tiny/results.png").stat().st_size) > 5000
    before = {name: Path("runs", name, "run.json").read_bytes() for name in names}
    assert main(["sweep", "sweep.yaml"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("  completed  held_out_loss ") == 2 and "kept" in printed and "running" not in printed
    assert before == {name: Path("runs", name, "run.json").read_bytes() for name in names}
