"""Sound: what is accepted, what it becomes, what is refused; and long clips, which are refused or split, never cut."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgekit.data.clean import BadRow
from forgekit.data.collate import check_rows, count_soft_tokens, tokenize_rows
from forgekit.data.parts import audio, count_pieces, find_longest_piece, sound
from forgekit.data.parts.source import Wanted
from tests.data.media import clip_part, encode_sound, make_chat, text_part, tone


@pytest.fixture(scope="module")
def processor(tiny_folder: Path) -> Any:
    from forgekit import load_config, load_processor

    return load_processor(load_config(None, {"model.id": str(tiny_folder), "model.load_in": "16bit"}))


def listen(source: Any, **more: Any) -> np.ndarray:
    (part,) = audio.load(audio.check({"type": "audio", "audio": source, **more}), Wanted())
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


def test_a_file_is_the_same_read_in_one_block_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling block by block leaves no seam."""
    import soxr

    data = encode_sound(tone(44_100, 1.3, channels=2), 44_100, subtype="FLOAT")
    whole = listen(data)
    monkeypatch.setattr(sound, "BLOCK", 1000)
    assert np.array_equal(listen(data), whole)
    assert np.array_equal(whole, soxr.resample(tone(44_100, 1.3).astype(np.float32), 44_100, audio.RATE))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_sound_files_are_read(tmp_path: Path, subtype: str) -> None:
    data = encode_sound(tone(16_000), 16_000, subtype=subtype)
    (tmp_path / "a.wav").write_bytes(data)
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), data, bytearray(data), {"bytes": data, "path": None}):
        assert np.abs(listen(source) - tone(16_000)).max() < 1e-3


def test_arrays_are_scaled_by_their_type() -> None:
    wave = tone(16_000)
    assert np.abs(listen({"array": wave.tolist(), "sampling_rate": 16_000}) - wave).max() < 1e-6
    assert np.abs(listen((wave * 32767).astype(np.int16), sampling_rate=16_000) - wave).max() < 1e-3
    assert np.abs(listen((wave * 2147483647).astype(np.int32), sampling_rate=16_000) - wave).max() < 1e-6
    assert np.abs(listen((wave * 127 + 128).astype(np.uint8), sampling_rate=16_000) - wave).max() < 2e-2
    assert np.abs(listen(tone(16_000, channels=2).T, sampling_rate=16_000) - wave).max() < 1e-6


def encode_mp3(xing: bool, seconds: float) -> bytes:
    """Return noise behind silence at a variable bit rate, with or without the header that tells the length."""
    import av

    samples = np.zeros(int(44_100 * seconds), np.float32)
    samples[len(samples) // 2 :] = np.random.default_rng(0).normal(0, 0.3, len(samples) - len(samples) // 2)
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"write_xing": str(int(xing))}) as written:
        track = written.add_stream("libmp3lame", rate=44_100)
        track.codec_context.flags |= 2  # AV_CODEC_FLAG_QSCALE
        track.codec_context.global_quality = 5 * 118  # quality 5, in libav's units
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.rate = 44_100
        written.mux(track.encode(frame))
        written.mux(track.encode())
    return file.getvalue()


def test_an_mp3_without_a_length_is_read_to_its_end_and_one_with_it_is_not_cut_off() -> None:
    """libsndfile guesses 32 s for the first one, which lasts 30 s or less."""
    import soundfile

    guessed, told = encode_mp3(False, 29.9), encode_mp3(True, 29.9)
    assert soundfile.info(io.BytesIO(guessed)).duration > 31
    assert [abs(len(listen(data)) / audio.RATE - 29.9) < 0.06 for data in (guessed, told)] == [True, True]
    with pytest.raises(BadRow, match="cut off: [0-9]+ samples of") as caught:
        listen(told[: len(told) // 2])
    assert caught.value.code == "corrupt_media"
    # nothing tells that this one goes on, but what is heard is what the file holds, the same each time
    heard = [listen(guessed[: len(guessed) // 2]) for _ in range(3)]
    assert np.array_equal(heard[0], heard[1]) and np.array_equal(heard[0], heard[2])


def test_a_datasets_column_is_read_without_a_decoder_of_its_own(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.wav").write_bytes(encode_sound(tone(16_000), 16_000))
    table = datasets.Dataset.from_dict({"audio": [str(tmp_path / "a.wav")]})
    row = table.cast_column("audio", datasets.Audio(decode=False))[0]
    assert np.abs(listen(row["audio"]) - tone(16_000)).max() < 1e-3


def test_what_soundfile_does_not_know_is_read_by_pyav() -> None:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as written:
        track = written.add_stream("aac", rate=44_100)
        samples = tone(44_100, 2.0)[None].astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 44_100
        written.mux(track.encode(frame))
        written.mux(track.encode())
    heard = listen(file.getvalue())
    assert abs(len(heard) / audio.RATE - 2.0) < 0.1
    assert abs(np.abs(np.fft.rfft(heard)).argmax() * audio.RATE / len(heard) - 440) < 3


def test_clips_that_cannot_be_used_are_refused_with_the_reason(tmp_path: Path) -> None:
    broken = tone(16_000)
    broken[7] = np.nan
    whole = encode_sound(tone(16_000), 16_000)
    flac = encode_sound(np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000, format="FLAC")
    (tmp_path / "a.raw").write_bytes(b"12345678")
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    cases = [
        (np.zeros(0), 16_000, "empty_media", "no samples"),
        (np.zeros(20), 16_000, "empty_media", "at least 0.05 s"),
        (encode_sound(np.zeros(0), 16_000), None, "empty_media", "0.000 s"),
        (b"", None, "empty_media", "0 bytes"),
        (broken, 16_000, "not_finite", "NaN"),
        (encode_sound(broken, 16_000, subtype="FLOAT"), None, "not_finite", "NaN"),
        (np.full(16_000, 1e300), 16_000, "not_finite", "infinity"),
        (tone(16_000), None, "no_rate", "sampling_rate"),
        (tone(16_000), 5, "wrong_rate", "5 Hz"),
        (tone(16_000), float("nan"), "wrong_rate", "nan Hz"),
        (["a", "b"], 16_000, "wrong_type", "no array of numbers"),
        ([[0.0], [0.0, 1.0]], 16_000, "wrong_type", "no array of numbers"),
        (b"no sound", None, "corrupt_media", "cannot be decoded"),
        (playlist, None, "corrupt_media", "holds no sound|cannot be decoded"),
        (whole[: len(whole) // 2], None, "corrupt_media", "cut off"),
        (flac[: len(flac) // 2], None, "corrupt_media", "cut off|cannot be decoded"),
        (str(tmp_path / "a.raw"), None, "corrupt_media", "holds no sound|cannot be decoded"),
        (str(tmp_path / "missing.wav"), None, "missing_media", "does not exist"),
        (tmp_path, None, "corrupt_media", "is no file"),
        ("https://example.org/a.wav", None, "url", "fetch it first"),
        (7, None, "wrong_type", "not int"),
    ]
    for source, rate, code, words in cases:
        with pytest.raises(BadRow, match=words) as caught:
            listen(source, sampling_rate=rate)
        assert caught.value.code == code, words


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_thirty_seconds_are_heard_and_more_are_refused(rate: int) -> None:
    """By an array's length, by a file's header, and where no header tells (PyAV) while it is read."""
    silence = np.zeros(rate * 30, np.float32)
    assert len(listen(silence, sampling_rate=rate)) == len(listen(encode_sound(silence, rate))) == 30 * audio.RATE
    longer = np.zeros(round(rate * 30.1), np.float32)
    blocks = sound.make_mono
    for refuse in (
        lambda: listen(longer, sampling_rate=rate),
        lambda: listen(encode_sound(longer, rate)),
        lambda: blocks([(longer[:, None], rate)], audio.SECONDS),
    ):
        with pytest.raises(BadRow, match=r"30\.10 s, and 30 s are the most") as caught:
            refuse()
        assert caught.value.code == "clip_too_long"


def test_a_clip_longer_than_this_models_soft_tokens_is_refused(processor: Any) -> None:
    longest = audio.longest(processor)
    assert longest < audio.SECONDS
    assert check_rows([make_chat([clip_part(longest)], "1")], processor, 500) == [None]
    (bad,) = check_rows([make_chat([clip_part(longest + 0.1)], "1")], processor, 500)
    assert bad is not None
    assert bad.code == "clip_too_long"


def test_a_long_clip_is_split_when_asked_and_nothing_is_lost(processor: Any) -> None:
    seconds = find_longest_piece("split", processor)
    assert seconds == audio.longest(processor)
    assert find_longest_piece("refuse", processor) is None
    clip = clip_part(2.5 * seconds, 3)
    chat = make_chat([clip, text_part("what?"), clip_part(seconds)], "1", seconds=seconds)
    parts = chat[0]["content"]
    assert [part["type"] for part in parts] == ["audio", "audio", "audio", "text", "audio"]
    assert [part.get("piece") for part in parts] == [1, 2, 3, None, None]
    assert np.array_equal(np.concatenate([part["audio"] for part in parts[:3]]), clip["audio"])
    assert max(len(part["audio"]) for part in parts[:3]) <= seconds * audio.RATE
    assert count_pieces(chat) == (1, 3)
    assert check_rows([chat], processor, 500) == [None]
    (row,) = tokenize_rows([chat], processor)
    ((token, number),) = count_soft_tokens(processor)["audio"].most_common(1)
    assert row.count(token) == 4 * number
    assert audio.show(parts[1])[0] == f"[sound, {len(parts[1]['audio']) / audio.RATE:.2f} s, part 2 of 3]"


def test_load_data_splits_long_clips_and_says_how_many(processor: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from forgekit import load_config, load_data

    seconds = audio.longest(processor)
    clips = [encode_sound(clip_part(length * seconds, 1)["audio"], audio.RATE) for length in (2.5, 1.0, 1.5)]
    rows = [{"clip": clip, "answer": str(number)} for number, clip in enumerate(clips)]

    def to_example(row: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "audio", "audio": row["clip"]}, text_part(f"{row['answer']}?")]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]}

    config = load_config(None, {"model.max_length": 500, "data.max_bad": 1.0, "data.long_clips": "split"})
    data = load_data(config, processor, to_example, rows=rows)
    kinds = [[part["type"] for part in row["messages"][0]["content"]] for row in data["train"]]
    assert kinds == [["audio"] * number + ["text"] for number in (3, 1, 2)]
    assert "Long clips split (data.long_clips): 2 became 5 parts" in capsys.readouterr().out
    data = load_data(config.change({"data.long_clips": "refuse"}), processor, to_example, rows=rows)
    assert len(data["train"]) == 1
    out = capsys.readouterr().out
    assert "2 x clip_too_long" in out and "split (" not in out


def test_an_hour_is_the_most_that_is_split() -> None:
    rate = 1000
    data = encode_sound(np.zeros(3601 * rate, np.int16), rate, subtype="PCM_U8")
    with pytest.raises(BadRow, match="3601.00 s, and 3600 s are the most") as caught:
        audio.load({"audio": data, "sampling_rate": None}, Wanted(seconds=30.0))
    assert caught.value.code == "clip_too_long"
