"""The practice tasks: what their rows hold, and that no row is met twice or known from pre-training."""

import json
import random

import numpy as np
import pytest

from forgekit.data.samples import SAMPLES
from forgekit.data.samples.orders import NUMBER_WORDS, SENTENCES, load_orders
from forgekit.data.samples.tones import COLUMN_HZ, KEY_HZ, ROW_HZ, load_tones
from forgekit.model import tiny_material


def find_strongest(samples: np.ndarray, candidates: tuple[int, ...]) -> int:
    """Returns the one of several frequencies in Hz that carries most power in samples at 16000 Hz."""
    seconds, window = np.arange(len(samples)) / 16000, np.hanning(len(samples))
    power = [abs(np.sum(samples * window * np.exp(-2j * np.pi * hertz * seconds))) for hertz in candidates]
    return candidates[int(np.argmax(power))]


def find_presses(samples: np.ndarray) -> list[np.ndarray]:
    """Cuts a recording into its loud stretches, by the power of every 10 ms."""
    frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    loud = np.sqrt((frames**2).mean(1)) > 0.25 * np.sqrt((frames**2).mean(1)).max()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud.astype(int), [0]])))
    return [samples[begin * 160 : end * 160] for begin, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name, held_out", [("orders", 100), ("digits", 200), ("tones", 100), ("films", 4)])
def test_held_out_rows_come_last_and_are_marked(name, held_out):
    splits = [row["split"] for row in SAMPLES[name]()]
    assert splits == ["train"] * (len(splits) - held_out) + ["test"] * held_out


@pytest.mark.parametrize("name", ["orders", "tones", "films"])
def test_generated_rows_follow_from_the_seed_alone(name):
    first, again, other = (SAMPLES[name](rows=20, seed=seed) for seed in (5, 5, 6))
    assert repr(first) == repr(again) != repr(other)


def test_every_order_is_distinct_and_its_facts_stand_in_its_message():
    rows = load_orders()
    assert len({row["message"] for row in rows}) == len({json.dumps(row["order"]) for row in rows}) == len(rows)
    for row in rows:
        order = row["order"]
        assert list(order) == ["customer", "item", "quantity", "city", "day"]
        words = row["message"].lower()
        assert all(order[fact].lower() in words for fact in ("customer", "item", "city", "day"))
        assert str(order["quantity"]) in words or NUMBER_WORDS[order["quantity"]] in words


def test_no_number_is_dialled_twice():
    numbers = [row["text"] for row in load_tones()]
    assert len(set(numbers)) == len(numbers)


def test_tones_are_the_dialled_keys():
    # The key is read back from the sound without the code that made it: the strongest row and column frequency.
    for row in load_tones(rows=30, seed=9):
        audio = row["audio"]
        assert audio["sampling_rate"] == 16000 and audio["array"].dtype == np.float32
        pairs = [
            (find_strongest(press, ROW_HZ), find_strongest(press, COLUMN_HZ)) for press in find_presses(audio["array"])
        ]
        assert pairs == [KEY_HZ[key] for key in row["text"]]


def test_digits_are_pictures_of_every_digit():
    rows = SAMPLES["digits"]()
    assert len(rows) == 1797 and {row["text"] for row in rows} == set("0123456789")
    image = rows[0]["image"]
    assert (image.mode, image.size) == ("RGB", (64, 64)) and image.getextrema()[0][1] > 200


def test_pre_training_never_shows_the_tasks():
    # Other sentences, no answer with the keys of an order, no digit printed, no key tone played.
    generator = random.Random(0)
    pairs = [tiny_material.draw_text(generator) for _ in range(3000)]
    messages = {row["message"] for row in load_orders(rows=2000)}
    assert not set(SENTENCES) & set(tiny_material.SENTENCES)
    keys = set(load_orders(rows=1)[0]["order"])
    for prompt, answer in pairs:
        assert prompt not in messages and "Turn this order into JSON" not in prompt
        found = json.loads(answer) if answer.startswith("{") else {}
        assert not keys <= set(found)
    assert not set("0123456789") & set(tiny_material.LETTERS)
    notes = list(tiny_material.NOTES.values())
    for low, high in KEY_HZ.values():
        # No chord comes within four hundredths of a key's pair of frequencies.
        assert not any(abs(a / low - 1) < 0.04 and abs(b / high - 1) < 0.04 for a in notes for b in notes)


def test_the_pre_training_check_sees_a_leak(monkeypatch):
    monkeypatch.setattr(tiny_material, "LETTERS", tiny_material.LETTERS + "7")
    with pytest.raises(AssertionError):
        test_pre_training_never_shows_the_tasks()


def test_a_film_shows_its_digits_in_order():
    from forgekit.data.parts.video import sample_frames

    (film,), digits = SAMPLES["films"](rows=1), SAMPLES["digits"](rows=4)
    question, answer = film["messages"]
    frames = sample_frames(question["content"][0]["video"], 4)
    assert [seconds for seconds, _ in frames] == [0.25, 0.75, 1.25, 1.75]
    assert answer["content"][0]["text"] == " ".join(digit["text"] for digit in digits)
    for (_, frame), digit in zip(frames, digits, strict=True):
        shown = [np.asarray(other["image"], float) for other in digits]
        distances = [np.abs(np.asarray(frame, float) - other).mean() for other in shown]
        assert int(np.argmin(distances)) == digits.index(digit)
