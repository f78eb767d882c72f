"""Does it fit? What is the most that does, and what to change when it does not, with the saving of each, computed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ConfigError
from ..hardware import GIB, choose_optimizer
from .memory import MemoryEstimate, estimate_memory
from .plan import find_shapes, plan_layers

if TYPE_CHECKING:
    from ..table import Table

# card -> GiB that a program sees of it (what torch reports as total memory is a little below the name)
CARDS = {
    "RTX 3060 12 GB": 11.6,
    "T4 15 GB": 14.6,
    "RTX 3090 24 GB": 23.6,
    "RTX 4090 24 GB": 23.5,
    "L4 24 GB": 22.0,
    "A100 40 GB": 39.4,
    "A100 80 GB": 79.1,
    "H100 80 GB": 79.1,
}
SCALES = (
    ("train.per_device_train_batch_size", (1, 2, 4, 8, 16, 32)),
    ("model.max_length", (512, 1024, 2048, 4096, 8192)),
)


@dataclass(frozen=True)
class Change:
    """One thing to change, and the bytes that it saves (below zero: costs)."""

    settings: tuple[tuple[str, Any], ...]
    saving: float

    def __str__(self) -> str:
        text = ", ".join(f"{name}: {value}" for name, value in self.settings)
        return f"{text} saves {self.saving / GIB:.1f} GiB"


def try_settings(config: Config, changes: dict[str, Any], model: Any, **media: Any) -> MemoryEstimate:
    """Return the estimate with some settings changed; the plan is made anew."""
    changed = config.change(changes, "trial")
    return estimate_memory(plan_layers(changed, model), changed, model, **media)


def rank_changes(config: Config, model: Any = None, **media: Any) -> list[Change]:
    """Return what can be changed, the largest saving first; what would save nothing is left out.

    Args:
        media: `images`, `clips` and `engine` as for `estimate_memory`.
    """
    shapes = find_shapes(config, model)
    now = try_settings(config, {}, shapes, **media).total
    train = config.train
    trials: list[dict[str, Any]] = [
        {"model.load_in": "4bit"},
        {"train.gradient_checkpointing": "on"},
        {"train.optim": "adamw_8bit"},
        {"train.optim": "paged_adamw_8bit"},
    ]
    half = train.per_device_train_batch_size // 2
    if half:
        steps = train.gradient_accumulation_steps * 2  # as many rows a step
        trials.append({"train.per_device_train_batch_size": half, "train.gradient_accumulation_steps": steps})
    if config.model.max_length >= 512:
        trials.append({"model.max_length": config.model.max_length // 2})
    if config.adapter.r > 8 and config.model.load_in != "full":
        trials.append({"adapter.r": 8})
    if config.model.engine == "huggingface":
        trials.append({"model.engine": "unsloth"})
    changes = []
    for trial in trials:
        engine = {"engine": None} if "model.engine" in trial else {}
        try:
            saving = now - try_settings(config, trial, shapes, **{**media, **engine}).total
        except ConfigError:  # the recipe has settings that do not go with this one
            continue
        if saving > 0.005 * GIB:
            changes.append(Change(tuple(trial.items()), saving))
    return sorted(changes, key=lambda change: -change.saving)


def try_values(config: Config, name: str, values: tuple[int, ...], model: Any, **media: Any) -> dict[int, float]:
    """Return the bytes needed with each value of one setting."""
    return {value: try_settings(config, {name: value}, model, **media).total for value in values}


def find_largest(config: Config, memory: float, model: Any = None, **media: Any) -> dict[str, int]:
    """Return the largest batch at this length, and the largest length at this batch, that fit into `memory` bytes; 0: none.

    Tried are batches of 1 to 32 and lengths of 512 to 8192, in powers of two.
    """
    shapes = find_shapes(config, model)
    batches, lengths = (try_values(config, name, values, shapes, **media) for name, values in SCALES)
    return {"batch": find_last(batches, memory), "length": find_last(lengths, memory)}


def find_last(needed: dict[int, float], memory: float) -> int:
    """Return the largest value that fits, or 0."""
    return max((value for value, bytes_needed in needed.items() if bytes_needed <= memory), default=0)


def advise_cards(config: Config, model: Any = None, **media: Any) -> "Table":
    """Return one row a common card: whether these settings fit, and the largest batch and length that do."""
    import pandas

    from ..table import Table

    shapes = find_shapes(config, model)
    needed = try_settings(config, {}, shapes, **media).total
    batches, lengths = (try_values(config, name, values, shapes, **media) for name, values in SCALES)
    rows = []
    for card, gib in CARDS.items():
        fits = "yes" if needed <= gib * GIB else f"{needed / GIB - gib:.1f} GiB too much"
        most = (find_last(batches, gib * GIB) or "none", find_last(lengths, gib * GIB) or "none")
        rows.append((card, gib, fits, *most))
    columns = ["card", "GiB", "fits", "largest batch at this length", "largest length at this batch"]
    return Table(pandas.DataFrame(rows, columns=columns))


def describe_fit(config: Config, memory: float, model: Any = None, **media: Any) -> str:
    """Return whether it fits into `memory` bytes and, where not, what to change, one line each."""
    shapes = find_shapes(config, model)
    needed = try_settings(config, {}, shapes, **media).total
    text = f"needs {needed / GIB:.1f} GiB of {memory / GIB:.1f} GiB ({choose_optimizer(config, 'cuda')})"
    if needed <= memory:
        return f"{text}: fits"
    changes = "".join(f"\n  {change}" for change in rank_changes(config, shapes, **media))
    return f"{text}: {(needed - memory) / GIB:.1f} GiB too much. What saves most:{changes}"
