"""Attention over tokens that stand in one line (rows.py): a kernel for every device, and flash attention where it is right.

    queries [Q, heads, d], keys and values [N, kv heads, d] -> [Q, heads, d]

Query i looks at the keys from first[i] up to its own place. `padded` spreads the line over [rows, longest] again and uses
torch's scaled_dot_product_attention with a mask. `flash` takes the line as it is; it needs half precision on a GPU and, in the
upper layers, kept tokens that are the last of their row.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .flash import flash
from .rows import Line, Rows, choose_rows

PIECES = 16  # rows that the filling is cut into, for flash attention: so the longest is hardly ever one of them


class Plan(NamedTuple):
    """What the kernel of one stage and one attention kind needs; tensors only, so that a compiler meets no new numbers.

    padded: slots [Q] and key_slots [N], places in [rows * longest row]; mask, bool [rows, 1, longest queries, longest keys].
    flash: slots and key_slots, int32 [rows + PIECES + 1], where rows start; limits, on the CPU: the longest row in queries and in keys,
    and how many keys before its own a query sees (-1: all).
    """

    kernel: str
    slots: torch.Tensor
    key_slots: torch.Tensor
    mask: torch.Tensor
    limits: torch.Tensor


def plan_attention(rows: Rows, stage: str, kind: str, window: int | None, kernel: str) -> Plan:
    """Prepare attention for the "lower" or "upper" stage."""
    line = rows.lower if stage == "lower" else rows.upper
    if kernel == "flash" and rows.whole and (stage == "lower" or rows.suffix):
        empty = torch.empty(0, device=rows.flat.device)
        limits = [longest_row(line, rows), longest_row(rows.lower, rows), -1 if window is None else window - 1]
        return Plan("flash", row_starts(line, rows), row_starts(rows.lower, rows), empty, torch.tensor(limits))
    return plan_padded(rows, line, kind)


def longest_row(line: Line, rows: Rows) -> int:
    """Return the length of the longest row, the filling's included; at least 2, as one query has a kernel of its own."""
    return max(line.longest, -(-rows.filling // PIECES), 2)


def row_starts(line: Line, rows: Rows) -> torch.Tensor:
    """Return int32 [rows + PIECES + 1]: where each row starts in the line, and where the last ends; filling makes rows of its own.

    Its pieces are as long as the keys' filling asks for, so that no piece has more queries than keys.
    """
    starts = F.pad(line.counts.cumsum(0), (1, 0))
    piece = (rows.lower.counts[-1] + PIECES - 1) // PIECES
    ends = starts[-2] + piece * torch.arange(1, PIECES, device=starts.device)
    return torch.cat([starts[:-1], ends.minimum(starts[-1]), starts[-1:]]).int()


def bound(rows: Rows, kernel: str) -> Rows:
    """Return the same rows with larger numbers for their longest, so that batches of like lengths share a recording.

    Attention takes any that is not too small. Flash attention starts blocks for rows of that length, and those that find nothing end
    at once; a mask is as large as it says, so there it is the next power of two. The filling's pieces are counted in, for the keys.
    """
    keys = longest_row(rows.lower, rows)
    if kernel == "flash" and rows.whole and rows.suffix:
        longest = [
            bound_row(keys, rows.lower, rows.batch),
            bound_row(longest_row(rows.upper, rows), rows.upper, rows.batch),
        ]
    else:
        longest = [raise_to_power(keys), raise_to_power(rows.upper.longest)]
    lower, upper = (dataclasses.replace(line, longest=number) for line, number in zip((rows.lower, rows.upper), longest, strict=True))  # fmt: skip
    return dataclasses.replace(rows, lower=lower, upper=upper, filling=0)


def bound_row(longest: int, line: Line, batch: int) -> int:
    """Return four times what a row has on average, or the whole line where the longest is longer than that."""
    number = line.index.numel()
    usual = min(4 * raise_to_power(-(-number // batch)), number)
    return max(usual if longest <= usual else number, 2)


def raise_to_power(number: int) -> int:
    """Return the next power of two, 2 at least."""
    return 1 << (max(number, 2) - 1).bit_length()


def plan_padded(rows: Rows, line: Line, kind: str) -> Plan:
    """Prepare the mask of [rows, 1, longest queries, longest keys] and the places of queries and keys in it.

    Filling goes to a slot behind the last, and reads the first.
    """
    keys = rows.lower
    width, key_width = line.longest, keys.longest
    slots = torch.where(line.row < rows.batch, line.row * width + line.place, rows.batch * width)
    key_slots = torch.where(keys.row < rows.batch, keys.row * key_width + keys.place, rows.batch * key_width)
    start = (keys.counts.cumsum(0) - keys.counts)[line.row]
    first = spread(rows.first[kind][line.index] - start, slots, rows.batch * width).view(rows.batch, width, 1)
    own = spread(line.index - start, slots, rows.batch * width).view(rows.batch, width, 1)
    key = torch.arange(key_width, device=slots.device)
    mask = ((key >= first) & (key <= own))[:, None]
    return Plan("padded", slots, key_slots, mask, torch.empty(0, dtype=torch.int64))


def spread(values: torch.Tensor, slots: torch.Tensor, size: int) -> torch.Tensor:
    """Put values [Q, ...] into their slots of [size, ...]; the other slots are zero."""
    return values.new_zeros(size + 1, *values.shape[1:]).index_copy(0, slots, values)[:size]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Return softmax(q k) v; Gemma 3n scales by one, because its queries and keys are normed."""
    if plan.kernel == "flash":
        # packed layers answer in the precision that they are asked in, float32 here; autocast would cast torch's own function too
        device = q.device.type
        cast = q.dtype == torch.float32 and torch.is_autocast_enabled(device)
        half = torch.get_autocast_dtype(device) if cast else q.dtype
        inputs = (x.to(half).contiguous() for x in (q, k, v))
        return flash(*inputs, plan.slots, plan.key_slots, plan.limits)[0].to(q.dtype)
    return attend_padded(q, k, v, plan)


def attend_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Attend in [rows, heads, longest, d].

    Keys are repeated for all query heads: given fewer, scaled_dot_product_attention with a mask falls back to a slow kernel.
    """
    batch, _, width, key_width = plan.mask.shape
    group = q.shape[1] // k.shape[1]
    queries = spread(q, plan.slots, batch * width).view(batch, width, *q.shape[1:]).transpose(1, 2)
    keys, values = (
        spread(x, plan.key_slots, batch * key_width).view(batch, key_width, *x.shape[1:]).transpose(1, 2)
        for x in (k, v)
    )
    if group > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=plan.mask, scale=1.0)
    out = out.transpose(1, 2).reshape(batch * width, *q.shape[1:])
    return out.index_select(0, plan.slots.clamp(max=batch * width - 1))


def flash_is_right(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    """Say whether `flash` runs here and agrees with `padded`, forward and backward, on a small batch with a window.

    Both are compared with `padded` in float32: flash may be off by twice as much as `padded` in this precision, and a little.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    labels = torch.full((3, 150), -100, device=device)
    mask = torch.ones_like(labels)
    for row, (start, learned) in enumerate([(0, 90), (40, 30), (100, 45)]):
        mask[row, :start] = 0
        labels[row, 150 - learned :] = 1
    generator = torch.Generator(device).manual_seed(0)
    for window in (None, 37):
        rows = choose_rows(labels, mask, {"any": window}, 16)
        assert rows is not None
        for stage, line in (("lower", rows.lower), ("upper", rows.upper)):
            shapes = [(line.index.numel(), heads, width), *2 * [(rows.flat.numel(), kv_heads, width)]]
            q, k, v = (torch.randn(shape, generator=generator, device=device) / width**0.25 for shape in shapes)
            used = line.row < rows.batch  # what the filling answers is not read
            plans = {
                kernel: plan_attention(bound(rows, kernel), stage, "any", window, kernel)
                for kernel in ("padded", "flash")
            }
            try:
                truth = run_kernel(q, k, v, plans["padded"], used)
                padded, fast = (
                    run_kernel(q.to(dtype), k.to(dtype), v.to(dtype), plans[kernel], used) for kernel in plans
                )
            except RuntimeError:
                return False
            for right, near, got in zip(truth, padded, fast, strict=True):
                if not (got - right).norm() <= 2 * (near - right).norm() + 1e-3 * right.norm():
                    return False
    return True


def run_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, used: torch.Tensor) -> list[torch.Tensor]:
    """Return output and gradients in float32."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(inputs[0], inputs[1], inputs[2], plan)[used]
    out.float().square().sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in inputs if x.grad is not None)]
