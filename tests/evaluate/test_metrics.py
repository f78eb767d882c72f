"""Metrics: each agrees with its library's own score of a set, or with cases counted by hand."""

import random
import sys
from pathlib import Path
from typing import Any

import jiwer
import pytest
import sacrebleu

from forgekit.config import load_config
from forgekit.errors import ConfigError
from forgekit.evaluate import metrics
from forgekit.evaluate.matches import match_json, match_pattern, measure_rouge_l, normalize, overlap_tokens
from forgekit.evaluate.metrics import KNOWN, describe_source, find_metric, find_metrics
from forgekit.gate_settings import METRICS

from .rows import make_row, make_scores

WORDS = "the order is for Ana, who wants four boxes of tea in Lima by Monday.".split()


def make_texts(number: int = 30) -> list[tuple[str, str]]:
    """(right answer, answer): the same words, some changed, lost or doubled."""
    draw = random.Random(7)
    pairs = []
    for _ in range(number):
        right = draw.choices(WORDS, k=draw.randrange(3, 14))
        said = [draw.choice([word, word, word, draw.choice(WORDS), f"{word} {word}", ""]) for word in right]
        pairs.append((" ".join(right), " ".join(" ".join(said).split())))
    return [*pairs, ("one more", "")]


TEXTS = make_texts()
RIGHT, SAID = ([pair[i] for pair in TEXTS] for i in (0, 1))
ROWS = [make_row(i, *pair) for i, pair in enumerate(TEXTS)]


def test_every_metric_that_a_recipe_can_name_is_there() -> None:
    assert {*KNOWN, "regex"} == set(METRICS)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bleu", lambda: sacrebleu.corpus_bleu(SAID, [RIGHT]).score / 100),
        ("chrf", lambda: sacrebleu.corpus_chrf(SAID, [RIGHT]).score / 100),
        ("wer", lambda: jiwer.wer(RIGHT, SAID)),
        ("cer", lambda: jiwer.cer(RIGHT, SAID)),
    ],
)
def test_the_score_of_a_set_is_the_librarys(name: str, library: Any) -> None:
    assert KNOWN[name].score(ROWS) == pytest.approx(library(), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bleu", lambda said, right: sacrebleu.sentence_bleu(said, [right]).score / 100),
        ("chrf", lambda said, right: sacrebleu.sentence_chrf(said, [right]).score / 100),
        ("wer", lambda said, right: jiwer.wer(right, said)),
    ],
)
def test_the_score_of_a_row_is_the_librarys(name: str, library: Any) -> None:
    expected = [library(said, right) for right, said in TEXTS]
    assert KNOWN[name].score_rows(ROWS) == pytest.approx(expected, abs=1e-9)


# F1 of Google's rouge-score 0.1.2 (rougeL, no stemmer)
@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the cat sat on the mat.", "On the mat, the cat sat!", 0.5),
        ("a b c d e f", "a x c y e z f", 0.615385),
        ("It's 3.5 kg", "its 3.5kg", 0.25),
        ("", "some words", 0),
    ],
)
def test_rouge_l_is_that_of_rouge_score(prediction: str, reference: str, score: float) -> None:
    assert measure_rouge_l(prediction, reference) == pytest.approx(score, abs=1e-6)


def test_rouge_l_reads_every_script() -> None:
    assert measure_rouge_l("Größe über alles", "größe ÜBER nichts") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ('{"b": [1, 2.0], "a": "x"}', '{"a":"x","b":[1.0,2]}', True),
        ('```json\n{"a": 1}\n```', '{"a": 1}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": 1, "b": null}', '{"a": 1}', False),
        ("no JSON", "null", False),
        ("", "{}", False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_json_is_compared_by_value(prediction: str, reference: str, same: bool) -> None:
    assert match_json(prediction, reference) == float(same)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Four boxes.", "four boxes", 1.0),
        ("four four boxes", "four boxes", 0.8),  # the second four is not in the reference: 2 * 2 / (3 + 2)
        ("tea", "soap", 0.0),
        ("", "soap", 0.0),
        ("...", "!", 1.0),
    ],
)
def test_token_f1_counts_each_word_as_often_as_both_have_it(prediction: str, reference: str, score: float) -> None:
    assert overlap_tokens(prediction, reference) == pytest.approx(score)


def test_normalising_leaves_words_alone() -> None:
    assert normalize(" The  CAT's\nhat…  ＦＵＬＬ ") == "the cats hat full"


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("first 3, so #### 42", "3 + 39 = 42\n#### 42", 1),
        ("#### 41\n#### 42", "#### 42", 1),  # the last one is the answer
        ("#### 42\n#### 41", "#### 42", 0),
        ("42", "#### 42", 0),
        ("#### 42", "42", 1),  # a reference without the mark is the answer itself
        ("none", "none", 0),
    ],
)
def test_a_pattern_compares_what_it_finds_last(prediction: str, reference: str, score: int) -> None:
    assert match_pattern(prediction, reference, r"#### (-?\d+)") == score


def test_shares_count_rows(tmp_path: Path) -> None:
    pairs = [("tea", "tea"), ("tea", "Tea."), ("tea", "some tea"), ("tea", "soap")]
    names = ["contains", "exact_match", "normalized_match", "token_f1"]
    scores = make_scores(pairs, {"evaluate.metric": names})
    found = {name: scores.metrics[name]["score"] for name in names}
    assert found == pytest.approx(
        {"contains": 0.5, "exact_match": 0.25, "normalized_match": 0.5, "token_f1": (2 + 2 / 3) / 4}
    )


def test_loss_weighs_tokens_and_perplexity_is_its_power() -> None:
    rows = [make_row(0, "a", "a", loss=1.0, tokens=1), make_row(1, "b", "b", loss=3.0, tokens=3)]
    assert KNOWN["loss"].score(rows) == pytest.approx(2.5)
    assert KNOWN["perplexity"].score(rows) == pytest.approx(2.718281828**2.5)


# ---- the user's own --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "my_scores_of_this_test.py"
    file.write_text(
        "def same_length(prediction, reference):\n    return len(prediction) == len(reference)\n\n\ndef text(p, r):\n    return 'x'\n"
    )
    monkeypatch.delitem(sys.modules, "my_scores_of_this_test", raising=False)
    return file


def test_a_function_of_the_users_scores_rows(own_module: Path) -> None:
    scores = make_scores([("abc", "xyz"), ("abc", "x")], {"evaluate.metric": "my_scores_of_this_test:same_length"})
    assert (scores.score, [row["right"] for row in scores.rows]) == (0.5, [True, False])
    assert "def same_length" in describe_source("my_scores_of_this_test:same_length")
    # without the function, for instance in `forgekit gates`, the rows keep their scores
    assert find_metric(scores.metric).score_rows(scores.rows) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "my_scores_of_this_test:nothing",
            "cannot be imported: module 'my_scores_of_this_test' has no attribute 'nothing'",
        ),
        ("no_such_module:f", "cannot be imported: No module named 'no_such_module'. It names a function"),
        ("my_scores_of_this_test:text", "returned 'x'; it must be a number"),
    ],
)
def test_a_function_that_cannot_score_is_refused(name: str, words: str, own_module: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        make_scores([("a", "b")], {"evaluate.metric": name})


def test_exact_match_and_loss_are_always_computed() -> None:
    config = load_config(None, {"evaluate.metric": ["wer", "loss"]})
    assert [metric.name for metric in find_metrics(config)] == ["wer", "loss", "exact_match"]


def test_one_row_lost_turns_the_comparison_with_the_library_red(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metrics.count_errors
    monkeypatch.setattr(metrics, "count_errors", lambda rows, characters: real(rows[1:], characters))
    with pytest.raises(AssertionError):
        assert metrics.make_errors("wer", "", False).score(ROWS) == pytest.approx(jiwer.wer(RIGHT, SAID), abs=1e-9)
