"""Batches for recordings, and what stands in for one on a CPU: torch's operations, below autograd, noted and run again on the same tensors.

As with a CUDA graph no Python runs again.
"""

from collections.abc import Callable
from typing import Any


def tape(function: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Stand in for `capture`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    operations: list[tuple[Any, Any, Any, Any]] = []

    class Tape(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operation(*args, **(kwargs or {}))
            operations.append((operation, args, kwargs or {}, result))
            return result

    def list_tensors(values: Any) -> list[Any]:
        return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

    with Tape():
        first = function()

    def replay() -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operation, args, kwargs, result in operations:
                inputs = {value.untyped_storage().data_ptr() for value in list_tensors((args, kwargs))}
                found = operation(*args, **kwargs)
                for old, new in zip(list_tensors(result), list_tensors(found), strict=True):
                    if (
                        old.untyped_storage().data_ptr() not in inputs and old.numel()
                    ):  # else a view, or changed in place
                        old.detach().copy_(new.detach())

    return replay, first


def change_words(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same batch of other words."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, batch["input_ids"].shape, generator=generator)
    labels = torch.where(batch["labels"] == -100, -100, ids)
    return batch | {"input_ids": ids, "labels": labels}


def plain_batch(length: int, learned: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """Two rows without padding, of which so many last tokens are learned."""
    import torch

    ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(length) < length - torch.tensor(learned)[:, None], -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}
