"""What the backward needs: kept, or computed again, as the memory allows.

Keys and values that layers share are arguments and results of the steps here, so both ways give the same gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint

from ..adapter.fast_memory import PAIRED_TOKENS, SPAN

GIB = 2**30
RESERVE = 2 * GIB  # of the GPU's memory: chunks of logits, one layer's backward, the optimiser
SHARE = 0.9  # of the GPU's memory that "auto" plans with; the rest is for fragments


def recompute(step: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step without keeping what its backward needs.

    Always torch's own non-reentrant kind: Unsloth puts a reentrant one in its place, which finds no gradient to carry where
    the inputs are frozen.
    """
    checkpoint = (
        getattr(torch.utils.checkpoint, "_unsloth_pristine_checkpoint", None) or torch.utils.checkpoint.checkpoint
    )
    # a CUDA graph that is being recorded has no random state to note; graphs.py records nothing that draws numbers
    recorded = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return checkpoint(step, *arguments, use_reentrant=False, preserve_rng_state=not recorded)


@dataclass
class Memory:
    """Decides for each step whether what its backward needs is kept.

    limit: bytes that tensors on the device may take; 0 keeps nothing, None everything. A step is kept while the memory in
    use, and what steps of its size were seen to keep, stay below. span: layers that are run, and kept or not, together.
    """

    limit: int | None
    span: int = 1
    seen: dict[Any, float] = field(default_factory=dict)  # step -> bytes a row
    kept: int = 0
    again: int = 0

    def run(self, keep: Callable[[], Any], again: Callable[[], Any], key: Any, rows: int) -> Any:
        """Run a step on so many rows; `key` names steps that keep the same bytes a row.

        Args:
            keep, again: the step, called so that its backward finds all, or computes it again.
        """
        if self.limit is None:
            self.kept += 1
            return keep()
        if self.limit == 0 or self.seen.get(key, 0) * rows + torch.cuda.memory_allocated() > self.limit:
            self.again += 1
            return again()
        before = torch.cuda.memory_allocated()
        result = keep()
        self.seen[key] = max(self.seen.get(key, 0), (torch.cuda.memory_allocated() - before) / rows)
        self.kept += 1
        return result


def plan_memory(
    memory: str | float, device: torch.device, tokens: int, compiled: bool, taken: int = 0, share: float = 1.0
) -> Memory:
    """Return the plan for `train.memory`: low, high, auto (what the GPU has; everything on a CPU), or a number of GiB.

    Args:
        tokens: of the batch.
        compiled: whether its layers are.
        taken: bytes that this process has and this batch cannot use.
        share: of what "auto" finds free.
    """
    if memory == "low":
        return Memory(0, 1 if compiled and tokens < PAIRED_TOKENS else SPAN)
    if memory == "high" or device.type != "cuda":
        return Memory(None)
    if memory == "auto":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) - taken
        used = torch.cuda.memory_allocated(device)
        limit = int((free + ours) * SHARE) - RESERVE
        return Memory(max(1, used + int((limit - used) * share)))
    return Memory(int(float(memory) * GIB))
