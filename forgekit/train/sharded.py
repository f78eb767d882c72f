"""FSDP2 for `model.load_in: full`: each of several processes keeps a part of every weight that learns, of its gradient and its moments.

    the notebook's model    empty weights while it trains, and whole ones again behind it
    its twin                the same modules, sharded by torch's fully_shard: what is trained

A decoder layer's weights are gathered while it is at work, the per-layer table's while rows of it are read, all others' (the tied
embeddings, norms, projections) during a whole forward and backward. Frozen weights, the towers', stay whole in each process.
accelerate's own way to FSDP2 needs a GPU, leaves no plain model behind and writes checkpoints of another form.
"""

import contextlib
import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from .decoder import GATHER, clamp_coefficients
from .fast_path import find_text


class Shards:
    """The parts of a model's weights that one process keeps.

    model: the whole one. weights: its own, those that learn empty from `shard` (`parted`) to `put_back`. twin: the one that is
    trained.
    """

    def __init__(self, model: Any):
        """Make the twin, which has the model's own weights until `shard`."""
        self.model, self.twin, self.parted = model, copy_modules(model), False
        self.weights, self.modules = list(model.parameters()), vars(model)["_modules"]
        # TRL's forward, which the twin has too, calls the one that this very model had before
        vars(model)["_modules"] = vars(self.twin)["_modules"]

    def shard(self) -> None:
        """Let the twin keep this process's part of each weight, and the model none; call it once the weights are those to begin with."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        text = find_text(self.twin)
        learned, frozen = ({p for p in self.twin.parameters() if p.requires_grad is learns} for learns in (True, False))
        mesh = DeviceMesh.from_group(dist.group.WORLD, next(iter(learned)).device.type)
        for part in (*text.layers, text.embed_tokens_per_layer):
            if learned & set(part.parameters()):
                fully_shard(part, mesh=mesh, ignored_params=frozen)
        fully_shard(self.twin, mesh=mesh, ignored_params=frozen)
        for layer in text.layers:  # the fast path calls what is in a layer, and not the layer
            setattr(layer, GATHER, types.MethodType(run_in, layer))
            register_fsdp_forward_method(layer, GATHER)
        # the library clamps what was gathered, and a clamp that is to last concerns the parts
        self.twin.register_forward_pre_hook(lambda *_: clamp_coefficients(text))
        empty(self.weights)
        self.parted = True

    def gather(self, kept: bool) -> dict[str, torch.Tensor]:
        """Return the whole weights and buffers by name, on the CPU and tied ones as one, if `kept`; every process takes part."""
        reshard(self.twin)
        found: dict[int, torch.Tensor] = {}
        names: dict[str, int] = {}
        for name, value in self.twin.state_dict(keep_vars=True).items():
            names[name] = id(value)
            if id(value) not in found:
                found[id(value)] = gather(value, kept)
        return {name: found[key] for name, key in names.items()} if kept else {}

    def put_back(self, kept: bool) -> None:
        """Give the model its weights, whole and trained, if `kept`; every process takes part."""
        reshard(self.twin)
        for mine, its in zip(self.weights, self.twin.parameters(), strict=True):
            if mine.requires_grad:
                whole = its.detach().full_tensor()
                mine.data = whole if kept else mine.data

    def close(self) -> None:
        """Part the model from its twin."""
        vars(self.model)["_modules"] = self.modules


def empty(weights: list[Any]) -> None:
    """Let go the numbers of weights that learn: whatever uses them after that fails, and nothing is computed with wrong ones."""
    for parameter in weights:
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)


def run_in(layer: Any, step: Any, *arguments: Any) -> Any:
    """Run a step of the decoder on a layer, as a method of it.

    What it hands on as it came is copied: torch has put a view in its place, and warns of one that is returned.
    """
    results = step(layer, *arguments)
    return tuple(result.clone() if any(result is given for given in arguments) else result for result in results)


def copy_modules(model: Any) -> Any:
    """Return a copy of the modules, with the very same weights and buffers in them."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def reshard(twin: Any) -> None:
    """Let go what was gathered for a forward without a backward, such as a score's."""
    from torch.distributed.fsdp import FSDPModule

    for module in twin.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(value: Any, kept: bool) -> Any:
    """Return a tensor whole and on the CPU, if `kept`; what is no part of one is returned as it is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value.detach() if isinstance(value, torch.Tensor) else value
    whole = value.detach().full_tensor()
    return whole.cpu() if kept else None


def cut(value: torch.Tensor, like: Any) -> Any:
    """Return this process's part of a whole tensor, on the device and in the manner of another one's."""
    from torch.distributed.tensor import DTensor

    parts = value.chunk(like.device_mesh.size(), 0)
    rank = like.device_mesh.get_local_rank()
    part = parts[rank] if rank < len(parts) else value[:0]
    return DTensor.from_local(
        part.to(like.to_local().device, copy=True), like.device_mesh, like.placements, run_check=False, shape=value.shape, stride=value.stride()
    )  # fmt: skip


# ---- the optimiser --------------------------------------------------------------------------------------------------


def gather_moments(optimizer: Any, kept: bool) -> dict[str, Any]:
    """Return the optimiser's state as one process has it, on the CPU, if `kept`; every process takes part."""
    state = optimizer.state_dict()
    moments = {
        number: {name: gather(value, kept) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments} if kept else {}


def load_moments(optimizer: Any, file: Path) -> None:
    """Read this process's part of an optimiser's state. Raises RunError when another optimiser wrote it."""
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim():
                if value.shape != weights[number].shape:
                    raise RunError(
                        f"{file.parent.name}: its optimiser's state ({name}, {tuple(value.shape)}) is not of the kind that is shared over "
                        "processes. Resume with train.gpus: 1, or with the train.optim that it was written with."
                    )
                values[name] = cut(value, weights[number])
    optimizer.load_state_dict(state)


# ---- a training ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def share_out(trainer: Any, group: Any) -> Iterator[None]:
    """Let a trainer train the twin of its model; rank 0's model has the trained weights behind it.

    When the block fails, the other processes' parts are gone, and the model keeps no weight that learned. `checkpoints.lost` says so
    until the weights of a checkpoint are read into it, which happens in here, too.
    """
    model, lost = trainer.model, trainer.checkpoints.lost
    sizes = lost or [parameter.shape for parameter in model.parameters()]
    for parameter, size in zip(model.parameters(), sizes, strict=True):
        if parameter.shape != size:
            parameter.data = parameter.data.new_empty(size)
    group.shards = Shards(model)
    trainer.model = group.shards.twin
    try:
        yield
        drop_optimizer(trainer)  # moments make room for whole weights
        group.shards.put_back(group.rank == 0)
    finally:
        group.shards.close()
        if lost and not group.shards.parted:
            empty(group.shards.weights)
        trainer.checkpoints.lost = sizes if [parameter.shape for parameter in model.parameters()] != sizes else None
        trainer.model = trainer.callback_handler.model = model
        group.shards = None
        drop_optimizer(trainer)
        if trainer.checkpoints.lost and not group.rank:
            print(
                "The weights that learned were shared over processes that are gone: the model here has none until it is loaded again, or "
                "trains on from a checkpoint.",
                flush=True,
            )
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()


def drop_optimizer(trainer: Any) -> None:
    """Forget the optimiser of the parts, wherever it is kept; the next training makes one of its own."""
    for keeper in (trainer, trainer.callback_handler):
        keeper.optimizer = keeper.lr_scheduler = None
    trainer.accelerator.free_memory()
