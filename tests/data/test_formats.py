"""Rows as people bring them, and the messages that each becomes."""

from typing import Any

import pytest

from forgekit.data.clean import BadRow
from forgekit.data.detect import detect_format
from forgekit.data.formats import make_conversion
from forgekit.data.messages import check_example
from forgekit.errors import DataError
from forgekit.settings import Data


def convert(name: str, row: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    """Convert a row and return its turns as (role, text)."""
    messages = check_example(make_conversion(name, Data(**settings))(row))
    return [(message["role"], "".join(part["text"] for part in message["content"])) for message in messages]


@pytest.mark.parametrize(
    ("name", "row", "turns"),
    [
        (
            "messages",
            {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]},
            [("user", "1?"), ("assistant", "2")],
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
                    {"role": "user", "content": "1?"},
                    {"role": "model", "content": "2"},
                ]
            },
            [("system", "Be brief."), ("user", "1?"), ("assistant", "2")],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}]},
            [("user", "1?"), ("assistant", "2")],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "1?"},
                    {"role": "assistant", "content": "2"},
                ]
            },
            [("system", "Be brief."), ("user", "1?"), ("assistant", "2")],
        ),
        (
            "alpaca",
            {"instruction": "Translate.", "input": "Hund", "output": "dog"},
            [("system", "Translate."), ("user", "Hund"), ("assistant", "dog")],
        ),
        ("alpaca", {"instruction": "Name a colour.", "input": "", "output": "red"}, [("user", "Name a colour."), ("assistant", "red")]),
        ("alpaca", {"instruction": "Name a colour.", "input": None, "output": "red"}, [("user", "Name a colour."), ("assistant", "red")]),
        ("alpaca", {"instruction": "Name a colour.", "output": "red"}, [("user", "Name a colour."), ("assistant", "red")]),
        ("prompt_completion", {"prompt": "1?", "completion": "2"}, [("user", "1?"), ("assistant", "2")]),
        ("prompt_completion", {"prompt": "1?", "response": "2", "source": "web"}, [("user", "1?"), ("assistant", "2")]),
        ("prompt_completion", {"prompt": "1?", "completion": 2}, [("user", "1?"), ("assistant", "2")]),
        (
            "prompt_completion",
            {"prompt": [{"role": "user", "content": "1?"}], "completion": [{"role": "assistant", "content": "2"}]},
            [("user", "1?"), ("assistant", "2")],
        ),
    ],
)  # fmt: skip
def test_each_format_becomes_messages(name: str, row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert convert(name, row) == turns
    assert detect_format([row, row]) == name


@pytest.mark.parametrize(
    ("name", "row", "code", "reason"),
    [
        ("messages", {"text": "x"}, "no_messages", "to_example must return {'messages': [...]}"),
        ("messages", {"messages": "1?"}, "no_messages", "to_example must return"),
        ("sharegpt", {"conversations": "x"}, "wrong_type", "column 'conversations' should hold a list of turns"),
        ("sharegpt", {"conversations": ["x"]}, "wrong_type", "column 'conversations' should hold a list of turns"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "unknown_role", "role 'robot'; known are system"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "wrong_type", "not NoneType"),
        ("alpaca", {"instruction": "x"}, "wrong_type", "column 'output' should hold text, not None"),
        ("alpaca", {"instruction": "x", "input": ["y"], "output": "z"}, "wrong_type", "column 'input' should hold text, not list"),
        ("prompt_completion", {"prompt": "x"}, "wrong_type", "column 'completion' should hold text, not None"),
        ("prompt_completion", {"prompt": "x", "response": True}, "wrong_type", "column 'response' should hold text, not bool"),
        ("prompt_completion", {"prompt": [{"role": "user"}], "completion": "2"}, "wrong_type", "column 'prompt' should hold text, not list"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_its_format_says_what_is_wrong(
    name: str, row: dict[str, Any], code: str, reason: str
) -> None:
    with pytest.raises(BadRow) as caught:
        convert(name, row)
    assert caught.value.code == code
    assert reason in caught.value.reason


def test_the_first_format_that_fits_every_row_is_taken() -> None:
    both = {"messages": [], "prompt": "1?", "completion": "2"}
    assert detect_format([both]) == "messages"
    assert detect_format([both, {"prompt": "1?", "completion": "2"}]) == "prompt_completion"
    assert (
        detect_format([{"prompt": "1?", "completion": "2"}, {"prompt": "1?", "response": "2"}]) == "prompt_completion"
    )


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"query": "1?", "reply": "2"}], "query, reply"),
        ([{"prompt": "1?", "completion": "2"}, {"prompt": "1?"}], "completion, prompt"),
        ([{"instruction": "x"}], "instruction"),
        ([], "none"),
        ([{}], "none"),
    ],
)
def test_unknown_columns_are_named_beside_the_known_formats_and_the_remedy(rows: list[dict], found: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(rows)
    message = str(caught.value)
    assert message.startswith(f"The rows' columns ({found}) fit no known format (messages: messages; ")
    assert "prompt_completion: prompt, completion/response; " in message
    assert message.endswith(
        "Define to_example(row) in the notebook, which returns {'messages': [...]}, or set data.template."
    )


def test_one_row_of_another_shape_does_not_hide_the_format() -> None:
    rows = [{"prompt": "1?", "completion": "2"}] * 3
    assert detect_format([*rows, {"prompt": "no answer"}]) == "prompt_completion"
    with pytest.raises(DataError, match="fit no known format"):
        detect_format([rows[0], {"prompt": "no answer"}])
