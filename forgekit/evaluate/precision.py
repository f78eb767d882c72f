"""What rounding costs: the perplexity of one trained model in every precision that it could be shipped in, on the same rows.

16-bit, 8-bit and 4-bit are loaded one after the other from the merged folder and freed again; what runs elsewhere, such as
each type of GGUF, comes as a number or as a function that measures it. A precision that this machine cannot load becomes a
line with the reason.
"""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ForgekitError
from ..files import write_json
from .loss import RowLosses, measure_loss, sum_losses

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset

LOADED = {"merged, 16-bit": "16bit", "8-bit": "8bit", "4-bit": "4bit"}  # title -> model.load_in
TRAINED = "trained, in memory"


@dataclass(frozen=True)
class Precision:
    """One precision: its perplexity, or why there is none."""

    name: str
    perplexity: float | None
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Precisions:
    """All of them; the first is what the others are compared with."""

    found: list[Precision]
    rows: int

    @property
    def table(self) -> "pandas.DataFrame":
        """One row a precision: perplexity, how much higher it is than the first, or the reason why it was not measured."""
        from ..table import Table

        first = self.found[0].perplexity
        rows = [
            {
                "precision": one.name,
                "perplexity": "" if one.perplexity is None else f"{one.perplexity:.4f}",
                "against the first": "" if None in (one.perplexity, first) else f"{one.perplexity / first - 1:+.2%}",  # type: ignore[operator]
                "not measured because": one.reason,
            }
            for one in self.found
        ]
        return Table(Table(rows).set_index("precision"))

    def __repr__(self) -> str:
        lines = [
            f"  {name:<20}"
            + (line["not measured because"] or f"{line['perplexity']:>12}  {line['against the first']:>8}")
            for name, line in self.table.iterrows()
        ]
        return "\n".join([f"Perplexity on {self.rows} rows", *lines])

    def _repr_html_(self) -> str:
        return f"<p>Perplexity on {self.rows} rows</p>{self.table._repr_html_()}"

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, {"rows": self.rows, "precisions": [asdict(one) for one in self.found]})


def measure_precisions(
    model: Any,
    processor: Any,
    dataset: "Dataset",
    config: Config,
    merged: Path | None = None,
    others: Mapping[str, float | Callable[[], float]] | None = None,
    path: Path | None = None,
    losses: RowLosses = sum_losses,
) -> Precisions:
    """Measure the perplexity of the trained model in each precision, on the first `evaluate.rows` rows.

    Args:
        merged: the exported folder that 16-bit, 8-bit and 4-bit are loaded from; None leaves them out.
        others: name -> perplexity, or a function that returns it, for instance {"GGUF Q8_0": lambda: ...}.
        path: where the figures are written as JSON.

    Returns a table. A precision that cannot be loaded or measured (ForgekitError, a library's ImportError, RuntimeError or
    OSError) is a line with the reason.
    """
    wanted = len(dataset) if config.evaluate.rows is None else min(config.evaluate.rows, len(dataset))

    def measure(some_model: Any) -> float:
        chats = [dataset[i]["messages"] for i in range(wanted)]
        loss, _ = measure_loss(some_model, processor, chats, config.evaluate.per_device_eval_batch_size, losses)
        return math.exp(loss)

    def measure_loaded(load_in: str) -> float:
        from ..model.load import load_model

        assert merged is not None
        settings = {"model.id": str(merged), "model.load_in": load_in}
        loaded, _ = load_model(config.change(settings, "precision", ["model.revision"]))
        try:
            return measure(loaded)
        finally:
            del loaded
            free_memory()

    ways: dict[str, Any] = {TRAINED: lambda: measure(model)}
    if merged is not None:
        ways |= {name: (lambda load_in=load_in: measure_loaded(load_in)) for name, load_in in LOADED.items()}
    found = Precisions([try_measure(name, way) for name, way in {**ways, **(others or {})}.items()], wanted)
    if path:
        found.save(path)
    return found


def try_measure(name: str, way: float | Callable[[], float]) -> Precision:
    """Return a perplexity, or the first line of why it could not be measured."""
    try:
        return Precision(name, float(way() if callable(way) else way))
    except (ForgekitError, ImportError, RuntimeError, OSError) as error:
        return Precision(name, None, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


def free_memory() -> None:
    """Give the memory of a model that is gone back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
