"""Films: evenly spaced frames as pictures, and the sound track as a clip when it is asked for."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..clean import BadRow
from . import audio, image

FEED = None  # its frames and sound are fed as pictures and clips
FRAMES = 4  # each costs 256 soft tokens with the released checkpoints


def check(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"type": "video", "video": path or bytes, "sound": bool}. Raises BadRow for no known type."""
    source = part.get("video", part.get("path"))
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str) and "://" in source:
        raise BadRow(
            "url", f"a film at an address ({source[:80]}); fetch it first, so that a run does not depend on the network"
        )
    if not isinstance(source, str | Path | bytes):
        raise BadRow("wrong_type", f"a film is a path or bytes, not {type(source).__name__}")
    return {"type": "video", "video": source, "sound": bool(part.get("sound", False))}


def load(part: dict[str, Any], frames: int) -> list[dict[str, Any]]:
    """Return `frames` picture parts, each with its "seconds", and with `sound` a clip part behind them."""
    parts = [
        {"type": "image", "image": picture, "seconds": seconds}
        for seconds, picture in sample_frames(part["video"], frames)
    ]
    if part["sound"]:
        samples, rate = audio.read_with_av(part["video"], BadRow("corrupt_media", "the film holds no sound"))
        parts.append({"type": "audio", "audio": audio.to_mono_16k(samples, rate), "sampling_rate": audio.RATE})
    return parts


def sample_frames(source: Any, frames: int) -> list[tuple[float, Any]]:
    """Decode and return (seconds, RGB picture) of evenly spaced frames: the middles of `frames` equal stretches.

    A film with fewer frames gives all it has. Raises BadRow when none can be decoded.
    """
    import av

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(Path(source).expanduser())) as film:
            if not film.streams.video:
                raise BadRow("corrupt_media", "the file holds no pictures")
            stream = film.streams.video[0]
            total = sum(1 for _ in film.decode(stream))  # counted, as headers are often wrong
            wanted = {min(total - 1, int((i + 0.5) * total / frames)) for i in range(frames)} if total else set()
            film.seek(0)
            chosen = [
                (float(frame.time or 0.0), frame.to_image())
                for i, frame in enumerate(film.decode(stream))
                if i in wanted
            ]
    except FileNotFoundError:
        raise BadRow("missing_media", f"the film {source} does not exist") from None
    except (av.FFmpegError, ValueError, OSError) as error:
        raise BadRow("corrupt_media", f"the film cannot be decoded: {error}") from None
    if not chosen:
        raise BadRow("empty_media", "the film holds no frame")
    return [(seconds, image.load_picture(picture)) for seconds, picture in chosen]


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the frames that the model would see, with their times."""
    shown = [(p["seconds"], *image.show(p)) for p in load({**part, "sound": False}, FRAMES)]
    times = ", ".join(f"{seconds:.2f} s" for seconds, *_ in shown)
    return f"[film, frames at {times}]", "".join(
        f"<figure style='display:inline-block'>{html}<figcaption>{seconds:.2f} s</figcaption></figure>"
        for seconds, _, html in shown
    )
