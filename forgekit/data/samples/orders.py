"""Order sentences and the JSON they stand for: the quick task of the text notebook."""

import random

NAMES = (
    "Ana Ben Chen Dara Eli Fatima Grace Hugo Ines Jonas Kira Leo Maria Nadia Omar Priya Quinn Rosa Sam Tara "
    "Uma Viktor Wanda Yusuf Zoe Amir Bella Carlos Diana Emil"
).split()
ITEMS = (
    "tea coffee rice bread apples pears soap paper pens candles bolts cables lamps chairs books maps batteries "
    "gloves boots seeds paint tiles honey salt"
).split()
CITIES = (
    "Lima Oslo Cairo Delhi Paris Quito Seoul Tunis Vienna Lagos Accra Berlin Dublin Hanoi Kyoto Lisbon Madrid "
    "Nairobi Prague Rome"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBER_WORDS = dict(enumerate("two three four five six seven eight nine ten eleven twelve".split(), start=2))

SENTENCES = (
    "{customer} ordered {quantity} boxes of {item} for {city} on {day}.",
    "On {day}, {customer} asked us to send {quantity} boxes of {item} to {city}.",
    "Please deliver {quantity} boxes of {item} to {customer} in {city} by {day}.",
    "{city} needs {quantity} boxes of {item} on {day}, says {customer}.",
    "Hi, this is {customer}. I want {quantity} boxes of {item} in {city} next {day}.",
    "For {day}: {quantity} boxes of {item}, customer {customer}, ship to {city}.",
    "Could {customer} get {quantity} boxes of {item} in {city} on {day}?",
    "{quantity} boxes of {item} go to {customer} in {city} this {day}.",
)
HELD_OUT = 100  # rows at the end of the list that a run must not train on


def load_orders(rows: int = 500, seed: int = 3407) -> list[dict]:
    """Makes `rows` orders, no order twice, in the order generated; the last 100 (at most half) have split "test".

    A row is {"message": one sentence, "order": {"customer", "item", "quantity", "city", "day"}, "split"}. The
    quantity is a number from 2 to 12, written in the sentence as digits or as a word.
    """
    generator = random.Random(seed)
    orders: list[dict] = []
    seen: set[tuple] = set()
    while len(orders) < rows:
        order = draw_order(generator)
        message = write_sentence(order, generator)
        if tuple(order.values()) in seen:
            continue
        seen.add(tuple(order.values()))
        orders.append({"message": message, "order": order})
    return mark_split(orders, HELD_OUT)


def draw_order(generator: random.Random) -> dict:
    """Draws the five facts of one order, in the order in which the answer lists them."""
    return {
        "customer": generator.choice(NAMES),
        "item": generator.choice(ITEMS),
        "quantity": generator.choice(list(NUMBER_WORDS)),
        "city": generator.choice(CITIES),
        "day": generator.choice(DAYS),
    }


def write_sentence(order: dict, generator: random.Random) -> str:
    """Puts an order into one of the sentences; half of the quantities are written as a word."""
    quantity = NUMBER_WORDS[order["quantity"]] if generator.random() < 0.5 else str(order["quantity"])
    sentence = generator.choice(SENTENCES).format(**{**order, "quantity": quantity})
    return sentence[0].upper() + sentence[1:]


def mark_split(rows: list[dict], held_out: int) -> list[dict]:
    """Marks the last `held_out` rows (at most half of them) "test" and the others "train"."""
    first_test = len(rows) - min(held_out, len(rows) // 2)
    return [{**row, "split": "test" if index >= first_test else "train"} for index, row in enumerate(rows)]
