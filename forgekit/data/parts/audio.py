"""Sound: a path, bytes, an array with its rate, or a row of a `datasets` Audio column; each becomes 16 kHz mono."""

import base64
import hashlib
import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..clean import BadRow
from .feed import Feed
from .sound import RATE, read_array, read_sound, too_long
from .source import Wanted, find_source, is_file_like

if TYPE_CHECKING:
    import numpy

SECONDS = 30.0  # what the released checkpoints hear; the feature extractor cuts silently behind it
# Seconds of a clip that is split: an hour is 120 parts of 188 tokens, more than a row of the usual model.max_length takes
LONGEST_SPLIT = 3600.0
# Frames of zeros (10 ms each) behind each clip: the tower's two convolutions (kernel 3, stride 2) read up to 6 frames past
# the last one, and should find the same there whether or not a longer clip stands beside it.
LOOK_AHEAD = 8
STRIDE = 4  # frames to one step of the tower behind those convolutions


def check(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"type": "audio", "audio": source, "sampling_rate": Hz or None}. Raises BadRow for no known type."""
    source, rate = part.get("audio", part.get("path")), part.get("sampling_rate")
    if isinstance(source, Mapping):  # a row of a datasets Audio column, decoded or not
        rate = source.get("sampling_rate", rate)
        array = source.get("array")
        source = source if array is None else array
    source = find_source(source, "clip")
    if not is_file_like(source) and not hasattr(source, "__len__"):
        raise BadRow(
            "wrong_type", f"a clip is a path, bytes or an array with sampling_rate, not {type(source).__name__}"
        )
    if not is_file_like(source) and rate is None:
        raise BadRow("no_rate", "an array of samples needs its sampling_rate in Hz, for instance 16000")
    return {"type": "audio", "audio": source, "sampling_rate": rate}


def load(part: dict[str, Any], wanted: Wanted) -> list[dict[str, Any]]:
    """Return the part decoded: {"audio": float32 samples in [-1, 1] at 16 kHz, one channel}.

    A clip longer than `wanted.seconds` becomes several such parts, each with "piece", from 1, and "pieces".
    """
    source, limit = part["audio"], SECONDS if wanted.seconds is None else LONGEST_SPLIT
    samples = read_sound(source, limit) if is_file_like(source) else read_array(source, part["sampling_rate"], limit)
    pieces = split(samples, wanted.seconds)
    numbers = [
        {"piece": number, "pieces": len(pieces)} if len(pieces) > 1 else {} for number in range(1, len(pieces) + 1)
    ]
    return [
        {"type": "audio", "audio": piece, "sampling_rate": RATE, **number}
        for piece, number in zip(pieces, numbers, strict=True)
    ]


def split(samples: "numpy.ndarray", seconds: float | None) -> list["numpy.ndarray"]:
    """Cut samples into the fewest pieces of at most so many seconds, all of one length to a sample; None: one piece."""
    import numpy

    number = 1 if seconds is None else math.ceil(len(samples) / int(seconds * RATE))
    return numpy.array_split(samples, number)


def longest(processor: Any) -> float:
    """Return how many seconds the processor's soft tokens cover; `load_processor` notes it for other sizes than Gemma's."""
    return getattr(processor.feature_extractor, "max_seconds", SECONDS)


def batch(values: list["numpy.ndarray"], processor: Any) -> dict[str, Any]:
    """Return {"input_features": [clips, frames, mel bins], "input_features_mask": [clips, frames]}.

    Each clip is extracted alone, as padding sound before extraction changes the last frames of the shorter ones; then
    frames are padded with zeros.
    """
    import torch
    from torch.nn.functional import pad

    features = []
    for clip in values:
        done = processor.feature_extractor(clip, padding=False, pad_to_multiple_of=None, return_tensors="pt")
        features.append(done["input_features"][0])
    frames = max(len(clip) for clip in features) + LOOK_AHEAD
    frames += -frames % STRIDE
    return {
        "input_features": torch.stack([pad(clip, (0, 0, 0, frames - len(clip))) for clip in features]),
        "input_features_mask": torch.stack([torch.arange(frames) < len(clip) for clip in features]),
    }


def check_length(value: "numpy.ndarray", processor: Any) -> None:
    """Raise BadRow for a clip that is longer than its soft tokens; the feature extractor would cut it without a word."""
    if len(value) > longest(processor) * RATE:
        raise too_long(len(value) / RATE, longest(processor))


FEED = Feed("audio_token", "full_audio_sequence", "audio", batch, check_length)


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the clip's length and, of a clip that was split, its number; and a player."""
    import soundfile

    (decoded,) = load(dict(part), Wanted(seconds=LONGEST_SPLIT))
    file = io.BytesIO()
    # no sample is lost and a quarter saved; level 0 has integer predictors, so that every machine writes the same bytes
    soundfile.write(file, decoded["audio"], RATE, format="FLAC", subtype="PCM_16", compression_level=0)
    data = base64.b64encode(file.getvalue()).decode()
    which = f", part {part['piece']} of {part['pieces']}" if "pieces" in part else ""
    text = f"[sound, {len(decoded['audio']) / RATE:.2f} s{which}]"
    return text, f"<audio controls aria-label='{text[1:-1]}' src='data:audio/flac;base64,{data}'></audio>"


def fingerprint(part: Mapping[str, Any]) -> str:
    """Return a hash of the samples of a decoded clip, at 16 bit."""
    return hashlib.sha256((part["audio"] * 32767).round().astype("int16").tobytes()).hexdigest()
