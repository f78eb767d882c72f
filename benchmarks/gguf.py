"""How far each kind of GGUF file is from the model in transformers, over several seeds: where the bounds come from.

python -m benchmarks.gguf [--seeds 5] [--steps 40] [--models narrow wide practice]

practice   the built-in practice model after a short training on its orders: feed-forward parts 128 wide
wide       random weights of hidden width 256 with a random adapter, on which K types apply
narrow     the same of hidden width 32, feed-forward parts 128 wide: the hardest case for another cut-off
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forgekit import add_adapter, load_config, load_data, load_model, sft_trainer, start_run
from forgekit.data.samples.orders import load_orders
from forgekit.export.compare import Reference
from forgekit.export.gguf import export_gguf
from forgekit.export.gguf_verify import verify_gguf
from forgekit.model.tiny import build_config, build_model, build_processor, build_tokenizer

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_K_M")
COMMON = {
    "model.engine": "huggingface",
    "model.device": "cpu",
    "model.load_in": "16bit",
    "model.max_length": 256,
    "evaluate.max_new_tokens": 8,
}
FIGURES = {"KL": "mean KL with llama.cpp's cut-off, nats a token", "KL, other cut-off": "mean KL, nats a token", "perplexity": "change of perplexity"}  # fmt: skip


def to_example(row: dict[str, Any]) -> dict[str, Any]:
    """Return an order as the text notebook has it."""
    question = f"Turn this order into JSON: {row['message']}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": json.dumps(row["order"])}]}  # fmt: skip


def make_practice(seed: int, steps: int, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Return (model, processor, config, held-out rows) of a practice model trained for some steps."""
    settings = {
        "data.path": "sample:orders",
        "data.test": 100,
        "model.id": "tiny",
        "adapter.lora_alpha": 32,
        "train.seed": seed,
    }
    training = {
        "train.per_device_train_batch_size": 16,
        "train.gradient_accumulation_steps": 1,
        "train.learning_rate": 2e-3,
    }
    config = load_config(None, {**COMMON, **settings, **training, "train.max_steps": steps, "train.logging_steps": 20})
    model, processor = load_model(config)
    data = load_data(config, processor, to_example, folder / f"quarantine-{seed}.jsonl")
    model = add_adapter(model, config)
    sft_trainer(model, processor, data, config, start_run(config, f"seed-{seed}")).train()
    return model.eval(), processor, config, data["test"]


def make_random(seed: int, width: int, folder: Path) -> tuple[Any, Any, Any, Any]:
    """Return the same of random weights; a width of 256 is enough for the blocks of K types."""
    import torch
    from datasets import Dataset

    from forgekit.data.messages import check_example

    place = folder / f"random-{width}-{seed}"
    tokenizer = build_tokenizer(row["message"] for row in load_orders(300))
    shape = build_config(tokenizer, hidden_size=width, layers=22, shared_layers=2)
    if width == 256:
        shape.text_config.intermediate_size, shape.text_config.head_dim = [256] * 22, 64
    build_model(shape, seed).save_pretrained(place)
    build_processor(tokenizer).save_pretrained(place)
    config = load_config(None, {**COMMON, "data.path": "sample:orders", "model.id": str(place)})
    model, processor = load_model(config)
    model = add_adapter(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    rows = [{"messages": check_example(to_example(row))} for row in load_orders(16)]
    return model, processor, config, Dataset.from_list(rows)


def measure_kinds(model: Any, processor: Any, config: Any, rows: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Return kind -> figure -> value, and what the largest difference of texts and chats was."""
    found = {}
    for kind in KINDS:
        path = export_gguf(kind, model, processor, config, folder / f"model-{kind}.gguf")
        checks = {check.name: check.value for check in verify_gguf(kind, Reference(model, processor, rows), path, config).checks}  # fmt: skip
        found[kind] = {short: checks[name] for short, name in FIGURES.items()}
        found[kind]["texts, chats"] = sum(value for name, value in checks.items() if name.startswith(("texts", "chats")))  # fmt: skip
        path.unlink()
    return found


def print_table(name: str, seeds: list[dict[str, dict[str, float]]]) -> None:
    """Print one line a kind: the median over the seeds and the largest."""
    print(f"\n| {name} | {' | '.join(FIGURES)} | texts and chats that differ |\n|---|---|---|---|---|")
    for kind in KINDS:
        cells = []
        for figure in FIGURES:
            values = [seed[kind][figure] for seed in seeds]
            cells.append(f"{statistics.median(values):.1e} (max {max(values):.1e})")
        print(f"| {kind} | {' | '.join(cells)} | {sum(seed[kind]['texts, chats'] for seed in seeds):.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of the practice model")
    parser.add_argument(
        "--models", nargs="+", choices=("narrow", "wide", "practice"), default=["narrow", "wide", "practice"]
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FORGEKIT_RUNS"] = name
        models: dict[str, Callable[[int], Any]] = {
            "narrow": lambda seed: make_random(seed, 32, folder),
            "wide": lambda seed: make_random(seed, 256, folder),
            "practice": lambda seed: make_practice(seed, arguments.steps, folder),
        }
        for kind in arguments.models:
            make, found = models[kind], []
            for seed in range(arguments.seeds):
                with contextlib.redirect_stdout(io.StringIO()):
                    found.append(measure_kinds(*make(seed), folder / "files"))
            print_table(kind, found)


if __name__ == "__main__":
    main()
