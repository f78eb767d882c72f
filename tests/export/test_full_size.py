"""What only shows at size: memory and disk while merging, and the names in checkpoints of the released shapes."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from forgekit import load_config
from forgekit.export import changes, merged, shard
from forgekit.export.changes import Whole
from forgekit.export.merged import match_changes, merge_shards
from forgekit.layer_groups import expand_groups, find_group

MIB = 2**20
HAS_PEAK = os.access("/proc/self/clear_refs", os.W_OK)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A text model of 230 MB in files of at most 80 MB, the largest tensor 64 MB, and an adapter, also beside that."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 8}
    with torch.device("cpu"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **size)).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="80MB")
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "up_proj", "embed_tokens"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.normal_(0, 0.1)
    return model, folder


def measure_growth(model: Any, base: Path, folder: Path) -> tuple[int, int]:
    """Return by how many bytes this process grew at most while it merged, and the bytes on disk behind it."""
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = psutil.Process().memory_info().rss
    merge_shards(model, base, folder)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return peak - before, sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.skipif(not HAS_PEAK, reason="the system does not reset the peak of a process's memory")
def test_a_merge_holds_less_than_one_file_in_memory_and_writes_no_more_than_the_base(
    large: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base = large
    files = {file.name: file.stat().st_size for file in base.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) >= 3
    merge_shards(model, base, tmp_path / "first")  # what libraries take for themselves when they are first used
    growth, disk = measure_growth(model, base, tmp_path / "merged")
    largest = max(files.values())
    print(f"grew by {growth / MIB:.0f} MiB, largest file {largest / MIB:.0f} MiB")
    assert growth < largest
    assert disk == sum(files.values()) and {file.name for file in (tmp_path / "merged").iterdir()} == set(files)
    # mutant: whole tensors at a time
    monkeypatch.setattr(merged, "split_rows", lambda tensor: shard.split_rows(tensor, 2**40))
    growth, _ = measure_growth(model, base, tmp_path / "mutant")
    assert growth > largest


@pytest.mark.parametrize("size", ["E2B", pytest.param("E4B", marks=pytest.mark.slow)])
def test_names_of_the_released_shapes_fit(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: every adapted module of every group has its weight in the files; what transformers does not
    load, the keys and values of the sharing layers, stands in the files and is left as it is."""
    import torch

    from forgekit.adapter.lora import describe_lora
    from forgekit.model.shapes import choose_class, make_released_config

    settings = make_released_config(size)
    layers = ["attention", "mlp", "laurel", "per_layer", "per_layer_embeddings", "vision_tower", "vision", "audio", "audio_convolutions"]  # fmt: skip
    config = load_config(None, {"model.id": f"google/gemma-3n-{size}-it", "model.engine": "huggingface", "model.load_in": "16bit", "adapter.layers": layers})  # fmt: skip
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = choose_class(settings)(settings)
        model.tie_weights()
        names = set(model.state_dict()) - {"lm_head.weight"}
        model = get_peft_model(model, LoraConfig(**describe_lora(model, config)), low_cpu_mem_usage=True)
    text = settings.text_config
    unused = {
        f"model.language_model.layers.{layer}.self_attn.{part}.weight"
        for layer in range(text.num_hidden_layers - text.num_kv_shared_layers, text.num_hidden_layers)
        for part in ("k_proj", "v_proj", "k_norm")
    }
    assert not unused & names and len(unused) == 3 * text.num_kv_shared_layers
    write_header(tmp_path / "model.safetensors", sorted(names | unused))
    monkeypatch.setattr(changes, "read_layer", lambda name, layer: Whole(layer.get_base_layer().weight))
    found = match_changes(model, [tmp_path / "model.safetensors"])
    assert len(found) > 400 and found.keys() <= names
    groups = {find_group(name.removesuffix(".weight")) for name in found}
    assert groups == set(expand_groups(tuple(layers)))


def write_header(path: Path, names: list[str]) -> None:
    """Write a safetensors file of empty tensors."""
    header = {name: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for name in names}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
