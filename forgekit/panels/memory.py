"""The predicted memory of a selection, against this machine's graphics card or one that a person names."""

from ..adapter.advice import CARDS
from ..adapter.memory import MemoryEstimate, estimate_memory
from ..adapter.plan import LayerPlan
from ..config import Config
from ..hardware import GIB, detect_hardware
from ..model.shapes import Shapes


def find_cards() -> dict[str, float]:
    """Return card -> bytes of memory: this machine's GPU first where there is one, then the common ones, smallest first."""
    here = detect_hardware()
    own = {f"this GPU: {here.name}": float(here.memory)} if here.device == "cuda" else {}
    return own | {name: gib * GIB for name, gib in sorted(CARDS.items(), key=lambda item: item[1])}


def predict_memory(plan: LayerPlan, config: Config, shapes: Shapes) -> MemoryEstimate:
    """Estimate the peak of a training step on a GPU; a tower that learns gets one picture or clip a row."""
    learns = {total.tower for total in plan.totals if total.modules}
    return estimate_memory(plan, config, shapes, images=int("vision" in learns), clips=int("audio" in learns))


def describe_memory(estimate: MemoryEstimate, card: str, memory: float) -> str:
    """Return one line: what is needed of a card's memory, whether it fits, and for which settings that holds."""
    left = memory - estimate.total
    verdict = f"fits, {left / GIB:.1f} GiB to spare" if left >= 0 else f"{-left / GIB:.1f} GiB too much"
    return (
        f"Predicted peak memory {estimate.total / GIB:.1f} of {memory / GIB:.1f} GiB ({card}): {verdict}, "
        f"with {estimate.describe()}"
    )
