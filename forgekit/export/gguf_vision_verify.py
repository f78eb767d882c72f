"""Does llama.cpp see what the trained model sees? The soft tokens of one picture, by both.

bytes      the file holds what was meant to be written
merged     each soft token's distance to what transformers makes of the merged weights, as a share of its length
trained    the same from the model in memory, which the merge to 16 bit rounds
base       the file is nearer to the trained model than the base is, where the tower or its projection learned
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.parts.image import load_picture
from ..evaluate.generate import inference
from .compare import Reference
from .gguf import open_merged
from .gguf_tensors import Weights
from .gguf_verify import check_bytes, count_types, open_reference
from .gguf_vision import PIXELS
from .llama_vision import read_soft_tokens
from .verdict import Verdict, at_most

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

# About four times the largest seen: benchmarks/README.md, "Pictures in llama.cpp".
MEAN, LARGEST = 0.01, 0.06
ROUNDED = 0.2  # with the merge's rounding to bfloat16
BASE_SHARE = 0.5
TOWERS = re.compile(r"\b(vision_tower|embed_vision)\.")


def verify_vision(trained: Reference, path: Path, config: Config) -> Verdict:
    """Compare an mmproj file with the trained model in memory, on the first held-out picture or on a drawn one.

    Returns the Verdict. Raises ExportError when llama.cpp cannot load the file.
    """
    verdict = check_bytes(path)
    if not verdict.verified:  # llama.cpp may end the process over a damaged file
        return verdict
    picture = choose_picture(trained)
    with open_reference(trained.model, trained.processor, path, config) as reference:
        with open_merged(trained.model, trained.processor, config, path) as folder:
            merged = read_tower(reference, trained.processor, picture, Weights(folder))
        own = read_tower(reference, trained.processor, picture)
    found = read_soft_tokens(path, picture, own.shape[1])
    mean, largest = measure_difference(merged, found)
    rounded = measure_difference(own, found)[0]
    verdict = verdict.add(
        at_most("mean relative difference of the soft tokens", mean, MEAN),
        at_most("largest relative difference of a soft token", largest, LARGEST),
        at_most("mean relative difference to the model in memory", rounded, ROUNDED),
        rows=1,
        tokens=len(own),
        notes={"types": count_types(path)},
    )
    apart = measure_base(trained, picture)
    return (
        verdict.add(at_most("difference as a share of the base's", rounded / apart, BASE_SHARE)) if apart else verdict
    )


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


def read_tower(model: Any, processor: Any, picture: "Image", weights: Weights | None = None) -> "numpy.ndarray":
    """Return the soft tokens of a picture in transformers, computed in float32: [soft tokens, width].

    Args:
        weights: of a merged folder, to take the place of the model's own and of its adapter.
    """
    import torch
    from peft import PeftModel

    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        if weights and isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        stack.enter_context(in_float32(model, weights))
        found = model.get_image_features(pixel_values=pixels.to(model.device, torch.float32))
    tokens = found if isinstance(found, torch.Tensor) else found.pooler_output
    return tokens.reshape(-1, tokens.shape[-1]).cpu().numpy()


@contextlib.contextmanager
def in_float32(model: Any, weights: Weights | None) -> Iterator[None]:
    """Let tower and projection compute in float32 on the model's device; behind the block they are exactly what they were."""
    import torch

    parts = [(name, one) for name, one in (*model.named_parameters(), *model.named_buffers()) if TOWERS.search(name)]
    kept = [(name, one, one.data) for name, one in parts if one.is_floating_point()]
    for name, one, data in kept:
        if weights and isinstance(one, torch.nn.Parameter) and not is_added(name):
            data = torch.from_numpy(weights.tensor(name_on_disk(name), name).read())
        one.data = data.to(model.device, torch.float32)
    try:
        yield
    finally:
        for _, one, data in kept:
            one.data = data


def name_on_disk(name: str) -> str:
    """Return a parameter's name in the files of a checkpoint, without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def is_added(name: str) -> bool:
    """Say whether an adapter brought a parameter along."""
    return "lora_" in name or "modules_to_save" in name


def measure_base(trained: Reference, picture: "Image") -> float:
    """Return how far the adapter moves the soft tokens of a picture from the base's; 0 where it leaves the tower alone."""
    from peft import PeftModel

    model = trained.model
    if not isinstance(model, PeftModel) or not any(
        TOWERS.search(name) and is_added(name) for name in model.state_dict()
    ):
        return 0.0
    own = read_tower(model, trained.processor, picture)
    with model.disable_adapter():
        return measure_difference(own, read_tower(model, trained.processor, picture))[0]


def measure_difference(expected: "numpy.ndarray", found: "numpy.ndarray") -> tuple[float, float]:
    """Return (mean, largest) distance of two soft tokens as a share of the expected one's length; infinite where shapes differ."""
    import numpy

    if expected.shape != found.shape:
        return float("inf"), float("inf")
    distance = numpy.linalg.norm(expected.astype(float) - found, axis=-1)
    relative = distance / numpy.linalg.norm(expected.astype(float), axis=-1)
    return float(relative.mean()), float(relative.max())
