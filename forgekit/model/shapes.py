"""A model's modules and their shapes, read off a model or built from a config alone, without weights."""

import copy
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..environment import set_environment
from ..errors import ModelError
from ..hardware import choose_engine
from .load import find_model, quiet_libraries, start_engine
from .slice_plan import apply_slice
from .trust import NO_CODE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What the released checkpoints' config.json says where it differs from Gemma3nConfig's defaults, which describe E4B:
# huggingface.co/google/gemma-3n-E2B-it, config.json
RELEASED = {
    "E4B": {},
    "E2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 30, "num_kv_shared_layers": 10},
}


@dataclass(frozen=True)
class Module:
    """One module: its whole name, its class, what an adapter can go beside, and its own parameters.

    `kind` is "linear", "conv" or "embedding", or "" for all others; `shape` is (out, in), (out, in / groups, height, width)
    or (rows, width); `parameters` are (name, number) of those that belong to no module below it.
    """

    name: str
    type: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)  # told apart by identity, because thousands of modules are slow to hash
class Shapes:
    """All modules of a model, in its own order, and what of its config the plan and the memory estimate read."""

    type: str
    source: str  # where the sizes come from, for a person
    modules: tuple[Module, ...]
    layer_types: tuple[str, ...]
    shared_layers: int
    tied: bool  # the output head is the vocabulary's table
    sparse: tuple[bool, ...]  # layers whose feed-forward part cuts small values off
    heads: int
    window: int  # tokens that a sliding layer sees


def read_shapes(model: "PreTrainedModel", source: str = "the loaded model") -> Shapes:
    """Return the shapes of a model, loaded or on the meta device; packed weights count as what they stand for."""
    text = model.config.get_text_config()
    seen: set[int] = set()
    modules = tuple(describe_module(name, module, seen) for name, module in model.named_modules() if name)
    types = tuple(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    tied = bool(getattr(model.config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)))
    sparsity = getattr(text, "activation_sparsity_pattern", None) or [0.0] * text.num_hidden_layers
    return Shapes(
        type(model).__name__,
        source,
        modules,
        types,
        getattr(text, "num_kv_shared_layers", 0) or 0,
        tied,
        tuple(value > 0 for value in sparsity),
        text.num_attention_heads,
        getattr(text, "sliding_window", None) or 0,
    )


def describe_module(name: str, module: Any, seen: set[int]) -> Module:
    """Return one module's entry; a parameter that stands in `seen` belongs to an earlier module and is left out."""
    from torch import nn

    kind, groups = "", 1
    shape: tuple[int, ...] = ()
    if isinstance(module, nn.Linear):
        kind, shape = "linear", (module.out_features, module.in_features)
    elif isinstance(module, nn.Conv1d | nn.Conv2d):
        kind, shape, groups = "conv", tuple(module.weight.shape), module.groups
    elif isinstance(module, nn.Embedding):
        kind, shape = "embedding", tuple(module.weight.shape)
    own = [(key, value) for key, value in module.named_parameters(recurse=False) if id(value) not in seen]
    seen |= {id(value) for _, value in own}
    parameters = tuple((key, count_weights(value)) for key, value in own)
    return Module(name, type(module).__name__, kind, shape, groups, parameters)


def count_weights(parameter: Any) -> int:
    """Count the weights that a parameter stands for; a 4-bit one holds two in a byte."""
    packed = parameter.dtype.itemsize == 1 and type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 if packed else 1)


def build_shapes(settings: "PreTrainedConfig", kind: Any = None, source: str = "the config") -> Shapes:
    """Return the shapes of the model that a transformers config describes: built on the meta device once, then remembered.

    Args:
        kind: the model's class; default: the one the config names, else the one transformers takes for it.
    """
    settings = copy.deepcopy(settings)
    kind = kind or choose_class(settings)
    settings.architectures = [kind.__name__]
    for key in ("quantization_config", "torch_dtype", "dtype"):
        settings.__dict__.pop(key, None)
    text = json.dumps(settings.to_dict(), sort_keys=True, default=str)
    shapes = build_once(kind, text)
    return Shapes(**{**shapes.__dict__, "source": source})


@functools.lru_cache(maxsize=8)
def build_once(kind: Any, text: str) -> Shapes:
    """Build the model on the meta device: parameters have shapes and no values, so it takes no memory and under a second."""
    import torch

    with torch.device("meta"):
        model = kind(kind.config_class.from_dict(json.loads(text)))
    model.tie_weights()
    return read_shapes(model)


def choose_class(settings: "PreTrainedConfig") -> Any:
    """Return the transformers class that a config names. Raises ModelError when this version has none."""
    import transformers

    name = (settings.architectures or [None])[0]
    if name is None:
        name = transformers.AutoModelForImageTextToText._model_mapping.get(type(settings), None)
        return name or transformers.AutoModelForCausalLM._model_mapping[type(settings)]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(f"transformers {transformers.__version__} has no {name}. Update transformers.")
    return kind


def prepare_libraries(config: Config) -> None:
    """Import in the order that the run's engine needs; a recipe for another machine is planned with transformers alone."""
    try:
        choose_engine(config)
    except ModelError:
        set_environment()
        quiet_libraries()
    else:
        start_engine(config)


def read_config(config: Config) -> tuple["PreTrainedConfig", str]:
    """Return the transformers config of `model.id`, cut as `model.slice` says, and a sentence on where it came from.

    Raises ModelError for a model whose config.json cannot be reached, or a slice that would break it.
    """
    settings, text = read_whole_config(config)
    if not config.model.slice:
        return settings, text
    return apply_slice(settings, config.model.slice, config.model.id), f"{text}, sliced as model.slice says"


def read_whole_config(config: Config) -> tuple["PreTrainedConfig", str]:
    """Return the transformers config of `model.id` and a sentence on where it came from.

    Read from the checkpoint's folder or the cache; the released sizes of E2B and E4B are known here; others from the Hub.
    Raises ModelError for a model whose config.json cannot be reached.
    """
    prepare_libraries(config)
    from transformers import AutoConfig

    name = find_model(config)
    size = next((size for size in RELEASED if f"gemma-3n-{size}".lower() in name.lower()), None)
    try:
        settings = AutoConfig.from_pretrained(
            name, revision=config.model.revision, local_files_only=size is not None, **NO_CODE
        )
    except (OSError, ValueError) as error:
        if size is not None:
            text = f"the released sizes of Gemma 3n {size} (its config.json is not on this machine)"
            return make_released_config(size), text
        raise ModelError(
            f"model.id: the config.json of {config.model.id} cannot be read, so its layers are not known. "
            "Connect to the Hub once, or name a folder that holds it."
        ) from error
    return settings, "config.json in its folder" if Path(name).is_dir() else "config.json of the Hub or its cache"


def make_released_config(size: str) -> "PreTrainedConfig":
    """Return the config of Gemma 3n "E2B" or "E4B" with the sizes of the released checkpoints."""
    from transformers import Gemma3nConfig

    text = RELEASED[size]
    settings = Gemma3nConfig(text_config=dict(text)) if text else Gemma3nConfig()
    settings.architectures = ["Gemma3nForConditionalGeneration"]
    return settings
