"""Unsloth's engine beside transformers and PEFT: the same modules learn, in every tower, and rows have the same loss by the fast path.

Unsloth is imported first, so each engine runs in a process of its own:

    python -m pytest tests/model/test_unsloth_gpu.py -m gpu
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# what a recipe may ask for; the second one leaves out layers, the last one names modules itself
SELECTIONS = [
    {"adapter.layers": ["attention", "mlp"]},
    {"adapter.layers": ["attention"], "adapter.layers_to_transform": "0-1,3"},
    {"adapter.layers": ["attention", "mlp", "laurel", "per_layer"], "adapter.rank_pattern": {"laurel": 4}},
    {"adapter.layers": ["mlp", "vision", "audio"]},
    {"adapter.target_modules": r".*layers\.\d+\.self_attn\.(?:q|o)_proj"},
]
LOOK = """
import json, sys
from pathlib import Path

import forgekit
from forgekit.adapter.plan import count_learning

engine, folder, selections, out = sys.argv[1:]
found = []
for selection in json.loads(selections):
    settings = {"model.id": folder, "model.engine": engine, "model.load_in": "16bit", "model.device": "cuda", "adapter.r": 8}
    config = forgekit.load_config(None, settings | selection)
    model, _ = forgekit.load_model(config)
    found.append(count_learning(forgekit.add_adapter(model, config)))
Path(out).write_text(json.dumps(found))
"""
SCORE = """
import json, sys
from pathlib import Path

import forgekit
from forgekit.data.messages import check_example
from forgekit.evaluate.loss import measure_rows, sum_losses
from forgekit.train import score

folder, rows, out = sys.argv[1:]
settings = {"model.id": folder, "model.engine": "unsloth", "model.load_in": "16bit", "model.device": "cuda"}
config = forgekit.load_config(None, settings)
model, processor = forgekit.load_model(config)
model = forgekit.add_adapter(model, config)
chats = [check_example({"messages": chat}) for chat in json.loads(rows)]
whole = measure_rows(model, processor, chats, sum_losses)
with score.open_losses(model, config) as losses:
    assert losses is not sum_losses, "the fast path was not taken"
    found = measure_rows(model, processor, chats, losses)
Path(out).write_text(json.dumps([whole, found]))
"""


def run_script(script: str, folder: Path, *arguments: str) -> None:
    """Run a script in a process of its own, with forgekit of this checkout."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", script, *arguments]
    subprocess.run(command, check=True, timeout=500, cwd=folder, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.gpu
def test_rows_of_unsloths_model_have_the_same_loss_by_the_fast_path(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["tea", "for two", "on the table", "at the latest, please"]
    chats = [
        [{"role": "user", "content": f"Two cups {more}."}, {"role": "assistant", "content": f"Monday {more}"}]
        for more in words
    ]
    out = tmp_path / "losses.json"
    run_script(SCORE, tmp_path, str(tiny_folder), json.dumps(chats), str(out))
    whole, found = json.loads(out.read_text())
    assert [tokens for _, tokens in found] == [tokens for _, tokens in whole]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in whole], rel=2e-2)


@pytest.mark.gpu
def test_both_engines_train_the_same_modules(tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for engine in ("unsloth", "huggingface"):
        out = tmp_path / f"{engine}.json"
        run_script(LOOK, tmp_path, engine, str(tiny_folder), json.dumps(SELECTIONS), str(out))
        found[engine] = json.loads(out.read_text())
    assert all(found["huggingface"])
    assert len({json.dumps(modules, sort_keys=True) for modules in found["huggingface"]}) == len(SELECTIONS)
    assert found["unsloth"] == found["huggingface"]
