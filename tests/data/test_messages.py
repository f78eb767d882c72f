"""The one form that every example has, and what is refused on the way to it."""

from typing import Any

import pytest

from forgekit.data.clean import BadRow
from forgekit.data.messages import ROLES, check_example, get_answer, get_text, make_message

USER, ASSISTANT, SYSTEM = (
    make_message("user", "1?"),
    make_message("assistant", "2"),
    make_message("system", "Be brief."),
)


def part(**values: Any) -> dict[str, Any]:
    """An example whose question is one part."""
    return {"messages": [{"role": "user", "content": [values]}, ASSISTANT]}


def test_text_becomes_a_list_with_one_text_part() -> None:
    example = {"messages": [{"role": "human", "content": "2 + 2?"}, {"role": "gpt", "content": "4"}]}
    assert check_example(example) == [
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]


def test_a_checked_example_stays_as_it_is() -> None:
    once = check_example({"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]})
    assert check_example({"messages": once}) == once


def test_the_example_itself_is_not_changed() -> None:
    example = {"messages": ({"role": "human", "content": "1?"}, {"role": "gpt", "content": "2"})}
    check_example(example)
    assert example == {"messages": ({"role": "human", "content": "1?"}, {"role": "gpt", "content": "2"})}


def test_keys_that_arrow_added_are_taken_away() -> None:
    messages = check_example(part(type="text", text="1?", image=None, audio=None))
    assert messages[0]["content"] == [{"type": "text", "text": "1?"}]


@pytest.mark.parametrize("role", ROLES)
def test_every_known_role_is_one_of_three(role: str) -> None:
    assert ROLES[role] in ("system", "user", "assistant")


def test_texts_are_joined_and_the_answer_is_the_last_turn_trimmed() -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b\n"}]}
    messages = check_example({"messages": [USER, ASSISTANT, USER, answer]})
    assert get_text(messages[-1]) == " ab\n"
    assert get_answer(messages) == "ab"


@pytest.mark.parametrize(
    ("messages", "code", "reason"),
    [
        ([USER], "no_assistant_turn", "no assistant turn to learn from (roles: user)"),
        ([SYSTEM, USER], "no_assistant_turn", "(roles: system, user)"),
        ([], "no_assistant_turn", "(roles: none)"),
        ([ASSISTANT], "roles_out_of_order", "turns must go user, assistant, user, assistant ... and end with assistant (roles: assistant)"),
        ([USER, ASSISTANT, USER], "roles_out_of_order", "(roles: user, assistant, user)"),
        ([USER, USER, ASSISTANT], "roles_out_of_order", "(roles: user, user, assistant)"),
        ([USER, SYSTEM, ASSISTANT], "roles_out_of_order", "(roles: user, system, assistant)"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "roles_out_of_order", "(roles: system, system, user, assistant)"),
        ([USER, make_message("assistant", "")], "empty_answer", "an assistant turn is empty"),
        ([USER, make_message("assistant", " \n")], "empty_answer", "an assistant turn is empty"),
        ([USER, {"role": "assistant", "content": []}], "empty_answer", "an assistant turn is empty"),
        ([USER, make_message("assistant", ""), USER, ASSISTANT], "empty_answer", "an assistant turn is empty"),
        ([{"role": "robot", "content": "x"}], "unknown_role", "role 'robot'; known are system, developer, user"),
        ([{"role": None, "content": "x"}], "unknown_role", "role None"),
        ([{"role": ["user"], "content": "x"}], "unknown_role", "role ['user']"),
        ([{"role": "User", "content": "x"}], "unknown_role", "role 'User'"),
        ([{"role": "user"}], "wrong_type", "a turn is {'role': ..., 'content': ...}, not {'role': 'user'}"),
        (["hello"], "wrong_type", "not 'hello'"),
        ([{"role": "user", "content": 5}], "wrong_type", "the content of a turn is text or a list of parts, not int"),
        ([{"role": "user", "content": None}], "wrong_type", "not NoneType"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_learned_from_are_refused(messages: list, code: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        check_example({"messages": messages})
    assert caught.value.code == code
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("example", "code", "reason"),
    [
        (part(type="smell", smell="a.png"), "unknown_part", "a part of type 'smell'"),
        (part(type="text"), "wrong_type", "a text part holds a string, not NoneType"),
        (part(type="text", text=5), "wrong_type", "a text part holds a string, not int"),
        (part(text="no type"), "wrong_type", "a part is {'type': 'text', 'text': ...}"),
        (part(type="text", text="a\0b"), "not_text", "NUL or half a character"),
        (part(type="text", text="a\ud83d"), "not_text", "NUL or half a character"),
        ({"messages": [{"role": "user", "content": ["1?"]}, ASSISTANT]}, "wrong_type", "not '1?'"),
        ({}, "no_messages", "to_example must return {'messages': [...]}, not {}"),
        (None, "no_messages", "not None"),
        ([USER, ASSISTANT], "no_messages", "to_example must return"),
        ({"messages": "text"}, "no_messages", "to_example must return"),
    ],
)
def test_parts_and_examples_of_the_wrong_shape_are_refused(example: Any, code: str, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        check_example(example)
    assert caught.value.code == code
    assert reason in caught.value.reason


def test_a_long_wrong_value_is_shortened_in_the_reason() -> None:
    with pytest.raises(BadRow) as caught:
        check_example("x" * 10_000)
    assert len(str(caught.value)) < 200
