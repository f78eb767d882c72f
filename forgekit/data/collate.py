"""Examples to tensors, and which tokens are learned.

    text     <bos><start_of_turn>user\\n2 + 2?<end_of_turn>\\n<start_of_turn>model\\n4<end_of_turn>\\n
    learned                                                                        ^^^^^^^^^^^^^^^

The labels come from token ids: everything from behind `<start_of_turn>model\\n` up to and with `<end_of_turn>`; all other
positions are -100, which the loss passes over (torch.nn.CrossEntropyLoss, ignore_index). Soft tokens of media are never
learned. A placeholder that the template writes for a picture or a clip becomes its whole sequence of soft tokens here, as
the processor would do it, so that rows can be measured without decoding twice.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .clean import BadRow
from .messages import Messages
from .parts import FEEDS, find_values

if TYPE_CHECKING:
    import torch

IGNORE = -100
TURN_START, TURN_END, ROLE = "<start_of_turn>", "<end_of_turn>", "model\n"


@dataclass(frozen=True)
class Markers:
    """Token ids that enclose what the assistant says, and the ids that every row is checked for."""

    start: tuple[int, ...]  # <start_of_turn> model \n
    end: int  # <end_of_turn>
    bos: int
    control: dict[int, str]  # special tokens that no text holds: <eos>, <pad>, the media tokens

    @classmethod
    def find(cls, tokenizer: Any) -> "Markers":
        """Look the ids up in a tokenizer."""
        ids = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
        if None in ids or tokenizer.unk_token_id in ids:
            raise BadRow(
                "template", f"the tokenizer lacks {TURN_START} or {TURN_END}, which mark the turns that are learned"
            )
        role = tokenizer(ROLE, add_special_tokens=False).input_ids
        # <unk> stands for a character that the vocabulary lacks, so text may hold it
        written = {*ids, tokenizer.bos_token_id, tokenizer.unk_token_id}
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        control = {token: name for token, name in special if token not in written}
        return cls((ids[0], *role), ids[1], tokenizer.bos_token_id, control)


def get_tokenizer(processor: Any) -> Any:
    """Return the tokenizer of a processor, or the tokenizer itself, which is all that a text-only checkpoint has."""
    return getattr(processor, "tokenizer", processor)


def render_chats(chats: list[Messages], processor: Any, answer: bool = True) -> list[str]:
    """Write chats through the model's chat template; without `answer` the last turn is left off and the model's begun."""
    shapes = [[find_shape(turn) for turn in (chat if answer else chat[:-1])] for chat in chats]
    return processor.apply_chat_template(shapes, tokenize=False, add_generation_prompt=not answer)


def find_shape(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template needs of a turn: which parts there are. It would look at values for addresses to fetch."""
    parts = [{key: part[key] for key in ("type", "text") if key in part} for part in turn["content"]]
    return {"role": turn["role"], "content": parts}


def render_chat(messages: Messages, processor: Any, answer: bool = True) -> str:
    """Write one chat, as `render_chats` does."""
    return render_chats([messages], processor, answer)[0]


def write_sequences(text: str, processor: Any) -> str:
    """Put the whole sequence of soft tokens in place of each placeholder."""
    for feed in FEEDS.values():
        tokens = feed.tokens(processor)
        text = text.replace(*tokens) if tokens else text
    return text


def tokenize_texts(chats: list[Messages], processor: Any, answer: bool = True, **padding: Any) -> dict[str, Any]:
    """Turn chats into input_ids and attention_mask; the template has written <bos>, so none is added."""
    texts = [write_sequences(text, processor) for text in render_chats(chats, processor, answer)]
    tokenizer = get_tokenizer(processor)
    return dict(tokenizer(texts, add_special_tokens=False, return_token_type_ids=False, **padding))


def tokenize_chats(chats: list[Messages], processor: Any, answer: bool = True, **padding: Any) -> dict[str, Any]:
    """Turn chats into everything the model's forward takes: token ids, mask, and the tensors of their media.

    Args:
        chats: messages whose parts are decoded (`load_parts`).
    """
    batch = tokenize_texts(chats, processor, answer, **padding)
    for name, feed in FEEDS.items():
        values = [value for messages in chats for value in find_values(messages, name)]
        if values:
            batch |= feed.batch(values, processor)
    return batch


def tokenize_rows(chats: list[Messages], processor: Any) -> list[list[int]]:
    """Return each chat's token ids, soft tokens included, without padding."""
    return tokenize_texts(chats, processor)["input_ids"]


def mark_learned(ids: list[int], markers: Markers) -> list[bool]:
    """Return for each token whether it is learned: the assistant's turns, <end_of_turn> included, media left out.

    Args:
        ids: one row's token ids, padding included.

    Returns a list of the same length.
    """
    learned, inside, length = [False] * len(ids), False, len(markers.start)
    for position, token in enumerate(ids):
        if inside:
            learned[position] = token not in markers.control
            inside = token != markers.end
        else:
            inside = tuple(ids[max(0, position - length + 1) : position + 1]) == markers.start
    return learned


def check_rows(chats: list[Messages], processor: Any, max_length: int) -> list[BadRow | None]:
    """Measure rows as they will be trained on; return for each what is wrong with it, or None."""
    if not chats:
        return []
    tokenizer = get_tokenizer(processor)
    markers, soft = Markers.find(tokenizer), count_soft_tokens(processor)
    return [
        check_media(messages, processor) or check_ids(ids, messages, markers, max_length, soft)
        for ids, messages in zip(tokenize_rows(chats, processor), chats, strict=True)
    ]


def count_soft_tokens(processor: Any) -> dict[str, Counter[int]]:
    """Return, for each kind that the model takes, how often each token stands in the sequence of one value."""
    tokenizer = get_tokenizer(processor)
    pairs = {name: feed.tokens(processor) for name, feed in FEEDS.items()}
    return {
        name: Counter(tokenizer(pair[1], add_special_tokens=False).input_ids) for name, pair in pairs.items() if pair
    }


def check_media(messages: Messages, processor: Any) -> BadRow | None:
    """Return why this model cannot take a row's media whole, or None."""
    for name, feed in FEEDS.items():
        values = find_values(messages, name)
        if values and not feed.tokens(processor):
            return BadRow("not_taken", f"the row holds a part of type {name}, which this model does not take")
        try:
            for value in values:
                feed.check(value, processor)
        except BadRow as bad:
            return bad
    return None


def check_ids(
    ids: list[int], messages: Messages, markers: Markers, max_length: int, soft: dict[str, Counter[int]] | None = None
) -> BadRow | None:
    """Return why a row of token ids cannot be learned from, or None.

    Args:
        soft: tokens in the sequence of one value of each kind, from `count_soft_tokens`.
    """
    if ids.count(markers.bos) != 1 or ids[0] != markers.bos:
        return BadRow(
            "bos",
            f"{ids.count(markers.bos)} <bos> tokens; exactly one is right, at the start (is <bos> written in the text?)",
        )
    if len(ids) > max_length:
        return BadRow("too_long", f"{len(ids)} tokens, and model.max_length is {max_length}")
    turns = len(messages) - (messages[0]["role"] == "system")  # the template writes system text into the first turn
    names = {markers.start[0]: TURN_START, markers.end: TURN_END}
    held = [name for token, name in names.items() if ids.count(token) != turns]
    wanted: Counter[int] = Counter()
    for name, tokens in (soft or {}).items():
        for _ in find_values(messages, name):
            wanted += tokens
    found = Counter(token for token in ids if token in markers.control)
    wrong = [token for token in markers.control if found[token] != wanted[token]]
    held += [markers.control[token] for token in sorted(wrong, key=lambda token: wanted[token] - found[token])]
    if held:
        return BadRow("control_tokens", f"the text holds {', '.join(held)}, which the model reads as control tokens")
    return None


@dataclass
class Collator:
    """Makes a training batch of examples; give it to a trainer as `data_collator`.

    A batch holds input_ids, attention_mask and labels, each int64 of [rows, longest row's tokens], and the tensors of the
    media in its rows; labels are -100 where nothing is learned.
    """

    processor: Any
    multiple: int = 1  # pad rows to a multiple of so many tokens: fewer shapes, so that a compiler meets few of them

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
        """Collate examples, each {"messages": [...]} with decoded parts."""
        import torch

        batch = tokenize_chats(
            [example["messages"] for example in examples],
            self.processor,
            padding=True,
            pad_to_multiple_of=self.multiple,
            return_tensors="pt",
        )
        markers = Markers.find(get_tokenizer(self.processor))
        learned = torch.tensor([mark_learned(row, markers) for row in batch["input_ids"].tolist()])
        batch["labels"] = batch["input_ids"].masked_fill(~learned, IGNORE)
        return batch
