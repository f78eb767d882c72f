"""Speed and memory of one training step: forgekit's fast path, Unsloth, and transformers + TRL, on one GPU.

    python -m benchmarks.fast_path CHECKPOINT [--rows core | all | SHAPE ...] [--sides SIDE ...] [--out FILE]
    python -m benchmarks.fast_path --groups CHECKPOINT=SIDE=SHAPE,SHAPE ... [--out FILE]     just these
    python -m benchmarks.fast_path_show FILE [--chart PNG]      the table and the picture of what FILE holds

CHECKPOINT is a folder of Gemma 3n at full size; random weights do, because speed and memory do not depend on values. Each side
runs in a process of its own (Unsloth, which compiles anew for each shape, in one for each); all load and compile at the same time, and
then measure in turn while the others wait, so that all rows of a call are of one machine in one state. Every row is printed and appended
to FILE (JSON lines) as it is done, and rows that FILE holds are not measured again, so a run can be cut at any time and taken up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# shape -> rows, tokens a row, share of the prompt, medium, weights
SHAPES: dict[str, tuple[int, int, float, str, str]] = {
    "4x1024-75": (4, 1024, 0.75, "text", "16bit"),
    "1x1024-75": (1, 1024, 0.75, "text", "16bit"),
    "8x2048-75": (8, 2048, 0.75, "text", "16bit"),
    "4x1024-0": (4, 1024, 0.0, "text", "16bit"),
    "4x1024-50": (4, 1024, 0.50, "text", "16bit"),
    "4x1024-90": (4, 1024, 0.90, "text", "16bit"),
    "vision-4x400": (4, 400, 0.84, "image", "16bit"),
    "audio-4x320": (4, 320, 0.80, "audio", "16bit"),
    "4x1024-75-4bit": (4, 1024, 0.75, "text", "4bit"),
    "1x1024-75-4bit": (1, 1024, 0.75, "text", "4bit"),
    "mixed-epoch": (4, 1024, 0.75, "mixed", "16bit"),
}
CORE = ("4x1024-75", "1x1024-75", "8x2048-75", "4x1024-0")
SIDES = ("unsloth", "trl", "forgekit-low-compiled-graphs-park", "forgekit-high-compiled-graphs")
Group = tuple[str, str, list[str]]  # checkpoint, side, shapes: of one process
STEPS = 11
WARM = 4  # eager, compiled, recorded, and one more
EPOCH = 200  # batches of the mixed row
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, from the makers' data sheets


def make_batch(shape: str, seed: int, config: Any, device: str = "cuda") -> dict[str, Any]:
    """Make a batch: random words, the last part of each row learned, and media if the shape has them."""
    import torch

    rows, tokens, prompt, medium, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    lengths = [tokens] * rows
    if medium == "mixed":
        lengths = torch.randint(64, 1025, (rows,), generator=generator).tolist()
        tokens = -(-max(lengths) // 64) * 64
    words = min(200_000, config.get_text_config().vocab_size_per_layer_input)
    ids = torch.randint(1000, words, (rows, tokens), generator=generator)
    ids[:, 0] = 2
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, length in enumerate(lengths):
        mask[row, : tokens - length] = 0
        labels[row, : tokens - length + max(1, int(prompt * length))] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if medium == "image":
        ids[:, 10 : 10 + config.vision_soft_tokens_per_image] = config.image_token_id
        batch["pixel_values"] = torch.rand(rows, 3, 768, 768, generator=generator).bfloat16()
    if medium == "audio":
        ids[:, 10 : 10 + config.audio_soft_tokens_per_image] = config.audio_token_id
        batch["input_features"] = torch.rand(rows, 3000, 128, generator=generator).bfloat16()
        batch["input_features_mask"] = torch.ones(rows, 3000, dtype=torch.bool)
    return {name: value.to(device) for name, value in batch.items()}


def count_floor(model: Any, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Count the products that a step cannot do without: forward and the gradient of the inputs, 2 + 2 for each weight and row.

    Rows that teach nothing stop at the layer that gives the shared keys; attention, towers and the adapter are left out.
    """
    base = model.get_base_model()
    text = base.model.language_model
    layers = [sum(p.numel() for n, p in layer.named_parameters() if "lora_" not in n and p.dim() == 2) for layer in text.layers]  # fmt: skip
    source = max(number for number, layer in enumerate(text.layers) if not layer.self_attn.is_kv_shared_layer)
    head = base.get_output_embeddings().weight.numel()
    real = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
    learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) / len(batches)
    flops = 4 * (real * sum(layers[:source]) + learned * (sum(layers[source:]) + head))
    return {"tokens": real, "learned": learned, "floor_tflop": flops / 1e12}


def run_side(side: str, shapes: list[str], checkpoint: str, out: Path, turn: Path | None, longest: float) -> None:
    """Measure shapes with one stack in this process, and append a line for each.

    Args:
        turn: a name of files: `.ready` is made when the first shape is warm, and `.go` waited for before anything is timed.
        longest: seconds after which no further step of a shape begins: a mixed epoch may compile for longer than anybody waits.
    """
    started = time.perf_counter()
    import torch

    if side.startswith("unsloth"):
        import unsloth  # noqa: F401
    from benchmarks.sides import PARKED, Clock, load_side
    from forgekit.train.fast_path import get_fast_path, unwrap
    from forgekit.train.tower_cache import cache_towers

    kind = SHAPES[shapes[0]][4]
    media = {SHAPES[shape][3] for shape in shapes} & {"image", "audio"}
    model, loss_of = load_side(side, checkpoint, kind, media)
    loaded = time.perf_counter() - started
    print(f"    {side}: imported and loaded in {loaded:.0f} s", flush=True)
    clock = Clock(model, loss_of)
    for number, shape in enumerate(shapes):
        row: dict[str, Any] = {"side": side, "shape": shape, "checkpoint": Path(checkpoint).name}
        epoch = shape == "mixed-epoch"
        try:
            start_afresh(model)
            batches = [make_batch(shape, seed, model.config) for seed in range(EPOCH if epoch else 2)]
            warm = clock.warm_up(batches, 2 if epoch else WARM)
            if turn and number == 0:
                wait_for_turn(turn)
            row |= clock.measure(batches[2:] if epoch else batches, EPOCH - 2 if epoch else STEPS, warm, longest)
            if "graphs" in side:  # which keep memory that torch does not count as allocated
                row["peak_gib"] = row["reserved_gib"]
                path = get_fast_path(model)
                row["recorded_difference"] = path and path.graphs and path.graphs.difference
                row["recordings"] = path and path.graphs and len(path.graphs.recordings)
            row |= count_floor(model, batches)
            row["tokens_per_s"] = round(row["tokens"] / row["ms"] * 1000)
            if epoch:  # with all that was compiled on the way
                row["epoch_tokens_per_s"] = round(row["tokens"] * row["steps"] / row["all_steps_s"])
            device = torch.cuda.get_device_name()
            peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
            row["utilisation"] = round(row["floor_tflop"] * 1e12 / (row["ms"] / 1000) / peak, 3) if peak else None
            row |= {"device": device, "torch": torch.__version__, "load_s": round(loaded, 1), "cold": number == 0}
            row["call"] = turn.parent.name[:15] if turn else time.strftime("%Y-%m-%dT%H%M")
            row["cold_first_step_s"] = round(loaded + row["first_step_s"], 1) if number == 0 else None
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # the next shape may well run
            row["error"] = f"{type(error).__name__}: {str(error).strip()[:400]}"
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if turn and number == 0:
                wait_for_turn(turn)
        write_row(row, out)
        medium = SHAPES[shape][3]
        if side.startswith("forgekit") and medium in ("image", "audio") and "error" not in row:
            with cache_towers(unwrap(model), {medium}):  # what a second epoch costs
                warm = clock.warm_up(batches, 2)
                again = row | {"side": f"{side}-cached"} | clock.measure(batches, STEPS, warm)
            again |= {"tokens_per_s": round(row["tokens"] / again["ms"] * 1000), "utilisation": None}
            write_row(again | ({"peak_gib": again["reserved_gib"]} if "graphs" in side else {}), out)
    PARKED.close()


def start_afresh(model: Any) -> None:
    """Drop what was recorded for the shape before, so that each shape's memory is its own."""
    import torch

    from forgekit.train.fast_path import get_fast_path

    path = get_fast_path(model)
    if path and path.graphs:
        path.graphs.forget()
        torch.cuda.empty_cache()


def write_row(row: dict[str, Any], out: Path) -> None:
    """Append a row to the file, and print it."""
    with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(describe(row), flush=True)


def wait_for_turn(turn: Path) -> None:
    """Give memory back, say that this process is warm, and wait until it is its turn."""
    import torch

    torch.cuda.empty_cache()
    turn.with_suffix(".ready").touch()
    while not turn.with_suffix(".go").exists():
        time.sleep(0.1)


def describe(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    head = f"| {row['shape']} | {row['side']} |"
    if "error" in row:
        return f"{head} {row['error'][:200]} | | | | | |"
    return (
        f"{head} {row['ms']:.0f} ms ({row['ms_min']:.0f} to {row['ms_max']:.0f}) | {row['tokens_per_s']:,} | {row['peak_gib']:.2f} ({row['reserved_gib']:.2f}) GiB "
        f"| {row['first_step_s']:.0f} s, {row['slow_steps_s']:.0f} s in slow steps | {row['utilisation'] or 0:.0%} | {row['loss']:.3f} |"
    )


HEAD = "| shape | side | step | tokens/s | peak (reserved) | first step | of peak FLOP/s | loss |\n|---|---|---|---|---|---|---|---|"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows measured so far; of two of one name in one call the newer one counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = ("side", "shape", "checkpoint", "call")
    return list({tuple(row.get(name) for name in names): row for row in map(json.loads, lines)}.values())


def main(arguments: list[str]) -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--groups", nargs="+", default=[], help="CHECKPOINT=SIDE=SHAPE,SHAPE: a process for each")
    parser.add_argument("--rows", nargs="+", default=["core"], help=f"core, all, or of {', '.join(SHAPES)}")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), help="see benchmarks/sides.py, load_side")
    parser.add_argument("--out", type=Path, default=Path("fast_path.jsonl"))
    parser.add_argument("--seconds", type=int, default=570, help="longest time of the whole call")
    parser.add_argument(
        "--warm-seconds", type=int, default=400, help="longest time that all wait for the last to be warm"
    )
    parser.add_argument("--turn-seconds", type=int, default=90, help="longest time that one process measures")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # measure in this process
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = {"core": CORE, "all": tuple(SHAPES)}.get(options.rows[0], tuple(options.rows))
    if options.here:
        run_side(
            options.sides[0], list(wanted), options.checkpoint, options.out, options.turn, 0.9 * options.turn_seconds
        )
        return
    print(HEAD, flush=True)
    if not (options.checkpoint or options.groups):
        parser.error("name a checkpoint, or groups")
    groups: list[Group] = []
    for checkpoint, side, shapes in (group.split("=") for group in options.groups):
        groups.append((checkpoint, side, shapes.split(",")))
    for side in options.sides if not groups else ():
        done = {row["shape"] for row in read_rows(options.out) if row["side"] == side and row["checkpoint"] == Path(options.checkpoint).name and "error" not in row}  # fmt: skip
        for load_in in ("16bit", "4bit"):
            missing = [shape for shape in wanted if SHAPES[shape][4] == load_in and shape not in done]
            parts = [[shape] for shape in missing] if side == "unsloth" else [missing] if missing else []
            groups += [(options.checkpoint, side, part) for part in parts]
    with tempfile.TemporaryDirectory(prefix=time.strftime("%Y-%m-%dT%H%M-")) as folder:
        run_in_turn(groups, options, Path(folder))


def make_command(group: Group, options: argparse.Namespace, turn: Path) -> list[str]:
    """Return the command of the process that measures a side."""
    checkpoint, side, shapes = group
    command = [sys.executable, "-m", "benchmarks.fast_path", checkpoint, "--here", "--sides", side]
    command += ["--out", str(options.out), "--turn", str(turn), "--turn-seconds", str(options.turn_seconds)]
    return [*command, "--rows", *shapes]


def run_in_turn(groups: list[Group], options: argparse.Namespace, folder: Path) -> None:
    """Start a process for each side and its shapes; when all are warm, or have failed, let one after the other measure."""
    started = time.monotonic()
    processes = []
    for number, group in enumerate(groups):
        processes.append(subprocess.Popen(make_command(group, options, folder / f"{number}"), env=dict(os.environ)))

    def is_over() -> bool:
        return time.monotonic() - started > options.seconds

    try:
        waiting = dict(enumerate(processes))
        while waiting and not is_over():
            waiting = {n: p for n, p in waiting.items() if p.poll() is None and not (folder / f"{n}.ready").exists()}
            if time.monotonic() - started > options.warm_seconds:
                break
            time.sleep(0.2)
        late = list(waiting)
        for number in late:  # nobody measures beside one that compiles
            processes[number].kill()
        late_sides = f", but for {', '.join(groups[n][1] for n in late)}, which ended here" if late else ""
        print(f"    all warm after {time.monotonic() - started:.0f} s{late_sides}", flush=True)
        for number in (n for n in range(len(processes)) if n not in late):
            (folder / f"{number}.go").touch()
            began = time.monotonic()
            while processes[number].poll() is None and not is_over() and time.monotonic() - began < options.turn_seconds:  # fmt: skip
                time.sleep(0.1)
            code = processes[number].poll()
            processes[number].kill()  # one that takes too long does not use up the others' time
            if code != 0:
                print(f"    {' '.join(map(str, groups[number]))}: " + ("cut off" if code is None else f"ended with code {code}"), flush=True)  # fmt: skip
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
