"""Losses of held-out rows by the fast path: the same numbers as by the model's own forward, and the model left as it was."""

from typing import Any

import pytest

from forgekit import add_adapter, disable_fast_path, enable_fast_path, evaluate_model, load_model
from forgekit.data.messages import check_example, make_message
from forgekit.evaluate.loss import measure_rows, sum_losses
from forgekit.train import score
from forgekit.train.fast_path import get_fast_path

CHATS = [
    check_example({"messages": [make_message("user", f"Question {i}" + " again" * i), make_message("assistant", a)]})
    for i, a in enumerate(["7", "no", "Monday at the latest, please", "8 9", '{"city": "Lima"}'])
]
CHATS.append([*CHATS[0], make_message("user", "And then?"), make_message("assistant", "2 of them")])


@pytest.fixture
def loaded(make_config: Any) -> Any:
    import torch

    config = make_config({"evaluate.rows": "none", "evaluate.metric": "loss"})
    model, processor = load_model(config)
    model = add_adapter(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return model, processor, config


def compare_losses(model: Any, processor: Any, config: Any, chats: Any) -> None:
    expected = measure_rows(model, processor, chats, sum_losses)
    with score.open_losses(model, config) as losses:
        assert losses is not sum_losses
        found = measure_rows(model, processor, chats, losses)
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)


def test_each_rows_loss_is_the_library_forwards(loaded: Any) -> None:
    compare_losses(*loaded, CHATS)
    with loaded[0].disable_adapter():
        compare_losses(*loaded, CHATS)


def test_so_is_that_of_rows_with_pictures(loaded: Any) -> None:
    from PIL import Image

    chats = [
        [{**chat[0], "content": [{"type": "image", "image": Image.new("RGB", (64, 64), colour)}, *chat[0]["content"]]}, chat[1]]
        for chat, colour in zip(CHATS[:3], ("red", "green", "blue"), strict=True)
    ]  # fmt: skip
    compare_losses(*loaded, [*chats, CHATS[3]])


def test_rows_that_are_mixed_up_turn_that_check_red(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = score.sum_losses_fast
    monkeypatch.setattr(score, "sum_losses_fast", lambda *args: real(*args).flip(0))
    with pytest.raises(AssertionError):
        compare_losses(*loaded, CHATS)


@pytest.mark.parametrize(("fast", "used"), [("auto", True), ("on", True), ("off", False)])
def test_train_fast_decides_and_nothing_stays_behind(
    fast: str, used: bool, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    model, processor, config = loaded
    calls: list[int] = []
    real = score.sum_losses_fast
    monkeypatch.setattr(score, "sum_losses_fast", lambda *args: calls.append(1) or real(*args))
    rows = Dataset.from_list([{"messages": chat} for chat in CHATS[:4]])
    scores = evaluate_model(model, processor, rows, config.change({"train.fast": fast}))
    assert bool(calls) is used and get_fast_path(model) is None and "forward" not in vars(model.get_base_model())
    assert [row["tokens"] for row in scores.rows] == [n for _, n in measure_rows(model, processor, CHATS[:4])]


def test_a_fast_path_that_is_on_stays_on(loaded: Any) -> None:
    model, processor, config = loaded
    path = enable_fast_path(model)
    try:
        with score.open_losses(model, config):
            pass
        assert get_fast_path(model) is path
    finally:
        disable_fast_path(model)
