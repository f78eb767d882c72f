"""Parts of every kind in one batch: the loss of each row alone, spans that are never cut, and no branch on a kind."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from forgekit.data.clean import BadRow
from forgekit.data.collate import (
    IGNORE,
    Collator,
    Markers,
    check_ids,
    check_rows,
    count_soft_tokens,
    mark_learned,
    render_chat,
    tokenize_rows,
)
from forgekit.data.messages import Messages, check_example
from forgekit.data.parts import FEEDS, KINDS, audio, find_values, load_parts, show_part
from tests.data.media import clip_part, make_chat, picture_part, text_part

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> tuple[Any, Any]:
    """The random checkpoint and its processor, as load_model gives them."""
    from forgekit import load_config, load_model

    model, processor = load_model(load_config(None, {"model.id": str(tiny_folder), "model.load_in": "16bit"}))
    return model.eval(), processor


@pytest.fixture(scope="module")
def processor(loaded: tuple[Any, Any]) -> Any:
    return loaded[1]


# user's parts, answer, and for some a second question and answer
CHATS: dict[str, tuple[Any, ...]] = {
    "text only": ([text_part("hello there")], "one two three"),
    "one picture": ([picture_part(1), text_part("which letter?")], "A"),
    "two pictures": ([picture_part(2), text_part("and"), picture_part(3), text_part("both?")], "two boxes"),
    "a clip": ([clip_part(0.7, 4), text_part("what?")], "407"),
    "a longer clip": ([clip_part(2.3, 5), text_part("what number is it?")], "40799"),
    "a picture and a clip": ([picture_part(6), clip_part(1.1, 7), text_part("x")], "yes it is so"),
    "three media in two turns": (
        [picture_part(8), text_part("which?")],
        "B",
        [clip_part(0.5, 9), picture_part(10), text_part("and now?")],
        "a 4, and C",
    ),
}


@pytest.fixture(scope="module")
def chats() -> dict[str, Messages]:
    return {name: make_chat(*contents) for name, contents in CHATS.items()}


# ---- batches ---------------------------------------------------------------------------------------------------------


def measure(model: Any, processor: Any, chats: list[Messages]) -> tuple[float, int]:
    """Return loss and number of learned tokens of one batch."""
    import torch

    batch = Collator(processor)([{"messages": chat} for chat in chats])
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss), int((batch["labels"][:, 1:] != IGNORE).sum())


def test_a_mixed_batch_has_the_loss_of_its_rows(loaded: tuple[Any, Any], chats: dict[str, Messages]) -> None:
    model, processor = loaded
    alone = [measure(model, processor, [chat]) for chat in chats.values()]
    together, tokens = measure(model, processor, list(chats.values()))
    assert tokens == sum(n for _, n in alone)
    assert together == pytest.approx(sum(loss * n for loss, n in alone) / tokens, abs=1e-5)
    # rows of equal weight would give another number, and so would a row with the media of its neighbour
    assert abs(together - sum(loss for loss, _ in alone) / len(alone)) > 1e-4
    swapped = [chats["one picture"], chats["text only"]]
    assert measure(model, processor, swapped)[0] == pytest.approx(measure(model, processor, swapped[::-1])[0], abs=1e-5)


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
    assert differ_beside_longer(model, processor) < 1e-5
    # the mutant: clips padded as sound and extracted together, as the processor does it
    monkeypatch.setattr(audio, "batch", lambda clips, p: dict(p.feature_extractor(clips, return_tensors="pt")))
    assert differ_beside_longer(model, processor) > 1e-4


def test_tokens_and_pictures_are_those_of_the_processor(processor: Any, chats: dict[str, Messages]) -> None:
    import torch

    for chat in chats.values():
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


# ---- labels and spans ------------------------------------------------------------------------------------------------


def test_only_answers_are_learned_beside_media(processor: Any, chats: dict[str, Messages]) -> None:
    tokenizer = processor.tokenizer
    markers = Markers.find(tokenizer)
    batch = Collator(processor)([{"messages": chat} for chat in chats.values()])
    for contents, labels, ids in zip(
        CHATS.values(), batch["labels"].tolist(), batch["input_ids"].tolist(), strict=True
    ):
        learned = [token for token in labels if token != IGNORE]
        answers = [tokenizer(text, add_special_tokens=False).input_ids for text in contents[1::2]]
        assert learned == [token for answer in answers for token in (*answer, markers.end)]
        assert ids.count(markers.bos) == 1


def test_media_tokens_are_never_learned_even_in_an_answer(processor: Any) -> None:
    chat = make_chat([text_part("draw")], [text_part("here:"), picture_part()])
    batch = Collator(processor)([{"messages": chat}])
    learned = set(batch["labels"][batch["labels"] != IGNORE].tolist())
    assert not learned & set(Markers.find(processor.tokenizer).control)
    assert learned


def test_no_span_is_cut_at_any_length(processor: Any, chats: dict[str, Messages]) -> None:
    """From 1 to n + 2 a row is kept whole, or set aside with its length; rows with 0, 1, 2 and 3 media."""
    markers, soft = Markers.find(processor.tokenizer), count_soft_tokens(processor)
    rows = tokenize_rows(
        list(chats.values()), processor
    )  # lengths are tried on these; tokenising each time takes minutes
    media = [sum(len(find_values(chat, name)) for name in soft) for chat in chats.values()]
    assert set(media) == {0, 1, 2, 3}
    for row, chat in zip(rows, chats.values(), strict=True):
        for longest in range(1, len(row) + 3):
            bad = check_ids(row, chat, markers, longest, soft)
            assert (bad is None) == (longest >= len(row))
            if bad:
                assert (bad.code, bad.reason) == ("too_long", f"{len(row)} tokens, and model.max_length is {longest}")
        # and the whole way at the edge: what is kept is the whole row, soft tokens and all
        assert [bad.code if bad else None for bad in check_rows([chat], processor, len(row) - 1)] == ["too_long"]
        assert check_rows([chat], processor, len(row)) == [None]
        kept = Collator(processor)([{"messages": chat}])["input_ids"][0].tolist()
        assert kept == row
        for name, tokens in soft.items():
            assert all(kept.count(token) >= number * len(find_values(chat, name)) for token, number in tokens.items())


def test_a_picture_costs_256_tokens_and_a_clip_188_with_the_released_sizes(processor: Any) -> None:
    """Known from the processor's settings, before anything is extracted."""
    from transformers import Gemma3nConfig, Gemma3nProcessor

    settings = Gemma3nConfig()
    real = Gemma3nProcessor(
        processor.feature_extractor,
        processor.image_processor,
        processor.tokenizer,
        chat_template=processor.chat_template,
        image_seq_length=settings.vision_soft_tokens_per_image,
        audio_seq_length=settings.audio_soft_tokens_per_image,
    )
    soft = {name: tokens.most_common(1)[0][1] for name, tokens in count_soft_tokens(real).items()}
    assert soft == {"image": 256, "audio": 188}
    chat = make_chat([picture_part(), clip_part(0.5), text_part("x")], "y")
    (bad,) = check_rows([chat], real, 400)
    assert bad is not None and bad.code == "too_long" and int(bad.reason.split()[0]) > 256 + 188


# ---- no branch on a kind ---------------------------------------------------------------------------------------------


def find_branches(source: str) -> list[int]:
    """Return the lines of a file that compare something with a kind's name: ==, in, match, startswith and the like."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        method = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if isinstance(node, ast.Compare | ast.MatchValue) or method in ("startswith", "endswith", "fullmatch", "match"):
            names = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
            lines += [node.lineno if hasattr(node, "lineno") else node.value.lineno] if names & set(KINDS) else []
    return lines


@pytest.mark.parametrize(
    "planted",
    [
        'if part["type"] == "image": pass',
        'if "audio" != kind: pass',
        'x = 1 if kind in ("image", "audio") else 2',
        'x = [p for p in parts if p["type"] in {"video"}]',
        'while kind is not "audio": pass',
        'match kind:\n    case "image" | "audio": pass',
        'if kind.startswith("image"): pass',
    ],
)
def test_a_planted_branch_on_a_kind_is_found(planted: str) -> None:
    assert find_branches(planted)


def test_only_the_folder_of_the_parts_names_a_kind() -> None:
    files = [ROOT / "forgekit/data/collate.py"]
    files += [*(ROOT / "forgekit/train").rglob("*.py"), *(ROOT / "forgekit/evaluate").rglob("*.py")]
    assert len(files) > 4
    found = {file.name: find_branches(file.read_text(encoding="utf-8")) for file in files}
    assert not {name: lines for name, lines in found.items() if lines}


# A fifth kind is one file, here one that decodes into a kind there is, and one line in KINDS.
KEYS = """
import numpy

from forgekit.data.clean import BadRow
from forgekit.data.parts import audio

FEED = None


def check(part):
    if not str(part.get("keys", "")).isdigit():
        raise BadRow("wrong_type", "keys are digits")
    return {"type": "keys", "keys": str(part["keys"])}


def load(part, wanted):
    times = numpy.arange(3200) / audio.RATE
    sound = [numpy.sin(2 * numpy.pi * (300 + 100 * int(key)) * times) for key in part["keys"]]
    return audio.load({"audio": numpy.concatenate(sound), "sampling_rate": audio.RATE}, wanted)


def show(part):
    return f"[keys {part['keys']}]", f"<kbd>{part['keys']}</kbd>"
"""

# ... and one with tensors of its own, for a model that takes them.
PULSE = """
import torch

from forgekit.data.clean import BadRow
from forgekit.data.parts.feed import Feed


def check(part):
    if not isinstance(part.get("pulse"), list):
        raise BadRow("wrong_type", "a pulse is a list of numbers")
    return {"type": "pulse", "pulse": part["pulse"]}


def load(part, wanted):
    return [part]


def batch(values, processor):
    return {"pulse_values": torch.tensor([value[:2] for value in values])}


def refuse_long(value, processor):
    if len(value) > 3:
        raise BadRow("pulse_too_long", f"{len(value)} beats, and 3 are the most")


FEED = Feed("pulse_token", "full_pulse_sequence", "pulse", batch, refuse_long)


def show(part):
    return f"[pulse {part['pulse']}]", str(part["pulse"])
"""


def add_kind(name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a kind's file and put it in the table of kinds, as the line in `parts/__init__.py` would."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(KINDS, name, module)
    if module.FEED:
        monkeypatch.setitem(FEEDS, name, module.FEED)


def test_a_fifth_kind_is_one_file_and_one_line_and_trains(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    import torch

    with pytest.raises(BadRow, match="a part of type 'keys'; known are text, image, audio, video"):
        make_chat([{"type": "keys", "keys": 407}], "407")
    add_kind("keys", KEYS, tmp_path, monkeypatch)
    turns = [
        {"role": "user", "content": [{"type": "keys", "keys": 407}, text_part("which keys?")]},
        {"role": "assistant", "content": "407"},
    ]
    checked = check_example({"messages": turns})
    assert show_part(checked[0]["content"][0])[0] == "[keys 407]"
    chat = load_parts(checked)
    model, processor = copy.deepcopy(loaded[0]).requires_grad_(True), loaded[1]
    assert check_rows([chat], processor, 500) == [None]
    batch = Collator(processor)([{"messages": chat}, {"messages": make_chat([picture_part()], "x")}])
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(3):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_a_fifth_kind_brings_its_own_tokens_and_tensors(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy

    add_kind("pulse", PULSE, tmp_path, monkeypatch)
    chats = [
        make_chat([{"type": "pulse", "pulse": beats}, text_part("fast?")], "no") for beats in ([60, 61], [1, 2, 3, 4])
    ]
    (bad,) = check_rows(chats[:1], processor, 500)
    assert bad is not None and bad.code == "not_taken" and "type pulse" in bad.reason
    taking = copy.deepcopy(
        processor
    )  # a checkpoint that takes pulses: its processor has the tokens, its template the branch
    taking.tokenizer.add_special_tokens({"additional_special_tokens": ["<pulse>"]})
    taking.pulse_token, taking.full_pulse_sequence = "<pulse>", "<pulse>" * 3
    text = "{%- elif part['type'] == 'text' -%}"
    branch = "{%- elif part['type'] == 'pulse' -%}{{- '<pulse>' -}}"
    assert text in taking.chat_template
    taking.chat_template = taking.chat_template.replace(text, branch + text)
    first, second = check_rows(chats, taking, 500)
    assert first is None and second is not None and second.code == "pulse_too_long"
    batch = Collator(taking)([{"messages": chats[0]}, {"messages": make_chat([picture_part()], "x")}])
    token = taking.tokenizer.convert_tokens_to_ids("<pulse>")
    assert batch["pulse_values"].tolist() == [[60, 61]]
    assert (batch["input_ids"] == token).sum(1).tolist() == [3, 0]
    assert not (batch["labels"] == token).any()
    assert mark_learned([token], Markers.find(taking.tokenizer)) == [False]
