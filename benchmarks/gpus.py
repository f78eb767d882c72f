"""One run over several GPUs: time of a step, tokens a second, scaling efficiency, and whether the loss curves are the same one.

    python -m benchmarks.gpus CHECKPOINT [--gpus 1 2 4] [--rows 4x1024] [--accumulated 4] [--compile off] [--out FILE]

CHECKPOINT is a folder of Gemma 3n; random weights of full size do, because speed does not depend on values. Each number of GPUs is
a process of its own that trains by `sft_trainer`, with all that belongs to a step: collating, gradients over all GPUs, the log. With
--load-in full the weights are shared out over the GPUs (FSDP2), else each has the whole model (DDP). The rows of a step are the same
for all; efficiency is the speed-up over one GPU divided by their number. A row is printed and appended to FILE (JSON lines) as it is
done, and the loss of each step is compared with that of the first number. --one-gpu puts all processes on one GPU: what it takes to see
whether the curve is the same, also where a machine has no more; its times say nothing.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rows import make_rows
from forgekit.hardware import GIB

OUT = Path(__file__).with_name("gpus.jsonl")
FIGURES = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
WARM = 5  # steps left out of the median: compiling, first allocations
HEAD = "| GPUs | ms a step | tokens/s | efficiency | first step | start | peak | batches by CUDA graphs | largest difference of a loss |\n|---|---|---|---|---|---|---|---|---|"


def make_settings(options: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """Return the settings of a run."""
    rows, tokens = map(int, options.rows.split("x"))
    return {
        "model.id": options.checkpoint,
        "model.engine": options.engine,
        "model.load_in": options.load_in,
        "model.dtype": options.dtype,
        "model.max_length": 2 * tokens,  # words of the checkpoint's tokenizer are measured, not known
        "train.per_device_train_batch_size": rows,
        "train.gradient_accumulation_steps": options.accumulated,
        "train.max_steps": options.steps,
        "train.learning_rate": options.learning_rate,
        "train.optim": "adamw_torch",
        "train.compile": options.compile,
        "train.memory": options.memory,
        "train.fast": options.fast,
        "train.save_minutes": "none",
        "train.gpus": gpus,
    } | ({"export.formats": ["merged"]} if options.load_in == "full" else {})


def measure(options: argparse.Namespace, gpus: int, folder: Path) -> dict[str, Any]:
    """Train on so many GPUs in this process and its workers; return the row."""
    os.environ["FORGEKIT_RUNS"] = str(folder)
    if options.one_gpu:
        share_one_gpu()
    if options.no_reading_ahead:
        from forgekit.train.exact import ExactTraining

        ExactTraining.reads_ahead = lambda self: False  # type: ignore[method-assign]
    from forgekit import add_adapter, load_config, load_data, load_model, sft_trainer, start_engine, start_run

    config = load_config(None, make_settings(options, gpus))
    start_engine(config)  # before transformers, if it is Unsloth
    import torch
    from transformers import TrainerCallback

    from forgekit.data.collate import get_tokenizer, tokenize_rows
    from forgekit.files import read_json
    from forgekit.run_folder import find_versions
    from forgekit.train.group import join_group

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    run = start_run(config, f"gpus-{gpus}")
    model, processor = load_model(config)
    batch = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    tokens = int(options.rows.split("x")[1])
    rows = make_rows(get_tokenizer(processor), options.steps * batch, tokens, options.media)
    data = load_data(config, processor, rows=rows)
    lengths = [
        len(ids) for ids in tokenize_rows([data["train"][n]["messages"] for n in range(len(data["train"]))], processor)
    ]
    trainer = sft_trainer(add_adapter(model, config), processor, data, config, run)
    trainer.add_callback(Clock())
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if options.grouped:
            stack.enter_context(join_group(trainer, 0, 1, folder / "meeting", find_unused=False))
        trainer.train()
    ends = Clock.ends
    steps = sorted(1000 * (b - a) for a, b in zip(ends[WARM:], ends[WARM + 1 :], strict=False))
    stats = read_json(run.path / "metrics" / "training-stats.json")
    fast = read_json(run.path / "run.json").get("fast_path") or {}
    log = (run.path / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [entry for entry in map(json.loads, log) if "loss" in entry]
    return {
        "gpus": gpus,
        "one_gpu": options.one_gpu,
        "reads_ahead": trainer.reads_ahead(),
        "ms": round(median(steps), 2),
        "ms_min": round(steps[0], 2),
        "ms_max": round(steps[-1], 2),
        "tokens_per_s": round(sum(lengths) / len(lengths) * batch / median(steps) * 1000),
        "tokens_a_row": round(sum(lengths) / len(lengths), 1),
        "rows_a_step": batch,
        "first_step_s": stats["first_step_seconds"],
        "start_s": round(ends[0] - started - stats["first_step_seconds"], 1),  # of the other processes
        "peak_gib": stats["peak_gpu_memory_bytes"] and round(stats["peak_gpu_memory_bytes"] / GIB, 2),
        "batches": fast.get("batches"),  # of the first process, by the fast path
        "recorded_batches": fast.get("recorded_batches"),
        "figures": {name: value for name, value in found[-1].items() if name in FIGURES},  # of the last step
        "losses": [entry["loss"] for entry in found],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {name: version for name, version in find_versions().items() if version},
    }


def share_one_gpu() -> None:
    """Let the processes of a training all use the first GPU. NCCL refuses two on the same GPU of one host, so each is a host of its own."""
    from forgekit.train import together, workers

    make_environment = workers.make_environment

    def share_first(rank: int, cuda: bool) -> dict[str, str]:
        return make_environment(0, cuda) | {"NCCL_HOSTID": f"rank{rank}"}

    os.environ["NCCL_HOSTID"] = "rank0"
    workers.make_environment = share_first
    together.check_gpus = lambda config: None


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    if "error" in row:
        return f"| {row['gpus']} | {row['error']} | | | | | | | |"
    efficiency = "" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
    efficiency = "on one GPU" if row["one_gpu"] else efficiency
    difference = "" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}"
    recorded = f"{row['recorded_batches']} of {row['batches']}" if row["batches"] else ""
    return (
        f"| {row['gpus']} | {row['ms']:.0f} ({row['ms_min']:.0f} to {row['ms_max']:.0f}) | {row['tokens_per_s']:,} | {efficiency} "
        f"| {row['first_step_s']:.1f} s | {row['start_s']:.0f} s | {row['peak_gib'] or 0:.1f} GiB | {recorded} | {difference} |"
    )


def compare(row: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a row shows beside the first one: efficiency, and the largest difference of a step's loss."""
    if first is None or "error" in row:
        return {"efficiency": None, "loss_difference": None}
    pairs = zip(row["losses"], first["losses"], strict=True)
    return {
        "efficiency": round(first["ms"] * first["gpus"] / (row["ms"] * row["gpus"]), 4),
        "loss_difference": max(abs(ours - theirs) for ours, theirs in pairs),
    }


def run_process(options: argparse.Namespace, arguments: list[str], gpus: int) -> dict[str, Any]:
    """Measure in a process of its own, which may fail or be cut off; its lines appear as they come."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpus", *arguments, "--here", str(gpus), "--folder", folder]
        try:
            code = subprocess.run(command, timeout=options.seconds).returncode
            error = f"ended with code {code}"
        except subprocess.TimeoutExpired:
            error = f"cut off after {options.seconds} s"
        result = Path(folder) / "row.json"
        if result.exists():
            return json.loads(result.read_text())
        for log in sorted(Path(folder).rglob("rank*.log")):  # gone with the folder
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-30:], sep="\n", flush=True)
        return {"gpus": gpus, "error": error}


def main(arguments: list[str]) -> int:
    """Print the table and append the rows; return 1 when a curve is another one or a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", default="4x1024", help="rows at once x tokens of each")
    parser.add_argument("--accumulated", type=int, default=4, help="batches of a step, over all GPUs together")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--compile", default="on", choices=["on", "off"])
    parser.add_argument("--engine", default="huggingface", choices=["huggingface", "unsloth"])
    parser.add_argument("--memory", default="auto", choices=["low", "auto", "high"])
    parser.add_argument("--fast", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--load-in", default="16bit", choices=["16bit", "4bit", "full"])
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--media", choices=["image", "audio"], help="one in each row")
    parser.add_argument("--no-reading-ahead", action="store_true", help="collate while the GPU waits")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--bound", type=float, default=1e-3, help="largest difference of a step's loss that passes")
    parser.add_argument(
        "--seconds", type=int, default=400, help="longest time of one number of GPUs, the last checkpoint included"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one-gpu", action="store_true", help="all processes on one GPU: for the curve, not for times")
    parser.add_argument(
        "--grouped", action="store_true", help="one process joins a group, too: what DistributedDataParallel costs"
    )
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        row = measure(options, options.here, options.folder)
        (options.folder / "row.json").write_text(json.dumps(row))
        return 0
    lines, first, right = [], None, True
    for gpus in options.gpus:
        row = run_process(options, arguments, gpus)
        row |= compare(row, first) | {
            "date": time.strftime("%Y-%m-%d"),
            "command": f"python -m benchmarks.gpus {' '.join(arguments)}",
        }
        if "error" not in row:
            first = first or row
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        right &= "error" not in row and (row["loss_difference"] or 0) <= options.bound
        lines.append(describe(row))
        print("\n".join(["", HEAD, *lines, ""]), flush=True)
    print(f"Loss curves within {options.bound:g}: {'yes' if right else 'NO'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
