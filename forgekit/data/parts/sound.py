"""Sound of any file or array to samples: one channel, 16 kHz, read block by block, so that no length fills the memory."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from ..clean import BadRow
from .source import decoding, open_source

if TYPE_CHECKING:
    import numpy

RATE = 16_000  # Hz, what Gemma 3n's feature extractor expects; it takes no rate and would not notice another one
SHORTEST = 0.05  # seconds; the feature extractor makes its first frames of about so much
BLOCK = 1 << 18  # samples of one channel read at a time
RATES = (1_000, 768_000)  # Hz; another number is a mistake
UNKNOWN_SIZES = (0, 0xFFFFFFFF)  # what programs write into a WAV's header when they cannot go back to fill it in
HEAD = 1 << 14  # bytes looked at for MP3_LENGTHS
MP3_LENGTHS = (
    b"Xing",
    b"Info",
)  # where an MP3 file writes its length; without them libsndfile guesses, by up to a tenth
MP3_SLACK = 2 * 1152  # samples: two of MP3's frames, which encoders count in or not

Blocks = Iterable[tuple["numpy.ndarray", Any]]  # ([samples, channels] float32, Hz)


def read_sound(source: Any, limit: float) -> "numpy.ndarray":
    """Decode a file: with soundfile, or with PyAV what soundfile does not know (m4a, a film's sound track).

    Args:
        limit: seconds; a longer clip raises BadRow, as soon as its header or its samples show it.

    Returns float32 [samples] at 16 kHz. Raises BadRow for what cannot be decoded.
    """
    import soundfile

    with decoding(source, "clip"), open_source(source, "clip") as file:
        head = check_whole(file)
        try:
            sound = soundfile.SoundFile(file)
        except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a name that ends in .raw
            file.seek(0)
            return make_mono(read_with_av(file, getattr(error, "error_string", str(error))), limit)
        with sound:
            guessed = sound.format == "MP3" and not any(tag in head for tag in MP3_LENGTHS)
            if sound.frames > limit * sound.samplerate and not guessed:
                raise too_long(sound.frames / sound.samplerate, limit)
            return make_mono(read_blocks(sound, guessed), limit)


def check_whole(file: BinaryIO) -> bytes:
    """Return the first bytes. Raises BadRow for a WAV file that ends before its header says.

    libsndfile would hand out what is left of it without a word.
    """
    head = file.read(HEAD)
    size = file.seek(0, 2)
    file.seek(0)
    told = int.from_bytes(head[4:8], "little")
    if head[:4] == b"RIFF" and told not in UNKNOWN_SIZES and size < told + 7:  # 8, less a byte that pads odd lengths
        raise BadRow("corrupt_media", f"the clip is cut off: {size} bytes, and its header tells of {told + 8}")
    return head


def read_blocks(sound: Any, guessed: bool) -> Iterator[tuple["numpy.ndarray", int]]:
    """Yield a sound file's samples. Raises BadRow when there are fewer than its header tells of, unless that is a guess."""
    read = 0
    # not sound.blocks(): soundfile 0.14 fills up its last block, where a file is cut off, with whatever was in memory
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        read += len(block)
        yield block, sound.samplerate
    if read < sound.frames - (MP3_SLACK if sound.format == "MP3" else 0) and not guessed:
        raise BadRow("corrupt_media", f"the clip is cut off: {read} samples of {sound.frames} can be decoded")


def read_with_av(file: BinaryIO, first: str) -> Iterator[tuple["numpy.ndarray", int]]:
    """Yield the samples of a file's first sound track through PyAV. Raises BadRow with soundfile's reason if that fails."""
    import av

    try:
        # no protocol: a playlist must not open other files or addresses
        with av.open(file, options={"protocol_whitelist": "none"}) as opened:
            if not opened.streams.audio:
                raise BadRow("corrupt_media", "the file holds no sound")
            stream = opened.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
            for frame in itertools.chain(opened.decode(stream), [None]):  # None empties the resampler
                for block in resampler.resample(frame):
                    yield block.to_ndarray().T, stream.rate
    except (av.FFmpegError, ValueError, IndexError, OSError) as error:
        raise BadRow("corrupt_media", f"the clip cannot be decoded: {first}; PyAV: {error}") from None


def read_array(source: Any, rate: Any, limit: float) -> "numpy.ndarray":
    """Bring an array of [samples], [samples, channels] or [channels, samples] to 16 kHz mono; see `read_sound`."""
    samples = to_float(source)
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.size == 0:
        raise BadRow("empty_media", f"the clip holds no samples (shape {samples.shape})")
    if samples.shape[0] < samples.shape[1]:
        samples = samples.T
    check_rate(rate)
    if len(samples) > limit * rate:
        raise too_long(len(samples) / rate, limit)
    return make_mono([(samples, rate)], limit)


def to_float(source: Any) -> "numpy.ndarray":
    """Return samples as float32; whole numbers are scaled by their type's range, unsigned ones around its middle."""
    import numpy

    try:
        samples = numpy.asarray(source)
        if numpy.issubdtype(samples.dtype, numpy.unsignedinteger):
            half = (int(numpy.iinfo(samples.dtype).max) + 1) / 2
            return ((samples.astype(numpy.float64) - half) / half).astype(numpy.float32)
        if numpy.issubdtype(samples.dtype, numpy.integer):
            return samples.astype(numpy.float32) / float(numpy.iinfo(samples.dtype).max)
        if numpy.issubdtype(samples.dtype, numpy.complexfloating):
            raise TypeError("complex numbers")
        with numpy.errstate(over="ignore"):  # too large for float32 becomes infinity, which is refused
            return samples.astype(numpy.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRow("wrong_type", f"the samples are no array of numbers: {error}") from None


def check_rate(rate: Any) -> None:
    """Raise BadRow for a sampling rate that no sound has."""
    import numpy

    if not isinstance(rate, int | float | numpy.number) or not RATES[0] <= rate <= RATES[1]:
        raise BadRow("wrong_rate", f"a sampling rate of {rate} Hz; between {RATES[0]} and {RATES[1]} is sound")


def make_mono(blocks: Blocks, limit: float) -> "numpy.ndarray":
    """Mix channels down and resample to 16 kHz, block by block. Raises BadRow for what is no sound."""
    import numpy
    import soxr

    stream, heard, count = None, [], 0
    for block, rate in blocks:
        check_rate(rate)
        count += len(block)
        if count > limit * rate:
            raise too_long(count / rate, limit, "more than ")
        if not numpy.isfinite(block).all():
            raise BadRow("not_finite", "the clip holds samples that are not numbers (NaN or infinity)")
        mono = numpy.ascontiguousarray(block.mean(axis=1), numpy.float32)
        if rate != RATE:
            stream = stream or soxr.ResampleStream(rate, RATE, 1, dtype="float32")
            mono = stream.resample_chunk(mono)
        heard.append(mono)
    if stream:
        heard.append(stream.resample_chunk(numpy.zeros(0, numpy.float32), last=True))
    samples = numpy.concatenate(heard) if heard else numpy.zeros(0, numpy.float32)
    if len(samples) < SHORTEST * RATE:
        raise BadRow(
            "empty_media",
            f"the clip lasts {len(samples) / RATE:.3f} s; at least {SHORTEST} s are needed for one frame",
        )
    return samples


def too_long(seconds: float, limit: float, more: str = "") -> BadRow:
    """Return what is wrong with a clip of so many seconds."""
    return BadRow(
        "clip_too_long",
        f"a clip of {more}{seconds:.2f} s, and {limit:g} s are the most. "
        "Split it, or set data.long_clips to split: it is never cut",
    )
