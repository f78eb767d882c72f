"""The per-layer embedding table in the machine's memory, read by the GPU: 4.0 GB of E2B and 4.7 GB of E4B that it need not hold."""

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch

TABLE = "embed_tokens_per_layer"


def find_table(model: Any) -> str | None:
    """Return the name of the module that is the table, or None where the architecture has none."""
    return next((name for name, _ in model.named_modules() if name.rpartition(".")[2] == TABLE), None)


def place_beside_table(kind: Any, settings: Any, device: Any) -> dict[str, Any]:
    """Return the device map that puts all of a model on `device` but its table, which stays on the CPU.

    Each part has a line of its own: of a map that names the whole model, accelerate sends all of it to the device first, the table
    included, and settles there what it takes for the CPU's (`dispatch_model`, accelerate 1.15).

    Args:
        kind: a class of transformers' models, or one of its Auto classes. settings: its config.
    """
    with torch.device("meta"):
        owner = getattr(kind, "from_config", kind)(copy.deepcopy(settings))
    places: dict[str, Any] = {}
    name, before = str(find_table(owner)), ""
    for part in name.split("."):
        beside = [
            child for child, _ in (*owner.named_children(), *owner.named_parameters(recurse=False)) if child != part
        ]
        places |= {before + child: device for child in beside}
        before, owner = f"{before}{part}.", owner.get_submodule(part)
    return places | {name: "cpu"}


def settle_table(model: Any, device: torch.device) -> None:
    """Leave the table of a model that accelerate spread over CPU and `device` where it is, for good, and drop accelerate's hooks.

    They would send the whole table to the GPU for each lookup. Buffers all go to `device`: accelerate leaves those of modules that hold
    the table, which no line of the map names, on the CPU.
    """
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():
        module._buffers.update({name: None if b is None else b.to(device) for name, b in module._buffers.items()})
    model.hf_device_map = {"": device}
    table = model.get_submodule(str(find_table(model)))
    stack = contextlib.ExitStack()
    stack.enter_context(lend_table(table, device))
    table._forgekit_lent = stack  # held as long as the table: a context that nobody holds is left at once


@contextlib.contextmanager
def stay_put(module: Any) -> Iterator[None]:
    """Let a module's weights stay where they are when somebody sends the whole model to a device.

    accelerate does so as training begins, and Trainer when it is made.
    """
    module._apply = lambda function, recurse=True: module
    try:
        yield
    finally:
        module.__dict__.pop("_apply", None)


@contextlib.contextmanager
def lend_table(table: Any, device: torch.device) -> Iterator[None]:
    """Let a table on the CPU answer on `device`.

    The GPU reads a batch's rows in the machine's memory itself where the driver lets it, otherwise they are gathered and sent.
    """
    with contextlib.ExitStack() as stack:
        seen = stack.enter_context(show_to_gpu(table.weight.data, device)) if device.type == "cuda" else None
        table.forward = types.MethodType(make_gather(device) if seen is None else make_lookup(seen), table)
        stack.callback(lambda: delattr(table, "forward"))
        stack.enter_context(stay_put(table))
        yield


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
