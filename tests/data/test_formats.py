"""Rows as people bring them, and the messages that each becomes."""

from typing import Any

import pytest

from forgekit.config import load_config
from forgekit.data.clean import BadRow
from forgekit.data.detect import detect_format, find_format
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


# ---- templates, media in columns, questions without a question -----------------------------------------------------


@pytest.mark.parametrize(
    ("template", "row", "turns"),
    [
        ("Solve: {prompt}\n{response}", {"prompt": "1?", "response": "2"}, [("user", "Solve: 1?"), ("assistant", "2")]),
        ("user: {q}\nassistant: {a}", {"q": "1?", "a": "{q} user: x"}, [("user", "1?"), ("assistant", "{q} user: x")]),
        (
            "system: Be brief.\nuser: {q} {{x}}\nassistant: <think>{t}</think>\n{a}",
            {"q": "1?", "x": "?", "t": "hm", "a": 2},
            [("system", "Be brief."), ("user", "1? {?}"), ("assistant", "<think>hm</think>\n2")],
        ),
        (
            "r1_distill",
            {"problem": "1?", "reannotated_assistant_content": "<think>hm</think>", "solution": "2"},
            [("user", "1?"), ("assistant", "<think>hm</think>\n\n2")],
        ),
        ("reasoning", {"question": "1?", "reasoning": "hm", "answer": "2"}, [("user", "1?"), ("assistant", "<think>\nhm\n</think>\n\n2")]),
    ],
)  # fmt: skip
def test_a_template_says_what_is_asked_and_what_is_answered(template: str, row: dict, turns: list) -> None:
    assert convert("template", row, template=template) == turns


@pytest.mark.parametrize(
    "template", ["", "{prompt}", "{response}", "user: {q}", "user: {q}\nassistant: yes", "x\nuser: {q}\nassistant: {a}"]
)
def test_a_template_without_question_or_answer_is_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"does not say what is asked and what is answered\. Write turns"):
        make_conversion("template", Data(template=template))


def test_a_column_that_a_row_lacks_costs_the_row_and_one_that_all_lack_the_run() -> None:
    with pytest.raises(BadRow, match="column 'a' should hold text, not None"):
        convert("template", {"q": "1?"}, template="user: {q}\nassistant: {a}")
    config = load_config(None, {"data.template": "user: {q}\nassistant: {b}"})
    with pytest.raises(DataError, match=r"^data\.template names the column 'b', which no row has\. They have: q, a\.$"):
        find_format(config, [{"q": "1?", "a": "2"}])


def shape(name: str, row: dict[str, Any], **settings: Any) -> list[list[Any]]:
    """Convert a row and return each turn's parts: text, or (kind, value)."""
    messages = check_example(make_conversion(name, Data(**settings))(row))
    return [
        [p["text"] if p["type"] == "text" else (p["type"], p[p["type"]]) for p in turn["content"]] for turn in messages
    ]


@pytest.mark.parametrize(
    ("name", "row", "parts"),
    [
        ("question_answer", {"question": "1?", "answer": "2"}, [["1?"], ["2"]]),
        ("question_answer", {"image": "a.png", "question": "What?", "answer": "a cat"}, [[("image", "a.png"), "What?"], ["a cat"]]),
        ("question_answer", {"images": ["a", "b"], "question": "Which?", "answer": "b"}, [[("image", "a"), ("image", "b"), "Which?"], ["b"]]),
        ("question_answer", {"image": None, "question": "1?", "answer": "2"}, [["1?"], ["2"]]),
        ("transcript", {"audio": "a.wav", "text": "hello"}, [[("audio", "a.wav"), "Write down what is said."], ["hello"]]),
        ("transcript", {"audio": "a.wav", "sentence": "hello", "locale": "en"}, [[("audio", "a.wav"), "Write down what is said."], ["hello"]]),
        ("caption", {"image": "a.png", "text": "x^2"}, [[("image", "a.png"), "Describe this picture."], ["x^2"]]),
        ("alpaca", {"image": "a.png", "instruction": "Name it.", "output": "cat"}, [[("image", "a.png"), "Name it."], ["cat"]]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Left"}, {"type": "image"}, {"type": "image", "index": 1}]},
                    {"role": "assistant", "content": "yes"},
                ],
                "images": ["a", "b"],
            },
            [["Left", ("image", "a"), ("image", "b")], ["yes"]],
        ),
        (
            "sharegpt",
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]},
            [[("image", "a.png"), "What?"], ["a cat"]],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "What does <image> mean?", "role": None}, {"from": "gpt", "value": "a tag"}]},
            [["What does <image> mean?"], ["a tag"]],
        ),
    ],
)  # fmt: skip
def test_media_columns_come_into_the_turns(name: str, row: dict, parts: list) -> None:
    assert shape(name, row) == parts
    assert detect_format([row]) == name


def test_the_instruction_is_a_setting() -> None:
    row = {"image": "a.png", "text": "x^2"}
    assert shape("caption", row, instruction="Write it in LaTeX.")[0] == [("image", "a.png"), "Write it in LaTeX."]


@pytest.mark.parametrize(
    ("content", "images", "reason"),
    [
        ([{"type": "image"}, {"type": "image"}], ["a"], "the turns have more places of type image than the row holds"),
        ([{"type": "image"}], ["a", "b"], "the row holds 2 of type image, and its turns have places for fewer"),
    ],
)
def test_media_that_do_not_match_their_places_are_set_aside(content: list, images: list, reason: str) -> None:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    with pytest.raises(BadRow, match=reason) as caught:
        shape("messages", {"messages": turns, "images": images})
    assert caught.value.code == "media_count"


def test_what_was_found_is_shown_on_three_rows_that_could_be_converted(capsys: pytest.CaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "no answer"}]
    rows += [{"prompt": f"{n}?\n" + "x" * 200, "completion": f"\ud800 {n}" if n == 1 else "2"} for n in range(5)]
    find_format(load_config(None, {}), rows)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == (
        "Format: prompt_completion, as 5 of the first 6 rows have the columns prompt, completion. Another one: data.format, "
        "data.template, or to_example(row). Converted:"
    )
    assert [line[:13] for line in lines] == [
        "  1 user: 0? ",
        "  1 assistant",
        "  2 user: 2? ",
        "  2 assistant",
        "  3 user: 3? ",
        "  3 assistant",
    ]
    assert max(map(len, lines)) == 100


def test_a_named_format_is_taken_without_looking(capsys: pytest.CaptureFixture) -> None:
    find_format(load_config(None, {"data.format": "alpaca"}), [{"prompt": "1?", "completion": "2"}])
    assert capsys.readouterr().out.startswith("Format: alpaca, as data.format says. ")
    with pytest.raises(DataError, match=r"^data\.format is template, and data\.template is empty"):
        find_format(load_config(None, {"data.format": "template"}), [])
