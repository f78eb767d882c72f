"""Several processes that take the same optimiser steps: who they are, what they tell each other, and how a trainer joins them.

Gradients go through accelerate and torch's DistributedDataParallel, or where all weights learn through its FSDP2 (sharded.py), by NCCL
between GPUs and gloo between CPUs. What the processes
agree on beside them (losses, whether to stop or save) goes through gloo, which notices within moments that one is gone: each step
waits for it before weights change.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..errors import RunError

# nobody waits so long: a process that ends is noticed, and the supervisor sees to a step that hangs
PATIENCE = timedelta(days=7)
MEETING = timedelta(minutes=2)  # for all to find each other, once every model is loaded
# torch would end the notebook's kernel when a neighbour is gone; `Workers` sees to that instead
NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
CONTROL = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


@dataclass
class Group:
    """The processes that train together, seen from one of them; rank 0 is the notebook's."""

    rank: int
    size: int
    channel: Any  # torch's process group for what is said beside gradients
    shards: Any = None  # `Shards` where each process keeps a part of the weights that learn (sharded.py)

    def gather(self, numbers: list[float]) -> list[list[float]]:
        """Return every process's numbers, by rank; all give equally many."""
        import torch
        import torch.distributed as dist

        mine = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.channel)
        return [numbers.tolist() for numbers in found]

    def share(self, value: Any) -> Any:
        """Return rank 0's value."""
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.channel)
        return values[0]

    def agree(self, control: Any) -> None:
        """Do what rank 0 decided: it alone hears the panel, signals and the clock."""
        import torch
        import torch.distributed as dist

        flags = torch.tensor([getattr(control, name) for name in CONTROL], dtype=torch.uint8)
        dist.broadcast(flags, src=0, group=self.channel)
        for name, flag in zip(CONTROL, flags.tolist(), strict=True):
            setattr(control, name, bool(flag))

    def wait(self) -> None:
        """Return when every process has come here."""
        import torch.distributed as dist

        dist.barrier(group=self.channel)

    def seed_batch(self, seed: int, step: int, number: int) -> None:
        """Let dropout depend on (seed, step, batch) alone: the same masks for any number of processes from two on.

        Args:
            number: of this process's batches within the step.
        """
        import numpy
        import torch

        sequence = numpy.random.SeedSequence((seed, step, number * self.size + self.rank))
        torch.manual_seed(int(sequence.generate_state(1, numpy.uint64).item() >> 1))

    @contextlib.contextmanager
    def own_loader(self, trainer: Any) -> Iterator[None]:
        """Let accelerate leave a loader's rows as they are: `Share` has chosen those of this process."""
        from accelerate.data_loader import prepare_data_loader

        accelerator = trainer.accelerator

        def prepare(loader: Any) -> Any:
            loader = prepare_data_loader(
                loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
                non_blocking=accelerator.non_blocking,
            )  # fmt: skip
            loader._is_accelerate_prepared = True
            # a loader that knows of a remainder has accelerate cut the last gathered figures, as if processes were rows
            loader._drop_last = True
            accelerator._dataloaders.append(loader)
            return loader

        accelerator.prepare = prepare
        try:
            yield
        finally:
            del accelerator.prepare

    @contextlib.contextmanager
    def alone(self, trainer: Any) -> Iterator[None]:
        """Let a score be this process's own: each scores all rows, as one process does."""
        trainer.accelerator.gather = lambda values: values
        try:
            yield
        finally:
            del trainer.accelerator.gather


@contextlib.contextmanager
def join_group(
    trainer: Any, rank: int, size: int, meeting: Path, find_unused: bool, sharded: bool = False
) -> Iterator[Group]:
    """Let a trainer take part in a training of `size` processes while the block runs; then it is one process's again.

    Args:
        meeting: a file on this machine where the processes find each other; nothing listens on a port for that.
        find_unused: whether a batch may leave a parameter that learns without a gradient.
        sharded: each keeps a part of the weights that learn, and not all of them.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise RunError(
            "torch.distributed is in use in this process already. Set train.gpus: 1, or end that group first."
        )
    cuda = trainer.args.device.type == "cuda"
    # each process sees one GPU as its first; the local rank is that GPU's number
    local = {"LOCAL_RANK": "0" if cuda else str(rank), "LOCAL_WORLD_SIZE": str(size)}
    values = {"RANK": str(rank), "WORLD_SIZE": str(size), **local, **find_interface(), **(NCCL if cuda else {})}
    try:
        with environment(values):
            trainer.group = meet(rank, size, meeting, cuda)
            trainer.args.ddp_find_unused_parameters = find_unused
            leave_frozen(trainer.model)
            with share_weights(trainer, sharded):
                refresh(trainer)
                with shared_steps(trainer.args, size), count_together(trainer, trainer.group), whole_graphs(cuda):
                    if sharded:
                        leave_model(trainer.accelerator)
                    yield trainer.group
                    trainer.group.wait()
    except BaseException:
        abort_group()  # a group whose members are gone does not end by itself
        raise
    finally:
        trainer.group = None
        end_group()
        refresh(trainer)


def share_weights(trainer: Any, sharded: bool) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a trainer's weights are shared out, or one that does nothing."""
    if not sharded:
        return contextlib.nullcontext()
    from .sharded import share_out

    return share_out(trainer, trainer.group)


def leave_model(accelerator: Any) -> None:
    """Keep accelerate from wrapping a sharded model into DistributedDataParallel."""
    prepare = accelerator.prepare_model
    accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)


def meet(rank: int, size: int, meeting: Path, cuda: bool) -> Group:
    """Make torch's process groups, one for gradients and one for all else."""
    import torch
    import torch.distributed as dist

    store = dist.FileStore(str(meeting), size)
    store.set_timeout(MEETING)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=MEETING)
    channel = dist.new_group(backend="gloo", timeout=MEETING)
    for group, device in ((dist.group.WORLD, "cuda" if cuda else "cpu"), (channel, "cpu")):
        group._get_backend(torch.device(device))._set_default_timeout(PATIENCE)
    return Group(rank, size, channel)


@contextlib.contextmanager
def shared_steps(args: Any, size: int) -> Iterator[None]:
    """Let each process take its part of the batches of a step; accelerate sets the number of threads where nobody has."""
    import torch

    threads = torch.get_num_threads()
    args.gradient_accumulation_steps //= size
    try:
        yield
    finally:
        args.gradient_accumulation_steps *= size
        torch.set_num_threads(threads)


@contextlib.contextmanager
def count_together(trainer: Any, group: Group) -> Iterator[None]:
    """Let the tokens a second in the log be those of all processes."""
    from .progress import Progress

    counters = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Progress)]
    for counter in counters:
        counter.group = group
    try:
        yield
    finally:
        for counter in counters:
            counter.group = None


@contextlib.contextmanager
def whole_graphs(cuda: bool) -> Iterator[None]:
    """Keep the compiler from cutting graphs where gradients could be sent early: an adapter's are sent in no time."""
    if not cuda:
        yield
        return
    import torch._dynamo

    with torch._dynamo.config.patch(optimize_ddp=False):
        yield


def end_group() -> None:
    """Take torch's process groups down, if nobody has."""
    import torch.distributed as dist

    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the others are gone
            dist.destroy_process_group()


def abort_group() -> None:
    """Let go whatever waits for a process that is gone; called from any thread."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_backend() == "nccl":
        with contextlib.suppress(RuntimeError):
            dist.group.WORLD._get_backend(torch.device("cuda")).abort()


def refresh(trainer: Any) -> None:
    """Let transformers and accelerate look again whether there are several processes: they do so once, when a trainer is made."""
    import torch

    from .sft import use_one_gpu

    vars(trainer.args).pop("_setup_devices", None)
    if trainer.args.device.type == "cpu":  # accelerate numbers it, and a checkpoint cannot be read to cpu:0
        trainer.args._setup_devices = torch.device("cpu")
    use_one_gpu(trainer.args)
    trainer.accelerator.free_memory()
    trainer.model_wrapped = trainer.model
    trainer.model._is_accelerate_prepared = False
    trainer.create_accelerator_and_postprocess()


def leave_frozen(model: Any) -> None:
    """Keep frozen weights and buffers out of what DistributedDataParallel sends around: each process has read its own.

    They may stand on another device than what learns (`train.memory: low`), which it would refuse.
    """
    frozen = [name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = frozen + [name for name, _ in model.named_buffers()]


def find_interface() -> dict[str, str]:
    """Return the variables that keep gloo and NCCL on this machine's own loopback interface, where the user chose none."""
    loops = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    wanted = {variable: loops[0] for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loops}
    return {variable: name for variable, name in wanted.items() if variable not in os.environ}


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables, and put them back, with those that accelerate sets beside them."""
    names = {*values, "MASTER_ADDR", "MASTER_PORT"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
