"""What this machine can do: device, number format, memory."""

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError

if TYPE_CHECKING:
    import torch

    from .config import Config

GIB = 2**30
# The products of layers this wide are done before a second thread, which sleeps while it has nothing to do, is awake: a step of the
# practice model (96 wide) takes 0.5 s with one thread and 1.2 s with two (benchmarks/README.md).
ONE_THREAD_WIDTH = 256


@dataclass(frozen=True)
class Hardware:
    """The device that a run uses. Memory in bytes: of the GPU, or of this process's machine without one."""

    device: str  # "cuda" or "cpu"
    name: str
    memory: int
    bfloat16: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.memory / GIB:.1f} GiB, {'bfloat16' if self.bfloat16 else 'no bfloat16'})"


def detect_hardware() -> Hardware:
    """Describe the first CUDA device, or the CPU when there is none."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        # natively from Ampere on (compute capability 8.0); older cards only emulate it
        return Hardware("cuda", properties.name, properties.total_memory, properties.major >= 8)
    return Hardware("cpu", f"CPU, {cpu_count()} cores", memory_size(), True)


def cpu_count() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle_threads(width: int) -> None:
    """Let a model whose hidden states are this wide compute with one thread of the CPU, or with as many as torch had chosen.

    Always the same for one model, so a resumed training adds up in the same order. Nothing is done where OMP_NUM_THREADS is set.
    """
    import torch

    chosen = count_threads()
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1 if width < ONE_THREAD_WIDTH else chosen)


@functools.cache
def count_threads() -> int:
    """Return how many threads torch had chosen before this was called for the first time."""
    import torch

    return torch.get_num_threads()


def memory_size() -> int:
    """Return the machine's memory in bytes."""
    import psutil

    return psutil.virtual_memory().total


def choose_engine(config: "Config") -> str:
    """Resolve `model.engine: auto`: Unsloth on one GPU, transformers + PEFT without one or on several.

    Raises ModelError when a GPU-only setting meets a machine without a GPU.
    """
    hardware = detect_hardware()
    if config.model.device == "cuda" and hardware.device == "cpu":
        raise ModelError(
            "model.device: cuda was asked for, and torch sees no CUDA device here. Set model.device: auto, or check the "
            "driver with nvidia-smi; `forgekit doctor` shows what torch was built for."
        )
    if config.model.load_in in ("4bit", "8bit") and choose_device(config) == "cpu":
        why = "this machine has none" if hardware.device == "cpu" else "model.device: cpu was asked for"
        raise ModelError(
            f"model.load_in: {config.model.load_in} needs an NVIDIA GPU (bitsandbytes), and {why}. "
            "Set model.load_in: 16bit (float32 on a CPU), or run on a GPU; `forgekit doctor` shows what is seen."
        )
    if config.model.engine != "auto":
        return config.model.engine
    if config.train.gpus > 1:  # Unsloth trains in one process
        return "huggingface"
    return "unsloth" if hardware.device == "cuda" and config.model.device != "cpu" else "huggingface"


def choose_device(config: "Config") -> str:
    """Resolve `model.device: auto` to "cuda" or "cpu"."""
    return detect_hardware().device if config.model.device == "auto" else config.model.device


def choose_dtype(config: "Config") -> "torch.dtype":
    """Resolve `model.dtype: auto` to a torch dtype: bfloat16 where the GPU has it, float32 on a CPU.

    Gemma 3n's activations overflow float16, so float16 is given only to Unsloth, which patches the overflowing parts
    (https://unsloth.ai/docs/models/gemma-3n); anything else raises ModelError.
    """
    import torch

    wanted, engine = config.model.dtype, choose_engine(config)
    if wanted == "auto":
        if choose_device(config) == "cpu":
            return torch.float32
        wanted = "bfloat16" if detect_hardware().bfloat16 else "float16"
    if wanted == "float16" and engine != "unsloth":
        unsloth = "train.gpus: 1" if config.train.gpus > 1 else "model.engine: unsloth"
        raise ModelError(
            "float16 overflows in Gemma 3n (NaN or infinity) outside Unsloth's patched layers. "
            f"Set {unsloth}, or model.dtype: float32."
        )
    if wanted == "bfloat16" and choose_device(config) == "cuda" and not detect_hardware().bfloat16:
        raise ModelError(
            f"{detect_hardware().name} has no bfloat16 (it needs an Ampere GPU or newer). Set model.dtype: auto."
        )
    return getattr(torch, wanted)


def shares_weights(config: "Config") -> bool:
    """Say whether several processes keep a part each of the weights that learn (train/sharded.py)."""
    return config.train.gpus > 1 and config.model.load_in == "full"


def choose_optimizer(config: "Config", device: str) -> str:
    """Resolve `train.optim: auto`: 8-bit AdamW on a GPU, where bitsandbytes has it and no weight is a part of one, else torch's."""
    if config.train.optim != "auto":
        return config.train.optim
    if device == "cpu":
        return "adamw_torch"
    return "adamw_torch_fused" if shares_weights(config) else "adamw_8bit"


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder` or its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
