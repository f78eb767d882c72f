"""Each kind of part: what it accepts, what it becomes, what it refuses; and batches that mix them."""

import ast
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from forgekit.data.clean import BadRow
from forgekit.data.collate import IGNORE, Collator, Markers, check_rows, render_chat, tokenize_rows
from forgekit.data.messages import Messages, check_example
from forgekit.data.parts import KINDS, audio, find_values, image, load_parts, video

ROOT = Path(__file__).resolve().parents[2]
RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> tuple[Any, Any]:
    """The random checkpoint and its processor, as load_model gives them."""
    from forgekit import load_config, load_model

    return load_model(load_config(None, {"model.id": str(tiny_folder), "model.load_in": "16bit"}))


@pytest.fixture(scope="module")
def processor(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def picture_part(seed: int = 0) -> dict[str, Any]:
    values = np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(values)}


def clip_part(seconds: float, seed: int = 0) -> dict[str, Any]:
    samples = np.random.default_rng(seed).normal(0, 0.2, int(audio.RATE * seconds)).astype(np.float32)
    return {"type": "audio", "audio": samples, "sampling_rate": audio.RATE}


def make_chat(parts: list[dict[str, Any]], answer: str) -> Messages:
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return load_parts(check_example({"messages": turns}))


CHATS = [
    ([text_part("hello there")], "one two three"),
    ([picture_part(1), text_part("which letter?")], "A"),
    ([picture_part(2), text_part("and"), picture_part(3), text_part("both?")], "two boxes"),
    ([clip_part(0.7, 4), text_part("what?")], "407"),
    ([clip_part(2.3, 5), text_part("what number is it?")], "40799"),
    ([picture_part(6), clip_part(1.1, 7), text_part("x")], "yes it is so"),
]


def measure(model: Any, processor: Any, chats: list[Messages]) -> tuple[float, int]:
    """Return loss and number of learned tokens of one batch."""
    import torch

    batch = Collator(processor)([{"messages": chat} for chat in chats])
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss), int((batch["labels"][:, 1:] != IGNORE).sum())


def test_a_mixed_batch_has_the_loss_of_its_rows(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    model.eval()
    chats = [make_chat(*chat) for chat in CHATS]
    alone = [measure(model, processor, [chat]) for chat in chats]
    together, tokens = measure(model, processor, chats)
    assert tokens == sum(n for _, n in alone)
    assert together == pytest.approx(sum(loss * n for loss, n in alone) / tokens, abs=1e-5)


def differ_beside_longer(model: Any, processor: Any) -> float:
    """Return how far a clip's soft tokens move when a longer clip stands beside it, at the most over several lengths."""
    import torch

    clips = [clip_part(seconds, 4)["audio"] for seconds in (0.5, 0.61, 0.72, 0.83, 0.94)]
    worst = 0.0
    for clip in clips:
        outputs = []
        for values in ([clip], [clip, clip_part(2.0, 5)["audio"]]):
            batch = audio.batch(values, processor)
            with torch.no_grad():
                done = model.model.get_audio_features(
                    batch["input_features"], ~batch["input_features_mask"], return_dict=True
                )
            outputs.append(done.pooler_output[0][~done.audio_mel_mask[0]])
        alone, beside = outputs
        number = min(len(alone), len(beside))  # extracted together, the shorter clip even gets another number of tokens
        worst = max(worst, float((alone[:number] - beside[:number]).abs().max() / alone.abs().max()))
    return worst


def test_a_clip_has_the_same_soft_tokens_alone_and_beside_a_longer_one(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    model.eval()
    assert differ_beside_longer(model, processor) < 1e-5
    # the mutant: clips padded as sound and extracted together, as the processor does it
    monkeypatch.setattr(audio, "batch", lambda clips, p: dict(p.feature_extractor(clips, return_tensors="pt")))
    assert differ_beside_longer(model, processor) > 1e-4


def test_tokens_and_pictures_are_those_of_the_processor(processor: Any) -> None:
    import torch

    for chat in (make_chat(*chat) for chat in CHATS):
        pictures, clips = find_values(chat, "image"), find_values(chat, "audio")
        theirs = processor(
            text=[render_chat(chat, processor)],
            images=[pictures] if pictures else None,
            audio=clips or None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        ours = Collator(processor)([{"messages": chat}])
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        assert tokenize_rows([chat], processor) == theirs["input_ids"].tolist()
        if pictures:
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        if clips:
            frames = theirs["input_features"].shape[1]
            assert torch.allclose(ours["input_features"][:, : frames - 1], theirs["input_features"][:, : frames - 1])


def test_media_tokens_are_never_learned_even_in_an_answer(processor: Any) -> None:
    turns = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": [text_part("here:"), picture_part()]},
    ]
    chat = load_parts(check_example({"messages": turns}))
    batch = Collator(processor)([{"messages": chat}])
    learned = set(batch["labels"][batch["labels"] != IGNORE].tolist())
    assert not learned & set(Markers.find(processor.tokenizer).control)
    assert learned


def test_no_span_is_cut_at_any_length(processor: Any) -> None:
    for parts, answer in CHATS:
        chat = make_chat(parts, answer)
        (row,) = tokenize_rows([chat], processor)
        for longest in range(1, len(row) + 3):
            (bad,) = check_rows([chat], processor, longest)
            assert (bad is None) == (longest >= len(row))
            if bad:
                assert (bad.code, bad.reason) == ("too_long", f"{len(row)} tokens, and model.max_length is {longest}")


def test_only_the_folder_of_the_parts_names_a_kind() -> None:
    files = [
        ROOT / "forgekit/data/collate.py",
        *(ROOT / "forgekit/train").glob("*.py"),
        *(ROOT / "forgekit/evaluate").glob("*.py"),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                names = [c.value for c in (node.left, *node.comparators) if isinstance(c, ast.Constant)]
                assert not set(names) & set(KINDS), f"{file.name}:{node.lineno}"


def encode(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def decode(source: Any) -> Image.Image:
    (part,) = image.load(image.check({"type": "image", "image": source}), 1)
    return part["image"]


def test_pictures_come_from_a_path_bytes_an_image_and_a_column(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), RED)
    data = encode(picture)
    (tmp_path / "a.png").write_bytes(data)
    for source in (
        picture,
        data,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
    ):
        assert decode(source).tobytes() == picture.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture(orientation: int) -> None:
    upright = Image.new("RGB", (2, 1), WHITE)
    upright.putpixel((0, 0), RED)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's operation that EXIF asks to undo
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(encode(stored, exif=exif))
    assert turned.size == (2, 1)
    assert turned.getpixel((0, 0)) == RED


def test_every_mode_becomes_rgb() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    assert decode(half).getpixel((0, 0)) == WHITE  # see-through is white, not black
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert decode(encode(palette)).getpixel((0, 0)) == RED
    assert decode(encode(palette, transparency=0)).getpixel((0, 0)) == WHITE
    deep = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert [decode(encode(deep)).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]
    assert decode(encode(Image.new("CMYK", (2, 1), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == WHITE
    film = encode(Image.new("RGB", (2, 1), RED), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 1), WHITE)])
    assert decode(film).getpixel((0, 0)) == RED


def test_pictures_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path) -> None:
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    cases = [
        (b"", "corrupt_media", "cannot be decoded"),
        (b"no picture", "corrupt_media", "cannot be decoded"),
        (whole[: len(whole) // 2], "corrupt_media", "truncated"),
        (str(tmp_path / "missing.png"), "missing_media", "does not exist"),
        ("https://example.org/a.png", "url", "fetch it first"),
        (7, "wrong_type", "not int"),
        (None, "wrong_type", "not NoneType"),
    ]
    for source, code, words in cases:
        with pytest.raises(BadRow, match=words) as caught:
            decode(source)
        assert caught.value.code == code


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encode(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(BadRow) as caught:
        decode(bomb)
    assert caught.value.code == "too_many_pixels"


def tone(rate: int, seconds: float = 0.5, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    return np.tile(wave[:, None], (1, channels)) if channels > 1 else wave


def listen(source: Any, **more: Any) -> np.ndarray:
    (part,) = audio.load(audio.check({"type": "audio", "audio": source, **more}), 1)
    return part["audio"]


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_becomes_16_khz_mono(rate: int, channels: int) -> None:
    heard = listen(tone(rate, channels=channels), sampling_rate=rate)
    assert heard.dtype == np.float32
    assert heard.ndim == 1
    assert abs(len(heard) - 8000) <= 1
    spectrum = np.abs(np.fft.rfft(heard))
    assert abs(spectrum.argmax() * audio.RATE / len(heard) - 440) < 3  # the pitch stays, so the rate was heeded


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_sound_files_are_read(tmp_path: Path, subtype: str) -> None:
    import soundfile

    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000, subtype=subtype)
    data = (tmp_path / "a.wav").read_bytes()
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), data, {"bytes": data, "path": None}):
        assert np.abs(listen(source) - tone(16_000)).max() < 1e-3
    assert np.abs(listen({"array": tone(16_000).tolist(), "sampling_rate": 16_000}) - tone(16_000)).max() < 1e-6
    whole = (tone(16_000) * 32767).astype(np.int16)
    assert np.abs(listen(whole, sampling_rate=16_000) - tone(16_000)).max() < 1e-3


def test_clips_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path, processor: Any) -> None:
    broken = tone(16_000)
    broken[7] = np.nan
    cases = [
        (np.zeros(0), 16_000, "empty_media", "no samples"),
        (np.zeros(20), 16_000, "empty_media", "at least 0.05 s"),
        (broken, 16_000, "not_finite", "NaN"),
        (tone(16_000), None, "no_rate", "sampling_rate"),
        (tone(16_000), 5, "wrong_rate", "5 Hz"),
        (b"no sound", None, "corrupt_media", "cannot be decoded"),
        (str(tmp_path / "missing.wav"), None, "missing_media", "does not exist"),
        ("https://example.org/a.wav", None, "url", "fetch it first"),
    ]
    for source, rate, code, words in cases:
        with pytest.raises(BadRow, match=words) as caught:
            listen(source, sampling_rate=rate)
        assert caught.value.code == code
    longest = audio.longest(processor)
    assert check_rows([make_chat([clip_part(longest)], "1")], processor, 500) == [None]
    (bad,) = check_rows([make_chat([clip_part(longest + 0.1)], "1")], processor, 500)
    assert bad is not None
    assert bad.code == "clip_too_long"


def write_film(path: Path, frames: int, sound: bool = False) -> None:
    """Write a film of 10 pictures a second, each of one grey that tells its number."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        track = film.add_stream("aac", rate=16_000) if sound else None
        for number in range(frames):
            picture = np.full((64, 64, 3), 10 * number, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
        if track:
            frame = av.AudioFrame.from_ndarray(
                tone(16_000, frames / 10)[None].astype(np.float32), format="fltp", layout="mono"
            )
            frame.rate = 16_000
            film.mux(track.encode(frame))
            film.mux(track.encode())


def test_a_film_gives_evenly_spaced_frames_and_its_sound(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", 20, sound=True)
    parts = video.load(video.check({"type": "video", "video": str(tmp_path / "a.mp4"), "sound": True}), 4)
    assert [part["type"] for part in parts] == ["image"] * 4 + ["audio"]
    assert [part["seconds"] for part in parts[:4]] == pytest.approx([0.2, 0.7, 1.2, 1.7])
    greys = [np.asarray(part["image"]).mean() for part in parts[:4]]
    assert greys == pytest.approx([20, 70, 120, 170], abs=6)
    assert abs(len(parts[4]["audio"]) / audio.RATE - 2.0) < 0.15


def test_a_short_film_gives_what_it_has_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", 2)
    assert len(video.load(video.check({"type": "video", "video": tmp_path / "a.mp4"}), 4)) == 2
    for source, code in ((b"no film", "corrupt_media"), (str(tmp_path / "missing.mp4"), "missing_media")):
        with pytest.raises(BadRow) as caught:
            video.load(video.check({"type": "video", "video": source}), 4)
        assert caught.value.code == code
