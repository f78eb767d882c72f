"""The tensors of a Gemma 3n text model as llama.cpp wants them: named, widened where it fixes a width, read by slices.

    models/merged/*.safetensors ── read_weights ── plan_tensors ── [Tensor(name, shape, rows)]

llama.cpp fixes for this architecture what the released checkpoints have: 20 layers with keys and values of their own, 10
sparse layers that cut at the 95th percentile, per-layer embeddings of width 256, LAuReL of rank 64
(llama.cpp, src/models/gemma3n.cpp). Narrower per-layer embeddings and LAuReL are widened with zeros, which changes no
result; another number of layers cannot be mended and is refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError

if TYPE_CHECKING:
    import numpy

OWN_LAYERS = 20  # layers with keys and values of their own
SPARSE_LAYERS, SPARSITY = 10, 0.95
PER_LAYER_WIDTH = 256
LAUREL_RANK = 64
TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
Rows = Callable[[int, int], "numpy.ndarray"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the GGUF file: its name there, its shape, and a function that reads rows start..stop as float32."""

    name: str
    shape: tuple[int, ...]
    rows: Rows

    def read(self) -> "numpy.ndarray":
        """Return all rows."""
        return self.rows(0, self.shape[0])

    def widen(self, axis: int, width: int, scale: float = 1.0) -> "Tensor":
        """Return the tensor with zeros behind `axis` up to `width`, the values multiplied by `scale`."""
        if self.shape[axis] == width and scale == 1:
            return self
        shape = (*self.shape[:axis], width, *self.shape[axis + 1 :])
        if axis == 0:
            return Tensor(self.name, shape, lambda start, stop: pad(self.rows(start, min(stop, self.shape[0])) * scale, 0, stop - start))  # fmt: skip
        return Tensor(self.name, shape, lambda start, stop: pad(self.rows(start, stop) * scale, axis, width))


def pad(array: "numpy.ndarray", axis: int, width: int) -> "numpy.ndarray":
    """Return the array with zeros behind one axis, float32."""
    import numpy

    after = [(0, width - size if i == axis else 0) for i, size in enumerate(array.shape)]
    return numpy.pad(array, after).astype(numpy.float32)


class Weights:
    """Every tensor of a safetensors folder, read by slices and never whole."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self.files.update(dict.fromkeys(file.keys(), file))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def tensor(self, key: str, name: str) -> Tensor:
        """Return a tensor of the folder under its name in the GGUF file."""
        part = self.files[key].get_slice(key)
        return Tensor(name, tuple(part.get_shape()), lambda start, stop: part[start:stop].float().numpy())


def check_architecture(settings: dict[str, Any]) -> None:
    """Raise ExportError, with every reason, for a model that llama.cpp cannot run as Gemma 3n.

    Args:
        settings: the checkpoint's config.json.
    """
    if settings.get("model_type") not in ("gemma3n", "gemma3n_text"):
        raise ExportError(
            f"GGUF is written for Gemma 3n; this checkpoint is {settings.get('model_type')}. Use llama.cpp's convert_hf_to_gguf.py on models/merged."
        )
    text = settings.get("text_config", settings)
    layers, widths = text["num_hidden_layers"], text["intermediate_size"]
    sparsity = text["activation_sparsity_pattern"] or [0.0] * layers
    expected = [SPARSITY if layer < SPARSE_LAYERS else 0.0 for layer in range(layers)]
    reasons = []
    if layers - text["num_kv_shared_layers"] != OWN_LAYERS:
        reasons.append(
            f"{layers - text['num_kv_shared_layers']} layers have keys and values of their own, and it wants {OWN_LAYERS}"
        )
    if any(abs(a - b) > 1e-6 for a, b in zip(sparsity, expected, strict=True)):
        reasons.append(f"it cuts small activations in the first {SPARSE_LAYERS} layers, and this model in others")
    if text["hidden_size_per_layer_input"] > PER_LAYER_WIDTH:
        reasons.append(
            f"per-layer embeddings are {text['hidden_size_per_layer_input']} wide, and it takes {PER_LAYER_WIDTH}"
        )
    if text["laurel_rank"] > LAUREL_RANK:
        reasons.append(f"LAuReL has rank {text['laurel_rank']}, and it takes {LAUREL_RANK}")
    if isinstance(widths, list) and len(set(widths)) > 1:
        reasons.append(
            f"the feed-forward parts are {min(widths)} to {max(widths)} wide, and it wants one width in all layers"
        )
    if reasons:
        raise ExportError(
            "llama.cpp cannot run this model: " + "; ".join(reasons) + ". Export adapter or merged instead."
        )


def plan_tensors(folder: Path, settings: dict[str, Any]) -> list[Tensor]:
    """Return every tensor of the text model in the order in which it is written.

    Raises ExportError for weights that GGUF has no name for.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    text = settings.get("text_config", settings)
    weights, names = Weights(folder), get_tensor_name_map(MODEL_ARCH.GEMMA3N, text["num_hidden_layers"])
    stacks: dict[str, list[str]] = {}
    tensors: list[Tensor] = []
    for key in weights:
        short = key.replace("language_model.", "")
        if short.removeprefix("model.").startswith(TOWERS) or short == "lm_head.weight":  # the head is the embedding
            continue
        if "altup_projections" in short or "altup_unembed_projections" in short:
            stacks.setdefault(short.rsplit(".", 2)[0], []).append(key)
            continue
        name = names.get_name(short + ("" if short.endswith(".weight") else ".weight"), try_suffixes=(".weight",))
        if name is None:
            raise ExportError(f"{folder}: GGUF has no name for the weight {key}.")
        tensors.append(widen_tensor(weights.tensor(key, name), text))
    tensors += [stack_tensors(weights, f"{names.get_name(short)}.weight", keys) for short, keys in stacks.items()]
    return [*tensors, *fill_shared_layers({tensor.name for tensor in tensors}, text)]


def widen_tensor(tensor: Tensor, text: dict[str, Any]) -> Tensor:
    """Return one tensor in the width that llama.cpp fixes, scaled so that every result of the model stays the same.

    With w instead of 256 per-layer values: llama.cpp multiplies the looked-up row by sqrt(256) instead of sqrt(w), so
    the table shrinks by sqrt(w / 256). Its norm takes the mean over 256 values, of which 256 - w are zero, so the
    projection in front grows by sqrt(256 / w), which also keeps the share of the norm's epsilon, and the norm's weight
    shrinks by as much.
    """
    layers, width = text["num_hidden_layers"], text["hidden_size_per_layer_input"]
    grow = (PER_LAYER_WIDTH / width) ** 0.5
    part = tensor.name.rsplit("blk.", 1)[-1].split(".", 1)[-1].removesuffix(".weight")
    if tensor.name == "token_embd.weight":
        return tensor.widen(0, text["vocab_size"])
    if tensor.name == "per_layer_token_embd.weight":
        return repeat_first_row(widen_groups(tensor, 1, layers, width, 1 / grow), text["vocab_size"])
    if tensor.name == "per_layer_model_proj.weight":
        return widen_groups(tensor, 0, layers, width, grow)
    if tensor.name == "per_layer_proj_norm.weight":
        return tensor.widen(0, PER_LAYER_WIDTH, 1 / grow)
    axes = {"inp_gate": (0, PER_LAYER_WIDTH), "proj": (1, PER_LAYER_WIDTH), "laurel_l": (0, LAUREL_RANK), "laurel_r": (1, LAUREL_RANK)}  # fmt: skip
    return tensor.widen(*axes[part]) if part in axes else tensor


def widen_groups(tensor: Tensor, axis: int, groups: int, width: int, scale: float) -> Tensor:
    """Return a table whose `axis` holds one group of `width` values a layer, each widened to 256: [.., layers * 256, ..]."""
    if width == PER_LAYER_WIDTH:
        return tensor
    other = tensor.shape[1 - axis]
    if axis == 1:  # [vocabulary, layers * width]: any rows will do
        shape = (other, groups * PER_LAYER_WIDTH)
        return Tensor(tensor.name, shape, lambda start, stop: pad(tensor.rows(start, stop).reshape(stop - start, groups, width) * scale, 2, PER_LAYER_WIDTH).reshape(stop - start, -1))  # fmt: skip
    whole = pad(tensor.read().reshape(groups, width, other) * scale, 1, PER_LAYER_WIDTH).reshape(-1, other)
    return Tensor(tensor.name, whole.shape, lambda start, stop: whole[start:stop])


def repeat_first_row(tensor: Tensor, rows: int) -> Tensor:
    """Return the per-layer table with row 0 behind its end: what transformers reads for ids of pictures and sound."""
    import numpy

    known = tensor.shape[0]
    if known >= rows:
        return tensor

    def read(start: int, stop: int) -> "numpy.ndarray":
        own = tensor.rows(min(start, known), min(stop, known))
        return numpy.concatenate([own, numpy.repeat(tensor.rows(0, 1), stop - max(start, known), 0)]) if stop > known else own  # fmt: skip

    return Tensor(tensor.name, (rows, tensor.shape[1]), read)


def stack_tensors(weights: Weights, name: str, keys: list[str]) -> Tensor:
    """Return matrices of one shape as one tensor of three dimensions."""
    import numpy

    parts = [weights.tensor(key, name) for key in sorted(keys)]
    return Tensor(name, (len(parts), *parts[0].shape), lambda start, stop: numpy.stack([part.read() for part in parts[start:stop]]))  # fmt: skip


def fill_shared_layers(present: set[str], text: dict[str, Any]) -> list[Tensor]:
    """Return zeros for keys and values of layers that share those of others: llama.cpp asks for them and never reads them."""
    import numpy

    head, hidden = text["head_dim"], text["hidden_size"]
    width = text["num_key_value_heads"] * head
    shapes = {"attn_k": (width, hidden), "attn_v": (width, hidden), "attn_k_norm": (head,)}
    return [
        Tensor(name, shape, lambda start, stop, rest=shape[1:]: numpy.zeros((stop - start, *rest), numpy.float32))  # type: ignore[misc]
        for layer in range(text["num_hidden_layers"])
        for part, shape in shapes.items()
        if (name := f"blk.{layer}.{part}.weight") not in present
    ]
