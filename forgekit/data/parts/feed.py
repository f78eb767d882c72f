"""How decoded values of one kind reach the model, beside the text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Feed:
    """One kind's way into the model.

    placeholder: attribute of the processor with the token that the chat template writes for one value.
    sequence: attribute of the processor with the text that stands in the prompt for one value (its soft tokens).
    value: key of a part that holds the decoded value.
    batch: (values, processor) -> tensors that the model's forward takes, values in the order of their placeholders.
    check: (value, processor) raises BadRow for a value that this processor cannot take whole.
    """

    placeholder: str
    sequence: str
    value: str
    batch: Callable[[list[Any], Any], dict[str, Any]]
    check: Callable[[Any, Any], None] = lambda value, processor: None

    def tokens(self, processor: Any) -> tuple[str, str] | None:
        """Return (placeholder, sequence) as text, or None when the model does not take this kind."""
        token, sequence = getattr(processor, self.placeholder, None), getattr(processor, self.sequence, None)
        return (token, sequence) if token and sequence else None
