"""Examples to tensors, and which tokens are learned.

    text     <bos><start_of_turn>user\\n2 + 2?<end_of_turn>\\n<start_of_turn>model\\n4<end_of_turn>\\n
    learned                                                                        ^^^^^^^^^^^^^^^

The labels come from token ids: everything from behind `<start_of_turn>model\\n` up to and with `<end_of_turn>`; all other
positions are -100, which the loss passes over (torch.nn.CrossEntropyLoss, ignore_index).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .clean import BadRow
from .messages import Messages

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
    control: dict[int, str]  # special tokens that no text turn holds: <eos>, <pad>, the media tokens

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


def render_chat(messages: Messages, processor: Any, answer: bool = True) -> str:
    """Write turns through the model's chat template; without `answer` the last turn is left off and the model's begun."""
    turns = messages if answer else messages[:-1]
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answer)


def tokenize_chats(chats: list[Messages], processor: Any, answer: bool = True, **padding: Any) -> dict[str, Any]:
    """Turn chats into the model's inputs; the template has written <bos>, so none is added."""
    texts = [render_chat(messages, processor, answer) for messages in chats]
    batch = processor(text=texts, add_special_tokens=False, **padding)
    return {name: values for name, values in batch.items() if name != "token_type_ids"}


def tokenize_rows(chats: list[Messages], processor: Any) -> list[list[int]]:
    """Return each chat's token ids, without padding; Gemma 3n's processor itself takes unequal rows only padded."""
    batch = tokenize_chats(chats, processor, padding=True, return_tensors="np")
    return [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def mark_learned(ids: list[int], markers: Markers) -> list[bool]:
    """Return for each token whether it is learned: the assistant's turns, <end_of_turn> included.

    Args:
        ids: one row's token ids, padding included.

    Returns a list of the same length.
    """
    learned, inside, length = [False] * len(ids), False, len(markers.start)
    for position, token in enumerate(ids):
        if inside:
            learned[position] = True
            inside = token != markers.end
        else:
            inside = tuple(ids[max(0, position - length + 1) : position + 1]) == markers.start
    return learned


def check_rows(chats: list[Messages], processor: Any, max_length: int) -> list[BadRow | None]:
    """Measure rows as they will be trained on; return for each what is wrong with it, or None."""
    if not chats:
        return []
    markers = Markers.find(getattr(processor, "tokenizer", processor))
    return [
        check_ids(ids, messages, markers, max_length)
        for ids, messages in zip(tokenize_rows(chats, processor), chats, strict=True)
    ]


def check_ids(ids: list[int], messages: Messages, markers: Markers, max_length: int) -> BadRow | None:
    """Return why a row of token ids cannot be learned from, or None."""
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
    held += sorted({markers.control[token] for token in ids if token in markers.control})
    if held:
        return BadRow("control_tokens", f"the text holds {', '.join(held)}, which the model reads as control tokens")
    return None


@dataclass
class Collator:
    """Makes a training batch of examples; give it to a trainer as `data_collator`.

    A batch holds input_ids, attention_mask and labels, each int64 of [rows, longest row's tokens]; labels are -100 where
    nothing is learned.
    """

    processor: Any
    multiple: int = 1  # pad rows to a multiple of so many tokens: fewer shapes, so that a compiler meets few of them

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, "torch.Tensor"]:
        """Collate examples, each {"messages": [...]}."""
        import torch

        batch = tokenize_chats(
            [example["messages"] for example in examples],
            self.processor,
            padding=True,
            pad_to_multiple_of=self.multiple,
            return_tensors="pt",
        )
        markers = Markers.find(getattr(self.processor, "tokenizer", self.processor))
        learned = torch.tensor([mark_learned(row, markers) for row in batch["input_ids"].tolist()])
        batch["labels"] = batch["input_ids"].masked_fill(~learned, IGNORE)
        return batch
