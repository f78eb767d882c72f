"""Sound: a path, bytes, an array with its rate, or a row of a `datasets` Audio column; each becomes 16 kHz mono."""

import base64
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..clean import BadRow
from .feed import Feed

if TYPE_CHECKING:
    import numpy

RATE = 16_000  # Hz, what Gemma 3n's feature extractor expects; it takes no rate and would not notice another one
SECONDS = 30.0  # what the released checkpoints hear; the feature extractor cuts silently behind it
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
        source = source.get("bytes") or source.get("path") if array is None else array
    if isinstance(source, str) and "://" in source:
        raise BadRow(
            "url", f"a clip at an address ({source[:80]}); fetch it first, so that a run does not depend on the network"
        )
    if not isinstance(source, str | Path | bytes) and not hasattr(source, "__len__"):
        raise BadRow(
            "wrong_type", f"a clip is a path, bytes or an array with sampling_rate, not {type(source).__name__}"
        )
    if not isinstance(source, str | Path | bytes) and rate is None:
        raise BadRow("no_rate", "an array of samples needs its sampling_rate in Hz, for instance 16000")
    return {"type": "audio", "audio": source, "sampling_rate": rate}


def load(part: dict[str, Any], frames: int) -> list[dict[str, Any]]:
    """Return the part decoded: {"audio": float32 samples in [-1, 1] at 16 kHz, one channel}."""
    source, rate = part["audio"], part["sampling_rate"]
    samples, rate = read_sound(source) if isinstance(source, str | Path | bytes) else (to_array(source), rate)
    return [{"type": "audio", "audio": to_mono_16k(samples, rate), "sampling_rate": RATE}]


def read_sound(source: Any) -> tuple["numpy.ndarray", int]:
    """Decode a file with soundfile, or with PyAV what soundfile does not know. Returns ([samples, channels], Hz)."""
    import soundfile

    try:
        return soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else str(Path(source).expanduser()),
            dtype="float32",
            always_2d=True,
        )
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        if not isinstance(source, bytes) and not Path(source).expanduser().is_file():
            raise BadRow("missing_media", f"the clip {source} does not exist") from None
        return read_with_av(source, error)


def read_with_av(source: Any, first: Exception) -> tuple["numpy.ndarray", int]:
    """Decode the first sound track of a file with PyAV. Raises BadRow with soundfile's reason when that fails too."""
    import av
    import numpy

    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as file:
            if not file.streams.audio:
                raise BadRow("corrupt_media", "the file holds no sound")
            stream = file.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            blocks = [block.to_ndarray() for frame in file.decode(stream) for block in resampler.resample(frame)]
            return numpy.concatenate(blocks, axis=1).T, stream.rate
    except (av.FFmpegError, ValueError, IndexError, OSError):
        raise BadRow("corrupt_media", f"the clip cannot be decoded: {first}") from None


def to_array(source: Any) -> "numpy.ndarray":
    """Return samples as float32; whole numbers are scaled by their type's range."""
    import numpy

    try:
        samples = numpy.asarray(source)
        if numpy.issubdtype(samples.dtype, numpy.integer):
            return samples.astype(numpy.float32) / float(numpy.iinfo(samples.dtype).max)
        return samples.astype(numpy.float32)
    except (ValueError, TypeError) as error:
        raise BadRow("wrong_type", f"the samples are no array of numbers: {error}") from None


def to_mono_16k(samples: "numpy.ndarray", rate: Any) -> "numpy.ndarray":
    """Mix channels down ([samples] or [samples, channels]) and resample to 16 kHz. Raises BadRow for what is no sound."""
    import numpy
    import soxr

    if not isinstance(rate, int | float | numpy.number) or not 1_000 <= rate <= 768_000:
        raise BadRow("wrong_rate", f"a sampling rate of {rate} Hz; between 1000 and 768000 is sound")
    if samples.ndim == 2:
        samples = samples.mean(axis=1 if samples.shape[1] <= samples.shape[0] else 0)
    if samples.ndim != 1 or samples.size == 0:
        raise BadRow("empty_media", f"the clip holds no samples (shape {samples.shape})")
    if not numpy.isfinite(samples).all():
        raise BadRow("not_finite", "the clip holds samples that are not numbers (NaN or infinity)")
    mono = samples if rate == RATE else soxr.resample(samples, rate, RATE)
    if len(mono) < RATE // 20:
        raise BadRow(
            "empty_media", f"the clip lasts {len(mono) / RATE:.3f} s; at least 0.05 s are needed for one frame"
        )
    return numpy.ascontiguousarray(mono, numpy.float32)


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
        raise BadRow(
            "clip_too_long",
            f"a clip of {len(value) / RATE:.2f} s, and the model hears {longest(processor):g} s. Split it: it is never cut",
        )


FEED = Feed("audio_token", "full_audio_sequence", "audio", batch, check_length)


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the clip's length, and a player."""
    import soundfile

    samples = load(dict(part), 0)[0]["audio"]
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="WAV", subtype="PCM_16")
    data = base64.b64encode(file.getvalue()).decode()
    text = f"[sound, {len(samples) / RATE:.2f} s]"
    return text, f"<audio controls aria-label='{text[1:-1]}' src='data:audio/wav;base64,{data}'></audio>"


def fingerprint(part: Mapping[str, Any]) -> str:
    """Return a hash of the samples of a decoded clip, at 16 bit."""
    return hashlib.sha256((part["audio"] * 32767).round().astype("int16").tobytes()).hexdigest()
