"""Device, engine and number format, decided for machines that this one is not."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forgekit import hardware
from forgekit.config import load_config
from forgekit.errors import ModelError
from forgekit.hardware import (
    GIB,
    Hardware,
    choose_device,
    choose_dtype,
    choose_engine,
    cpu_count,
    detect_hardware,
    free_disk,
)

CPU = Hardware("cpu", "CPU, 2 cores", 8 * GIB, True)
H200 = Hardware("cuda", "NVIDIA H200", 140 * GIB, True)
T4 = Hardware("cuda", "Tesla T4", 15 * GIB, False)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that makes this machine another one."""
    return lambda machine: monkeypatch.setattr(hardware, "detect_hardware", lambda: machine)


@pytest.mark.parametrize(
    ("machine", "settings", "engine"),
    [
        (H200, {}, "unsloth"),
        (T4, {}, "unsloth"),
        (CPU, {"model.load_in": "16bit"}, "huggingface"),
        (CPU, {"model.load_in": "full", "export.formats": ["merged"]}, "huggingface"),
        (CPU, {"model.load_in": "16bit", "model.engine": "unsloth"}, "unsloth"),
        (H200, {"model.engine": "huggingface"}, "huggingface"),
        (H200, {"model.device": "cpu", "model.load_in": "16bit"}, "huggingface"),
    ],
)
def test_auto_is_unsloth_on_a_gpu_and_transformers_without(
    on: Any, machine: Hardware, settings: dict, engine: str
) -> None:
    on(machine)
    assert choose_engine(load_config(None, settings)) == engine


@pytest.mark.parametrize(
    ("machine", "settings", "dtype"),
    [
        (CPU, {}, torch.float32),
        (CPU, {"model.dtype": "bfloat16"}, torch.bfloat16),
        (H200, {}, torch.bfloat16),
        (H200, {"model.engine": "huggingface"}, torch.bfloat16),
        (H200, {"model.device": "cpu"}, torch.float32),
        (H200, {"model.dtype": "float32"}, torch.float32),
        (T4, {}, torch.float16),  # through Unsloth's patched layers alone
        (T4, {"model.dtype": "float32", "model.engine": "huggingface"}, torch.float32),
    ],
)
def test_the_number_format_follows_the_hardware(on: Any, machine: Hardware, settings: dict, dtype: torch.dtype) -> None:
    on(machine)
    assert choose_dtype(load_config(None, {"model.load_in": "16bit", **settings})) == dtype


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        (
            CPU,
            {},
            "model.load_in: 4bit needs an NVIDIA GPU (bitsandbytes), and this machine has none. Set model.load_in: 16bit",
        ),
        (CPU, {"model.load_in": "8bit", "model.engine": "unsloth"}, "model.load_in: 8bit needs an NVIDIA GPU"),
        (
            H200,
            {"model.device": "cpu"},
            "model.load_in: 4bit needs an NVIDIA GPU (bitsandbytes), and model.device: cpu was asked for.",
        ),
        (
            CPU,
            {"model.device": "cuda"},
            "model.device: cuda was asked for, and torch sees no CUDA device here. Set model.device: auto",
        ),
        (
            CPU,
            {"model.device": "cuda", "model.load_in": "16bit"},
            "nvidia-smi; `forgekit doctor` shows what torch was built for.",
        ),
    ],
)
def test_what_needs_a_gpu_says_so_where_there_is_none(on: Any, machine: Hardware, settings: dict, message: str) -> None:
    on(machine)
    with pytest.raises(ModelError) as caught:
        choose_engine(load_config(None, settings))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        (
            T4,
            {"model.engine": "huggingface"},
            "float16 overflows in Gemma 3n (NaN or infinity) outside Unsloth's patched layers.",
        ),
        (CPU, {"model.dtype": "float16"}, "Set model.engine: unsloth, or model.dtype: float32."),
        (H200, {"model.dtype": "float16", "model.engine": "huggingface"}, "float16 overflows in Gemma 3n"),
        (
            T4,
            {"model.dtype": "bfloat16"},
            "Tesla T4 has no bfloat16 (it needs an Ampere GPU or newer). Set model.dtype: auto.",
        ),
    ],
)
def test_a_format_that_would_give_wrong_numbers_is_refused(
    on: Any, machine: Hardware, settings: dict, message: str
) -> None:
    on(machine)
    with pytest.raises(ModelError) as caught:
        choose_dtype(load_config(None, {"model.load_in": "16bit", **settings}))
    assert message in str(caught.value)


@pytest.mark.parametrize(("capability", "bfloat16"), [((7, 5), False), ((7, 0), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_counts_only_where_the_gpu_has_it(
    capability: tuple[int, int], bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.is_bf16_supported also says yes to cards that emulate it, so the compute capability decides."""
    card = SimpleNamespace(name="card", total_memory=16 * GIB, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert detect_hardware() == Hardware("cuda", "card", 16 * GIB, bfloat16)


def test_without_a_gpu_the_machine_itself_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = detect_hardware()
    assert (found.device, found.name) == ("cpu", f"CPU, {cpu_count()} cores")
    assert found.memory > GIB / 4
    assert choose_device(load_config()) == "cpu"


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=123)

    monkeypatch.setattr(shutil, "disk_usage", measure)
    assert free_disk(tmp_path / "runs" / "new" / "models") == 123
    assert asked == [tmp_path]


def test_a_narrow_model_computes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    hardware.count_threads.cache_clear()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        torch.set_num_threads(2)
        for width, threads in ((96, 1), (2048, 2), (255, 1), (256, 2)):
            hardware.settle_threads(width)
            assert torch.get_num_threads() == threads, width
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        hardware.settle_threads(96)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
        hardware.count_threads.cache_clear()


def test_the_practice_model_is_loaded_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from forgekit.model import load

    widths: list[int] = []
    monkeypatch.setattr(load, "settle_threads", widths.append)
    load.load_model(load_config(None, {"model.id": "tiny", "model.load_in": "16bit"}))
    assert widths == [96]
