"""A model whose adapter says something, as after training, and what it makes of a fixed text."""

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
