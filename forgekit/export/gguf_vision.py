"""The picture tower as a GGUF file of its own (mmproj), which llama.cpp loads beside the text model.

llama.cpp builds the tower of the released checkpoints and no other: MobileNetV5 at 768 x 768 pixels beside a text model of
width 2048 (llama.cpp, tools/mtmd, PROJECTOR_TYPE_GEMMA3NV). For Gemma 3n's sound it has nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ExportError
from .gguf import append_tensors, check_room, describe_model, open_merged, start_file
from .gguf_metadata import add_description
from .gguf_tensors import Tensor, Weights

TOWER, PROJECTION = "model.vision_tower.timm_model.", "model.embed_vision."
PIXELS, PATCH = 768, 3
TEXT_WIDTH = 2048
BLOCKS, HEADS = 128, 8  # asked for and not used: the tower is built from the tensors' names
KEPT = ("stem", "gamma", "norm", "bn")  # parts of names that stay in float32


def export_vision(model: Any, processor: Any, config: Config, path: Path, scores: dict[str, Any] | None = None) -> Path:
    """Write the picture tower with what it learned as a GGUF file in F16.

    Raises ExportError for a tower that llama.cpp cannot build, with the reason.
    """
    about = describe_model(config)
    check_tower(model.config.to_dict())
    with open_merged(model, processor, config, path) as merged:
        return write_vision(merged, path, about)


def check_tower(settings: dict[str, Any]) -> None:
    """Raise ExportError with every reason why llama.cpp cannot build a checkpoint's picture tower.

    Args:
        settings: the checkpoint's config.json.
    """
    vision, text = settings.get("vision_config"), settings.get("text_config", {})
    if settings.get("model_type") != "gemma3n" or not vision:
        raise ExportError("This checkpoint has no picture tower of Gemma 3n. Leave gguf:mmproj out of export.formats.")
    reasons = []
    if text.get("hidden_size") != TEXT_WIDTH:
        reasons.append(f"the text model is {text.get('hidden_size')} wide, and it takes {TEXT_WIDTH}")
    if vision.get("architecture") != "mobilenetv5_300m_enc" or vision.get("model_args"):
        reasons.append("the tower is not the released MobileNetV5")
    if reasons:
        raise ExportError(
            f"llama.cpp cannot read pictures for this model: {'; '.join(reasons)}. Leave gguf:mmproj out of export.formats."
        )


def write_vision(source: Path, path: Path, about: dict[str, Any]) -> Path:
    """Write the picture tower of a merged folder as GGUF, whole or not at all."""
    from gguf import GGMLQuantizationType as Type

    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    check_tower(settings)
    plan = [(tensor, Type.F32 if len(tensor.shape) == 1 or any(part in tensor.name for part in KEPT) else Type.F16) for tensor in plan_tower(source)]  # fmt: skip
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
