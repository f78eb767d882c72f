"""300 pictures and 200 clips, sound and damaged, made from a seed; with what should become of each where that is known."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from tests.data.media import encode, encode_sound, tone

RED, BLUE = (255, 0, 0), (0, 0, 255)
KEPT = "kept"
LOSSY = {"GIF", "TIFF"}  # the first cut of a GIF leaves whole frames, the table of a TIFF stands anywhere: not foretold


@dataclass(frozen=True)
class Case:
    """One row: bytes or a path, and its verdict: "kept", a reason's code, or "" where either may happen.

    check: for a picture kept, size and corner pixel (red); for a clip kept, samples at 16 kHz.
    """

    name: str
    data: bytes | None
    verdict: str = ""
    path: str | None = None
    check: tuple[int, ...] = ()


def make_bomb(width: int, height: int) -> bytes:
    """Return a 1-bit PNG of so many black pixels, whole and valid, without ever holding them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flip(data: bytes, generator: np.random.Generator) -> bytes:
    """Return the bytes with one to twenty of them replaced."""
    damaged = bytearray(data)
    for place in generator.integers(0, len(data), generator.integers(1, 21)):
        damaged[place] = generator.integers(0, 256)
    return bytes(damaged)


def cut(data: bytes, offsets: int = 20) -> Iterator[tuple[int, bytes]]:
    """Yield the first part of some bytes, cut at so many offsets between 1 % and 95 %."""
    for number in range(offsets):
        end = int(len(data) * (0.01 + 0.94 * number / (offsets - 1)))
        yield end, data[:end]


def make_whole_pictures() -> Iterator[Case]:
    """Yield what is to be kept: every mode, and every turn."""
    size = (12, 8)
    deep = np.zeros((8, 12), np.uint16)
    palette = Image.new("P", size)
    palette.putpalette([*RED, *[0] * 765])
    red = Image.new("RGB", size, RED)
    film = [Image.new("RGB", size, BLUE)]
    corner = (*size, *RED)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF"):
        yield Case(f"rgb {kind}", encode(red, kind), KEPT, check=corner)
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        yield Case(f"film {kind}", encode(red, kind, save_all=True, append_images=film), KEPT, check=corner)
    for kind in ("JPEG", "TIFF"):
        yield Case(f"cmyk {kind}", encode(Image.new("CMYK", size, (0, 255, 255, 0)), kind), KEPT, check=corner)
    for kind in ("PNG", "TIFF"):
        yield Case(f"16 bit {kind}", encode(Image.fromarray(deep), kind), KEPT, check=(*size, 0, 0, 0))
        yield Case(
            f"16 bit white {kind}", encode(Image.fromarray(deep + 65535), kind), KEPT, check=(*size, 255, 255, 255)
        )
        yield Case(
            f"alpha {kind}", encode(Image.new("RGBA", size, (*BLUE, 0)), kind), KEPT, check=(*size, 255, 255, 255)
        )
    yield Case("32 bit", encode(Image.fromarray(deep.astype(np.float32)), "TIFF"), KEPT, check=(*size, 0, 0, 0))
    yield Case("palette", encode(palette), KEPT, check=corner)
    for kind in ("PNG", "GIF"):
        yield Case(f"palette + alpha {kind}", encode(palette, kind, transparency=0), KEPT, check=(*size, 255, 255, 255))
    yield Case("grey + alpha", encode(Image.new("LA", size, (0, 0))), KEPT, check=(*size, 255, 255, 255))
    yield Case("1 bit", encode(Image.new("1", size, 1)), KEPT, check=(*size, 255, 255, 255))
    upright = Image.new("RGB", (32, 16), BLUE)  # blocks of 16 pixels, so that JPEG keeps the corner's colour
    upright.paste(RED, (0, 0, 16, 16))
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's operation that EXIF asks to undo
    for kind in ("PNG", "JPEG", "WEBP"):
        for orientation, operation in back.items():
            stored = upright if operation is None else upright.transpose(Image.Transpose(operation))
            exif = Image.Exif()
            exif[0x0112] = orientation
            settings = {"lossless": True} if kind == "WEBP" else {}
            yield Case(
                f"exif {orientation} {kind}", encode(stored, kind, exif=exif, **settings), KEPT, check=(32, 16, *RED)
            )


def make_pictures(folder: Path, seed: int = 3407, number: int = 300) -> list[Case]:
    """Return pictures; those with a path are written to the folder."""
    generator = np.random.default_rng(seed)
    cases = list(make_whole_pictures())
    png = encode(Image.new("RGB", (12, 8), RED))
    for ending in (".jpg", ".gif", ".tif", ".txt", ".wav", ""):
        (folder / f"wrong{ending}").write_bytes(png)
        cases.append(Case(f"a PNG called {ending}", None, KEPT, str(folder / f"wrong{ending}"), (12, 8, *RED)))
    (folder / "words.png").write_text("no picture")
    cases += [
        Case("words", None, "corrupt_media", str(folder / "words.png")),
        Case("missing", None, "missing_media", str(folder / "missing.png")),
        Case("a folder", None, "corrupt_media", str(folder)),
        Case("an address", None, "url", "https://example.org/a.png"),
        Case("nothing", None, "wrong_type"),
        Case("zero bytes", b"", "empty_media"),
        Case("a signature", png[:8], "corrupt_media"),
        Case("a bomb", make_bomb(30_000, 30_000), "too_many_pixels"),
        Case("a wide bomb", make_bomb(1_000_000, 900), "too_many_pixels"),
        Case("a bomb in its header", b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0), "too_many_pixels"),
    ]  # fmt: skip
    noise = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    whole = {kind: encode(noise, kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")}
    for kind, data in whole.items():
        verdict = "" if kind in LOSSY else "corrupt_media"
        cases += [Case(f"{kind} cut at {end}", part, verdict) for end, part in cut(data)]
    kinds = sorted(whole)
    for place in range(len(cases), number):
        kind = kinds[place % len(kinds)]
        cases.append(Case(f"{kind} damaged {place}", flip(whole[kind], generator)))
    return cases


def encode_silence(seconds: int, rate: int) -> bytes:
    """Return a FLAC file of silence, written a second at a time."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, format="FLAC") as sound:
        for _ in range(seconds):
            sound.write(np.zeros(rate, np.int16))
    return file.getvalue()


def make_clips(folder: Path, seed: int = 3407, number: int = 200) -> list[Case]:
    """Return clips; those with a path are written to the folder."""
    generator, cases = np.random.default_rng(seed), []
    for rate in (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000):
        for seconds, verdict in ((0.0, "empty_media"), (29.9, KEPT), (30.0, KEPT), (30.1, "clip_too_long")):
            data = encode_sound(np.zeros(round(rate * seconds), np.int16), rate)
            cases.append(Case(f"{seconds} s at {rate} Hz", data, verdict, check=(round(seconds * 16_000),)))
    for subtype in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "PCM_U8", "ULAW"):
        for rate in (8_000, 44_100, 96_000):
            for channels in (1, 2):
                data = encode_sound(tone(rate, 0.3, channels), rate, subtype=subtype)
                cases.append(Case(f"{subtype} {rate} Hz {channels} channels", data, KEPT, check=(4_800,)))
    noise = generator.normal(0, 0.1, 16_000)
    whole = {kind: encode_sound(noise, 16_000, format=kind) for kind in ("WAV", "FLAC", "OGG", "MP3")}
    cases += [Case(kind, data, KEPT) for kind, data in whole.items()]
    for kind, data in whole.items():
        for end, part in cut(data):
            # what is left of a cut OGG file is a whole, shorter one; an MP3's length stands in its first frame, and is known to two
            known = kind in ("WAV", "FLAC") or (kind == "MP3" and 0.2 < end / len(data) < 0.8)
            cases.append(Case(f"{kind} cut at {end}", part, "corrupt_media" if known else ""))
    for value in (np.nan, np.inf, -np.inf):
        for place in (0, 7_999, 15_999):
            broken = noise.copy()
            broken[place] = value
            cases.append(Case(f"{value} at {place}", encode_sound(broken, 16_000, subtype="FLOAT"), "not_finite"))
    for ending in (".mp3", ".flac", ".txt", ".png"):
        (folder / f"wrong{ending}").write_bytes(whole["WAV"])
        cases.append(Case(f"a WAV called {ending}", None, KEPT, str(folder / f"wrong{ending}"), (16_000,)))
    (folder / "words.wav").write_text("no sound")
    cases += [
        Case("words", None, "corrupt_media", str(folder / "words.wav")),
        Case("missing", None, "missing_media", str(folder / "missing.wav")),
        Case("a folder", None, "corrupt_media", str(folder)),
        Case("an address", None, "url", "https://example.org/a.wav"),
        Case("nothing", None, "wrong_type"),
        Case("zero bytes", b"", "empty_media"),
        Case("0.04 s", encode_sound(np.zeros(640), 16_000), "empty_media"),
        Case("an hour", encode_sound(np.zeros(3600 * 8_000, np.int16), 8_000, subtype="PCM_U8"), "clip_too_long"),
        Case("five hours, packed", encode_silence(5 * 3600, 8_000), "clip_too_long"),
    ]  # fmt: skip
    kinds = sorted(whole)
    for place in range(len(cases), number):
        kind = kinds[place % len(kinds)]
        cases.append(Case(f"{kind} damaged {place}", flip(whole[kind], generator)))
    return cases
