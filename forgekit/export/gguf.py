"""The text model as one GGUF file for llama.cpp, Ollama and programs built on them, written offline from the merged model.

The file carries its own size and checksum as metadata, so that a copy can be checked anywhere.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..files import write_text
from ..model.load import find_model
from .card import TERMS
from .gguf_metadata import add_metadata
from .gguf_seal import ALIGNMENT, Seal, add_blank_seal
from .gguf_tensors import Tensor, check_architecture, plan_tensors
from .gguf_types import choose_type, quantize, stored_bytes
from .merged import check_space, export_merged

if TYPE_CHECKING:
    from gguf import GGUFWriter

CARD = """\
---
license: {license}
library_name: gguf
tags: [forgekit, gguf]
---
# {name}, as GGUF

The text model with its tokenizer and chat template, each file in another number format; `model-*.verify.json` says how far
each is from the trained model. They run in a llama.cpp that knows the tokenizer of Gemma 4, whose kind Gemma 3n's is.

```python
from forgekit import ask_gguf

ask_gguf("{file}", "...")
```

Without forgekit: `llama-server -m {file}`.

## Terms

{terms}
"""
CHUNK = 1 << 22  # numbers converted at once: 16 MiB of float32


def export_gguf(
    kind: str, model: Any, processor: Any, config: Config, path: Path, scores: dict[str, Any] | None = None
) -> Path:
    """Write the text model with what it learned as a GGUF file of one kind ("F16", "BF16", "Q8_0", "Q4_K_M").

    Raises ExportError for a model that llama.cpp cannot run, and for too little disk.
    """
    about = describe_model(config)
    with open_merged(model, processor, config, path) as merged:
        write_gguf(merged, path, kind, about)
    write_text(path.parent / "README.md", CARD.format(file=path.name, terms=TERMS, **about))
    return path


@contextlib.contextmanager
def open_merged(model: Any, processor: Any, config: Config, path: Path) -> Iterator[Path]:
    """Yield the run's merged folder, or where the recipe names none one that exists only inside the context."""
    found = [folder / "merged" for folder in path.parents[:3] if (folder / "merged" / "config.json").is_file()]
    if found:
        yield found[0]
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".merged-") as folder:
        yield export_merged(model, processor, config, Path(folder) / "merged")


def describe_model(config: Config) -> dict[str, Any]:
    """Return name, base and licence as they stand in the file: {"name", "base": Hub id or None, "license"}."""
    found = Path(find_model(config))
    base = None if found.is_dir() else config.model.id
    return {"name": f"{Path(config.model.id).name}-forgekit", "base": base, "license": read_license(found, config)}


def read_license(folder: Path, config: Config) -> str:
    """Return the licence that the base's card names; without a card Gemma's for a Gemma, else "other"."""
    card = folder / "README.md"
    for line in card.read_text(encoding="utf-8").splitlines() if card.is_file() else ():
        if line.startswith("license:"):
            return line.removeprefix("license:").strip()
    return "gemma" if "gemma" in config.model.id.lower() else "other"


def write_gguf(source: Path, path: Path, kind: str, about: dict[str, Any]) -> Path:
    """Write a merged Gemma 3n folder as GGUF, whole or not at all.

    Args:
        source: a folder with config.json, safetensors, tokenizer.json and chat_template.jinja.
        kind: one of gguf_types.KINDS.
        about: name, base (a Hub id or None), license.

    Raises ExportError for a model that llama.cpp cannot run, and for too little disk.
    """
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    check_architecture(settings)
    layers = settings.get("text_config", settings)["num_hidden_layers"]
    plan = [(tensor, choose_type(tensor.name, tensor.shape, kind, layers)) for tensor in plan_tensors(source, settings)]
    check_room(plan, path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with start_file(temporary, "gemma3n", plan) as writer:
            add_metadata(writer, source, settings, kind, about)
        append_tensors(temporary, plan)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_room(plan: list[tuple[Tensor, Any]], path: Path) -> None:
    """Make the file's folder. Raises ExportError when the disk is too small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(sum(stored_bytes(tensor.shape, type) for tensor, type in plan), path.parent)


@contextlib.contextmanager
def start_file(path: Path, architecture: str, plan: list[tuple[Tensor, Any]]) -> Iterator["GGUFWriter"]:
    """Yield a gguf.GGUFWriter for metadata; behind the block the file holds them and the list of tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    add_blank_seal(writer)
    yield writer
    add_tensor_list(writer, plan)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def add_tensor_list(writer: "GGUFWriter", plan: list[tuple[Tensor, Any]]) -> None:
    """Tell the writer name, shape and type of each tensor; GGUF lists them before the first one's numbers."""
    import numpy
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    plain = {Type.F32: numpy.dtype(numpy.float32), Type.F16: numpy.dtype(numpy.float16)}
    for tensor, type in plan:
        size = stored_bytes(tensor.shape, type)
        if type in plain:
            writer.add_tensor_info(tensor.name, tensor.shape, plain[type], size)
        else:
            shape = quants.quant_shape_to_byte_shape(tensor.shape, type)
            writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), size, raw_dtype=type)


def append_tensors(path: Path, plan: list[tuple[Tensor, Any]]) -> None:
    """Write the numbers behind the header, each tensor at a multiple of 32 bytes, and then size and checksum into it.

    The checksum is taken of the bytes on their way to the disk, so it also tells a write that went wrong.
    """
    header = path.read_bytes()
    header += bytes(-len(header) % ALIGNMENT)
    sizes = [stored_bytes(tensor.shape, type) for tensor, type in plan]
    seal = Seal(header, len(header) + sum(size + -size % ALIGNMENT for size in sizes))
    with path.open("r+b") as file:
        file.write(seal.header)
        for (tensor, type), size in zip(plan, sizes, strict=True):
            step = max(1, CHUNK * tensor.shape[0] // max(1, size))
            for start in range(0, tensor.shape[0], step):
                rows = tensor.rows(start, min(start + step, tensor.shape[0]))
                file.write(seal.add(quantize(rows, type).tobytes()))
            file.write(seal.add(bytes(-size % ALIGNMENT)))
        seal.close(file)
        file.flush()
        os.fsync(file.fileno())
