"""Films of handwritten digits, drawn and encoded here: they show how a film becomes pictures for the model."""

import io
from typing import Any

from .digits import SIDE_PIXELS, load_digits_images
from .orders import mark_split

DIGITS = 4  # a film: with data.frames: 4 each picture that the model sees is another digit
FRAMES_A_SECOND = 8
SECONDS_A_DIGIT = 0.5


def load_films(rows: int = 12, seed: int = 3407) -> list[dict[str, Any]]:
    """Makes `rows` silent films of 2 seconds, each of four of scikit-learn's digits; the last third has split "test".

    A row is {"messages": [...], "split"}: the user's turn holds the film (bytes of an MP4 file, 64 x 64 pixels, 8 frames
    a second) and a question, the assistant's turn the digits in their order, for instance "4 1 9 7".
    """
    digits = load_digits_images(rows * DIGITS, seed)
    films = []
    for start in range(0, len(digits), DIGITS):
        shown = digits[start : start + DIGITS]
        question = {"type": "text", "text": "Which digits does the film show, in order?"}
        film = {"type": "video", "video": encode_film([digit["image"] for digit in shown])}
        answer = {"type": "text", "text": " ".join(digit["text"] for digit in shown)}
        turns = [{"role": "user", "content": [film, question]}, {"role": "assistant", "content": [answer]}]
        films.append({"messages": turns})
    return mark_split(films, rows // 3)


def encode_film(pictures: list[Any]) -> bytes:
    """Returns an MP4 file (MPEG-4 Part 2, which every FFmpeg can write) that shows each picture for half a second."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as film:
        stream = film.add_stream("mpeg4", rate=FRAMES_A_SECOND)
        stream.width = stream.height = SIDE_PIXELS
        stream.pix_fmt, stream.bit_rate = "yuv420p", 400_000
        for picture in pictures:
            for _ in range(round(SECONDS_A_DIGIT * FRAMES_A_SECOND)):
                film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    return file.getvalue()
