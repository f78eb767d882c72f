"""The Unsloth engine on a CPU, in a process of its own: the same forgekit calls train, score, export and reload.

Unsloth 2026.10.9 takes the whole Gemma3nForConditionalGeneration there as long as the rows hold text alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TRAIN = """
import json, sys, threading
from pathlib import Path

import forgekit
from forgekit.evaluate.loss import measure_loss

settings = json.loads(sys.argv[1])
config = forgekit.load_config(None, settings)
model, processor = forgekit.load_model(config)
import transformers
from peft import PeftModel

found = {"unsloth": "unsloth" in sys.modules, "class": type(model).__name__}
data = forgekit.load_data(config, processor)
run = forgekit.start_run(config, "unsloth")
model = forgekit.add_adapter(model, config)
found |= {"peft": isinstance(model, PeftModel), "modules": forgekit.count_trainable(model)["language"]["modules"]}
chats = [example["messages"] for example in data["train"]]
found["before"] = measure_loss(model, processor, chats, 8)[0]
trainer = forgekit.sft_trainer(model, processor, data, config, run)
collator, seen, threads = trainer.data_collator, [], set()
type(trainer).reads_ahead = lambda self: True  # as on a GPU

def note(examples):
    threads.add(threading.current_thread().name.rpartition("_")[0])
    seen.append([example["messages"] for example in examples])
    return collator(examples)

trainer.data_collator = note
trainer.train()
found["threads"] = sorted(threads)
found["fast_path"] = run.record["fast_path"]
found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
found["after"] = measure_loss(model, processor, chats, 8)[0]
first = seen[0] + seen[1]  # the two accumulated batches of the first step, scored by the untrained model
with model.disable_adapter():
    found["first"] = measure_loss(model, processor, first, 4)[0]
    found["mean_of_means"] = sum(measure_loss(model, processor, batch, 4)[0] for batch in seen[:2]) / 2
written = forgekit.export_model(model, processor, config, run)
for kind, folder in written.items():
    again, _ = forgekit.load_export(folder, config)
    found[kind] = measure_loss(again, processor, chats, 8)[0]
try:
    forgekit.load_model(config.change({"model.engine": "huggingface"}))
except forgekit.ModelError as error:
    found["error"] = str(error)
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_unsloth_trains_scores_exports_and_reloads_on_a_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    answers = ["7", '{"city": "Lima", "items": ["tea", "soap", "rice"]}', "Monday at the latest", "no"]
    rows = [{"prompt": f"Question {number}?", "completion": answers[number % 4]} for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data.path": str(tmp_path / "rows.jsonl"),
        "model.id": str(tiny_folder),
        "model.engine": "unsloth",
        "model.device": "cpu",
        "model.load_in": "16bit",
        "model.max_length": 128,
        "adapter.r": 8,
        "train.max_steps": 6,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 2,
        "train.learning_rate": 5e-3,
        "train.warmup_steps": 1,
        "export.formats": ["adapter", "merged"],
    }
    out = tmp_path / "found.json"
    subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(settings), str(out)],
        check=True,
        timeout=400,
        cwd=tmp_path,
        env={**os.environ, "FORGEKIT_RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    found = json.loads(out.read_text())
    assert found["unsloth"] and found["peft"] and found["class"] == "Gemma3nForConditionalGeneration"
    assert found["modules"] == 24
    assert len(found["losses"]) == 6 and found["threads"] == ["", "read-ahead"]
    assert found["fast_path"]["batches"] >= 12 and not found["fast_path"]["library_batches"]
    # every learned token of a step weighs the same, as with plain transformers
    assert abs(found["losses"][0] - found["first"]) < 1e-4 < abs(found["mean_of_means"] - found["first"])
    assert found["after"] < found["before"] - 0.05
    for kind in ("adapter", "merged"):
        assert abs(found[kind] - found["after"]) < 1e-4
        assert abs(found[kind] - found["before"]) > 0.05
    assert "this process has imported unsloth" in found["error"]
