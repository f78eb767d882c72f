"""The same selection through the Unsloth engine trains the same modules as through transformers and PEFT, in every tower.

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


@pytest.mark.gpu
def test_both_engines_train_the_same_modules(tiny_folder: Path, tmp_path: Path) -> None:
    found = {}
    for engine in ("unsloth", "huggingface"):
        out = tmp_path / f"{engine}.json"
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", LOOK, engine, str(tiny_folder), json.dumps(SELECTIONS), str(out)]
        subprocess.run(command, check=True, timeout=500, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
        found[engine] = json.loads(out.read_text())
    assert all(found["huggingface"])
    assert len({json.dumps(modules, sort_keys=True) for modules in found["huggingface"]}) == len(SELECTIONS)
    assert found["unsloth"] == found["huggingface"]
