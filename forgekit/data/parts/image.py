"""Pictures: a PIL image, a path, bytes, or a row of a `datasets` Image column; each is turned, flattened and made RGB."""

import base64
import hashlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..clean import BadRow
from .feed import Feed
from .source import Wanted, decoding, find_source, is_file_like, open_source

if TYPE_CHECKING:
    from PIL.Image import Image

# Larger ones are refused before they are decoded: a file of a few kB can hold gigabytes of pixels. About the size from
# which Pillow itself warns of a decompression bomb (2**28 / 3 pixels); up to it, decoding takes less than 1 GB.
MEGAPIXELS = 89
SHOWN = 256  # longest side of a picture in a notebook, in pixels


def check(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"type": "image", "image": source}. Raises BadRow when the source is of no known type."""
    source = find_source(part.get("image", part.get("path")), "picture")
    if not (is_file_like(source) or hasattr(source, "getexif")):
        raise BadRow("wrong_type", f"a picture is a path, bytes or a PIL image, not {type(source).__name__}")
    return {"type": "image", "image": source}


def load(part: dict[str, Any], wanted: Wanted) -> list[dict[str, Any]]:
    """Return the part with its picture decoded."""
    return [{"type": "image", "image": load_picture(part["image"])}]


def load_picture(source: Any) -> "Image":
    """Decode to RGB: the first frame, turned as EXIF says, alpha on white. Raises BadRow when it cannot be."""
    from PIL import Image

    with decoding(source, "picture"):
        try:
            if not is_file_like(source):
                return make_rgb(source)
            with open_source(source, "picture") as file:
                return make_rgb(Image.open(file))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadRow("too_many_pixels", str(error)) from None


def make_rgb(picture: "Image") -> "Image":
    """Decode an opened picture, unless it is too large, and bring it to 8-bit RGB."""
    from PIL import Image, ImageOps

    check_size(picture.width, picture.height)
    picture.seek(0)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16 and 32 bit: PIL's own conversion cuts the high values off
        picture = scale_range(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A"))
    return white


def check_size(width: int, height: int) -> None:
    """Raise BadRow for a picture without pixels, or with more than are decoded."""
    if not width * height:
        raise BadRow("empty_media", f"the picture has {width} x {height} pixels")
    if width * height > MEGAPIXELS * 1_000_000:
        raise BadRow(
            "too_many_pixels",
            f"{width} x {height} pixels, more than {MEGAPIXELS} megapixels; make it smaller: the model sees 768 x 768",
        )


def scale_range(picture: "Image") -> "Image":
    """Bring a picture of more than 8 bit to 8 bit: 16-bit values by 257, others by their own range."""
    import numpy
    from PIL import Image

    values = numpy.asarray(picture)
    if numpy.issubdtype(values.dtype, numpy.integer) and values.max(initial=0) <= 65535:
        return Image.fromarray((values.clip(0) // 257).astype(numpy.uint8))
    if not numpy.isfinite(values).all():
        raise BadRow("corrupt_media", "the picture holds values that are not numbers")
    top = max(float(values.max(initial=0)), 1e-12)
    return Image.fromarray((values.clip(0, top) * numpy.float32(255 / top)).astype(numpy.uint8))


def batch(values: list["Image"], processor: Any) -> dict[str, Any]:
    """Return {"pixel_values": [pictures, 3, height, width]} in the size that the processor's config names."""
    return {"pixel_values": processor.image_processor(values, return_tensors="pt")["pixel_values"]}


FEED = Feed("image_token", "full_image_sequence", "image", batch)


def show(part: Mapping[str, Any]) -> tuple[str, str]:
    """Return the picture's size and, of a film's frame, its time; and the picture itself, at most 256 pixels a side."""
    picture = load_picture(part["image"])
    small = picture.copy()
    small.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    small.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    when = f", at {part['seconds']:.2f} s" if "seconds" in part else ""
    text = f"[picture, {picture.width} x {picture.height} pixels{when}]"
    return text, f"<img alt='{text[1:-1]}' src='data:image/png;base64,{data}'>"


def fingerprint(part: Mapping[str, Any]) -> str:
    """Return a hash of size and pixels of a decoded picture."""
    picture = part["image"]
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
