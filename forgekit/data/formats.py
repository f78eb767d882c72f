"""The shapes of rows that people bring, and how each becomes messages. A sample is looked at, and the finding is said."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DataError
from .clean import BadRow
from .messages import make_message

Example = dict[str, Any]
ToExample = Callable[[dict[str, Any]], Mapping[str, Any]]


def get_field(row: Mapping[str, Any], *names: str) -> str:
    """Return the first named column as text. Raises BadRow when it is missing or no text."""
    name = next((name for name in names if name in row), names[0])
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(
            "wrong_type", f"column {name!r} should hold text, not {value if value is None else type(value).__name__}"
        )
    return str(value)


def from_messages(row: Mapping[str, Any]) -> Example:
    """OpenAI style: {"messages": [{"role", "content"}]}, content a string or parts."""
    return {"messages": row.get("messages")}


def from_sharegpt(row: Mapping[str, Any]) -> Example:
    """ShareGPT: {"conversations": [{"from": "human", "value": ...}]}, or with role and content."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("wrong_type", "column 'conversations' should hold a list of turns")
    return {
        "messages": [
            {"role": turn.get("from", turn.get("role")), "content": turn.get("value", turn.get("content"))}
            for turn in turns
        ]
    }


def from_alpaca(row: Mapping[str, Any]) -> Example:
    """Alpaca: instruction -> system, input -> user, output -> assistant; without an input the instruction is the user's."""
    instruction, answer = get_field(row, "instruction"), make_message("assistant", get_field(row, "output"))
    question = row.get("input")
    if not question:
        return {"messages": [make_message("user", instruction), answer]}
    return {"messages": [make_message("system", instruction), make_message("user", get_field(row, "input")), answer]}


def from_prompt_completion(row: Mapping[str, Any]) -> Example:
    """Pairs: {"prompt": ..., "completion": ...}; `response` does for completion. Both may be lists of turns, as TRL has them."""
    prompt = row.get("prompt")
    answer = row.get("completion", row.get("response"))
    if isinstance(prompt, list) and isinstance(answer, list):
        return {"messages": [*prompt, *answer]}
    return {
        "messages": [
            make_message("user", get_field(row, "prompt")),
            make_message("assistant", get_field(row, "completion", "response")),
        ]
    }


# name -> (columns it needs, each one of several names; conversion). The first that fits is taken.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], ToExample]] = {
    "messages": ((("messages",),), from_messages),
    "sharegpt": ((("conversations",),), from_sharegpt),
    "alpaca": ((("instruction",), ("output",)), from_alpaca),
    "prompt_completion": ((("prompt",), ("completion", "response")), from_prompt_completion),
}


def detect_format(rows: list[dict[str, Any]]) -> str:
    """Return the name of the format whose columns most rows of the sample have, if that is more than half of them.

    The others are set aside later, each with its reason. Raises DataError naming the columns when no format fits.
    """
    fitting = {
        name: sum(all(any(choice in row for choice in choices) for choices in columns) for row in rows)
        for name, (columns, _) in FORMATS.items()
    }
    best = max(fitting, key=lambda name: fitting[name])
    if 2 * fitting[best] > len(rows):
        return best
    found = ", ".join(sorted({key for row in rows for key in row})) or "none"
    known = "; ".join(
        f"{name}: {', '.join('/'.join(choices) for choices in columns)}" for name, (columns, _) in FORMATS.items()
    )
    raise DataError(
        f"The rows' columns ({found}) fit no known format ({known}). "
        "Define to_example(row) in the notebook, which returns {'messages': [...]}, or set data.format."
    )
