"""Held-out rows: the same on every machine, never on both sides."""

import random

import pytest

from forgekit.data import split
from forgekit.data.messages import make_message
from forgekit.data.split import count_held_out, count_rows, hash_prompt
from forgekit.errors import DataError


def chat(question: str, answer: str = "4", system: str | None = None) -> list[dict]:
    head = [make_message("system", system)] if system else []
    return [*head, make_message("user", question), make_message("assistant", answer)]


def hold_out(hashes: list[str], sizes: dict[str, int]) -> dict[str, list[int]]:
    return {name: numbers.tolist() for name, numbers in split.hold_out(hashes, sizes).items()}


# ---- hashes ----------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_prompt_is_the_one_it_always_was() -> None:
    """sha256 of "3407", a line feed and "user: 2 + 2?", as `printf '3407\\nuser: 2 + 2?' | sha256sum` prints it."""
    assert hash_prompt(chat("2 + 2?"), 3407) == "02f3c8fef55528f2a190e583279379e466581b5b433bffdcf124395a42e5b1ac"
    with_system = chat("2 + 2?", system="Be brief.")
    assert hash_prompt(with_system, 3407) == "2cf80e431e9b5a92d2814d381fb8ebf4244fa509e27cf67c8372f3beb19934e5"


def test_only_the_turns_before_the_first_answer_count_case_and_space_folded() -> None:
    longer = [*chat("2 + 2?"), *chat("And 3 + 3?", "6")]
    same = [chat("2 + 2?", "five"), chat("  2  +\n2? "), longer]
    assert {hash_prompt(messages, 1) for messages in same} == {hash_prompt(chat("2 + 2?"), 1)}
    assert hash_prompt(chat("Is IT?"), 1) == hash_prompt(chat("is it?"), 1)


def test_another_question_system_text_or_seed_gives_another_hash() -> None:
    others = [
        hash_prompt(chat("2 + 2?"), 1),
        hash_prompt(chat("2 + 3?"), 1),
        hash_prompt(chat("2 + 2?", system="x"), 1),
        hash_prompt(chat("2 + 2?"), 2),
    ]
    assert len(set(others)) == 4


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "total", "number"),
    [(5, 10, 5), (50, 10, 50), (0.1, 100, 10), (0.25, 10, 2), (0.999, 10, 10), (1, 10, 1)],
)
def test_a_share_or_a_number_becomes_a_number_of_rows(wanted: float, total: int, number: int) -> None:
    assert count_rows(wanted, total) == number


@pytest.mark.parametrize(("wanted", "number"), [(10, 10), (11, 11), (0.99, 10), (0.01, 0), (0, 0), (-1, -1)])
def test_holding_out_none_or_all_is_refused(wanted: float, number: int) -> None:
    with pytest.raises(DataError) as caught:
        count_held_out(wanted, 10, "data.test")
    assert str(caught.value) == (
        f"data.test is {wanted}: that is {number} of 10 rows. At least one row must be held out, and one left to learn from."
    )


# ---- dealing ---------------------------------------------------------------------------------------------------------


def test_the_held_out_rows_are_the_ones_they_always_were() -> None:
    hashes = [hash_prompt(chat(f"question {number}"), 3407) for number in range(20)]
    assert hold_out(hashes, {"test": 3, "validation": 4}) == {
        "test": [12, 15, 17],
        "validation": [11, 14, 16, 18],
        "train": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 19],
    }


def test_each_row_stands_in_exactly_one_part() -> None:
    hashes = [f"{random.Random(number).random():.2f}" for number in range(500)]
    parts = hold_out(hashes, {"test": 50, "validation": 30})
    assert sorted(row for rows in parts.values() for row in rows) == list(range(500))
    assert all(rows == sorted(rows) for rows in parts.values())


def test_equal_prompts_never_stand_on_both_sides() -> None:
    hashes = [f"{random.Random(number).random():.1f}" for number in range(200)]  # eleven prompts, each many times
    parts = hold_out(hashes, {"test": 30, "validation": 30})
    sides = [{hashes[row] for row in rows} for rows in parts.values()]
    assert all(sides)
    assert sum(map(len, sides)) == len(set(hashes))
    assert len(parts["test"]) >= 30


def test_without_equal_prompts_the_sizes_are_exact() -> None:
    parts = hold_out([str(number) for number in range(100)], {"test": 10, "validation": 20})
    assert {name: len(rows) for name, rows in parts.items()} == {"test": 10, "validation": 20, "train": 70}


def test_the_choice_follows_the_prompts_and_not_their_order() -> None:
    hashes = [hash_prompt(chat(f"question {number}"), 3407) for number in range(50)]
    order = random.Random(5).sample(range(50), 50)
    there = {hashes[row] for row in hold_out(hashes, {"test": 10})["test"]}
    shuffled = [hashes[row] for row in order]
    assert {shuffled[row] for row in hold_out(shuffled, {"test": 10})["test"]} == there


def test_more_rows_keep_most_held_out_rows_held_out() -> None:
    """A prompt's place depends on its own hash, so a data set that grows a little does not mix the sides again."""
    hashes = [hash_prompt(chat(f"question {number}"), 3407) for number in range(110)]
    before = set(hold_out(hashes[:100], {"test": 20})["test"])
    after = set(hold_out(hashes, {"test": 20})["test"])
    assert len(before & after) >= 15


def test_nothing_is_held_out_where_nothing_was_asked_for() -> None:
    assert hold_out(["b", "a"], {}) == {"train": [0, 1]}
    assert hold_out([], {"test": 1}) == {"test": [], "train": []}
