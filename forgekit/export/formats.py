"""The formats of `export.formats`: where each is placed below the run's folder, what writes it, what verifies it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .adapter import export_adapter
from .gguf import export_gguf
from .gguf_verify import verify_gguf
from .gguf_vision import export_vision
from .gguf_vision_verify import verify_vision
from .merged import export_merged
from .ollama import export_ollama, verify_ollama
from .verdict import Verdict
from .verify_adapter import verify_adapter
from .verify_merged import verify_merged


class Format(NamedTuple):
    """One format.

    place: a folder below the run's, or a .gguf file there.
    write: (model, processor, config, path, scores) -> path; writes the folder or file, which does not exist yet.
    verify: (reference, path, config) -> Verdict; reads it back and compares with the model and rows of a compare.Reference.
    """

    place: str
    write: Callable[..., Path]
    verify: Callable[..., Verdict]


FORMATS = {
    "adapter": Format("models/lora", export_adapter, verify_adapter),
    "merged": Format("models/merged", export_merged, verify_merged),
    **{
        f"gguf:{kind.lower()}": Format(
            f"models/quantized/model-{kind}.gguf", partial(export_gguf, kind), partial(verify_gguf, kind)
        )
        for kind in ("F16", "BF16", "Q8_0", "Q4_K_M")
    },
    "gguf:mmproj": Format("models/quantized/mmproj-F16.gguf", export_vision, verify_vision),
    "ollama": Format("models/ollama", export_ollama, verify_ollama),
}


def find_format(path: Path) -> str | None:
    """Return the name of the format that a folder or file is of, or None."""
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / "config.json").is_file():
        return "merged"
    return next((name for name, format in FORMATS.items() if path.name == Path(format.place).name), None)
