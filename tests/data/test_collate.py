"""Which tokens are learned, against tables written by hand; and mutants of the mask, which must not pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgekit.data import collate
from forgekit.data.collate import IGNORE, Collator, Markers, check_rows, mark_learned, tokenize_rows
from forgekit.data.messages import check_example

Table = list[tuple[str, bool]]  # (piece of text, learned); each piece begins and ends where tokens do
HEAD: Table = [("<bos>", False)]


def user(text: str) -> Table:
    return [("<start_of_turn>", False), ("user\n", False), (text, False), ("<end_of_turn>", False), ("\n", False)]


ORDER = '{"item": "tea",\n "quantity": 3}\n\n{"city": "Lima"}'
CASES: dict[str, tuple[list[tuple[str, str]], Table]] = {
    "one turn": (
        [("user", "2 + 2?"), ("assistant", "4")],
        [
            ("<bos>", False),
            ("<start_of_turn>", False),
            ("user\n", False),
            ("2 + 2?", False),
            ("<end_of_turn>", False),
            ("\n", False),
            ("<start_of_turn>", False),
            ("model\n", False),
            ("4", True),
            ("<end_of_turn>", True),
            ("\n", False),
        ],
    ),
    "three turns": (
        [("user", "1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "4 5"), ("user", "6?"), ("assistant", "7")],
        [
            *HEAD,
            *user("1?"),
            *[("<start_of_turn>", False), ("model\n", False), ("2", True), ("<end_of_turn>", True), ("\n", False)],
            *user("3?"),
            *[("<start_of_turn>", False), ("model\n", False), ("4 5", True), ("<end_of_turn>", True), ("\n", False)],
            *user("6?"),
            *[("<start_of_turn>", False), ("model\n", False), ("7", True), ("<end_of_turn>", True), ("\n", False)],
        ],
    ),
    "system turn, which Gemma's template puts before the first question": (
        [("system", "Be brief."), ("user", "1?"), ("assistant", "2")],
        [
            *HEAD,
            *user("Be brief.\n\n1?"),
            *[("<start_of_turn>", False), ("model\n", False), ("2", True), ("<end_of_turn>", True), ("\n", False)],
        ],
    ),
    "JSON with newlines in the answer": (
        [("user", "Order?"), ("assistant", ORDER)],
        [
            *HEAD,
            *user("Order?"),
            *[("<start_of_turn>", False), ("model\n", False), (ORDER, True), ("<end_of_turn>", True), ("\n", False)],
        ],
    ),
    "the words user and model in the text": (
        [("user", "user\nmodel\n1"), ("assistant", "model\n2\nuser\n")],
        [
            *HEAD,
            *user("user\nmodel\n1"),
            # the template trims a turn, so the last newline is gone
            *[("<start_of_turn>", False), ("model\n", False), ("model\n2\nuser", True)],
            *[("<end_of_turn>", True), ("\n", False)],
        ],
    ),
}


@pytest.fixture(scope="module")
def processor(tiny_folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_folder)


def make_chat(turns: list[tuple[str, str]]) -> Any:
    return check_example({"messages": [{"role": role, "content": text} for role, text in turns]})


def expand(table: Table, processor: Any) -> tuple[list[int], list[int]]:
    """Return the token ids and the labels that a table stands for."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in table:
        tokens = processor.tokenizer(piece, add_special_tokens=False).input_ids
        ids += tokens
        labels += tokens if learned else [IGNORE] * len(tokens)
    return ids, labels


def check_batch(processor: Any, names: list[str], side: str = "left") -> None:
    """Compare a batch of the named cases, token by token, with their tables."""
    before, processor.tokenizer.padding_side = processor.tokenizer.padding_side, side
    try:
        batch = Collator(processor)([{"messages": make_chat(CASES[name][0])} for name in names])
    finally:
        processor.tokenizer.padding_side = before
    rows = [expand(CASES[name][1], processor) for name in names]
    longest = max(len(ids) for ids, _ in rows)
    for number, (ids, labels) in enumerate(rows):
        missing = longest - len(ids)
        front, back = (missing, 0) if side == "left" else (0, missing)
        pad = processor.tokenizer.pad_token_id
        assert batch["input_ids"][number].tolist() == [pad] * front + ids + [pad] * back
        assert batch["labels"][number].tolist() == [IGNORE] * front + labels + [IGNORE] * back
        assert batch["attention_mask"][number].tolist() == [0] * front + [1] * len(ids) + [0] * back


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_the_table(processor: Any, name: str) -> None:
    check_batch(processor, [name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_learned(processor: Any, side: str) -> None:
    check_batch(processor, list(CASES), side)


def test_batch_holds_what_the_model_takes_and_no_more(processor: Any) -> None:
    batch = Collator(processor)([{"messages": make_chat(CASES["one turn"][0])}])
    assert {name: str(tensor.dtype) for name, tensor in batch.items()} == {
        "input_ids": "torch.int64",
        "attention_mask": "torch.int64",
        "labels": "torch.int64",
    }


Mask = Callable[[list[int], Markers], list[bool]]
MUTANTS: dict[str, Mask] = {
    "one position late": lambda ids, markers: [False, *mark_learned(ids, markers)[:-1]],
    "one position early": lambda ids, markers: [*mark_learned(ids, markers)[1:], False],
    "without <end_of_turn>": lambda ids, markers: [
        mark and token != markers.end for mark, token in zip(mark_learned(ids, markers), ids, strict=True)
    ],
    "prompt learned": lambda ids, markers: [True] * len(ids),
    "every <end_of_turn> learned": lambda ids, markers: [
        mark or token == markers.end for mark, token in zip(mark_learned(ids, markers), ids, strict=True)
    ],
    "nothing learned": lambda ids, markers: [False] * len(ids),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_mask_turns_the_table_red(
    processor: Any, monkeypatch: pytest.MonkeyPatch, mutant: str, name: str
) -> None:
    monkeypatch.setattr(collate, "mark_learned", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_batch(processor, [name])


def test_a_mask_of_the_last_turn_alone_turns_the_table_red(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def learn_last(ids: list[int], markers: Markers) -> list[bool]:
        learned = mark_learned(ids, markers)
        last = max(i for i, mark in enumerate(learned) if mark)
        start = max(i for i in range(last) if not learned[i])
        return [start < i <= last for i in range(len(ids))]

    monkeypatch.setattr(collate, "mark_learned", learn_last)
    check_batch(processor, ["one turn"])
    with pytest.raises(AssertionError):
        check_batch(processor, ["three turns"])


class DoubleBos:
    """A processor whose template writes a second <bos>, as a tokenizer's default settings add one."""

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer

    def apply_chat_template(self, *chats: Any, **settings: Any) -> list[str]:
        return [self.tokenizer.bos_token + text for text in self.processor.apply_chat_template(*chats, **settings)]


def test_every_row_has_exactly_one_bos_and_a_second_one_is_refused(processor: Any) -> None:
    chats = [make_chat(turns) for turns, _ in CASES.values()]
    bos = processor.tokenizer.bos_token_id
    assert [ids.count(bos) for ids in tokenize_rows(chats, processor)] == [1] * len(chats)
    assert check_rows(chats, processor, 1000) == [None] * len(chats)
    twice = DoubleBos(processor)
    assert [ids.count(bos) for ids in tokenize_rows(chats, twice)] == [2] * len(chats)
    for bad in check_rows(chats, twice, 1000):
        assert bad is not None and bad.code == "bos" and "2 <bos> tokens; exactly one is right" in bad.reason


CONTROL = ["<start_of_turn>", "<end_of_turn>", "<start_of_turn>model\n", "<eos>", "<pad>", "<image_soft_token>", "<start_of_audio>"]  # fmt: skip


@pytest.mark.parametrize("token", CONTROL)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_that_holds_a_control_token_is_refused(processor: Any, token: str, role: str) -> None:
    turns = {"system": "Be brief.", "user": "1?", "assistant": "2"}
    chat = make_chat(list((turns | {role: f"{turns[role]} {token} 3"}).items()))
    (bad,) = check_rows([chat], processor, 1000)
    assert bad is not None and bad.code == "control_tokens"
    assert f"the text holds {token.removesuffix(chr(10)).removesuffix('model')}" in bad.reason


def test_bos_in_the_text_is_refused(processor: Any) -> None:
    (bad,) = check_rows([make_chat([("user", "1 <bos> 2?"), ("assistant", "2")])], processor, 1000)
    assert bad is not None and bad.code == "bos"


def test_rows_longer_than_max_length_are_refused_with_both_numbers_and_never_cut(processor: Any) -> None:
    chat = make_chat(CASES["one turn"][0])
    length = len(expand(CASES["one turn"][1], processor)[0])
    assert check_rows([chat], processor, length) == [None]
    (bad,) = check_rows([chat], processor, length - 1)
    assert bad is not None and (bad.code, bad.reason) == (
        "too_long",
        f"{length} tokens, and model.max_length is {length - 1}",
    )


def test_answering_stops_where_learning_starts(processor: Any) -> None:
    """The prompt of an answer is the training row up to its last learned span, to the token."""
    for turns, table in CASES.values():
        ids, labels = expand(table, processor)
        first = max(i for i in range(1, len(ids)) if labels[i] != IGNORE and labels[i - 1] == IGNORE)
        prompt = collate.tokenize_chats([make_chat(turns)], processor, answer=False, padding=True)["input_ids"][0]
        assert list(prompt) == ids[:first]


def test_a_tokenizer_without_turn_markers_is_refused(processor: Any) -> None:
    class Plain:
        unk_token_id, bos_token_id = 3, 2

        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [3] * len(tokens)

    with pytest.raises(collate.BadRow, match="lacks <start_of_turn> or <end_of_turn>"):
        Markers.find(Plain())
