"""How near an answer is to the right one, row by row: 1 where it is right, 0 where it is not, between where it is near."""

import functools
import json
import re
import unicodedata
from collections import Counter
from typing import Any

FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)


def match_exactly(prediction: str, reference: str) -> float:
    """Return 1 for the same text."""
    return float(prediction == reference)


def match_normalized(prediction: str, reference: str) -> float:
    """Return 1 for the same words, whatever case, punctuation and white space they are written with."""
    return float(normalize(prediction) == normalize(reference))


def find_inside(prediction: str, reference: str) -> float:
    """Return 1 when the right answer stands, as it is written, somewhere in the prediction."""
    return float(reference in prediction)


def overlap_tokens(prediction: str, reference: str) -> float:
    """Return F1 of the normalised words that both share, each as often as it stands in both (as SQuAD counts them)."""
    predicted, right = normalize(prediction).split(), normalize(reference).split()
    shared = (Counter(predicted) & Counter(right)).total()
    if not predicted or not right:
        return float(predicted == right)
    return 2 * shared / (len(predicted) + len(right))


def measure_rouge_l(prediction: str, reference: str) -> float:
    """Return ROUGE-L: F1 of the longest common subsequence of words (https://aclanthology.org/W04-1013).

    Words are runs of letters and digits of any script in lower case; for ASCII they are those of Google's rouge-score.
    """
    from rapidfuzz.distance import LCSseq

    predicted, right = split_words(prediction), split_words(reference)
    if not predicted or not right:
        return float(predicted == right)
    return 2 * LCSseq.similarity(predicted, right) / (len(predicted) + len(right))


def match_json(prediction: str, reference: str) -> float:
    """Return 1 when both are JSON of the same value: order of keys and white space do not count, a code fence is taken off."""
    try:
        fenced = FENCE.fullmatch(prediction)
        return float(same_json(json.loads(fenced[1] if fenced else prediction), json.loads(reference)))
    except (ValueError, RecursionError):
        return 0.0


def same_json(one: Any, other: Any) -> bool:
    """Compare two JSON values: 1 and 1.0 are the same number, and true is no number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def match_pattern(prediction: str, reference: str, pattern: str) -> float:
    """Return 1 when the pattern's last find in the prediction is the one in the reference, or the whole reference."""
    found, right = find_last(pattern, prediction), find_last(pattern, reference)
    return float(found is not None and found == (reference if right is None else right))


def find_last(pattern: str, text: str) -> str | None:
    """Return what the pattern finds last: its first group where it has one, else all of it; None when it finds nothing."""
    found = None
    for found in re.finditer(pattern, text):  # noqa: B007 - the last one is wanted
        pass
    return None if found is None else found[1] if found.re.groups else found[0]


def normalize(text: str) -> str:
    """Return a text in lower case, without punctuation, in one line with single spaces."""
    return make_normalizer()(unicodedata.normalize("NFKC", text))


@functools.cache
def make_normalizer() -> Any:
    """Return jiwer's transformations in a row."""
    import jiwer

    steps = [jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveWhiteSpace(replace_by_space=True)]
    return jiwer.Compose([*steps, jiwer.RemoveMultipleSpaces(), jiwer.Strip()])


def split_words(text: str) -> list[str]:
    """Return the runs of letters and digits of a text in lower case."""
    return re.findall(r"[^\W_]+", text.lower())
