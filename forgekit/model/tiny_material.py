"""What the built-in tiny model is pre-trained on: generated text, printed letters and shapes, notes and chords.

It is related to the practice tasks in forgekit/data/samples and never the same: other sentences, other questions,
other keys, letters instead of digits, notes instead of telephone keys. Only the names and goods are shared.
"""

import json
import math
import random

import numpy as np

from ..data.samples.orders import CITIES, DAYS, ITEMS, NAMES, NUMBER_WORDS
from ..data.samples.tones import play_tones

# Words that questions and keys are made of; listed so that the tokenizer knows them whole and the model can copy them.
WORDS = (
    "customer item quantity city day order orders number digit dialled turn this into JSON text answer name names "
    "list value key keys write read which what who when where how many much please give show find make send is are "
    "was were the a an of for to in on at by with and or not from it its picture image letter shape sound tone tones "
    "note notes chord melody first last next one address street price weight colour size shop store bill note date "
    "time week month year morning evening question sentence word line box boxes parcel goods buyer town"
).split()

SENTENCES = (
    "A parcel for {buyer}: {boxes} crates of {goods}, to reach {town} before {date}.",
    "{buyer} from {town} bought {boxes} crates of {goods}; they leave on {date}.",
    "The {date} lorry to {town} carries {boxes} crates of {goods} which {buyer} paid for.",
    "We sold {goods}, {boxes} crates, and {buyer} will collect them in {town} on {date}.",
    "Note from {date}: {buyer} would like {goods} ({boxes} crates) sent over to {town}.",
    "In {town} there is {buyer}, who waits for {boxes} crates of {goods} since {date}.",
    "{boxes} crates with {goods} were packed on {date}; owner {buyer}, place {town}.",
    "My shop in {town} is out of {goods}. Bring {boxes} crates {date}. Yours, {buyer}",
    "{goods}: {boxes} crates. {town}. {date}. {buyer}.",
    "{date} again, and {buyer} still has {boxes} crates of {goods} in {town}.",
)
QUESTIONS = {
    "buyer": ("Who is the buyer?", "Which person is this about?", "Who paid?"),
    "goods": ("What was sold?", "Which goods?", "What is in the crates?"),
    "boxes": ("How many crates?", "How many are there?", "Which amount?"),
    "town": ("Which town?", "Where does it go?", "Where is it?"),
    "date": ("When is it?", "Which date?", "On what date?"),
}
GREETINGS = ("Hello there.", "Good morning.", "Good evening.", "Hi.")


def draw_sale(generator: random.Random) -> dict:
    """Draws the five facts of one sale."""
    return {
        "buyer": generator.choice(NAMES),
        "goods": generator.choice(ITEMS),
        "boxes": generator.choice(list(NUMBER_WORDS)),
        "town": generator.choice(CITIES),
        "date": generator.choice(DAYS),
    }


def write_sale(sale: dict, generator: random.Random) -> str:
    """Puts a sale into a sentence; half of the numbers are written as a word."""
    boxes = NUMBER_WORDS[sale["boxes"]] if generator.random() < 0.5 else str(sale["boxes"])
    sentence = generator.choice(SENTENCES).format(**{**sale, "boxes": boxes})
    return sentence[0].upper() + sentence[1:]


def draw_text(generator: random.Random) -> tuple[str, str]:
    """Draws a prompt and its answer: reading facts out of a sentence (three in four) or copying."""
    if generator.random() < 0.25:
        return draw_copy(generator)
    sale = draw_sale(generator)
    sentence = write_sale(sale, generator)
    if generator.random() < 0.3:
        fact = generator.choice(list(QUESTIONS))
        return f"{sentence} {generator.choice(QUESTIONS[fact])}", str(sale[fact])
    facts = generator.sample(list(QUESTIONS), generator.randint(1, 5))
    names, form = ", ".join(facts), generator.choice(("object", "object", "list", "lines"))
    if form == "object":
        return f"{sentence} Write an object with {names}.", json.dumps({fact: sale[fact] for fact in facts})
    if form == "list":
        return f"{sentence} Write a list with {names}.", json.dumps([sale[fact] for fact in facts])
    return f"{sentence} Write lines with {names}.", "\n".join(f"{fact}: {sale[fact]}" for fact in facts)


def draw_copy(generator: random.Random) -> tuple[str, str]:
    """Draws something to repeat: an object of up to three random words, a few words, or a greeting."""
    words = [*WORDS, *ITEMS, *NAMES, *CITIES, *DAYS]
    values = [*words, *range(100)]
    kind = generator.random()
    if kind < 0.6:
        keys = generator.sample(words, generator.randint(1, 3))
        text = json.dumps({key: generator.choice(values) for key in keys})
    elif kind < 0.95:
        text = " ".join(str(value) for value in generator.sample(values, generator.randint(1, 6)))
    else:
        text = generator.choice(GREETINGS)
    return f"Repeat: {text}", text


# Pictures: printed letters, and coloured shapes on a dark ground.
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without those that look like a digit
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
LETTER_QUESTIONS = ("Which letter is shown?", "Read the letter.")
SHAPE_QUESTIONS = ("What is in the picture?", "Name the shape.")
PICTURE_CLASSES = (*LETTERS, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES))


def draw_picture(generator: random.Random):
    """Draws (PIL RGB image of 64 x 64 pixels, question, answer); seven in ten show a letter."""
    if generator.random() < 0.7:
        letter = generator.choice(LETTERS)
        return draw_letter(letter, generator), generator.choice(LETTER_QUESTIONS), letter
    colour, shape = generator.choice(list(COLOURS)), generator.choice(SHAPES)
    return draw_shape(colour, shape, generator), generator.choice(SHAPE_QUESTIONS), f"{colour} {shape}"


def draw_letter(letter: str, generator: random.Random):
    """Prints a letter, turned, sheared and coarsened as if it had been scanned at 8 to 16 pixels."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (64, 64), 0)
    font = ImageFont.load_default(generator.randint(50, 64))
    centre = (32 + generator.randint(-3, 3), 32 + generator.randint(-3, 3))
    stroke = generator.randint(0, 4)
    ImageDraw.Draw(image).text(centre, letter, fill=255, font=font, anchor="mm", stroke_width=stroke)

    angle, shear = math.radians(generator.uniform(-10, 10)), generator.uniform(-0.15, 0.15)
    width, height = generator.uniform(0.85, 1.2), generator.uniform(0.85, 1.2)
    a, b = math.cos(angle) * width, math.sin(angle) + shear
    d, e = -math.sin(angle), math.cos(angle) * height
    affine = (a, b, 32 - 32 * (a + b), d, e, 32 - 32 * (d + e))
    image = image.transform((64, 64), Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR)
    coarse = generator.choice((8, 8, 10, 12, 16))
    image = image.resize((coarse, coarse), Image.Resampling.BOX).resize((64, 64), Image.Resampling.BILINEAR)

    grey = np.clip(np.asarray(image, np.float32) / 255 * generator.uniform(0.9, 1.5), 0, 1)
    grey += np.random.default_rng(generator.randrange(1 << 30)).normal(0, 0.03, grey.shape)
    return Image.fromarray((np.clip(grey, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def draw_shape(colour: str, shape: str, generator: random.Random):
    """Paints one shape of 24 to 48 pixels near the middle."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), tuple(generator.randint(0, 60) for _ in range(3)))
    brush, fill = ImageDraw.Draw(image), COLOURS[colour]
    half, x, y = generator.randint(12, 24), 32 + generator.randint(-8, 8), 32 + generator.randint(-8, 8)
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        brush.ellipse(box, fill=fill)
    elif shape == "ring":
        brush.ellipse(box, outline=fill, width=5)
    elif shape == "square":
        brush.rectangle(box, fill=fill)
    elif shape == "triangle":
        brush.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=fill)
    else:
        brush.line((x - half, y, x + half, y), fill=fill, width=6)
        brush.line((x, y - half, x, y + half), fill=fill, width=6)
    return image


# Sound: twelve notes from 546 Hz, each ten per cent above the one before, alone or two together. Start and step keep every
# pair of notes more than four per cent away from every telephone key's pair of frequencies.
NOTES = {name: 546.0 * 2 ** (step * 1.7 / 12) for step, name in enumerate("CDEFGABHKLMP")}
MELODY_QUESTIONS = ("Which notes were played?", "Write down the melody.")
CHORD_QUESTIONS = ("Which notes sound together?", "Name the chords.")


def draw_sound(generator: random.Random) -> tuple[np.ndarray, str, str]:
    """Draws (float32 samples at 16000 Hz, question, answer): one to four notes "C E G", or one to three chords "CE AB"."""
    if generator.random() < 0.5:
        names = [generator.choice(list(NOTES)) for _ in range(generator.randint(1, 4))]
        question = generator.choice(MELODY_QUESTIONS)
    else:
        chords = [generator.sample(list(NOTES), 2) for _ in range(generator.randint(1, 3))]
        names = ["".join(sorted(chord, key=NOTES.__getitem__)) for chord in chords]
        question = generator.choice(CHORD_QUESTIONS)
    samples = play_tones([tuple(NOTES[note] for note in name) for name in names], generator)
    return samples, question, " ".join(names)


def list_lines(count: int = 3000, seed: int = 1) -> list[str]:
    """Returns the lines that the tokenizer is trained on: text material, every question, and the plain words."""
    generator = random.Random(seed)
    lines = [line for _ in range(count) for line in draw_text(generator)]
    questions = [*LETTER_QUESTIONS, *SHAPE_QUESTIONS, *MELODY_QUESTIONS, *CHORD_QUESTIONS]
    words = [*WORDS, *(word.capitalize() for word in WORDS), *COLOURS, *SHAPES, *LETTERS, *NOTES, "user", "model"]
    words += [*NAMES, *ITEMS, *CITIES, *DAYS, *NUMBER_WORDS.values()]
    return lines + questions * 60 + [f"{word} {word}" for word in words] * 60
