"""Predicted against measured peak memory of real training steps, one line a setting; and the fit of the estimate's factors.

    python -m benchmarks.memory OUT.json [--settings e2b:16bit:1x1024:on,...] [--seconds 280]   on a GPU
    python -m benchmarks.memory OUT.json --checkpoint DIR --settings e2b:16bit:4x1024:on:unsloth      Unsloth, from a checkpoint
    python -m benchmarks.memory --fit [OUT.json]    the factor and constant of forgekit/adapter/memory.py that fit best
    python -m benchmarks.memory --table [OUT.json]  the results as a table for benchmarks/README.md; default: memory.json here
    python -m benchmarks.memory --towers            bytes that the towers keep, counted without weights

The models have full size and random weights, made on the GPU, because memory does not depend on their values; 4-bit ones are
packed there from the same weights. Each setting runs three steps of TRL's SFTTrainer as `sft_trainer` sets it up (engine
huggingface): rows of random tokens, all learned, one of them padded. OUT.json holds what was measured; a setting that stands in it is not run again.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forgekit.config import Config, load_config
from forgekit.hardware import GIB

# size : weights : batch x length : checkpointing. In an order in which a cut run still holds some of everything.
SETTINGS = (
    "e2b:16bit:1x1024:on e2b:16bit:1x1024:off e2b:16bit:4x1024:on e2b:16bit:8x2048:on e2b:16bit:4x512:off e2b:16bit:1x4096:on "
    "e2b:16bit:8x256:on e2b:16bit:1x4096:off e2b:4bit:1x256:on e2b:4bit:2x2048:on e2b:4bit:4x1024:off e2b:4bit:8x512:on "
    "e4b:16bit:1x1024:on e4b:16bit:4x1024:on e4b:16bit:2x1024:off e4b:16bit:8x2048:on e4b:4bit:1x4096:on e4b:4bit:4x1024:on "
    "e4b:4bit:2x512:off e4b:4bit:8x1024:on"
).split()
STEPS = 3
MEASURED = Path(__file__).with_name("memory.json")  # tests/adapter/test_memory.py holds the estimate against it


def make_config(setting: str) -> Config:
    """Return the Config of one setting: the recipe's defaults with r = 16 on the language model.

    A fifth part names the engine; without it transformers and PEFT alone.
    """
    size, load_in, shape, checkpointing, *engine = setting.split(":")
    rows, length = map(int, shape.split("x"))
    name = "tiny" if size == "tiny" else f"google/gemma-3n-{size.upper()}-it"
    return load_config(
        None,
        {
            "model.id": name,
            "model.engine": engine[0] if engine else "huggingface",
            "model.load_in": load_in,
            "model.max_length": length,
            "train.per_device_train_batch_size": rows,
            "train.gradient_accumulation_steps": 1,
            "train.gradient_checkpointing": checkpointing,
            "train.max_steps": STEPS,
            "train.fast": "off",
        },
    )


def build_model(size: str, device: str) -> Any:
    """Return a model of full size with random weights in bfloat16, made on the device; "tiny" takes the built-in config."""
    import torch
    from transformers import AutoConfig, Gemma3nForConditionalGeneration

    from forgekit.model.load import BUILT_IN
    from forgekit.model.shapes import make_released_config

    settings = AutoConfig.from_pretrained(BUILT_IN["tiny"]) if size == "tiny" else make_released_config(size.upper())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Gemma3nForConditionalGeneration(settings)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.02)
    model.tie_weights()
    return model.requires_grad_(False)


def pack_model(model: Any) -> None:
    """Pack the Linear layers that 4-bit loading packs, in place and on the GPU: NF4, double quantised."""
    import re

    import bitsandbytes
    import torch
    from torch import nn

    from forgekit.adapter.memory import is_quantised
    from forgekit.model.load import KEEP_16BIT
    from forgekit.model.shapes import read_shapes

    keep = re.compile("|".join(f"(?:{pattern})" for pattern in KEEP_16BIT))
    chosen = [module.name for module in read_shapes(model).modules if is_quantised(module, keep)]
    for name in chosen:
        parent, _, last = name.rpartition(".")
        plain: nn.Linear = model.get_submodule(name)
        with torch.device("meta"):
            packed = bitsandbytes.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
        weight = bitsandbytes.nn.Params4bit(
            plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        packed.weight = weight.to("cuda")
        setattr(model.get_submodule(parent), last, packed)
    model.is_loaded_in_4bit = True


def make_rows(config: Config) -> Any:
    """Return a collator that makes a batch of random tokens of full length, all learned but the padding of the first row."""
    import torch

    rows, length = config.train.per_device_train_batch_size, config.model.max_length

    def collate(examples: list[Any]) -> dict[str, Any]:
        ids = torch.randint(5, 250, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}

    return collate


def measure(model: Any, processor: Any, config: Config, cuda: bool) -> dict[str, Any]:
    """Train a few steps and return the peak bytes that tensors took and that PyTorch held, and the seconds of a step."""
    import torch
    from datasets import Dataset

    from forgekit.train.sft import choose_trainer, make_arguments

    rows = config.train.per_device_train_batch_size
    if config.model.engine == "huggingface":  # Unsloth has set its own kind up
        model.gradient_checkpointing_disable()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = choose_trainer(config, config.model.engine)(
            model=model,
            args=make_arguments(config, config.model.engine, SimpleNamespace(path=Path(folder))),  # type: ignore[arg-type]
            train_dataset=Dataset.from_dict({"number": list(range(rows * STEPS))}),
            data_collator=make_rows(config),
            processing_class=processor,
        )
        started = time.monotonic()
        trainer.train()
    found = {"seconds": (time.monotonic() - started) / STEPS, "allocated": 0, "reserved": 0}
    if cuda:
        found |= {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }
    trainer.optimizer = trainer.lr_scheduler = None
    for parameter in model.parameters():
        parameter.grad = None
    return found


def make_learner(config: Config, size: str, checkpoint: str | None, cuda: bool) -> Any:
    """Return a model with its adapter: random weights made in place, or a checkpoint loaded as `load_model` does it."""
    from forgekit.adapter.lora import add_adapter, add_peft_adapter
    from forgekit.model.load import load_model

    if checkpoint:
        config = config.change({"model.id": checkpoint})
        return add_adapter(load_model(config)[0], config)
    model = build_model(size, "cuda" if cuda else "cpu")
    if config.model.load_in == "4bit":
        pack_model(model)
    return add_peft_adapter(model, config)


def run_models(settings: list[str], out: Path, seconds: float, checkpoint: str | None = None) -> None:
    """Measure the settings of each model in a process of its own: libraries keep parts of a model that was deleted."""
    import subprocess
    import sys

    started = time.monotonic()
    for model in dict.fromkeys(":".join(setting.split(":")[:2]) for setting in settings):
        own = [setting for setting in settings if setting.startswith(f"{model}:")]
        left = seconds - (time.monotonic() - started)
        command = [sys.executable, "-m", "benchmarks.memory", str(out), "--here", "--settings", ",".join(own)]
        if left > 0:
            more = ["--checkpoint", checkpoint] if checkpoint else []
            subprocess.run([*command, "--seconds", f"{left:.0f}", *more], check=False)


def run_settings(settings: list[str], out: Path, seconds: float, checkpoint: str | None = None) -> None:
    """Measure the settings that `out` lacks, each model made once; stop in time, so that what was measured is kept."""
    from forgekit.model.load import load_processor, start_engine

    start_engine(make_config(settings[0]))  # Unsloth before transformers
    import torch

    cuda, started = torch.cuda.is_available(), time.monotonic()
    results = json.loads(out.read_text()) if out.exists() else {}
    processor = load_processor(
        make_config(":".join(["tiny:16bit:1x64:off", *settings[0].split(":")[4:]]))
    )  # its tokens are not looked at
    device = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{device}, torch {torch.__version__}, {len(settings)} settings, {len(results)} known", flush=True)
    for size, load_in in dict.fromkeys(tuple(setting.split(":")[:2]) for setting in settings):
        todo = [s for s in settings if s.startswith(f"{size}:{load_in}:") and s not in results]
        if not todo or time.monotonic() - started > seconds:
            continue
        begun = time.monotonic()
        learner = make_learner(make_config(todo[0]), size, checkpoint, cuda)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        weights = torch.cuda.memory_allocated() / GIB if cuda else 0.0
        print(f"{size} {load_in}: made in {time.monotonic() - begun:.0f} s, {weights:.2f} GiB with adapter", flush=True)
        for setting in todo:
            if time.monotonic() - started > seconds:
                print("out of time: run again to go on", flush=True)
                break
            try:
                results[setting] = measure(learner, processor, make_config(setting), cuda) | {"device": device}
            except torch.cuda.OutOfMemoryError:
                results[setting] = {"allocated": None, "reserved": None, "seconds": None, "device": device}
                for parameter in learner.parameters():
                    parameter.grad = None
            out.write_text(json.dumps(results, indent=1))
            print(describe(setting, results[setting]), flush=True)
        del learner
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


def predict(setting: str) -> Any:
    """Return the estimate of one setting."""
    from transformers import AutoConfig

    from forgekit.adapter.memory import estimate_memory
    from forgekit.adapter.plan import plan_layers
    from forgekit.model.load import BUILT_IN
    from forgekit.model.shapes import build_shapes, make_released_config

    size, config = setting.split(":")[0], make_config(setting)
    settings = AutoConfig.from_pretrained(BUILT_IN["tiny"]) if size == "tiny" else make_released_config(size.upper())
    shapes = build_shapes(settings)
    return estimate_memory(plan_layers(config, shapes), config, shapes)


def describe(setting: str, found: dict[str, Any]) -> str:
    """Return one line of the table."""
    size, load_in, shape, checkpointing, *engine = setting.split(":")
    size = f"{size} {engine[0]}" if engine else size
    predicted = predict(setting).peak / GIB
    if not found["allocated"]:
        return f"| {size} | {load_in} | {shape} | {checkpointing} | {predicted:.2f} | none | | | |"
    measured, held = found["allocated"] / GIB, found["reserved"] / GIB
    return (
        f"| {size} | {load_in} | {shape} | {checkpointing} | {predicted:.2f} | {measured:.2f} | {predicted / measured:.2f} "
        f"| {held:.2f} | {found['seconds']:.1f} s |"
    )


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table, and the range of the ratios."""
    print(
        "| size | weights | batch x length | checkpointing | predicted GiB | measured GiB | ratio | held GiB | a step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for setting, found in results.items():
        print(describe(setting, found))
    ratios = [predict(s).peak / found["allocated"] for s, found in results.items() if found["allocated"]]
    if ratios:
        print(f"\npredicted / measured: {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} settings")


def split_known(setting: str, measured: float) -> tuple[float, float]:
    """Return the bytes that FITTED multiplies, uncorrected, and the measured bytes that are neither those nor WORKSPACE."""
    from forgekit.adapter.memory import FITTED, WORKSPACE

    estimate = predict(setting)
    counted = estimate.kept + estimate.working - WORKSPACE
    return counted / FITTED[make_config(setting).model.engine], measured - (estimate.peak - counted - WORKSPACE)


def fit_factor(known: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Return the factor and the constant in bytes that fit (counted, left, measured) best: least squares of the ratios."""
    import numpy
    from scipy.optimize import nnls

    rows = [[counted / measured, GIB / measured] for counted, _, measured in known]
    (factor, constant), _ = nnls(numpy.array(rows), numpy.array([left / measured for _, left, measured in known]))
    return factor, constant * GIB


def fit(results: dict[str, Any]) -> None:
    """Print the factor and the constant that fit the measured peaks best, and how half of the settings predicts the other half."""
    engines: dict[str, list[tuple[float, float, float]]] = {}
    for setting, found in results.items():
        if measured := found["allocated"]:
            engine = make_config(setting).model.engine
            engines.setdefault(engine, []).append((*split_known(setting, measured), measured))
    for engine, known in engines.items():
        halves = [known[::2], known[1::2]]
        for name, learned, tried in (
            ("all", known, known),
            ("even ones, tried on odd", *halves),
            ("odd ones, tried on even", *reversed(halves)),
        ):
            factor, constant = fit_factor(learned)
            ratios = [1 + (factor * counted + constant - left) / measured for counted, left, measured in tried]
            print(
                f"{engine}, from {len(learned)} settings ({name}): factor {factor:.3f}, WORKSPACE {constant / GIB:.3f} GiB; "
                f"predicted / measured would be {min(ratios):.3f} to {max(ratios):.3f}"
            )


def count_tower_bytes() -> None:
    """Print what autograd saves in the released towers for one picture and one clip when they learn, in 16 bit."""
    import torch

    from forgekit.layer_groups import expand_groups, write_group_regex

    torch.set_default_dtype(torch.bfloat16)
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3nForConditionalGeneration

    from forgekit.model.shapes import make_released_config

    groups = expand_groups(("vision_tower", "audio_conformer", "audio_subsampling"))
    expression = "|".join(map(write_group_regex, groups))
    with torch.device("meta"):
        model = Gemma3nForConditionalGeneration(make_released_config("E4B")).requires_grad_(False)
        get_peft_model(model, LoraConfig(r=8, target_modules=expression), autocast_adapter_dtype=False)
        picture, clip = torch.empty(1, 3, 768, 768), torch.empty(1, 3000, 128)
        silent = torch.zeros(1, 3000, dtype=torch.bool)
    for tower, call in (
        ("vision", lambda: model.model.get_image_features(picture)),
        ("audio", lambda: model.model.audio_tower(clip, silent)),
    ):
        saved: dict[int, Any] = {}

        def pack(tensor: Any, saved: dict[int, Any] = saved) -> Any:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
        sizes = [storage.nbytes() for key, storage in saved.items() if key not in own]
        count = sum(p.numel() for n, p in model.named_parameters() if f"{tower}" in n and "lora_" not in n)
        print(f"{tower}: {count:,} weights, {sum(sizes):,} bytes kept, four times the largest: {4 * max(sizes):,}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="results as JSON; what stands in it is not measured again")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="which, divided by commas")
    parser.add_argument("--checkpoint", help="a folder, for settings that end in :unsloth, which loads only from disk")
    parser.add_argument("--seconds", type=float, default=280, help="start no setting after so many seconds")
    for name in ("fit", "table", "towers"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # measure in this process
    options = parser.parse_args()
    if options.towers:
        return count_tower_bytes()
    if options.fit or options.table:
        results = json.loads((options.out or MEASURED).read_text())
        return fit(results) if options.fit else print_table(results)
    if options.out is None:
        parser.error("name the file of the results")
    run = run_settings if options.here else run_models
    run(options.settings.split(","), options.out, options.seconds, options.checkpoint)


if __name__ == "__main__":
    main()
