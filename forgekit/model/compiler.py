"""A wait that compiled kernels of torch 2.11 to 2.13 lack, without which gradients are wrong now and then.

    loop 1   store a row to the GPU's memory
             wait for the other threads of the row          <- missing before torch 2.14
    loop 2   load the row again, by other threads

Triton may give the store and the load different threads, and a thread then reads what stood there before: a row's gradient a thousand
times too large, in a different row each time (https://github.com/triton-lang/triton/issues/10924, mended in torch 2.14 by
https://github.com/pytorch/pytorch/pull/190519). Two kernels of each layer's backward are of that kind.
"""

import functools
import inspect
from typing import Any

from ..errors import ModelError

BARRIER = "tl.debug_barrier()"
TAG = "forgekit-barriers"  # graphs compiled without the wait are in torch's cache on disk, and must not be taken from there


def check_compiler() -> None:
    """Let kernels compiled from now on wait before they load what they have stored. Raises ModelError where they cannot be made to."""
    import torch

    if not wait_for_stores():
        raise ModelError(
            f"The compiler of torch {torch.__version__} writes kernels that read gradients before they are written, and has no place "
            "where that can be mended. Take torch 2.14 or newer, or set train.compile: off."
        )


def wait_for_stores() -> bool:
    """Do what `check_compiler` says; return whether that is possible. A release that waits by itself is left as it is."""
    from torch._inductor.codegen import triton

    kernel = triton.TritonKernel
    if hasattr(kernel.load, "_forgekit") or BARRIER in inspect.getsource(kernel.load):
        return True
    if not all(hasattr(kernel, name) for name in ("load", "get_load_buffer")) or not hasattr(triton, "DeferredLine"):
        return False
    add_barriers(kernel, triton.DeferredLine)

    import torch.compiler

    torch.compiler.config.cache_key_tag += TAG
    return True


def add_barriers(kernel: Any, line: Any) -> None:
    """Write the wait into the code of a kernel, before each load of a buffer that it has stored in an earlier loop.

    Args:
        kernel: the class that writes kernels, torch's TritonKernel.
        line: makes a line of code that is dropped when the buffer is not needed after all, torch's DeferredLine.
    """
    load, get_load_buffer = kernel.load, kernel.get_load_buffer

    @functools.wraps(load)
    def load_behind_barrier(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        self._forgekit_loads = name
        try:
            return load(self, name, *args, **kwargs)
        finally:
            self._forgekit_loads = None

    @functools.wraps(get_load_buffer)
    def get_buffer_with_barrier(self: Any, indexing: Any) -> Any:
        buffer, name = get_load_buffer(self, indexing), getattr(self, "_forgekit_loads", None)
        if name in self.cse.invalidated_stores:
            buffer.writeline(line(name, BARRIER))
        return buffer

    load_behind_barrier._forgekit = True  # type: ignore[attr-defined]
    kernel.load, kernel.get_load_buffer = load_behind_barrier, get_buffer_with_barrier
