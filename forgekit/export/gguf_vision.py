"""The picture tower as a GGUF file of its own (mmproj), which llama.cpp loads beside the text model.

llama.cpp takes channels and blocks of MobileNetV5 from the tensors and fixes the rest as the released checkpoints have it:
768 x 768 pixels, 256 soft tokens, a text model of width 2048 (llama.cpp, tools/mtmd/models/mobilenetv5.cpp and clip.cpp,
PROJECTOR_TYPE_GEMMA3NV). For Gemma 3n's sound it has nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ExportError
from ..files import write_text
from .card import TERMS
from .gguf import append_tensors, check_room, describe_model, open_merged, start_file
from .gguf_metadata import add_description
from .gguf_tensors import Tensor, Weights

CARD = """\
# {name}: its eyes, as GGUF

`{file}` is the picture tower for the text models beside it. `mmproj-F16.verify.json` says how far the soft tokens that
llama.cpp makes of a picture with it are from the trained model's.

    llama-server -m model-Q8_0.gguf --mmproj {file} --jinja

llama.cpp puts black bars around a picture that is not square, where training stretches it: stretch it to {pixels} x {pixels}
pixels before it is sent.

## Terms

{terms}
"""
ARCHITECTURE = "mobilenetv5_300m_enc"
TOWER, PROJECTION = "model.vision_tower.timm_model.", "model.embed_vision."
PIXELS, PATCH = 768, 3
TEXT_WIDTH, TOKENS = 2048, 256
BLOCKS, HEADS = 128, 8  # asked for and not used: the tower is built from the tensors' names
KEPT = ("stem", "gamma", "norm", "bn")  # parts of names that stay in float32


def export_vision(model: Any, processor: Any, config: Config, path: Path, scores: dict[str, Any] | None = None) -> Path:
    """Write the picture tower with what it learned as a GGUF file in F16.

    Raises ExportError for a tower that llama.cpp cannot build, with the reasons.
    """
    check_tower(model.config, processor)
    about = describe_model(config)
    with open_merged(model, processor, config, path) as merged:
        write_vision(merged, path, about)
    write_text(path.parent / "mmproj.md", CARD.format(file=path.name, pixels=PIXELS, terms=TERMS, **about))
    return path


def check_tower(settings: Any, processor: Any) -> None:
    """Raise ExportError with every reason why llama.cpp cannot build a checkpoint's picture tower.

    Args:
        settings: the model's config.
    """
    vision = getattr(settings, "vision_config", None)
    images = getattr(processor, "image_processor", None)
    if settings.model_type != "gemma3n" or not vision or not images:
        raise ExportError("This checkpoint has no picture tower of Gemma 3n. Leave gguf:mmproj out of export.formats.")
    width, tokens = settings.get_text_config().hidden_size, settings.vision_soft_tokens_per_image
    size = images.size["height"], images.size["width"]
    reasons = []
    if vision.architecture != ARCHITECTURE:
        reasons.append(f"the tower is {vision.architecture}, and it knows {ARCHITECTURE}")
    if width != TEXT_WIDTH:
        reasons.append(f"the text model is {width} wide, and it takes {TEXT_WIDTH}")
    if tokens != TOKENS:
        reasons.append(f"a picture becomes {tokens} soft tokens, and it makes {TOKENS}")
    if size != (PIXELS, PIXELS):
        reasons.append(f"pictures have {size[0]} x {size[1]} pixels, and it takes {PIXELS} x {PIXELS}")
    if reasons:
        raise ExportError(
            f"llama.cpp cannot read pictures for this model: {'; '.join(reasons)}. Leave gguf:mmproj out of export.formats: the other formats "
            "of GGUF hold the text model, and merged holds the whole one."
        )


def write_vision(source: Path, path: Path, about: dict[str, Any]) -> Path:
    """Write the picture tower of a merged folder as GGUF, whole or not at all."""
    from gguf import GGMLQuantizationType as Type

    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = plan_tower(source)
    plan = [(tensor, Type.F32 if len(tensor.shape) == 1 or any(part in tensor.name for part in KEPT) else Type.F16) for tensor in tensors]  # fmt: skip
    check_room(plan, path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with start_file(temporary, "clip", plan) as writer:
            add_description(writer, "F16", about)
            add_tower(writer, settings)
        append_tensors(temporary, plan)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def add_tower(writer: Any, settings: dict[str, Any]) -> None:
    """Add the numbers that llama.cpp asks of a picture tower; pixels go in between 0 and 1, as they are."""
    from gguf import VisionProjectorType

    width = settings["vision_config"]["hidden_size"]
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(VisionProjectorType.GEMMA3NV)
    writer.add_vision_projection_dim(settings["text_config"]["hidden_size"])
    writer.add_vision_image_size(PIXELS)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(4 * width)
    writer.add_vision_block_count(BLOCKS)
    writer.add_vision_head_count(HEADS)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.0, 0.0, 0.0])
    writer.add_vision_image_std([1.0, 1.0, 1.0])


def plan_tower(folder: Path) -> list[Tensor]:
    """Return every tensor of the tower and of its projection. Raises ExportError for weights that GGUF has no name for."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    weights, names = Weights(folder), get_tensor_name_map(MODEL_ARCH.MMPROJ, BLOCKS)
    tensors = []
    for key in weights:
        if not key.startswith((TOWER, PROJECTION)):
            continue
        name = key.replace(TOWER + "blocks.", "v.blk.")
        if name == key:
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"{folder}: GGUF has no name for the weight {key}.")
        tensor = weights.tensor(key, name)
        tensors.append(spread(tensor) if name.endswith(("conv_stem.conv.bias", "layer_scale.gamma")) else tensor)
    return tensors


def spread(tensor: Tensor) -> Tensor:
    """Return one number a channel as [1, channels, 1, 1], as llama.cpp adds it to a picture."""
    shape = (1, tensor.shape[0], 1, 1)
    return Tensor(tensor.name, shape, lambda start, stop: tensor.read().reshape(shape))
