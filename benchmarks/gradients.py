"""Gradients of the same batches by the library, by the fast path and by its compiled layers: their lengths, each found several times.

    python -m benchmarks.gradients CHECKPOINT [--shapes vision-4x400] [--batches 6] [--times 2] [--sides library forgekit-high ...]

CHECKPOINT is a folder of Gemma 3n; random weights do. The length is that of all gradients of an adapter whose second half is still zero.
Layers at random weights double a rounding, so lengths of different sides may be a third apart; a thousand times as long is a mistake,
and so is another length the second time. Free memory is filled with large numbers before: what is read before it is written shows.
"""

import argparse
import math
import sys
from typing import Any

from benchmarks.fast_path import SHAPES, make_batch

SIDES = ("library", "forgekit-high", "forgekit-high-compiled")
FILLED = 2**30  # numbers of 4 bytes


def measure(model: Any, batch: dict[str, Any], device: str) -> tuple[float, float]:
    """Return the loss of a batch and the length of its gradient."""
    import torch

    if device == "cuda":
        torch.full((FILLED,), 1e3, device=device)
    learned = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast(device, torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return float(loss.detach()), math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))


def main(arguments: list[str]) -> int:
    """Print a line for each side and batch; return 1 when a length is more than three times another one of its batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--shapes", nargs="+", default=["4x1024-75", "vision-4x400", "audio-4x320"], choices=SHAPES)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=SIDES)
    options = parser.parse_args(arguments)
    import torch

    from benchmarks.sides import add_lora, load_forgekit, load_library
    from forgekit.train.fast_path import disable_fast_path

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = add_lora(load_library(options.checkpoint, "16bit", device))
    config = model.get_base_model().config
    batches = {(s, n): make_batch(s, n, config, device) for s in options.shapes for n in range(options.batches)}
    lengths: dict[tuple[str, int], list[float]] = {name: [] for name in batches}
    print("| side | batch | loss | length of the gradient, each time |\n|---|---|---|---|", flush=True)
    for side in options.sides:
        disable_fast_path(model)
        if side != "library":
            load_forgekit(model, side.split("-")[1:], set())
            measure(model, next(iter(batches.values())), device)  # compiled layers come with the second batch
        for (shape, number), batch in batches.items():
            found = [measure(model, batch, device) for _ in range(options.times)]
            lengths[shape, number] += [length for _, length in found]
            numbers = ", ".join(f"{length:.3g}" for _, length in found)
            print(f"| {side} | {shape} {number} | {found[0][0]:.4f} | {numbers} |", flush=True)
    wrong = [name for name, found in lengths.items() if not max(found) <= 3 * min(found)]
    print(f"Batches whose lengths are more than three times apart: {len(wrong)} of {len(batches)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
