"""What training did to each weight of the base, as a sum that can be taken a few rows at a time, in float32.

    LoRA         W + s B A                        https://arxiv.org/abs/2106.09685, s as PEFT resolved it (r, alpha, rsLoRA, patterns)
    DoRA         m (W + s B A) / |W + s B A|      https://arxiv.org/abs/2402.09353, the length taken of each output
    whole        the learned weights themselves   modules_to_save, biases, full training

A convolution's matrices are flattened: B (out, r), A (r, in * height * width). An embedding's stand the other way round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from .shard import Tensor, decode_rows, read_bytes, split_rows

if TYPE_CHECKING:
    import torch

NAME = "default"  # PEFT's name of the one adapter
MATRICES = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_vector")
Add = Callable[["torch.Tensor", int], "torch.Tensor"]


@dataclass(frozen=True)
class LowRank:
    """left @ right is added, both float32 on the CPU; `lengths` are DoRA's, of rows or (an embedding) of columns."""

    left: "torch.Tensor"  # [rows, r]
    right: "torch.Tensor"  # [r, width], times the scale
    lengths: "torch.Tensor | None" = None
    columns: bool = False


@dataclass(frozen=True)
class Whole:
    """The learned weights in place of the base's."""

    value: "torch.Tensor"


Change = LowRank | Whole


def find_changes(model: Any) -> dict[str, Change]:
    """Return what changes, by the name that the weight has in the model without its adapter.

    Raises ExportError for an adapter of a kind that cannot be merged, with the module's name.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        return {name: Whole(value.detach()) for name, value in model.state_dict().items()}
    layers = {clean_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    changes: dict[str, Change] = {f"{name}.weight": read_layer(name, layer) for name, layer in layers.items()}
    tied = tied_names(model)
    for name in changes:
        if name in tied:
            raise ExportError(
                f"The adapter beside {name} cannot be merged: the vocabulary's table and the output head are one tensor in the base, "
                "and adapted apart they would be two. Export the adapter alone, or train embed_tokens through adapter.modules_to_save."
            )
    for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if not any(part in f"{name}." for part in MATRICES):
            changes[clean_name(name)] = Whole(value.detach())
    return drop_tied_copy(changes, tied)


def clean_name(name: str) -> str:
    """Return the name of a module or weight as it is without an adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def tied_names(model: Any) -> set[str]:
    """Return the names of the vocabulary's table and the output head where both are one tensor."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {f"{clean_name(name)}.weight" for name, module in model.named_modules() if any(module is m for m in modules)}


def drop_tied_copy(changes: dict[str, Change], tied: set[str]) -> dict[str, Change]:
    """Leave out the head where it learned as the vocabulary's table; the base holds the table alone."""
    import torch

    whole = {name: change.value for name, change in changes.items() if isinstance(change, Whole)}
    table = next((name for name in whole if name.endswith("embed_tokens.weight")), None)
    head = next((name for name in whole if name.endswith("lm_head.weight")), None)
    if table and head and tied and torch.equal(whole[table], whole[head]):
        return {name: change for name, change in changes.items() if name != head}
    return changes


def read_layer(name: str, layer: Any) -> LowRank:
    """Return one adapted module's matrices with its scale. Raises ExportError for what cannot be summed."""
    from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper

    check_mergeable(name, layer, (MultiheadAttention, ParamWrapper))
    scale, embedding = layer.scaling[NAME], isinstance(layer, Embedding)
    if embedding:
        right, left = layer.lora_embedding_B[NAME].T, layer.lora_embedding_A[NAME].T
    else:
        left, right = layer.lora_B[NAME].weight.flatten(1), layer.lora_A[NAME].weight.flatten(1)
    lengths = None
    if layer.use_dora.get(NAME):
        lengths = layer.lora_magnitude_vector[NAME].weight.detach().float().cpu().flatten()
    return LowRank(left.detach().float().cpu(), scale * right.detach().float().cpu(), lengths, columns=embedding)


def check_mergeable(name: str, layer: Any, unknown: tuple[type, ...]) -> None:
    """Raise ExportError for adapters whose sum with the base is no single weight, or is not known here."""
    base, variant = layer.get_base_layer(), layer.lora_variant.get(NAME)
    groups = getattr(base, "groups", 1)
    reason = None
    if groups > 1:
        reason = f"it is a convolution in {groups} groups, whose sum with the adapter is no convolution of that kind"
    elif isinstance(layer, unknown):
        reason = f"adapters of {type(base).__name__} are not known here"
    elif variant is not None and "Dora" not in type(variant).__name__:
        reason = f"the variant {type(variant).__name__} of LoRA is not known here"
    elif layer.lora_bias.get(NAME):
        reason = "its matrices have a bias of their own (lora_bias)"
    elif layer.merged:
        reason = "it has been merged into the model in memory already; load the adapter anew"
    if reason:
        raise ExportError(f"The adapter beside {name} cannot be merged: {reason}. Export the adapter alone.")


def open_change(change: Change, path: Path, tensor: Tensor) -> Add:
    """Return a function: (float32 rows of the base, number of the first) -> the changed rows, which may be the given ones.

    Raises ExportError when the change is of another shape than the tensor of the base.
    """
    if isinstance(change, Whole):
        value = change.value
        check_shape(tuple(value.shape), tensor, path)
        return lambda rows, first: (
            value.reshape(tensor.rows, -1)[first : first + len(rows)].float().cpu().reshape(rows.shape)
        )
    check_shape((change.left.shape[0], change.right.shape[1]), tensor, path, flat=True)

    def add(rows: "torch.Tensor", first: int) -> "torch.Tensor":
        return rows.addmm_(change.left[first : first + len(rows)], change.right)

    if change.lengths is None:
        return add
    lengths = change.lengths
    if change.columns:
        factor = lengths / measure_columns(add, path, tensor)
        return lambda rows, first: add(rows, first).mul_(factor)

    def scale(rows: "torch.Tensor", first: int) -> "torch.Tensor":
        total = add(rows, first)
        return total.mul_((lengths[first : first + len(rows)] / total.norm(dim=1)).unsqueeze(1))

    return scale


def measure_columns(add: Add, path: Path, tensor: Tensor) -> "torch.Tensor":
    """Return the length of each column of the sum, which a first pass over all rows has to find."""
    squares = sum(
        add(decode_rows(read_bytes(path, tensor, first, last), path, tensor), first).double().square().sum(0)
        for first, last in split_rows(tensor)
    )
    assert not isinstance(squares, int)
    return squares.sqrt().float()


def check_shape(shape: tuple[int, ...], tensor: Tensor, path: Path, flat: bool = False) -> None:
    """Raise ExportError with both shapes when they differ."""
    expected = (tensor.rows, tensor.width) if flat else tensor.shape
    if shape != expected:
        raise ExportError(
            f"{tensor.name} has the shape {' x '.join(map(str, expected))} in {path.parent} and {' x '.join(map(str, shape))} in the trained "
            "model: it was trained on another base. Export with the model.id that it was trained on."
        )
