"""Slices of a checkpoint: equal to the larger model with its parts cut, and files that say so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_model, load_processor, slice_checkpoint
from forgekit.__main__ import main
from forgekit.model import slice as slicing
from forgekit.model import slice_weights
from forgekit.model.load import find_weights

LAYERS, WIDTH = 12, 64  # of the checkpoint in conftest.py
ROUND = ["sliding_attention", "sliding_attention", "full_attention"]
CHOICES = {
    "as e2b is cut": {"skip": "6-8", "widths": WIDTH // 2},
    "a sparse round": {"skip": "0-2"},
    "two rounds": {"skip": "0-2,9-11", "widths": {"full": WIDTH // 2}},
    "mix and match": {"widths": {"all": WIDTH // 2, "1": WIDTH, "6-8": WIDTH}},
}


def cut_model(model: Any, skipped: set[int], widths: dict[int, int], start: int = 0) -> Any:
    """Make a whole model compute what a slice should: layers that hand on what they get, and narrower feed-forward parts.

    Args:
        widths: by the model's own layer numbers.
        start: the first hidden feature that is kept; a slice keeps the first ones.
    """
    from torch.nn.functional import linear

    for number, layer in enumerate(model.model.language_model.layers):
        if number in skipped:
            layer.forward = lambda hidden, *args, **options: hidden
            continue

        def feed_forward(x: Any, mlp: Any = layer.mlp, part: Any = slice(start, start + widths[number])) -> Any:
            gate = linear(x, mlp.gate_proj.weight[part])
            if mlp.activation_sparsity > 0:
                gate = mlp._gaussian_topk(gate)
            narrow = mlp.act_fn(gate) * linear(x, mlp.up_proj.weight[part])
            return linear(narrow, mlp.down_proj.weight[:, part])

        layer.mlp.forward = feed_forward
    return model


def measure_difference(one: list[Any], other: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def load_whole(make_config: Callable, source: Path) -> Any:
    return load_model(make_config({"model.id": str(source)}))[0]


def read_tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---- it is the model that was asked for ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICES)
def test_a_slice_equals_the_whole_model_with_its_parts_cut(
    name: str, make_sliced: Callable, make_config: Callable, source: Path, read_logits: Callable
) -> None:
    config = make_sliced(CHOICES[name])
    model, processor = load_model(config)
    plan = slicing.read_plan(source, config)
    whole = cut_model(
        load_whole(make_config, source), set(plan.skipped), dict(zip(plan.layers, plan.widths, strict=True))
    )
    for media in (False, True):
        expected = read_logits(whole, processor, media)
        assert measure_difference(read_logits(model, processor, media), expected) <= 1e-6
    assert float(expected[0].std()) > 0.1  # 1e-6 of something


def test_the_comparison_sees_the_wrong_half_the_wrong_layer_and_the_wrong_embeddings(
    make_sliced: Callable, make_config: Callable, source: Path, monkeypatch: pytest.MonkeyPatch, read_logits: Callable
) -> None:
    config = make_sliced(CHOICES["as e2b is cut"])
    model, processor = load_model(config)
    sliced, half = read_logits(model, processor), dict.fromkeys(range(LAYERS), WIDTH // 2)
    for skipped, start in (({6, 7, 8}, WIDTH // 2), ({9, 10, 11}, 0)):
        other = cut_model(load_whole(make_config, source), skipped, half, start)
        assert measure_difference(sliced, read_logits(other, processor)) > 1e-3
    right = slice_weights.find_cut

    def first_columns(name: str, plan: Any) -> Any:
        found = right(name, plan)
        return (*found[:2], ((0, 9 * plan.per_layer),)) if name.endswith(slice_weights.TABLE) and found else found

    monkeypatch.setattr(slice_weights, "find_cut", first_columns)
    shutil.rmtree(find_weights(config))
    wrong, _ = load_model(config)
    assert measure_difference(sliced, read_logits(wrong, processor)) > 1e-3


def test_an_answer_with_the_cache_is_the_one_without(make_sliced: Callable) -> None:
    import torch

    model, _ = load_model(make_sliced(CHOICES["two rounds"]))
    ids = torch.randint(10, 250, (1, 12), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        answer = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        again = model(input_ids=answer[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(again[:, 11:], answer[:, 12:])


# ---- what is written -------------------------------------------------------------------------------------------------


def test_config_is_the_source_s_but_for_five_fields(make_sliced: Callable, source: Path, tmp_path: Path) -> None:
    folder = slice_checkpoint(make_sliced(CHOICES["two rounds"]), tmp_path / "out")
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, folder))
    changed = {name for name in after["text_config"] if after["text_config"][name] != before["text_config"].get(name)}
    assert changed == {
        "num_hidden_layers",
        "intermediate_size",
        "layer_types",
        "activation_sparsity_pattern",
        "num_kv_shared_layers",
    }
    text = after["text_config"]
    assert (text["num_hidden_layers"], text["num_kv_shared_layers"]) == (6, 3)
    assert text["layer_types"] == ROUND * 2 and text["activation_sparsity_pattern"] == [0.0] * 6
    assert text["intermediate_size"] == [WIDTH, WIDTH, WIDTH // 2] * 2
    assert all(isinstance(value, float) for value in text["activation_sparsity_pattern"])
    assert {**before, "text_config": None} == {**after, "text_config": None}
    record = json.loads((folder / "slice.json").read_text())
    assert (record["source"], record["skipped"]) == ("random-12", [0, 1, 2, 9, 10, 11])


def test_keys_of_the_sharing_layers_are_carried_over_and_all_else_is_the_source_s(
    make_sliced: Callable, source: Path, tmp_path: Path
) -> None:
    import torch

    folder = slice_checkpoint(make_sliced({"skip": "6-8"}), tmp_path / "out")
    before, after = read_tensors(source), read_tensors(folder)
    layer = "model.language_model.layers."
    for old, new in [(0, 0), (5, 5), (9, 6), (11, 8)]:
        names = [name for name in before if name.startswith(f"{layer}{old}.")]
        assert any("k_proj" in name for name in names) and any("k_norm" in name for name in names)
        for name in names:
            assert torch.equal(before[name], after[name.replace(f"{layer}{old}.", f"{layer}{new}.")])
    assert not any(name.startswith(f"{layer}9.") for name in after)
    towers = [name for name in before if "vision" in name or "audio" in name]
    assert len(towers) > 50 and all(torch.equal(before[name], after[name]) for name in towers)
    assert len(after) == len(before) - sum(name.startswith(tuple(f"{layer}{i}." for i in (6, 7, 8))) for name in before)


def test_processor_and_template_come_along_byte_for_byte(make_sliced: Callable, source: Path, tmp_path: Path) -> None:
    config = make_sliced(CHOICES["as e2b is cut"])
    folder = slice_checkpoint(config, tmp_path / "out")
    names = {
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert names <= {file.name for file in folder.iterdir()}
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    processor = load_processor(config.change({"model.id": str(folder), "model.slice": {}}))
    assert type(processor).__name__ == "Gemma3nProcessor"


def test_several_small_files_hold_what_one_holds(
    make_sliced: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import torch

    config = make_sliced(CHOICES["two rounds"])
    one = slice_checkpoint(config, tmp_path / "one")
    monkeypatch.setattr(slice_weights, "SHARD", 200_000)
    monkeypatch.setattr(slice_weights, "CHUNK", 7)  # rows of the table, which has more than a multiple of it
    capsys.readouterr()
    many = slice_checkpoint(config, tmp_path / "many")
    assert [file.name for file in one.glob("model*")] == ["model.safetensors"]
    files = sorted(file.name for file in many.glob("*.safetensors"))
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(files) == set(index["weight_map"].values())
    single, parts = read_tensors(one), read_tensors(many)
    assert single.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(single[name], parts[name]) for name in single)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in single.values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Slicing random-12: 6 of 12 layers (without 0-2,9-11), 4 of width 64, 2 of width 32.")
    assert [line.split()[1] for line in lines if line.startswith("Sliced ")] == files
    model, _ = load_model(config.change({"model.id": str(many), "model.slice": {}}))
    assert model.config.text_config.num_hidden_layers == 6


def test_the_command_writes_the_slice(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "below" / "out"
    assert main(["slice", str(source), str(out), "--skip", "6-8", "--widths", "32", "9-11=64"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert json.loads((out / "slice.json").read_text())["widths"] == [32] * 6 + [64] * 3
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert main(["slice", str(source), str(out), "--skip", "6-8"]) == 1
    assert f"{out} exists, and nothing is written over." in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
