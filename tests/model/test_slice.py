"""Slices of a checkpoint: equal to the larger model with its parts cut, whole or absent, and made once for a recipe."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit import load_model, load_processor, plan_layers, slice_checkpoint
from forgekit.__main__ import main
from forgekit.errors import ModelError
from forgekit.model import slice as slicing
from forgekit.model import slice_weights
from forgekit.model.load import find_weights

LAYERS, SHARED, WIDTH = 12, 6, 64
ROUND = ["sliding_attention", "sliding_attention", "full_attention"]
CHOICES = {
    "as e2b is cut": {"skip": "6-8", "widths": WIDTH // 2},
    "a sparse round": {"skip": "0-2"},
    "two rounds": {"skip": "0-2,9-11", "widths": {"full": WIDTH // 2}},
    "mix and match": {"widths": {"all": WIDTH // 2, "1": WIDTH, "6-8": WIDTH}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A random Gemma 3n of four rounds: the first sparse, the second with the sources of the keys that the last two share.

    As in the released checkpoints, its files hold keys and values of the sharing layers too; there are several of them.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    from forgekit.model.tiny import build_config, build_model

    folder = tmp_path_factory.mktemp("checkpoint") / "random-12"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    config = build_config(tokenizer, hidden_size=32, layers=LAYERS, shared_layers=SHARED)
    config.text_config.layer_types = ROUND * 4
    config.text_config.activation_sparsity_pattern = [0.95] * 3 + [0.0] * 9
    config.text_config.intermediate_size = [WIDTH] * LAYERS
    model, generator = build_model(config), torch.Generator().manual_seed(5)
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if ".layers.5.self_attn.k_" in name or ".layers.5.self_attn.v_" in name]:
        for layer in range(LAYERS - SHARED, LAYERS):
            drawn = torch.randn(tensors[name].shape, generator=generator)
            tensors[name.replace(".layers.5.", f".layers.{layer}.")] = drawn
    tensors.pop("lm_head.weight", None)
    model.save_pretrained(folder, state_dict=tensors, max_shard_size="300KB")
    for file in tiny_folder.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def make_sliced(make_config: Callable, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Returns a function: choice -> Config of the source with model.slice; the cache stands below tmp_path."""
    monkeypatch.setenv("FORGEKIT_CACHE", str(tmp_path / "cache"))
    return lambda choice, **settings: make_config({"model.id": str(source), "model.slice": choice, **settings})


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


def read_logits(model: Any, processor: Any, media: bool = False) -> Any:
    """Return logits of two rows longer than the window, or of a picture and a sound: [rows, tokens, vocabulary].

    In float64, because products of float32 round differently (1.4e-6 seen) with the layout of the weights in memory.
    """
    import torch

    if media:
        from forgekit.model import tiny_material, tiny_pretrain

        generator = random.Random(3)
        rows = [
            tiny_pretrain.encode_dialogues(
                processor, ["Read."], ["A"], [tiny_material.draw_picture(generator)[0]], None
            ),
            tiny_pretrain.encode_dialogues(processor, ["Read."], ["A"], None, [tiny_material.draw_sound(generator)[0]]),
        ]
    else:
        ids = torch.randint(10, 250, (2, 90), generator=torch.Generator().manual_seed(2))
        rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    rows = [
        {name: value.double() if value.is_floating_point() else value for name, value in row.items()} for row in rows
    ]
    with torch.no_grad():
        return [model.double()(**row, use_cache=False).logits for row in rows]


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
    name: str, make_sliced: Callable, make_config: Callable, source: Path
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
    make_sliced: Callable, make_config: Callable, source: Path, monkeypatch: pytest.MonkeyPatch
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


# ---- in a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_s_slice_is_made_once_and_anew_from_a_changed_source(
    make_sliced: Callable, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(source, mine)
    config = make_sliced(CHOICES["as e2b is cut"], **{"model.id": str(mine)})
    first = find_weights(config)
    assert first.startswith(str(tmp_path / "cache" / "slices" / "mine-9-layers-"))
    assert f"Made once, into {first}" in capsys.readouterr().out
    assert find_weights(config) == first and capsys.readouterr().out == ""
    assert find_weights(config.change({"model.slice": {"skip": "6-8"}})) != first
    shard = next(mine.glob("*.safetensors"))
    shard.touch()
    assert find_weights(config) != first


def test_the_plan_counts_a_slice_without_making_it(make_sliced: Callable, tmp_path: Path) -> None:
    plan = plan_layers(make_sliced(CHOICES["as e2b is cut"], **{"adapter.layers": ["mlp"]}))
    assert "sliced as model.slice says" in plan.source
    assert len(plan.modules) == 9 * 3 and not (tmp_path / "cache" / "slices").exists()


def test_an_adapter_of_a_slice_finds_its_base_again_and_nobody_takes_the_whole_one(
    make_sliced: Callable, source: Path, tmp_path: Path
) -> None:
    import torch
    from peft import PeftConfig
    from transformers import AutoConfig

    from forgekit import add_adapter, load_export
    from forgekit.export.adapter import export_adapter
    from forgekit.export.merged import export_merged

    config = make_sliced(CHOICES["as e2b is cut"])
    model, processor = load_model(config)
    model = add_adapter(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    expected = read_logits(model, processor)
    export_adapter(model, processor, config, tmp_path / "lora")
    export_merged(model, processor, config, tmp_path / "merged")
    for folder, bound in (("lora", 1e-6), ("merged", 1e-4)):
        again, _ = load_export(tmp_path / folder, config)
        assert measure_difference(read_logits(again, processor), expected) <= bound
    base = PeftConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path
    assert base == f'{source}#slice={{"skip":"6-8","widths":{WIDTH // 2}}}'
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(base)


def test_the_run_s_record_names_the_slice(make_sliced: Callable) -> None:
    from forgekit import start_run
    from forgekit.run_folder import read_json

    config = make_sliced(CHOICES["as e2b is cut"])
    run = start_run(config, "cut")
    run.update(**slicing.record_slice(config))
    record = read_json(run.path / "run.json")
    assert record["slice"]["folder"] == find_weights(config) and record["slice"]["skipped"] == [6, 7, 8]
    assert record["settings"]["model.slice"] == {"value": CHOICES["as e2b is cut"], "from": "notebook"}
    assert slicing.record_slice(config.change({"model.slice": {}})) == {}


# ---- the command, and what stops it ----------------------------------------------------------------------------------


def test_the_command_writes_the_slice(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "below" / "out"
    assert main(["slice", str(source), str(out), "--skip", "6-8", "--widths", "32", "9-11=64"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert json.loads((out / "slice.json").read_text())["widths"] == [32] * 6 + [64] * 3
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert main(["slice", str(source), str(out), "--skip", "6-8"]) == 1
    assert f"{out} exists, and nothing is written over." in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "Say what the slice leaves out: --preset, --skip or --widths."),
        (["--preset", "e2x"], 2, "('e2x' is none; did you mean e2b?). Meaning:"),
        (["--preset", "e2b", "--skip", "6-8"], 2, "a preset, or skip and widths, not both: e2b already says"),
        (["--preset", "E2B"], 1, "e2b is a slice of Gemma 3n E4B, which has 35 layers, and this has 12."),
        (["--skip", "six"], 2, "numbers and ranges such as 0-9,20 or last 8"),
        (["--skip", "40"], 1, "skip 40 asks for layer 40, and the model has layers 0 to 11"),
        (["--widths", "0-2=wide"], 2, "a mapping whose widths are one number, a list"),
        (["--widths", "128"], 1, "layer 0 has width 64, and 128 was asked for. A slice only leaves out"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], code: int, text: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["slice", str(source), str(tmp_path / "out"), *arguments]) == code
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def spoil(folder: Path, how: str) -> None:
    """Damage a checkpoint in one way."""
    from safetensors.torch import load_file, save_file

    config = folder / "config.json"
    settings = json.loads(config.read_text())
    shard = next(file for file in folder.glob("*.safetensors") if any("layers.0.mlp.up" in n for n in load_file(file)))
    if how == "llama":
        config.write_text(json.dumps({**settings, "model_type": "llama"}))
    elif how == "packed":
        config.write_text(json.dumps({**settings, "quantization_config": {"load_in_4bit": True}}))
    elif how == "config":
        config.unlink()
    elif how == "gone":
        shard.unlink()
    elif how == "damaged":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        tensors = load_file(shard)
        name = next(name for name in tensors if "layers.0.mlp.up_proj" in name)
        tensors |= {name: tensors[name][:5].clone()} if how == "short" else {}
        if how == "lost":
            del tensors[name]
        save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("llama", r"bad is of the type llama, and only Gemma 3n was trained so that parts of it work alone"),
        ("packed", r"bad holds quantised weights, which cannot be cut. Slice the 16-bit checkpoint"),
        ("config", r"is a folder but no checkpoint: it has no config.json"),
        ("gone", r"bad lacks model-0.*safetensors, which its index names. Fetch it again"),
        ("damaged", r"model-0.*safetensors cannot be read .* Fetch or save it again"),
        ("short", r"up_proj.weight has shape \[5, 32\], and config.json describes one of 64 in dimension 0"),
        ("lost", r"bad has 28 of the 29 tensors that a slice is cut from"),
    ],
)
def test_a_source_that_cannot_be_sliced_is_a_sentence(
    how: str, text: str, make_sliced: Callable, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    config = make_sliced(CHOICES["as e2b is cut"], **{"model.id": str(tmp_path / "bad")})
    with pytest.raises(ModelError, match=text):
        slice_checkpoint(config, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_too_small_a_disk_is_found_before_anything_is_written(
    make_sliced: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicing, "free_disk", lambda folder: 12_345)
    with pytest.raises(
        ModelError, match=r"out: the slice needs 0.1. GiB \([\d,]+ bytes\) and .* \(12,345 bytes\) free"
    ):
        slice_checkpoint(make_sliced(CHOICES["as e2b is cut"]), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_slice_that_fails_half_way_leaves_nothing(
    make_sliced: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, folder: Path) -> None:
        assert list(folder.glob("*.safetensors"))  # the weights stand in the temporary folder
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slicing, "copy_beside", fail)
    with pytest.raises(ModelError, match=r"out cannot be written: .*No space left on device. Nothing of it is left"):
        slice_checkpoint(make_sliced(CHOICES["as e2b is cut"]), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
