"""Pictures, clips, films and chats that the tests of this folder are made of."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from forgekit.data.messages import Messages, check_example
from forgekit.data.parts import audio, load_parts


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def picture_part(seed: int = 0) -> dict[str, Any]:
    values = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(values)}


def clip_part(seconds: float, seed: int = 0) -> dict[str, Any]:
    samples = np.random.default_rng(seed).normal(0, 0.2, int(audio.RATE * seconds)).astype(np.float32)
    return {"type": "audio", "audio": samples, "sampling_rate": audio.RATE}


def make_chat(parts: list[dict[str, Any]], answer: str, *more: Any, **loading: Any) -> Messages:
    """Return decoded messages: the user's parts and the answer, and more of the same in turn."""
    contents = [parts, answer, *more]
    roles = ["user", "assistant"] * (len(contents) // 2)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return load_parts(check_example({"messages": turns}), **loading)


def encode(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    """Return a picture as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def tone(rate: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    """Return samples of 440 Hz: [samples] or [samples, channels]."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.tile(wave[:, None], (1, channels)) if channels > 1 else wave


def encode_sound(samples: np.ndarray, rate: int, **settings: Any) -> bytes:
    """Return samples as the bytes of a file, WAV unless `format` says otherwise."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": "WAV", **settings})
    return file.getvalue()


def write_film(path: Path, frames: int, sound: bool = False, codec: str = "mpeg4", **options: str) -> None:
    """Write a film of 10 pictures a second, each of one grey that tells its number."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=10, options=options)
        stream.width = stream.height = 64
        track = film.add_stream("aac", rate=16_000) if sound else None
        for number in range(frames):
            picture = np.full((64, 64, 3), 200 * number // frames, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
        if track:
            samples = tone(16_000, frames / 10)[None].astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.rate = 16_000
            film.mux(track.encode(frame))
            film.mux(track.encode())
