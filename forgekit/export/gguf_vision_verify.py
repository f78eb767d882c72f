"""Does llama.cpp see what the trained model sees? The soft tokens of one picture, by both.

bytes      the file holds what was meant to be written
tokens     each soft token's distance to the trained model's, as a share of its length
base       the file is nearer to the trained model than the base is, where the tower or its projection learned
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.parts.image import load_picture
from ..evaluate.generate import inference
from .compare import Reference
from .gguf_verify import check_bytes, count_types, open_reference
from .gguf_vision import PIXELS
from .llama_vision import read_soft_tokens
from .verdict import Verdict, at_most

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

# Measured on random towers: benchmarks/README.md, "Pictures in llama.cpp". Its GELU is tanh's and its convolutions round to F16.
BOUND = 0.01
BASE_SHARE = 0.5


def verify_vision(trained: Reference, path: Path, config: Config) -> Verdict:
    """Compare an mmproj file with the trained model in memory, on the first held-out picture or on a drawn one.

    Returns the Verdict. Raises ExportError when llama.cpp cannot load the file.
    """
    verdict = check_bytes(path)
    if not verdict.verified:  # llama.cpp may end the process over a damaged file
        return verdict
    picture = choose_picture(trained)
    with open_reference(trained.model, trained.processor, path, config) as reference:
        width = reference.config.get_text_config().hidden_size
        expected = read_tower(reference, trained.processor, picture)
    found = read_soft_tokens(path, picture, width)
    verdict = verdict.add(rows=1, tokens=len(expected), notes={"types": count_types(path)})
    verdict = verdict.add(at_most("largest relative difference of a soft token", measure_difference(expected, found), BOUND))  # fmt: skip
    base = read_base(trained, picture)
    if base is None:
        return verdict
    own, before = base
    share = measure_difference(own, found) / measure_difference(own, before)
    return verdict.add(at_most("difference as a share of the base's", share, BASE_SHARE))


def choose_picture(trained: Reference) -> "Image":
    """Return the first held-out picture, or where there is none a drawn one, at the tower's size: RGB."""
    parts = (part for chat in trained.chats for turn in chat for part in turn["content"] if part["type"] == "image")
    first = next(parts, None)
    return load_picture(first["image"]).resize((PIXELS, PIXELS)) if first else draw_picture()


def draw_picture() -> "Image":
    """Return waves of three lengths, one a colour, with noise over them: edges and areas everywhere, always the same."""
    import numpy
    from PIL import Image

    down, right = numpy.mgrid[0:PIXELS, 0:PIXELS]
    waves = numpy.stack([numpy.sin(right / 20), numpy.cos(down / 13), numpy.sin((down + right) / 90)], -1)
    noise = numpy.random.default_rng(3).normal(0, 20, waves.shape)
    return Image.fromarray((127 * waves + 127 + noise).clip(0, 255).astype(numpy.uint8))


def read_tower(model: Any, processor: Any, picture: "Image") -> "numpy.ndarray":
    """Return the soft tokens of a picture in transformers, computed in float32: [soft tokens, width]."""
    import torch

    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with inference(model), in_float32(model), torch.backends.cudnn.flags(allow_tf32=False):
        found = model.get_image_features(pixel_values=pixels.to(model.device, torch.float32))
    tokens = found if isinstance(found, torch.Tensor) else found.pooler_output
    return tokens.reshape(-1, tokens.shape[-1]).cpu().numpy()


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Let tower and projection compute in float32 on the model's device; behind the block they are exactly what they were."""
    import torch

    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, module in model.named_modules():
        if name.endswith(("model.vision_tower", "model.embed_vision")):
            kept += [(one, one.data) for one in (*module.parameters(), *module.buffers()) if one.is_floating_point()]
    for one, data in kept:
        one.data = data.to(model.device, torch.float32)
    try:
        yield
    finally:
        for one, data in kept:
            one.data = data


def read_base(trained: Reference, picture: "Image") -> "tuple[numpy.ndarray, numpy.ndarray] | None":
    """Return the picture's soft tokens with and without the adapter, or None where it does not change them."""
    from peft import PeftModel

    model = trained.model
    if not isinstance(model, PeftModel) or not any(map(is_learned_tower, model.state_dict())):
        return None
    own = read_tower(model, trained.processor, picture)
    with model.disable_adapter():
        before = read_tower(model, trained.processor, picture)
    return (own, before) if measure_difference(own, before) else None


def is_learned_tower(name: str) -> bool:
    """Say whether a parameter was added to the picture tower or its projection."""
    return "vision" in name and ("lora_" in name or "modules_to_save" in name)


def measure_difference(expected: "numpy.ndarray", found: "numpy.ndarray") -> float:
    """Return the largest distance of two soft tokens as a share of the expected one's length; infinite where shapes differ."""
    import numpy

    if expected.shape != found.shape:
        return float("inf")
    distance = numpy.linalg.norm(expected.astype(float) - found, axis=-1)
    return float((distance / numpy.linalg.norm(expected.astype(float), axis=-1)).max())
