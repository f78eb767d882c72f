"""ChatPanel: both sides of one model answer as they would alone, a turn can be stopped, and a cell goes first."""

import copy
import threading
from typing import Any

import pytest
import torch

from forgekit import add_adapter, generate_answer, load_model
from forgekit.errors import ModelError
from forgekit.panels import chat
from forgekit.panels.chat import BUSY, ChatPanel

QUESTION = "Turn this order into JSON: tea"


@pytest.fixture
def models(make_config: Any) -> tuple[Any, Any, Any]:
    """A model whose adapter changes its answers, the model it was made from, and the processor."""
    config = make_config()
    base, processor = load_model(config)
    plain = copy.deepcopy(base)
    model = add_adapter(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.5, generator=generator)
    return model, plain, processor


def make_panel(model: Any, processor: Any) -> Any:
    """Return a panel that answers without chance, six tokens at most."""
    panel = ChatPanel(model, processor)
    assert panel.box
    panel.widgets.top_k.value, panel.widgets.max_new_tokens.value = 1, 6
    return panel


def ask(panel: Any, message: str) -> None:
    panel.widgets.message.value = message
    panel.widgets.send.click()
    if panel.worker:
        panel.worker.join()


def test_both_sides_answer_as_they_would_alone_and_remember_their_own_words(models: Any) -> None:
    model, plain, processor = models
    panel = make_panel(model, processor)
    ask(panel, QUESTION)
    ask(panel, "And now?")
    for side, alone in {"Tuned model": model, "Base model": plain}.items():
        turns: list[Any] = []
        for question in (QUESTION, "And now?"):
            turns.append({"role": "user", "content": question})
            answer = generate_answer(alone, processor, turns, max_new_tokens=6, temperature=0, stream=False)
            turns.append({"role": "assistant", "content": answer or "..."})
        said = ["".join(part["text"] for part in turn["content"]) for turn in panel.chats[side]]
        assert said == [turn["content"].strip() for turn in turns], side
    assert panel.chats["Tuned model"][1] != panel.chats["Base model"][1]
    assert "Answered" in panel.widgets.status.value and panel.widgets.message.value == ""
    panel.widgets.clear.click()
    assert panel.widgets.turns.children == () and panel.chats == {"Tuned model": [], "Base model": []}


def test_stop_ends_the_answer_and_the_adapter_is_back(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, processor = models
    panel = make_panel(model, processor)
    panel.widgets.max_new_tokens.value = 200
    begun = threading.Event()
    real = chat.write_answer

    def write(side: str, text: str) -> str:
        if side == "Base model" and text:
            begun.set()
        return real(side, text)

    def wait_then_stop() -> None:
        assert begun.wait(30)
        panel.widgets.stop.click()

    monkeypatch.setattr(chat, "write_answer", write)
    stopper = threading.Thread(target=wait_then_stop)
    stopper.start()
    ask(panel, QUESTION)
    stopper.join()
    assert "Stopped" in panel.widgets.status.value and panel.widgets.stop.disabled and not panel.widgets.send.disabled
    assert not [layer for layer in model.modules() if getattr(layer, "disable_adapters", False) is True]


def test_a_cell_goes_first(models: Any) -> None:
    model, _, processor = models
    panel = make_panel(model, processor)
    panel.begin_cell()
    ask(panel, QUESTION)
    assert BUSY in panel.widgets.status.value and panel.worker is None and not panel.chats["Tuned model"]
    panel.end_cell()
    panel.widgets.max_new_tokens.value = 200
    panel.widgets.message.value = QUESTION
    panel.widgets.send.click()
    panel.begin_cell()
    assert not panel.worker.is_alive() and "Stopped" in panel.widgets.status.value


def test_what_goes_wrong_is_said_in_the_panel(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, processor = models
    panel = make_panel(model, processor)
    ask(panel, "  ")
    assert "Write a message first." in panel.widgets.status.value

    def fail(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(chat, "generate_answer", fail)
    ask(panel, QUESTION)
    assert "RuntimeError: CUDA out of memory" in panel.widgets.status.value and not panel.widgets.send.disabled


def test_a_model_without_adapter_has_one_side(models: Any) -> None:
    _, plain, processor = models
    assert list(ChatPanel(plain, processor).sides) == ["Tuned model"]
    assert ChatPanel(plain, processor)._repr_mimebundle_().keys() == {"text/plain"}
    with pytest.raises(ModelError, match="base=True needs a model with an adapter"):
        ChatPanel(plain, processor, base=True)
