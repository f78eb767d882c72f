"""Telephone key tones: the quick task of the audio notebook."""

import random

import numpy as np

from .orders import mark_split

RATE = 16000  # Hz, what Gemma 3n hears
ROW_HZ = (697, 770, 852, 941)
COLUMN_HZ = (1209, 1336, 1477)
# Each key sounds two tones at once: its row's and its column's (ITU-T Recommendation Q.23).
KEY_HZ = {
    key: (low, high)
    for low, keys in zip(ROW_HZ, ("123", "456", "789", "*0#"), strict=True)
    for high, key in zip(COLUMN_HZ, keys, strict=True)
}
HELD_OUT = 100


def load_tones(rows: int = 700, seed: int = 3407) -> list[dict]:
    """Makes `rows` recordings of dialled numbers, no number twice; the last 100 (at most half) have split "test".

    A row is {"audio": {"array": float32 samples in -1..1, "sampling_rate": 16000}, "text": "407", "split"}: three
    or four digits, 0.5 to 1.6 seconds, with uneven rhythm, loudness, pitch (half a percent) and a little noise.
    """
    generator = random.Random(seed)
    numbers: dict[str, dict] = {}
    while len(numbers) < rows:
        number = "".join(generator.choice("0123456789") for _ in range(generator.choice((3, 4))))
        if number not in numbers:
            audio = play_tones([KEY_HZ[key] for key in number], generator)
            numbers[number] = {"audio": {"array": audio, "sampling_rate": RATE}, "text": number}
    return mark_split(list(numbers.values()), HELD_OUT)


def play_tones(sounds: list[tuple[float, ...]], generator: random.Random) -> np.ndarray:
    """Plays sounds one after the other; each is a tuple of frequencies in Hz that sound together.

    Returns float32 samples at 16000 Hz: 0.12 to 0.22 s a sound, pauses of 0.06 to 0.12 s, edges of 10 ms.
    """
    noise = np.random.default_rng(generator.randrange(1 << 30))
    loudness = generator.uniform(0.15, 0.6)
    pieces = [np.zeros(int(RATE * generator.uniform(0.03, 0.1)))]
    for sound in sounds:
        count = int(RATE * generator.uniform(0.12, 0.22))
        seconds = np.arange(count) / RATE
        wave = np.zeros(count)
        for hertz in sound:
            pitch, phase = hertz * generator.uniform(0.995, 1.005), generator.uniform(0, 2 * np.pi)
            wave += generator.uniform(0.7, 1.0) * np.sin(2 * np.pi * pitch * seconds + phase)
        edge = np.minimum(1, np.minimum(np.arange(count), np.arange(count)[::-1]) / (0.01 * RATE))
        pieces += [loudness * wave * edge / len(sound), np.zeros(int(RATE * generator.uniform(0.06, 0.12)))]
    samples = np.concatenate(pieces)
    return (samples + noise.normal(0, generator.uniform(0.004, 0.02), len(samples))).astype(np.float32)
