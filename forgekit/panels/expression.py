"""Names of modules as one short regular expression: layers as ranges of numbers, parts of a layer side by side."""

import re
from collections.abc import Callable, Iterable

from ..layer_groups import LANGUAGE_PREFIX, find_layer, find_runs, find_tower

ANY_PREFIX = r"(?:.*\.)?"


def write_expression(
    names: Iterable[str], known: Iterable[str], matches: Callable[[str, str], object] = re.fullmatch
) -> str:
    """Return an expression that matches `names` and nothing else among `known`.

    Where a block is written by its number, all numbers that `known` has become a plain \\d+, so that the expression reads
    "every layer". Module names are written from their tower or layer on; should that match more than it may, whole names
    are written.

    Args:
        matches: (expression, name) -> whether it matches; `re.fullmatch`, as PEFT reads target_modules.
    """
    names, known = set(names), set(known)
    terms = write_terms(names, known)
    if {name for name in known if any(matches(term, name) for term in terms)} != names:
        terms = [re.escape(name) for name in sorted(names)]
    return "|".join(terms)


def write_terms(names: set[str], known: set[str]) -> list[str]:
    """Return one term for all parts that stand in the same blocks."""
    blocks = collect_blocks(names)
    every = collect_blocks(known)
    together: dict[tuple[str, str, str], list[str]] = {}
    for (prefix, head, part), numbers in blocks.items():
        written = r"\d+" if numbers and numbers == every[prefix, head, part] else write_numbers(numbers)
        together.setdefault((prefix, head, written), []).append(part)
    return [
        prefix + r"\.".join(piece for piece in (re.escape(head), written, write_parts(parts)) if piece)
        for (prefix, head, written), parts in together.items()
    ]


def collect_blocks(names: Iterable[str]) -> dict[tuple[str, str, str], frozenset[int]]:
    """Return (prefix, what stands before the number, what stands behind it) -> numbers; none where there is no block."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in sorted(names):
        prefix, short = cut_prefix(name)
        pieces = re.fullmatch(r"(.+)\.(\d+)(?:\.(.+?))?", short)
        head, number, part = pieces.groups() if pieces else (short, None, None)
        numbers = found.setdefault((prefix, head, part or ""), set())
        if number is not None:
            numbers.add(int(number))
    return {key: frozenset(numbers) for key, numbers in found.items()}


def cut_prefix(name: str) -> tuple[str, str]:
    """Split a name into the expression of its prefix and the rest: the decoder's layers, a tower, or below the root."""
    if find_layer(name) is not None:
        return LANGUAGE_PREFIX, name[name.index("layers.") :]
    if find_tower(name) != "language":
        return ANY_PREFIX, re.sub(r"^.*?(?=(?:vision|audio)_tower|embed_(?:vision|audio))", "", name)
    return LANGUAGE_PREFIX, re.sub(r"^(?:.*\.)?language_model\.|^model\.", "", name)


def write_parts(parts: list[str]) -> str:
    r"""Return alternatives, those below one module together: self_attn\.(?:q_proj|k_proj)."""
    below: dict[str, list[str]] = {}
    for part in parts:
        parent, _, last = part.rpartition(".")
        below.setdefault(parent, []).append(re.escape(last))
    terms = [(re.escape(parent) + r"\." if parent else "") + wrap("|".join(lasts)) for parent, lasts in below.items()]
    return wrap("|".join(terms))


def wrap(expression: str) -> str:
    """Return an expression that can stand beside others."""
    return f"(?:{expression})" if "|" in expression else expression


def write_numbers(numbers: Iterable[int]) -> str:
    """Return an expression of whole numbers, digit by digit: 0 to 34 -> (?:\\d|[12]\\d|3[0-4]); "" for none."""
    return wrap("|".join(write_number_terms(set(numbers))))


def write_number_terms(numbers: set[int]) -> list[str]:
    """Return the alternatives of `write_numbers`: numbers that share their last digits share a term."""
    last_digits: dict[int, set[int]] = {}
    for number in numbers:
        last_digits.setdefault(number // 10, set()).add(number % 10)
    tens: dict[str, set[int]] = {}
    for ten, digits in sorted(last_digits.items()):
        if ten:
            tens.setdefault(write_digits(digits), set()).add(ten)
    small = [write_digits(last_digits[0])] if 0 in last_digits else []
    return small + [wrap("|".join(write_number_terms(group))) + digits for digits, group in tens.items()]


def write_digits(digits: set[int]) -> str:
    r"""Return an expression of one digit: {1, 2, 3, 7} -> [1-37]; all ten -> \d."""
    if len(digits) == 1:
        return str(*digits)
    if len(digits) == 10:
        return r"\d"
    return "[" + "".join(f"{a}" if a == b else f"{a}{'-' * (b - a > 1)}{b}" for a, b in find_runs(digits)) + "]"
