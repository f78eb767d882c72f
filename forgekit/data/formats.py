"""The shapes of rows that people bring, and how each becomes messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .clean import BadRow
from .media_columns import add_media
from .messages import make_message
from .template import fill_template, find_columns, get_field, read_template

if TYPE_CHECKING:
    from ..settings import Data

Example = dict[str, Any]
ToExample = Callable[[dict[str, Any]], Mapping[str, Any]]
ANSWERS = ("completion", "response")
TRANSCRIPTS = ("text", "sentence", "transcription", "transcript")
CAPTIONS = ("text", "caption")


def from_messages(row: Mapping[str, Any]) -> Example:
    """OpenAI style: {"messages": [{"role", "content"}]}, content a string or parts."""
    return {"messages": row.get("messages")}


def from_sharegpt(row: Mapping[str, Any]) -> Example:
    """ShareGPT: {"conversations": [{"from": "human", "value": ...}]}, or with role and content."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("wrong_type", "column 'conversations' should hold a list of turns")
    return {
        "messages": [{"role": pick(turn, "from", "role"), "content": pick(turn, "value", "content")} for turn in turns]
    }


def pick(turn: Mapping[str, Any], *names: str) -> Any:
    """Return the first of the values that is there; Arrow fills a key that other rows have with None."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def from_alpaca(row: Mapping[str, Any]) -> Example:
    """Alpaca: instruction -> system, input -> user, output -> assistant; without an input the instruction is the user's."""
    instruction, answer = get_field(row, "instruction"), make_message("assistant", get_field(row, "output"))
    if not row.get("input"):
        return {"messages": [make_message("user", instruction), answer]}
    return {"messages": [make_message("system", instruction), make_message("user", get_field(row, "input")), answer]}


def from_prompt_completion(row: Mapping[str, Any]) -> Example:
    """Pairs: {"prompt": ..., "completion": ...}; `response` does for completion. Both may be lists of turns, as TRL has them."""
    prompt, answer = row.get("prompt"), pick(row, *ANSWERS)
    if isinstance(prompt, list) and isinstance(answer, list):
        return {"messages": [*prompt, *answer]}
    return make_pair(get_field(row, "prompt"), get_field(row, *ANSWERS))


def from_question_answer(row: Mapping[str, Any]) -> Example:
    """Questions, with a picture, clip or film beside them where there is one: {"question", "answer", "image"}."""
    return make_pair(get_field(row, "question"), get_field(row, "answer"))


def from_transcript(row: Mapping[str, Any], instruction: str = "") -> Example:
    """Speech and its words: {"audio", "text"}; the instruction asks for them."""
    return make_pair(instruction or "Write down what is said.", get_field(row, *TRANSCRIPTS))


def from_caption(row: Mapping[str, Any], instruction: str = "") -> Example:
    """Pictures and what belongs to them, as captions or LaTeX_OCR have it: {"image", "text"}; the instruction asks for it."""
    return make_pair(instruction or "Describe this picture.", get_field(row, *CAPTIONS))


def make_pair(question: str, answer: str) -> Example:
    """Return one question and its answer."""
    return {"messages": [make_message("user", question), make_message("assistant", answer)]}


@dataclass(frozen=True)
class Format:
    """The columns that a row needs, each one of several names, and the conversion."""

    columns: tuple[tuple[str, ...], ...]
    convert: Callable[..., Example]
    asks: bool = False  # takes data.instruction

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row has the columns."""
        return all(any(choice in row for choice in choices) for choices in self.columns)


FORMATS: dict[str, Format] = {  # of several that fit, the first is taken
    "messages": Format((("messages",),), from_messages),
    "sharegpt": Format((("conversations",),), from_sharegpt),
    "alpaca": Format((("instruction",), ("output",)), from_alpaca),
    "prompt_completion": Format((("prompt",), ANSWERS), from_prompt_completion),
    "question_answer": Format((("question",), ("answer",)), from_question_answer),
    "transcript": Format((("audio",), TRANSCRIPTS), from_transcript, asks=True),
    "caption": Format((("image", "images"), CAPTIONS), from_caption, asks=True),
}


def make_conversion(name: str, settings: "Data") -> ToExample:
    """Return the conversion of a format, with its settings; media in columns of their own come into the turns."""
    if name == "template":
        return partial(convert_row, convert=partial(fill_template, read_template(settings.template or "")))
    found = FORMATS[name]
    return partial(
        convert_row, convert=partial(found.convert, instruction=settings.instruction) if found.asks else found.convert
    )


def convert_row(row: dict[str, Any], convert: Callable[[Mapping[str, Any]], Example]) -> Mapping[str, Any]:
    """Convert a row and put its media columns into the turns."""
    return add_media(convert(row), row)


def list_columns(name: str, settings: "Data") -> list[tuple[str, ...]]:
    """Return the columns that a format reads, each as the names it may have."""
    if name == "template":
        return [(column,) for column in find_columns(read_template(settings.template or ""))]
    return list(FORMATS[name].columns)
