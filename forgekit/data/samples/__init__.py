"""Built-in practice tasks: small, generated or bundled with scikit-learn, so that a quick run needs no download.

Each function returns a list of plain rows; the key `split` says "train" or "test", the held-out rows come last.
"""

from typing import Any


def load_orders(**options: int) -> list[dict[str, Any]]:
    """Returns rows {"message", "order", "split"}: one order sentence and what it says."""
    from .orders import load_orders

    return load_orders(**options)


def load_digits_images(**options: int) -> list[dict[str, Any]]:
    """Returns rows {"image", "text", "split"}: scikit-learn's handwritten digits as pictures."""
    from .digits import load_digits_images

    return load_digits_images(**options)


def load_tones(**options: int) -> list[dict[str, Any]]:
    """Returns rows {"audio", "text", "split"}: three or four telephone keys, pressed one after the other."""
    from .tones import load_tones

    return load_tones(**options)


def load_films(**options: int) -> list[dict[str, Any]]:
    """Returns rows {"messages", "split"}: a film of four handwritten digits, shown one after the other."""
    from .films import load_films

    return load_films(**options)


SAMPLES = {
    "orders": load_orders,  # text
    "digits": load_digits_images,  # vision
    "tones": load_tones,  # audio
    "films": load_films,  # video
}
