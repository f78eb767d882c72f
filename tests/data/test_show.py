"""What a person sees of an example is what the training batch holds."""

import html
import re
from pathlib import Path
from typing import Any

import pytest

from forgekit.data import show
from forgekit.data.collate import IGNORE, Collator
from forgekit.data.messages import check_example
from forgekit.data.show import show_example, show_labels

EXAMPLE = {"messages": check_example({"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 1 < 2 & 3?"},
    {"role": "assistant", "content": "yes\n<b>1</b>"},
    {"role": "user", "content": "4?"},
    {"role": "assistant", "content": "no"},
]})}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tiny_folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_folder)


def check_shown(processor: Any) -> None:
    """Compare what is marked, as text and as HTML, with the labels of the batch."""
    picture = show_labels(EXAMPLE, processor)
    batch = Collator(processor)([EXAMPLE])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    head, text = repr(picture).split("\n", 1)
    learned = sum(label != IGNORE for label in labels)
    assert head == f"{len(ids)} tokens, {learned} learned ({learned / len(ids):.0%})"
    assert text.replace("[[", "").replace("]]", "") == processor.tokenizer.decode(ids)
    assert re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL) == ["yes\n<b>1</b><end_of_turn>", "no<end_of_turn>"]
    spans = re.findall(r"<span title='(learned|read only)'", picture._repr_html_())
    assert [title == "learned" for title in spans] == [label != IGNORE for label in labels]


def test_marked_tokens_are_the_learned_ones(processor: Any) -> None:
    check_shown(processor)


def test_a_picture_with_a_mask_of_its_own_turns_the_check_red(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = show.mark_learned
    monkeypatch.setattr(show, "mark_learned", lambda ids, markers: [False, *real(ids, markers)[:-1]])
    with pytest.raises(AssertionError):
        check_shown(processor)


def test_example_shows_every_turn_and_escapes_html() -> None:
    picture = show_example(EXAMPLE)
    assert repr(picture).startswith("system: Be brief.\nuser: Is 1 < 2 & 3?\nassistant: yes\n<b>1</b>\nuser: 4?")
    body = picture._repr_html_()
    assert body.count("<tr>") == 5
    assert html.escape("yes\n<b>1</b>") in body and "<b>" not in body


def test_labels_escape_html(processor: Any) -> None:
    body = show_labels(EXAMPLE, processor)._repr_html_()
    assert "<b>" not in body and "&lt;start_of_turn&gt;" in body


def test_a_picture_is_one_chip_with_its_number_of_tokens(processor: Any) -> None:
    from PIL import Image

    content = [{"type": "image", "image": Image.new("RGB", (64, 64))}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, *EXAMPLE["messages"][-1:]]
    picture = show_labels({"messages": turns}, processor)
    number = processor.image_seq_length
    assert f"<image_soft_token> x {number} " in repr(picture)
    (chip,) = re.findall(r"<span title='read only, (\d+) tokens' style='([^']*)'", picture._repr_html_())
    assert chip == (str(number), f"{show.CHIP};margin-right:1px")
