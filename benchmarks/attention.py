"""Attention kernels over rows that stand in one line: torch's flash attention, masked attention, and FlexAttention, on one GPU.

    python -m benchmarks.attention [--rows 4] [--tokens 1024] [--learned 0.25] [--repeats 50]

Heads as in E2B and E4B (8, 2 of keys, width 256), bfloat16, forward and backward. "lower": every token asks; "upper": the last ones
of each row do. Medians of CUDA events, the kernels in turn within one loop, and each one's distance from masked attention in float32.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from forgekit.train.attention import attend, plan_attention
from forgekit.train.rows import Rows, choose_rows

HEADS, KEY_HEADS, WIDTH = 8, 2, 256
WINDOWS = {"full": None, "sliding": 512}


def make_flex(rows: Rows, stage: str, window: int | None) -> Callable[..., torch.Tensor]:
    """Return attention by FlexAttention: a mask of blocks from row, place and window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    line, keys = (rows.lower if stage == "lower" else rows.upper), rows.lower
    row, own, key_row = line.row, line.index, keys.row
    reach = window or rows.flat.numel()

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        at = own[query]
        return (row[query] == key_row[key]) & (key <= at) & (at - key < reach)

    mask = create_block_mask(sees, None, None, len(row), len(key_row), device=rows.flat.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, scale=1.0, enable_gqa=True)[0].transpose(0, 1)

    return run


def time_kernels(
    kernels: dict[str, Callable[..., torch.Tensor]], inputs: list[torch.Tensor], repeats: int
) -> dict[str, float]:
    """Return milliseconds of forward and backward, medians, the kernels in turn."""
    found: dict[str, list[float]] = {name: [] for name in kernels}
    for number in range(repeats + 5):
        for name, kernel in kernels.items():
            leaves = [x.detach().requires_grad_() for x in inputs]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            kernel(*leaves).sum().backward()
            end.record()
            end.synchronize()
            if number >= 5:
                found[name].append(start.elapsed_time(end))
    return {name: median(times) for name, times in found.items()}


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--learned", type=float, default=0.25, help="share of each row, its last part")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args(arguments)
    labels = torch.full((options.rows, options.tokens), -100, device="cuda")
    labels[:, -int(options.learned * options.tokens) :] = 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.rows} x {options.tokens} tokens")
    print("| stage, attention | kernel | forward + backward | distance |\n|---|---|---|---|")
    for kind, window in WINDOWS.items():
        rows = choose_rows(labels, None, {kind: window}, 64)
        assert rows is not None
        for stage, line in (("lower", rows.lower), ("upper", rows.upper)):
            torch.manual_seed(0)
            shapes = [(line.index.numel(), HEADS, WIDTH), *2 * [(rows.flat.numel(), KEY_HEADS, WIDTH)]]
            inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) / WIDTH**0.25 for shape in shapes]
            plans = {name: plan_attention(rows, stage, kind, window, name) for name in ("flash", "padded")}
            kernels: dict[str, Callable[..., torch.Tensor]] = {
                name: lambda q, k, v, plan=plan: attend(q, k, v, plan) for name, plan in plans.items()
            }
            kernels["flex"] = make_flex(rows, stage, window)
            with torch.no_grad():
                truth = attend(*(x.float() for x in inputs), plans["padded"])
                used = line.row < rows.batch
                errors = {n: float((k(*inputs).float() - truth)[used].norm() / truth[used].norm()) for n, k in kernels.items()}  # fmt: skip
            for name, milliseconds in time_kernels(kernels, inputs, options.repeats).items():
                print(f"| {stage}, {kind} | {name} | {milliseconds:.2f} ms | {errors[name]:.1e} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
