"""Weights that training can do without on the GPU: the per-layer table, of which a batch needs some rows, and idle towers.

E2B has 4.0 GB of table and 2 GB of towers, E4B 4.7 and 2. Both are put back behind the training, because generation looks for
its device at the first weight of a model.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch

TOWERS = {"image": "vision_tower", "audio": "audio_tower"}


@contextlib.contextmanager
def park_towers(model: Any, used: set[str]) -> Iterator[list[str]]:
    """Keep the towers of media that the data seem not to hold in the machine's memory; yield their names.

    A tower that is called nevertheless comes back by itself.

    Args:
        model: a Gemma3nForConditionalGeneration or Gemma3nForCausalLM.
        used: kinds of media in the data, of "image" and "audio".
    """
    towers = {name: getattr(model.model, name, None) for kind, name in TOWERS.items() if kind not in used}
    parked = {name: tower for name, tower in towers.items() if tower is not None and find_device(tower).type == "cuda"}
    homes = {name: find_device(tower) for name, tower in parked.items()}
    hooks = [
        tower.register_forward_pre_hook(lambda module, _, home=homes[name]: module.to(home) and None)
        for name, tower in parked.items()
    ]
    try:
        for tower in parked.values():
            tower.to("cpu")
        yield list(parked)
    finally:
        for hook in hooks:
            hook.remove()
        for name, tower in parked.items():
            tower.to(homes[name])


def find_device(module: Any) -> torch.device:
    """Return where a module's weights are."""
    return next(module.parameters()).device


@contextlib.contextmanager
def park_table(text: Any) -> Iterator[bool]:
    """Keep the per-layer embedding table of a Gemma3nTextModel in the machine's memory; yield whether it was moved.

    The GPU reads a batch's rows there itself where the driver lets it, otherwise they are gathered and sent. A table that learns
    stays.
    """
    table = text.embed_tokens_per_layer
    home = table.weight.device
    if table.weight.requires_grad or "forward" in vars(table):
        yield False
        return
    with contextlib.ExitStack() as stack:
        table.weight.data = table.weight.data.to("cpu")
        stack.callback(lambda: setattr(table.weight, "data", table.weight.data.to(home)))
        seen = stack.enter_context(show_to_gpu(table.weight.data, home)) if home.type == "cuda" else None
        table.forward = types.MethodType(make_gather(home) if seen is None else make_lookup(seen), table)
        stack.callback(lambda: delattr(table, "forward"))
        yield True


@contextlib.contextmanager
def show_to_gpu(weight: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor | None]:
    """Yield a tensor on the GPU whose bytes are those of `weight` in the machine's memory, or None where that cannot be.

    The pages are locked and the GPU reads them over its bus, the few rows that a lookup asks for: no gathering by the CPU, and
    nothing waits (CUDA's unified addressing, https://docs.nvidia.com/cuda/cuda-c-programming-guide/#mapped-memory).
    """
    from types import SimpleNamespace

    runtime: Any = torch.cuda.cudart()
    size = weight.numel() * weight.element_size()
    if int(runtime.cudaHostRegister(weight.data_ptr(), size, 0)) != 0:
        yield None
        return
    try:
        shape = (size // 2,)
        bytes_ = SimpleNamespace(__cuda_array_interface__={"shape": shape, "typestr": "<i2", "data": (weight.data_ptr(), False), "version": 3})  # fmt: skip
        try:
            seen = torch.as_tensor(bytes_, device=device).view(weight.dtype).view(weight.shape)
            places = torch.tensor([0, len(weight) - 1])
            right = seen.data_ptr() == weight.data_ptr() and torch.equal(seen[places.to(device)].cpu(), weight[places])
        except (RuntimeError, ValueError):  # a driver that wants another address for it
            right = False
        yield seen if right else None
        torch.cuda.synchronize(device)  # nothing may still read when the pages are let go
    finally:
        runtime.cudaHostUnregister(weight.data_ptr())


def make_lookup(weight: torch.Tensor) -> Any:
    """Return the forward of a table whose weights the GPU reads as `weight`."""

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, weight) * self.embed_scale.to(weight.device, weight.dtype)

    return forward


def make_gather(device: torch.device) -> Any:
    """Return the forward of a table whose rows are gathered by the CPU, each once, and sent to `device`."""
    staging: list[torch.Tensor] = []  # pinned memory for the rows of one batch, so that a copy need not be made first
    sent: list[Any] = []

    def forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
        words, place = torch.unique(ids, return_inverse=True)
        words = words.to(self.weight.device)
        if device.type != "cuda":
            rows = self.weight.index_select(0, words).to(device)
        else:
            if sent:
                sent.pop().synchronize()  # the rows before may still be on their way
            if not staging or staging[0].shape[0] < len(words):
                size = 1 << (len(words) - 1).bit_length()
                staging[:] = [torch.empty(size, self.weight.shape[1], dtype=self.weight.dtype, pin_memory=True)]
            torch.index_select(self.weight.data, 0, words, out=staging[0][: len(words)])
            rows = staging[0][: len(words)].to(device, non_blocking=True)
            sent.append(torch.cuda.Event())
            sent[0].record()
        # multiplied before it is spread, which gives the library's numbers bit for bit
        return (rows * self.embed_scale.to(device, self.weight.dtype))[place]

    return forward
