"""Films: evenly spaced frames as pictures, and the sound track as a clip when it is asked for."""

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from ..clean import BadRow
from . import audio, image
from .source import Wanted, decoding, find_source, is_file_like, open_source

FEED = None  # its frames and sound are fed as pictures and clips
FRAMES = Wanted.frames  # each costs 256 soft tokens with the released checkpoints
# A longer film (frames) is not decoded from its start to its end, if it has an index of key frames. Tried for every film:
# avi, mpeg and transport streams do not land where they should.
LONG = 2000
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


def check(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"type": "video", "video": path or bytes, "sound": bool}. Raises BadRow for no known type."""
    source = find_source(part.get("video", part.get("path")), "film")
    if not is_file_like(source):
        raise BadRow("wrong_type", f"a film is a path or bytes, not {type(source).__name__}")
    return {"type": "video", "video": source, "sound": bool(part.get("sound", False))}


def load(part: dict[str, Any], wanted: Wanted) -> list[dict[str, Any]]:
    """Return `wanted.frames` picture parts, each with its "seconds", and with `sound` the clip's part or parts behind them."""
    parts = [
        {"type": "image", "image": picture, "seconds": seconds}
        for seconds, picture in sample_frames(part["video"], wanted.frames)
    ]
    if part["sound"]:
        parts += audio.load({"audio": part["video"], "sampling_rate": None}, wanted)
    return parts


def sample_frames(source: Any, frames: int) -> list[tuple[float, Any]]:
    """Return (seconds, RGB picture) of evenly spaced frames: the middles of `frames` equal stretches.

    The frames' time stamps are read without decoding, then one picture at a time is decoded and kept. A film with fewer
    frames gives all it has. Raises BadRow when one of them cannot be decoded.
    """
    with decoding(source, "film"):
        with open_source(source, "film") as file:
            times = read_times(file)
        middles = sorted({int((number + 0.5) * len(times) / frames) for number in range(frames)})
        with open_source(source, "film") as file, open_film(file) as film:
            seek = len(times) > LONG and film.format.name in SEEKABLE
            stream = film.streams.video[0]
            pick = seek_frames if seek else walk_frames
            return [
                (float((stamp - times[0]) * find_unit(stream)), image.load_picture(frame.to_image()))
                for stamp, frame in pick(film, stream, [times[number] for number in middles])
            ]


def open_film(file: BinaryIO) -> Any:
    """Open a film with PyAV. No protocol is allowed: a playlist must not open other files or addresses."""
    import av

    return av.open(file, options={"protocol_whitelist": "none"})


def read_times(file: BinaryIO) -> list[int]:
    """Return the frames' time stamps as they are shown, in units of the stream's time base; without stamps, their numbers."""
    with open_film(file) as film:
        if not film.streams.video:
            raise BadRow("corrupt_media", "the file holds no pictures")
        stream = film.streams.video[0]
        image.check_size(stream.width, stream.height)
        stamps = [packet.pts for packet in film.demux(stream) if packet.size and not packet.is_discard]
    if not stamps:
        raise BadRow("empty_media", "the film holds no frame")
    return list(range(len(stamps))) if None in stamps else sorted(stamps)


def find_unit(stream: Any) -> Any:
    """Return the seconds of one unit of `read_times`: the time base, or a frame's share of a second in a bare stream."""
    return stream.time_base if stream.start_time is not None else 1 / (stream.average_rate or 25)


def walk_frames(film: Any, stream: Any, stamps: list[int]) -> Iterator[tuple[int, Any]]:
    """Yield (time stamp, frame) for each of some ascending time stamps, decoding the film from where it stands."""
    left = list(stamps)
    for number, frame in enumerate(film.decode(stream)):
        while left and (number if frame.pts is None else frame.pts) >= left[0]:
            yield left.pop(0), frame
        if not left:
            return
    raise BadRow("corrupt_media", f"the film breaks off: {len(left)} of the {len(stamps)} wanted frames are not there")


def seek_frames(film: Any, stream: Any, stamps: list[int]) -> Iterator[tuple[int, Any]]:
    """Do as `walk_frames` does, each time from the key frame before the time stamp."""
    for stamp in stamps:
        film.seek(stamp, stream=stream)
        yield from walk_frames(film, stream, [stamp])


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the frames that the model would see, with their times."""
    shown = [(p["seconds"], *image.show(p)) for p in load({**part, "sound": False}, Wanted())]
    times = ", ".join(f"{seconds:.2f} s" for seconds, *_ in shown)
    return f"[film, frames at {times}]", "".join(
        f"<figure style='display:inline-block'>{html}<figcaption>{seconds:.2f} s</figcaption></figure>"
        for seconds, _, html in shown
    )
