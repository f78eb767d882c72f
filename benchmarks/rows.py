"""Rows to measure with: random words, and a picture or a clip in each if wanted."""

import io
import random
import wave
from typing import Any

PROMPT = 0.75  # share of a row that is not learned
WORDS = "after again always answer before between bottle bridge bring cabin carry change clear cloud corner every field follow garden green house island letter light market morning never number other paper people piece place quiet river round second short silver simple small stone street table think three under water where window winter write".split()  # fmt: skip
DIFFERENT = 16  # media; rows take them in turn
SIZE, SECONDS, RATE = (800, 600), 10, 16000  # pixels of a picture; length of a clip, in seconds and Hz


def make_rows(tokenizer: Any, number: int, tokens: int, medium: str | None = None) -> list[dict[str, Any]]:
    """Make rows of about so many tokens of text each, of random words, the last part of each learned.

    Args:
        medium: "image" or "audio": each row holds one as well, as the bytes of a file.
    """
    draw = random.Random(0)
    sample = " ".join(draw.choices(WORDS, k=1000))
    words = int(0.97 * tokens / (len(tokenizer(sample, add_special_tokens=False).input_ids) / 1000))
    cut = max(1, int(PROMPT * words))
    media = [{"type": medium, medium: MAKERS[medium](seed)} for seed in range(DIFFERENT)] if medium else []
    rows = []
    for place in range(number):
        text = draw.choices(WORDS, k=max(words, cut + 1))
        question: list[dict[str, Any]] = [{"type": "text", "text": " ".join(text[:cut])}]
        question = [media[place % DIFFERENT], *question] if media else question
        answer = " ".join(text[cut:])
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def make_picture(seed: int) -> bytes:
    """Return a JPEG file of soft colours."""
    import numpy
    from PIL import Image

    colours = numpy.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=numpy.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize(SIZE, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def make_clip(seed: int) -> bytes:
    """Return a WAV file of noise."""
    import numpy

    samples = numpy.random.default_rng(seed).integers(-8000, 8000, RATE * SECONDS, dtype=numpy.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setparams((1, 2, RATE, len(samples), "NONE", ""))
        wav.writeframes(samples.tobytes())
    return file.getvalue()


MAKERS = {"image": make_picture, "audio": make_clip}
