"""A model whose adapter says something, as after training, and what it makes of a fixed text."""

from pathlib import Path
from typing import Any

import pytest

from forgekit import add_adapter, load_model
from forgekit.data.collate import tokenize_chats
from forgekit.data.messages import check_example


@pytest.fixture
def make_learned(make_config: Any) -> Any:
    """Returns a function: settings -> (model, processor, config); every matrix of the adapter is drawn, none is zero."""
    import torch

    def build(settings: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
        config = make_config(settings)
        model, processor = load_model(config)
        model = add_adapter(model, config)
        generator = torch.Generator().manual_seed(11)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # the ones that start at zero
                parameter.data.normal_(0, 0.1, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        return model.eval(), processor, config

    return build


@pytest.fixture(scope="session")
def read_logits() -> Any:
    """Returns a function: (model, processor) -> float32 logits of two chats, [2, tokens, vocabulary]."""
    import torch

    chats = [
        check_example({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "4 5 6"}]})
        for text in ("Order 3 boxes of tea for Lima.", "1 + 2?")
    ]

    def read(model: Any, processor: Any) -> Any:
        batch = tokenize_chats(chats, processor, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits.float()
        return logits[batch["attention_mask"].bool()]

    return read


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, make_llama_folder: Any) -> Path:
    """A random Gemma 3n that llama.cpp can run: 20 layers with keys and values of their own and 2 that share them."""
    return make_llama_folder(tmp_path_factory.mktemp("llama") / "random-gemma3n", hidden_size=32)


@pytest.fixture(scope="session")
def make_llama_folder() -> Any:
    """Returns a function: (folder, hidden_size, text settings) -> the folder of a random checkpoint for llama.cpp."""
    from forgekit.data.samples.orders import load_orders
    from forgekit.model.tiny import build_config, build_model, build_processor, build_tokenizer

    def build(folder: Path, hidden_size: int, seed: int = 0, **text: Any) -> Path:
        tokenizer = build_tokenizer(row["message"] for row in load_orders(300))
        config = build_config(tokenizer, hidden_size=hidden_size, layers=22, shared_layers=2)
        for name, value in text.items():
            setattr(config.text_config, name, value)
        build_model(config, seed).save_pretrained(folder)
        build_processor(tokenizer).save_pretrained(folder)
        return folder

    return build
