"""How far exports of one trained model lie from it by rounding alone: the data behind the bounds in export/verify_adapter.py.

    python -m benchmarks.verify [--steps 30] [--seeds 5]

For each seed the built-in model learns the orders task for some steps; its adapter and merged model are written and read
back, with the base in bfloat16 and in float32, and the model in memory in float32 (as on a CPU) and in bfloat16 (as on a
GPU). Prints one row a seed and kind, and the worst of each kind beside its bound.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgekit import add_adapter, load_config, load_data, load_export, load_model, sft_trainer, start_run
from forgekit.config import Config
from forgekit.export.adapter import export_adapter
from forgekit.export.compare import Reference
from forgekit.export.merged import export_merged, find_base
from forgekit.export.verdict import Verdict
from forgekit.export.verify_adapter import verify_adapter
from forgekit.export.verify_merged import verify_merged

SETTINGS = {
    "data.path": "sample:orders",
    "data.test": 100,
    "model.id": "tiny",
    "model.engine": "huggingface",
    "model.device": "cpu",
    "model.load_in": "16bit",
    "model.max_length": 256,
    "adapter.lora_alpha": 32,
    "train.per_device_train_batch_size": 16,
    "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 2e-3,
    "train.logging_steps": 1000,
}
SHOWN = ("largest difference of logits", "mean divergence, nats a token", "same most probable word, share", "divergence left, as a share of the base's")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    print(f"| model in memory, base on disk, format | seed | tokens | {' | '.join(SHOWN)} |")
    print("|---" * (3 + len(SHOWN)) + "|", flush=True)
    found: dict[str, list[Verdict]] = {}
    for seed in range(1, given.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            for kind, verdict in measure_seed(seed, given.steps, Path(folder)):
                found.setdefault(kind, []).append(verdict)
                print_row(kind, str(seed), verdict)
    for kind, verdicts in found.items():
        print_worst(kind, verdicts)


def measure_seed(seed: int, steps: int, folder: Path) -> Iterator[tuple[str, Verdict]]:
    """Train once and yield the verdict of each kind of export."""
    config = load_config(None, {**SETTINGS, "train.seed": seed, "train.max_steps": steps})
    with contextlib.redirect_stdout(io.StringIO()):
        model, processor, rows = train(config, folder)
        export_adapter(model, processor, config, folder / "lora")
        export_merged(model, processor, config, folder / "merged")
        wide = config.change({"model.id": str(widen_base(config, folder / "base"))})
        export_merged(model, processor, wide, folder / "wide")
        reference = Reference(model, processor, rows)
    yield "float32, bfloat16, adapter", verify_adapter(reference, folder / "lora", config)
    yield "float32, float32, merged", verify_merged(reference, folder / "wide", wide)
    yield "float32, bfloat16, merged", verify_merged(reference, folder / "merged", config)
    half = config.change({"model.dtype": "bfloat16"})
    with contextlib.redirect_stdout(io.StringIO()):
        reference = Reference(*load_export(folder / "lora", half), rows)
    yield "bfloat16, bfloat16, adapter", verify_adapter(reference, folder / "lora", half)
    yield "bfloat16, bfloat16, merged", verify_merged(reference, folder / "merged", half)


def train(config: Config, folder: Path) -> tuple[Any, Any, Any]:
    """Return the trained model, its processor and held-out rows."""
    import json

    def to_example(row: dict[str, Any]) -> dict[str, Any]:
        question = f"Turn this order into JSON: {row['message']}"
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": json.dumps(row["order"])}]}  # fmt: skip

    model, processor = load_model(config)
    data = load_data(config, processor, to_example)
    model = add_adapter(model, config)
    run = start_run(config, "training", inside=type("Place", (), {"path": folder})())
    sft_trainer(model, processor, data, config, run).train()
    run.finish()
    return model.eval(), processor, data["test"]


def widen_base(config: Config, folder: Path) -> Path:
    """Write the base's weights as float32, all else as it is; return the folder."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(find_base(config), folder)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def print_row(kind: str, seed: str, verdict: Verdict) -> None:
    """Print one line of the table."""
    values = {check.name: check.value for check in verdict.checks}
    cells = [f"{values[name]:.3g}" if name in values else "" for name in SHOWN]
    print(f"| {kind} | {seed} | {verdict.tokens} | {' | '.join(cells)} |", flush=True)


def print_worst(kind: str, verdicts: list[Verdict]) -> None:
    """Print the worst figure of all seeds beside its bound."""
    for name in SHOWN:
        checks = [check for verdict in verdicts for check in verdict.checks if check.name == name]
        if checks:
            worst = (min if "same" in name else max)(checks, key=lambda check: check.value)
            print(f"{kind}: {name}: worst of {len(checks)} {worst.value:.3g}, bound {worst.bound:g}")


if __name__ == "__main__":
    main()
