"""Handwritten digits that come with scikit-learn: the quick task of the vision notebook."""

import random

from .orders import mark_split

SIDE_PIXELS = 64
HELD_OUT = 200


def load_digits_images(rows: int | None = None, seed: int = 3407) -> list[dict]:
    """Returns the 1797 bundled digits (or the first `rows` of them) in a shuffled order, the last 200 as "test".

    A row is {"image": PIL RGB image of 64 x 64 pixels, "text": "7", "split"}. The originals are 8 x 8 pixels with
    16 grey levels (UCI "Optical Recognition of Handwritten Digits"); they are enlarged by bilinear interpolation.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(seed).shuffle(order)
    examples = []
    for index in order[:rows]:
        grey = (digits.images[index] * (255 / 16)).astype("uint8")
        image = Image.fromarray(grey).resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BILINEAR).convert("RGB")
        examples.append({"image": image, "text": str(digits.target[index])})
    return mark_split(examples, HELD_OUT)
