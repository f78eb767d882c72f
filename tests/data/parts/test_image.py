"""Pictures: what is accepted, what it becomes, what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forgekit.data.clean import BadRow
from forgekit.data.parts import image
from forgekit.data.parts.source import Wanted
from tests.data.media import encode

RED, WHITE = (255, 0, 0), (255, 255, 255)


def decode(source: Any) -> Image.Image:
    (part,) = image.load(image.check({"type": "image", "image": source}), Wanted())
    return part["image"]


def test_pictures_come_from_a_path_bytes_an_image_and_a_column(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), RED)
    data = encode(picture)
    (tmp_path / "a.png").write_bytes(data)
    for source in (
        picture,
        data,
        bytearray(data),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        assert decode(source).tobytes() == picture.tobytes()


def test_a_datasets_column_gives_its_pictures_undecoded_and_decoded(tmp_path: Path) -> None:
    import datasets

    picture = Image.new("RGB", (4, 3), RED)
    picture.save(tmp_path / "a.png")
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    for decoded in (False, True):
        row = table.cast_column("image", datasets.Image(decode=decoded))[0]
        assert isinstance(row["image"], dict) is not decoded
        assert decode(row["image"]).tobytes() == picture.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("opened", [False, True])
def test_exif_turns_a_picture(orientation: int, opened: bool, tmp_path: Path) -> None:
    upright = Image.new("RGB", (2, 1), WHITE)
    upright.putpixel((0, 0), RED)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's operation that EXIF asks to undo
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a.png").write_bytes(encode(stored, exif=exif))
    turned = decode(Image.open(tmp_path / "a.png") if opened else tmp_path / "a.png")
    assert turned.size == (2, 1)
    assert turned.getpixel((0, 0)) == RED


def test_see_through_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert decode(clear).getpixel((0, 0)) == WHITE  # not black, and not the red below
    assert decode(half).getpixel((0, 0)) == pytest.approx((255, 127, 127), abs=1)
    assert decode(clear.convert("LA")).getpixel((0, 0)) == WHITE
    assert decode(encode(palette)).getpixel((0, 0)) == RED
    assert decode(encode(palette, transparency=0)).getpixel((0, 0)) == WHITE
    assert decode(encode(Image.new("1", (2, 1)), transparency=0)).getpixel((0, 0)) == WHITE


def test_every_mode_becomes_rgb() -> None:
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert [decode(encode(deep)).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), WHITE]
    assert decode(encode(deep.convert("I"), "TIFF")).getpixel((1, 0)) == (100, 100, 100)
    real = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert [decode(encode(real, "TIFF")).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (127, 127, 127), WHITE]
    assert decode(encode(Image.new("CMYK", (2, 1), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == WHITE
    film = encode(Image.new("RGB", (2, 1), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 1), WHITE)])
    assert decode(film).getpixel((0, 0)) == RED


def test_pictures_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path) -> None:
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    closed = Image.open(tmp_path / "a.jpg") if (tmp_path / "a.jpg").write_bytes(whole) else None
    closed.close()
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (b"", "empty_media", "0 bytes"),
        (Image.new("RGB", (0, 5)), "empty_media", "0 x 5 pixels"),
        ({"bytes": b"", "path": None}, "empty_media", "0 bytes"),
        (b"no picture", "corrupt_media", "cannot be decoded"),
        (whole[: len(whole) // 2], "corrupt_media", "truncated"),
        (closed, "corrupt_media", "cannot be decoded"),
        (str(tmp_path / "missing.png"), "missing_media", "does not exist"),
        (tmp_path, "corrupt_media", "is no file"),
        (tmp_path / "pipe", "corrupt_media", "is no file"),
        ("https://example.org/a.png", "url", "fetch it first"),
        ("data:image/png;base64,aaaa", "url", "fetch it first"),
        (7, "wrong_type", "not int"),
        (None, "wrong_type", "not NoneType"),
        ({"bytes": None, "path": None}, "wrong_type", "not NoneType"),
    ]
    for source, code, words in cases:
        with pytest.raises(BadRow, match=words) as caught:
            decode(source)
        assert caught.value.code == code
        assert len(caught.value.reason) < 500


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just over our cap, and over the one from which Pillow itself refuses."""
    bomb = encode(Image.new("1", (side, side)))
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "convert", None)  # whoever gets as far as this has decoded it
    with pytest.raises(BadRow) as caught:
        decode(bomb)
    assert caught.value.code == "too_many_pixels"


def test_the_frame_of_a_film_says_its_time() -> None:
    text, markup = image.show({"type": "image", "image": Image.new("RGB", (4, 3), RED), "seconds": 1.25})
    assert text == "[picture, 4 x 3 pixels, at 1.25 s]"
    assert text[1:-1] in markup
