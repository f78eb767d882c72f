"""Weights that training can do without on the GPU: the per-layer table, of which a batch needs some rows, and idle towers.

E2B has 4.0 GB of table and 2 GB of towers, E4B 4.7 and 2. Both are put back behind the training, because generation looks for
its device at the first weight of a model.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from ..model.table import lend_table, stay_put

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
    with contextlib.ExitStack() as stack:
        for name, tower in parked.items():
            stack.enter_context(park(tower, homes[name]))
        yield list(parked)


@contextlib.contextmanager
def park(module: Any, home: torch.device) -> Iterator[None]:
    """Keep a module in the machine's memory until it is called or the context is left."""
    stack = contextlib.ExitStack()

    def come_back(*_: Any) -> None:
        stack.close()
        module.to(home)

    module.to("cpu")
    stack.enter_context(stay_put(module))
    hook = module.register_forward_pre_hook(come_back)
    try:
        yield
    finally:
        hook.remove()
        come_back()


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
    try:
        table.weight.data = table.weight.data.to("cpu")
        with lend_table(table, home):
            yield True
    finally:
        table.weight.data = table.weight.data.to(home)


def compact(model: Any) -> None:
    """Give the GPU back the places of weights that were parked, for others than torch's usual tensors: for CUDA graphs.

    transformers loads a model into one block of memory, and a block with holes stays torch's as a whole. Seconds for some GB, which
    pass through the machine's memory; where that has not twice as much free, nothing is done.
    """
    weights = [*model.parameters(), *model.buffers()]
    homes = {weight: weight.device for weight in weights if weight.is_cuda}
    size = sum(weight.numel() * weight.element_size() for weight in homes)
    if size > psutil.virtual_memory().available / 2:
        return
    try:
        for weight in homes:
            weight.data = weight.data.cpu()
        torch.cuda.empty_cache()
    finally:
        for weight, home in homes.items():
            weight.data = weight.data.to(home)
