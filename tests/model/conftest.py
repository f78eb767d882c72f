"""A checkpoint that slices are cut from, and what a model makes of fixed rows."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAYERS, SHARED, WIDTH = 12, 6, 64
ROUND = ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def read_logits() -> Callable:
    """Returns a function: (model, processor, media) -> logits."""
    import torch

    def read(model: Any, processor: Any, media: bool = False) -> Any:
        """Return logits of two rows longer than the window, or of a picture and a sound: [rows, tokens, vocabulary].

        In float64, because products of float32 round differently (1.4e-6 seen) with the layout of the weights in memory.
        """

        if media:
            from forgekit.model import tiny_material, tiny_pretrain

            generator = random.Random(3)
            rows = [
                tiny_pretrain.encode_dialogues(
                    processor, ["Read."], ["A"], [tiny_material.draw_picture(generator)[0]], None
                ),
                tiny_pretrain.encode_dialogues(
                    processor, ["Read."], ["A"], None, [tiny_material.draw_sound(generator)[0]]
                ),
            ]
        else:
            ids = torch.randint(10, 250, (2, 90), generator=torch.Generator().manual_seed(2))
            rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
        rows = [
            {name: value.double() if value.is_floating_point() else value for name, value in row.items()}
            for row in rows
        ]
        with torch.no_grad():
            return [model.double()(**row, use_cache=False).logits for row in rows]

    return read
