"""Pictures: a PIL image, a path, bytes, or a row of a `datasets` Image column; each is turned, flattened and made RGB."""

import base64
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..clean import BadRow
from .feed import Feed

if TYPE_CHECKING:
    from PIL.Image import Image

MEGAPIXELS = 100  # larger ones are refused before they are decoded: a file of a few kB can hold gigabytes of pixels
SHOWN = 256  # longest side of a picture in a notebook, in pixels


def check(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"type": "image", "image": source}. Raises BadRow when the source is of no known type."""
    source = part.get("image", part.get("path"))
    if isinstance(source, Mapping):  # a row of a datasets Image column that is not decoded
        source = source.get("bytes") or source.get("path")
    if isinstance(source, str) and "://" in source:
        raise BadRow(
            "url",
            f"a picture at an address ({source[:80]}); fetch it first, so that a run does not depend on the network",
        )
    if not (isinstance(source, str | Path | bytes) or hasattr(source, "getexif")):
        raise BadRow("wrong_type", f"a picture is a path, bytes or a PIL image, not {type(source).__name__}")
    return {"type": "image", "image": source}


def load(part: dict[str, Any], frames: int) -> list[dict[str, Any]]:
    """Return the part with its picture decoded."""
    return [{"type": "image", "image": load_picture(part["image"])}]


def load_picture(source: Any) -> "Image":
    """Decode to RGB: the first frame, turned as EXIF says, alpha on white. Raises BadRow when it cannot be."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = open_picture(source)
        if picture.width * picture.height > MEGAPIXELS * 1_000_000:
            raise BadRow(
                "too_many_pixels", f"{picture.width} x {picture.height} pixels, more than {MEGAPIXELS} megapixels"
            )
        picture.seek(0)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # 16 and 32 bit: PIL's own conversion cuts the high values off
            picture = scale_range(picture)
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        return picture.convert("RGB")
    except FileNotFoundError:
        raise BadRow("missing_media", f"the picture {source} does not exist") from None
    except Image.DecompressionBombError as error:
        raise BadRow("too_many_pixels", str(error)) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError) as error:
        name = source if isinstance(source, str | Path) else "bytes"
        raise BadRow("corrupt_media", f"the picture ({name}) cannot be decoded: {error}") from None


def open_picture(source: Any) -> "Image":
    """Open a path, bytes or PIL image without decoding it."""
    from PIL import Image

    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    return Image.open(Path(source).expanduser()) if isinstance(source, str | Path) else source


def scale_range(picture: "Image") -> "Image":
    """Bring a picture of more than 8 bit to 8 bit: 16-bit values by 256, others by their own range."""
    import numpy
    from PIL import Image

    values = numpy.asarray(picture, numpy.float64)
    if not numpy.isfinite(values).all():
        raise BadRow("corrupt_media", "the picture holds values that are not numbers")
    top = (
        65535.0
        if picture.mode.startswith("I") and values.max(initial=0) <= 65535
        else max(values.max(initial=0), 1e-12)
    )
    return Image.fromarray((values.clip(0, top) * (255.0 / top)).astype(numpy.uint8))


def batch(values: list["Image"], processor: Any) -> dict[str, Any]:
    """Return {"pixel_values": [pictures, 3, height, width]} in the size that the processor's config names."""
    return {"pixel_values": processor.image_processor(values, return_tensors="pt")["pixel_values"]}


FEED = Feed("image_token", "full_image_sequence", "image", batch)


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the picture's size, and the picture itself, at most 256 pixels wide and high."""
    picture = load_picture(part["image"])
    small = picture.copy()
    small.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    text = f"[picture, {picture.width} x {picture.height} pixels]"
    return text, f"<img alt='{text[1:-1]}' src='data:image/png;base64,{data}'>"


def fingerprint(part: Mapping[str, Any]) -> str:
    """Return a hash of size and pixels of a decoded picture."""
    picture = part["image"]
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
