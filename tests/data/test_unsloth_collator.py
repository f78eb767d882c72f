"""Our batches beside those of Unsloth's own vision collator, on the same rows, and why they differ.

Unsloth is imported first, so everything runs in a process of its own. On a GPU the class is the one that Unsloth's
notebooks use, with a model that Unsloth loaded:

    python -m pytest tests/data/test_unsloth_collator.py -m gpu

Without one, `unsloth.trainer` holds a stand-in for it that refuses to work, so the slow test takes the same class from
`unsloth_zoo.vision_utils`, with the model that transformers loads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMPARE = """
import unsloth
import copy, json, sys
from pathlib import Path

folder, out, device = sys.argv[1:]
if device == "cuda":
    from unsloth.trainer import UnslothVisionDataCollator
else:
    from unsloth_zoo.vision_utils import UnslothVisionDataCollator

import numpy as np
import torch
from PIL import Image

import forgekit
from forgekit.data.collate import IGNORE, Collator
from tests.data.media import clip_part, make_chat, picture_part, text_part

settings = {"model.id": folder, "model.load_in": "16bit", "model.device": device}
config = forgekit.load_config(None, settings | {"model.engine": "unsloth" if device == "cuda" else "auto"})
if device == "cuda":
    model, processor = forgekit.load_model(config)
else:
    from transformers import AutoProcessor, Gemma3nForConditionalGeneration

    model, processor = Gemma3nForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
question, square = text_part("which letter?"), {"type": "image", "image": square}
rows = {
    "text only": make_chat([text_part("hello there")], "one two three"),
    "a picture": make_chat([picture_part(1), question], "A"),
    "a square picture": make_chat([square, question], "A"),
    "two pictures": make_chat([picture_part(2), text_part("and"), picture_part(3), question], "two boxes"),
    "two turns": make_chat([picture_part(4), question], "B", [text_part("sure?")], "yes, B"),
    "a clip": make_chat([clip_part(0.7), question], "407"),
}
batches = {name: [chat] for name, chat in rows.items()}
batches["a batch"] = [rows[name] for name in ("text only", "a picture", "two pictures", "two turns")]
markers = {"instruction_part": "<start_of_turn>user\\n", "response_part": "<start_of_turn>model\\n"}
ways = {
    "default": UnslothVisionDataCollator(model, processor),
    "responses only": UnslothVisionDataCollator(model, processor, train_on_responses_only=True, **markers),
}
tokenizer = processor.tokenizer
media = [token for token in tokenizer.all_special_tokens if "image" in token or "audio" in token]
found = {"media": media, "pad": tokenizer.pad_token}
for way, collate in ways.items():
    for name, chats in batches.items():
        ours = Collator(processor)([{"messages": chat} for chat in chats])
        theirs = collate([{"messages": copy.deepcopy(chat)} for chat in chats])
        pixels = ours.get("pixel_values")
        found[f"{way}: {name}"] = {
            "same ids": ours["input_ids"].tolist() == theirs["input_ids"].tolist(),
            "same mask": ours["attention_mask"].tolist() == theirs["attention_mask"].tolist(),
            "tokens": [tokenizer.convert_ids_to_tokens(row) for row in theirs["input_ids"].tolist()],
            "ours": (ours["labels"] != IGNORE).tolist(),
            "theirs": (theirs["labels"] != IGNORE).tolist(),
            "more": sorted(set(theirs) - set(ours)),
            "less": sorted(set(ours) - set(theirs)),
            "pixels": None if pixels is None else float((pixels - theirs["pixel_values"].float().cpu()).abs().max()),
            "frames": [int(b["input_features_mask"].sum()) if "input_features_mask" in b else 0 for b in (ours, theirs)],
        }
Path(out).write_text(json.dumps(found))
"""

ANSWERS = {"text only": 1, "a picture": 1, "a square picture": 1, "two pictures": 1, "two turns": 2, "a clip": 1}


def compare(folder: Path, tmp_path: Path, device: str) -> dict[str, Any]:
    """Collate every row both ways in a process that imports Unsloth first."""
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [sys.executable, "-c", COMPARE, str(folder), str(tmp_path / "found.json"), device],
        check=True,
        timeout=500,
        cwd=tmp_path,
        env={**os.environ, **hidden, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    return json.loads((tmp_path / "found.json").read_text())


def check_differences(found: dict[str, Any]) -> None:
    media, pad = {*found.pop("media")}, found.pop("pad")
    assert len(media) == 6
    assert len(found) == 2 * (len(ANSWERS) + 1)
    for name, batch in found.items():
        # The same tokens in the same places: Unsloth calls the processor, we write the soft tokens ourselves.
        assert batch["same ids"] and batch["same mask"], name
        # Unsloth hands on token_type_ids, which Gemma 3n's forward does not read (Gemma 3's does).
        assert (batch["more"], batch["less"]) == (["token_type_ids"], []), name
        for tokens, ours, theirs in zip(batch["tokens"], batch["ours"], batch["theirs"], strict=True):
            check_labels(name, tokens, ours, theirs, media, pad)
    for way in ("default", "responses only"):
        # A picture whose sides are multiples of 32 reaches the model as it is, to the rounding of bfloat16. Any other one
        # Unsloth first brings to such sides (`fetch_image`, bicubic) and the processor then to its size; ours is resized once.
        assert found[f"{way}: a square picture"]["pixels"] < 0.005
        assert found[f"{way}: a picture"]["pixels"] > 0.05
        # Unsloth has the clip padded as sound to a multiple of 128 samples, which makes a frame of silence; ours is not.
        ours, theirs = found[f"{way}: a clip"]["frames"]
        assert theirs - ours == 1


def check_labels(name: str, tokens: list[str], ours: list[bool], theirs: list[bool], media: set[str], pad: str) -> None:
    """Compare one row's labels."""
    more = [i for i, (our, their) in enumerate(zip(ours, theirs, strict=True)) if their and not our]
    assert not [i for i, (our, their) in enumerate(zip(ours, theirs, strict=True)) if our and not their], name
    if name.startswith("default"):
        # Everything but media and padding is learned, and behind padding not the first token, which a padding token would
        # have to predict: <bos>, the turns' markers and the question, so most of what such a run learns is its prompts.
        first = tokens.index("<bos>")
        wanted = [token not in {*media, pad} and not (i == first > 0) for i, token in enumerate(tokens)]
        assert theirs == wanted, name
        assert tokens.index("<start_of_turn>") in more
        assert len(more) > sum(ours) or "turns" in name
    else:
        # With train_on_responses_only one token an answer is left: the newline behind <end_of_turn>, which the template
        # writes between turns. Generation has stopped by then, so we do not spend loss on it.
        ends = [i for i, our in enumerate(ours) if our and tokens[i] == "<end_of_turn>"]
        assert more == [i + 1 for i in ends], name
        assert {tokens[i] for i in more} == {"\n"}
        alone = name.removeprefix("responses only: ")
        assert len(ends) == ANSWERS.get(alone, len(ends))


@pytest.mark.gpu
def test_unsloths_collator_on_a_gpu_differs_where_we_say(tiny_folder: Path, tmp_path: Path) -> None:
    check_differences(compare(tiny_folder, tmp_path, "cuda"))


@pytest.mark.slow
def test_unsloths_collator_on_a_cpu_differs_where_we_say(tiny_folder: Path, tmp_path: Path) -> None:
    check_differences(compare(tiny_folder, tmp_path, "cpu"))
