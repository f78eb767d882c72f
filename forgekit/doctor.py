"""Checks of this machine: versions, GPU, number format, memory, disk, engines; each finding with a remedy."""

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .environment import cache_folder, is_writable, set_environment
from .hardware import GIB, detect_hardware, free_disk, memory_size
from .run_folder import find_run_root, find_version

OK, NOTE, BAD = "ok", "note", "bad"
NEEDED = ("torch", "transformers", "trl", "peft", "datasets", "timm", "papermill", "jupyterlab", "ipywidgets")
SPACE = 15 * GIB  # E2B in 16 bit is 11 GB on disk


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:>4}  {self.what}" + (f"\n      -> {self.remedy}" if self.remedy else "")


def examine() -> Iterator[Finding]:
    """Yield everything worth knowing before a run, in the order of dependence, each finding as soon as it is known."""
    set_environment()
    for check in (check_python, check_packages, check_hardware, check_engines, check_folders):
        yield from check()


def examine_recipe(recipe: str) -> Iterator[Finding]:
    """Load a recipe's rows and model and yield what the guard finds out about training them on this machine.

    The rows need a format that forgekit knows, because a notebook's `to_example` is not at hand here.
    """
    from .adapter.lora import add_adapter
    from .config import load_config
    from .data.load import load_data
    from .model.load import load_model, load_processor
    from .train.guard import examine_training

    config = load_config(recipe)
    data = load_data(config, load_processor(config))
    model, processor = load_model(config)
    for check in examine_training(add_adapter(model, config), processor, data["train"], config).checks:
        yield Finding(OK if check.passed else BAD, f"{check.name}: {check.found}", "" if check.passed else check.remedy)


def check_python() -> list[Finding]:
    """Python's version and whether it is a virtual environment."""
    version = platform.python_version()
    right = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return [
        Finding(
            OK if right else BAD,
            f"Python {version} on {platform.system()} {platform.machine()}",
            "" if right else "forgekit is tested on Python 3.11 to 3.13.",
        )
    ]


def check_packages() -> list[Finding]:
    """Versions of what is needed, and combinations known to train wrongly or not to import."""
    found = {name: find_version(name) for name in NEEDED}
    missing = [name for name, version in found.items() if version is None]
    findings = (
        [Finding(BAD, f"missing: {', '.join(missing)}", "pip install forgekit installs what it needs.")]
        if missing
        else []
    )
    findings.append(Finding(OK, ", ".join(f"{name} {version}" for name, version in found.items() if version)))
    if found["transformers"] and version_numbers(found["transformers"]) < (5, 6):
        findings.append(
            Finding(
                BAD,
                f"transformers {found['transformers']} trains Gemma 3n's shared layers on the wrong keys and values",
                "pip install 'transformers>=5.17'",
            )
        )
    findings += check_torchvision()
    kernel = find_version("ipykernel")
    if kernel and version_numbers(kernel)[:2] == (7, 4):
        findings.append(
            Finding(NOTE, f"ipykernel {kernel} answers widgets only between cells", "pip install 'ipykernel<7.4'")
        )
    return findings


def version_numbers(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers: "5.17.0.dev1" -> (5, 17, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def check_torchvision() -> list[Finding]:
    """Whether torchvision was built for this torch; a CPU-only torch beside a CUDA torchvision breaks timm's import."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    if done.returncode == 0:
        return []
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return [
        Finding(BAD, f"torchvision cannot be imported: {last}", "Install torch and torchvision from the same index.")
    ]


def check_hardware() -> list[Finding]:
    """GPU, number format and memory."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA is missing
        return [Finding(BAD, f"torch cannot be imported: {error}", "Reinstall forgekit in a fresh environment.")]

    hardware = detect_hardware()
    memory = Finding(
        OK if memory_size() > 8 * GIB else NOTE,
        f"memory: {memory_size() / GIB:.1f} GiB",
        "" if memory_size() > 8 * GIB else "Loading E2B needs about 12 GiB.",
    )
    if hardware.device == "cpu":
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__} was built for CUDA {built}, and finds no driver or no GPU: see nvidia-smi."
            if built
            else f"torch {torch.__version__} was built without CUDA."
        )
        return [
            Finding(
                NOTE, "no GPU: the quick recipes run on the CPU in minutes; real Gemma 3n needs an NVIDIA GPU", why
            ),
            memory,
        ]
    free, total = torch.cuda.mem_get_info()
    number = "bfloat16" if hardware.bfloat16 else "float16 through Unsloth's patches (no bfloat16 on this GPU)"
    return [Finding(OK, f"GPU: {hardware.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free; {number}"), memory]


def check_engines() -> list[Finding]:
    """Whether each engine can be imported, in a process of its own, because Unsloth changes the libraries it meets."""
    findings = []
    for name, code in (("huggingface", "import transformers, peft, trl"), ("unsloth", "import unsloth")):
        if name == "unsloth" and importlib.util.find_spec("unsloth") is None:
            findings.append(
                Finding(
                    NOTE,
                    "engine unsloth: not installed",
                    "pip install unsloth; model.engine: huggingface works without it.",
                )
            )
            continue
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        good = done.returncode == 0
        findings.append(
            Finding(
                OK if good else BAD,
                f"engine {name}: {'can be imported' if good else last}",
                "" if good else "Reinstall forgekit in a fresh environment.",
            )
        )
    return findings


def check_folders() -> list[Finding]:
    """Where runs and caches go, and whether there is room."""
    root = find_run_root(None)
    free, place = free_disk(root), root
    while not place.exists():  # looking must not make the folder
        place = place.parent
    writable = is_writable(place)
    findings = [
        Finding(
            OK if writable else BAD,
            f"runs: {root}",
            "" if writable else "Set FORGEKIT_RUNS to a folder that can be written.",
        ),
        Finding(OK, f"cache: {cache_folder()}"),
        Finding(
            OK if free > SPACE else NOTE,
            f"disk: {free / GIB:.1f} GiB free",
            "" if free > SPACE else "A merged E2B takes 11 GB; the adapter alone a few MB.",
        ),
    ]
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        findings.append(Finding(NOTE, "HF_HUB_OFFLINE=1: only models and data on this machine can be used"))
    return findings
