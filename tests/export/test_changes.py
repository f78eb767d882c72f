"""Every kind of adapter that can be chosen is merged right, or refused with a sentence.

The reference is PEFT's own merge in memory; where PEFT merges wrongly, the module's own output.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forgekit.errors import ExportError
from forgekit.export.changes import LowRank, Whole, check_mergeable, find_changes, open_change, read_layer
from forgekit.export.merged import find_shards, match_changes, merge_shards
from forgekit.export.shard import Tensor, decode_rows, read_bytes, read_header, split_rows

TEXT = ["attention", "mlp"]
KINDS: dict[str, dict[str, Any]] = {
    "ranks and scales by group": {
        "adapter.rank_pattern": {"mlp": 4},
        "adapter.alpha_pattern": {"attention": 40},
        "adapter.use_rslora": True,
    },
    "every plain matrix": {"adapter.layers": [*TEXT, "laurel", "altup", "per_layer", "audio", "vision"]},
    "convolutions of the picture tower": {"adapter.layers": ["vision_tower", "vision_stem"]},
    "convolutions of the sound tower": {"adapter.layers": ["audio_convolutions", "audio"]},
    "length and direction of convolutions": {"adapter.layers": ["vision_stage1", "mlp"], "adapter.use_dora": True},
    "the per-layer table": {"adapter.layers": ["per_layer_embeddings", "attention"]},
    "whole modules": {"adapter.modules_to_save": ["altup.prediction_coefs", "per_layer_model_projection"]},
    "the vocabulary": {"adapter.layers": ["attention", "embeddings"]},
    "biases": {"adapter.layers": ["vision_tower", "attention"], "adapter.bias": "all"},
}


def read_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def shift_whole(model: Any) -> None:
    """Make the modules and biases that learn whole other than the base's; the matrices are drawn already."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data.add_(0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_equals_pefts_own(make_learned: Any, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    """Both sum in float32 and round differently ordered sums: 1e-6 of a weight's size."""
    model, _, _ = make_learned(KINDS[kind])
    shift_whole(model)
    merge_shards(model, tiny_folder, tmp_path / "merged")
    before, after = read_tensors(tiny_folder), read_tensors(tmp_path / "merged")
    expected = model.merge_and_unload().state_dict()
    changed = [name for name in before if not before[name].equal(after[name])]
    for name in before:
        assert (after[name] - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max() + 1e-7, name
    assert len(changed) >= 4 and after.keys() == before.keys()


def test_an_embedding_with_length_and_direction_equals_the_layers_own_output(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Embedding(50, 12))
    model = get_peft_model(inner, LoraConfig(r=3, target_modules=["0"], use_dora=True))
    layer = model.base_model.model[0]
    for parameter in layer.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    file = tmp_path / "model.safetensors"
    save_file({"0.weight": layer.base_layer.weight.detach().clone()}, file)
    tensor = read_header(file)["0.weight"]
    add = open_change(read_layer("0", layer), file, tensor)
    pieces = [
        add(decode_rows(read_bytes(file, tensor, *piece), file, tensor), piece[0]) for piece in split_rows(tensor, 400)
    ]
    assert len(pieces) > 3
    assert torch.allclose(torch.cat(pieces), layer(torch.arange(50)).detach(), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 1000, 2**30])
def test_pieces_of_any_size_cover_each_row_once(chunk: int) -> None:
    tensor = Tensor("a", "BF16", (17, 3, 5), 0, 17 * 15 * 2)
    pieces = list(split_rows(tensor, chunk))
    assert [row for first, last in pieces for row in range(first, last)] == list(range(17))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"groups": 4}, "it is a convolution in 4 groups"),
        ({"lora_variant": {"default": SimpleNamespace()}}, "the variant SimpleNamespace of LoRA is not known here"),
        ({"lora_bias": {"default": True}}, "its matrices have a bias of their own"),
        ({"merged": True}, "it has been merged into the model in memory already"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(changed: dict[str, Any], reason: str) -> None:
    base = SimpleNamespace(groups=changed.get("groups", 1))
    plain = {"lora_variant": {}, "lora_bias": {}, "merged": False, "get_base_layer": lambda: base}
    layer = SimpleNamespace(**(plain | changed))
    with pytest.raises(ExportError, match=f"The adapter beside conv.3 cannot be merged: {reason}"):
        check_mergeable("conv.3", layer, ())


def test_an_adapter_beside_the_tied_vocabulary_is_refused(make_config: Any) -> None:
    from peft import LoraConfig, get_peft_model

    from forgekit import load_model

    model, _ = load_model(make_config())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ExportError, match="embed_tokens.weight cannot be merged: the vocabulary's table and the output head"):  # fmt: skip
        find_changes(model)


def test_another_shape_is_refused_with_both(tmp_path: Path) -> None:
    import torch

    tensor = Tensor("w", "F32", (4, 3), 0, 48)
    file = tmp_path / "base" / "model.safetensors"
    for change in (Whole(torch.zeros(5, 3)), LowRank(torch.zeros(5, 2), torch.zeros(2, 3))):
        with pytest.raises(ExportError, match="w has the shape 4 x 3 in .*base and 5 x 3 in the trained model"):
            open_change(change, file, tensor)


def test_names_of_the_checkpoint_are_found_by_transformers_own_rules(make_learned: Any, tiny_folder: Path) -> None:
    model, _, _ = make_learned()
    changes = match_changes(model, find_shards(tiny_folder))
    assert len(changes) == 24 and changes.keys() <= read_tensors(tiny_folder).keys()
