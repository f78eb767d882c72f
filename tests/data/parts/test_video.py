"""Films: which frames are taken, the sound track, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgekit.data.clean import BadRow
from forgekit.data.parts import audio, video
from forgekit.data.parts.source import Wanted
from tests.data.media import write_film


def watch(source: Any, frames: int = 4, sound: bool = False, **more: Any) -> list[dict[str, Any]]:
    return video.load(video.check({"type": "video", "video": source, "sound": sound}), Wanted(frames, **more))


def test_a_film_gives_evenly_spaced_frames_and_its_sound(tmp_path: Path) -> None:
    write_film(tmp_path / "a.mp4", 20, sound=True)
    for source in (str(tmp_path / "a.mp4"), (tmp_path / "a.mp4").read_bytes()):
        parts = watch(source, sound=True)
        assert [part["type"] for part in parts] == ["image"] * 4 + ["audio"]
        assert [part["seconds"] for part in parts[:4]] == pytest.approx([0.2, 0.7, 1.2, 1.7])
        greys = [np.asarray(part["image"]).mean() for part in parts[:4]]
        assert greys == pytest.approx([20, 70, 120, 170], abs=6)
        assert abs(len(parts[4]["audio"]) / audio.RATE - 2.0) < 0.15
    split = watch(source, sound=True, seconds=1.5)
    assert [part.get("piece") for part in split[4:]] == [1, 2]
    assert np.array_equal(np.concatenate([part["audio"] for part in split[4:]]), parts[4]["audio"])


def decode_all(path: Path) -> list[float]:
    """Return the mean grey of every frame."""
    import av

    with av.open(str(path)) as film:
        return [np.asarray(frame.to_image()).mean() for frame in film.decode(film.streams.video[0])]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "g": "12"}),  # frames are stored in another order than shown
        ("a.mkv", "libx264", {"bf": "2", "g": "7"}),
        ("a.webm", "libvpx-vp9", {"g": "9"}),
        ("a.avi", "mpeg4", {"bf": "2"}),  # its index leads elsewhere, so it is never sought in
        ("a.h264", "libx264", {"bf": "2"}),  # no time stamps at all
    ],
)
def test_the_frames_are_those_of_a_full_decode(name: str, codec: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = tmp_path / name
    write_film(path, 40, codec=codec, **options)
    greys = decode_all(path)
    assert len(greys) == 40
    found = {}
    for longest in (video.LONG, 10):  # decoded from its start; then as a long film, from key frame to key frame
        monkeypatch.setattr(video, "LONG", longest)
        for frames in (1, 4, 7, 64):
            parts = watch(path, frames)
            numbers = sorted({int((i + 0.5) * 40 / frames) for i in range(frames)})
            assert [np.asarray(part["image"]).mean() for part in parts] == [greys[number] for number in numbers]
            if path.suffix != ".h264":
                assert [part["seconds"] for part in parts] == pytest.approx(
                    [number / 10 for number in numbers], abs=0.002
                )
            found[longest, frames] = [part["seconds"] for part in parts]
    assert all(found[10, frames] == found[video_long, frames] for video_long, frames in found)


def test_a_long_film_is_sought_in_and_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_film(tmp_path / "a.mp4", 60, codec="libx264", g="6", bf="0")
    decoded = []
    walk = video.walk_frames

    def count(film: Any, stream: Any, stamps: list[int]) -> Any:
        class Counting:
            def decode(self, stream: Any) -> Any:
                for frame in film.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

        yield from walk(Counting(), stream, stamps)

    monkeypatch.setattr(video, "walk_frames", count)
    watch(tmp_path / "a.mp4")
    assert len(decoded) > 50
    decoded.clear()
    monkeypatch.setattr(video, "LONG", 10)
    watch(tmp_path / "a.mp4")
    assert len(decoded) <= 4 * 7


def test_a_short_film_gives_what_it_has_and_a_broken_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    write_film(tmp_path / "a.mp4", 2, sound=False)
    assert len(watch(tmp_path / "a.mp4")) == 2
    whole = (tmp_path / "a.mp4").read_bytes()
    cases = [
        (b"no film", "corrupt_media"),
        (b"", "empty_media"),
        (whole[: len(whole) // 2], "corrupt_media"),
        (str(tmp_path / "missing.mp4"), "missing_media"),
        ("https://example.org/a.mp4", "url"),
        (7, "wrong_type"),
    ]
    for source, code in cases:
        with pytest.raises(BadRow) as caught:
            watch(source)
        assert caught.value.code == code
    with pytest.raises(BadRow, match="holds no sound"):
        watch(whole, sound=True)
    monkeypatch.setattr("forgekit.data.parts.image.MEGAPIXELS", 0.001)
    with pytest.raises(BadRow) as caught:
        watch(whole)
    assert caught.value.code == "too_many_pixels"
