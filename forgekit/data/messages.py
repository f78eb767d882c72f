"""The one form that every example has, whatever the rows looked like and whatever they hold.

before   {"prompt": "2 + 2?", "completion": "4"}
after    {"messages": [{"role": "user",      "content": [{"type": "text", "text": "2 + 2?"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .clean import BadRow
from .parts import check_part

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant", "model": "assistant", "gpt": "assistant"}  # fmt: skip
Messages = list[dict[str, Any]]


def make_message(role: str, text: str) -> dict[str, Any]:
    """Return one turn that holds text."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def check_example(example: Any) -> Messages:
    """Return an example's messages in the one form. Raises BadRow with what is wrong."""
    if not isinstance(example, Mapping) or not isinstance(example.get("messages"), list | tuple):
        raise BadRow("no_messages", f"to_example must return {{'messages': [...]}}, not {repr(example)[:80]}")
    messages = [check_message(message) for message in example["messages"]]
    check_order([message["role"] for message in messages])
    for message in messages:
        if message["role"] == "assistant" and not get_text(message).strip():
            raise BadRow("empty_answer", "an assistant turn is empty, so it teaches nothing")
    return messages


def check_message(message: Any) -> dict[str, Any]:
    """Return one turn with a known role and a list of parts."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise BadRow("wrong_type", f"a turn is {{'role': ..., 'content': ...}}, not {repr(message)[:80]}")
    role = ROLES.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise BadRow("unknown_role", f"role {message['role']!r}; known are {', '.join(ROLES)}")
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise BadRow("wrong_type", f"the content of a turn is text or a list of parts, not {type(content).__name__}")
    return {"role": role, "content": [check_part(part) for part in parts]}


def check_order(roles: list[str]) -> None:
    """Require system?, then user and assistant in turn, with an assistant at the end: what Gemma's template can write."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in turns:
        raise BadRow("no_assistant_turn", f"no assistant turn to learn from (roles: {', '.join(roles) or 'none'})")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRow(
            "roles_out_of_order",
            f"turns must go user, assistant, user, assistant ... and end with assistant (roles: {', '.join(roles)})",
        )


def find_media(messages: Messages, folder: Path | None) -> Messages:
    """Return the messages with relative paths of media looked up in `folder`, the one of the data file.

    A path that stands in the current folder alone stays as it is; one that stands nowhere is named as the data file means it.
    """
    if folder is None or all(part["type"] == "text" for turn in messages for part in turn["content"]):
        return messages
    return [{**turn, "content": [find_file(part, folder) for part in turn["content"]]} for turn in messages]


def find_file(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a part whose path starts at the data file's folder."""
    kind = part["type"]
    path = part[kind]
    if kind == "text" or not isinstance(path, str | Path) or Path(path).expanduser().is_absolute():
        return part
    beside = folder / path
    try:
        here = not beside.exists() and Path(path).exists()
    except (OSError, ValueError):  # no name that a file can have
        return part
    return part if here else {**part, kind: str(beside)}


def get_text(message: Mapping[str, Any]) -> str:
    """Return the text of a turn, its text parts joined."""
    return "".join(part.get("text", "") for part in message["content"])


def get_answer(messages: Messages) -> str:
    """Return the last assistant turn's text, trimmed as the chat template does."""
    return get_text(messages[-1]).strip()
