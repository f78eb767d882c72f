"""Pre-trains the built-in tiny model from nothing: python -m forgekit.model.tiny_pretrain OUT

    towers    image soft tokens -> a classifier head; sound soft tokens -> a CTC head (the language loss alone left both
              deaf and blind after 1150 steps); the heads are thrown away
    language  text alone, through five of the 25 layers; the others pass their input on
    joint     text, pictures and sound in turn, through the same five layers
    deep      the same in turn through all 25 layers; the twenty new ones begin with small updates

Depth comes last because it is slow to begin with: 25 layers of width 64 from the start stood at a loss of 0.78 after 1000
language steps, five layers at 0.59 after 700, in half the time a step.
The same bytes every time on one machine: seeded data, counted steps, one thread, deterministic kernels.
"""

import argparse
import hashlib
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from . import tiny, tiny_material
from .tiny import list_update_norms

SEED = 7
BATCH = {"text": 24, "vision": 24, "audio": 16, "image_tower": 32, "audio_tower": 16}
STEPS = {"image_tower": 700, "audio_tower": 600, "language": 1300, "joint": 1200, "deep": 400}
RATE = {"image_tower": 2e-3, "audio_tower": 2e-3, "language": 3e-3, "joint": 2e-3, "deep": 1e-3}
# Sliding, full, sliding, full, full: with the two layers whose keys and values are shared (18, 19) and one that shares.
FIRST_LAYERS = (13, 14, 18, 19, 24)
SLEEPING_SCALE = 0.05  # first weight of the norms behind each update of the other layers
TURN_ORDER = ("text", "vision", "text", "audio")  # kinds of batch in the joint stage
REPORT_SECONDS = 30


def encode_dialogues(processor, prompts, answers, images=None, sounds=None) -> dict[str, torch.Tensor]:
    """Encodes one-turn dialogues as a padded batch; labels are the answer's tokens and its <end_of_turn>, else -100."""
    part = [{"type": "image"}] if images else [{"type": "audio"}] if sounds else []
    texts = [
        processor.apply_chat_template(
            [
                {"role": "user", "content": [*part, {"type": "text", "text": prompt}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
            tokenize=False,
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    media = {"images": [[image] for image in images]} if images else {"audio": list(sounds)} if sounds else {}
    batch = processor(text=texts, return_tensors="pt", padding=True, add_special_tokens=False, **media)
    opening = processor.tokenizer("<start_of_turn>model\n", add_special_tokens=False).input_ids
    labels = torch.full_like(batch["input_ids"], -100)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        start = max(i for i in range(len(ids)) if ids[i : i + len(opening)] == opening) + len(opening)
        labels[row, start:-1] = batch["input_ids"][row, start:-1]  # the last token is the template's line break
    return {**batch, "labels": labels}


def draw_batches(processor, kind: str, seed: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yields batches of one kind ("text", "vision" or "audio") without end, the same ones for the same seed."""
    generator = random.Random(f"{kind} {seed}")
    while True:
        count = range(BATCH[kind])
        if kind == "text":
            # Eight batches are drawn together and sorted by length, which saves a third of the padded tokens.
            pairs = sorted((tiny_material.draw_text(generator) for _ in range(8 * BATCH[kind])), key=count_characters)
            groups = [pairs[start : start + BATCH[kind]] for start in range(0, len(pairs), BATCH[kind])]
            for group in generator.sample(groups, len(groups)):
                yield encode_dialogues(processor, *zip(*group, strict=True))
        elif kind == "vision":
            images, prompts, answers = zip(*(tiny_material.draw_picture(generator) for _ in count), strict=True)
            yield encode_dialogues(processor, prompts, answers, images=images)
        else:
            sounds, prompts, answers = zip(*(tiny_material.draw_sound(generator) for _ in count), strict=True)
            yield encode_dialogues(processor, prompts, answers, sounds=sounds)


def count_characters(pair: tuple[str, str]) -> int:
    """Returns the length of a prompt and its answer in characters."""
    return len(pair[0]) + len(pair[1])


@contextmanager
def pass_through(model, awake: tuple[int, ...]):
    """Lets the text layers that are not in `awake` hand their input on unchanged, until the block is left."""
    asleep = [layer for index, layer in enumerate(model.model.language_model.layers) if index not in awake]
    for layer in asleep:
        layer.forward = lambda hidden_states, *positional, **named: hidden_states
    yield
    for layer in asleep:
        del layer.forward


def shrink_updates(model, awake: tuple[int, ...]) -> None:
    """Makes what the text layers that are not in `awake` add to the stream small, so that waking them changes little."""
    for index, layer in enumerate(model.model.language_model.layers):
        if index not in awake:
            for norm in list_update_norms(layer):
                torch.nn.init.constant_(norm.weight, SLEEPING_SCALE)


def run_steps(name: str, parameters, losses: Iterator[torch.Tensor], steps: int) -> None:
    """Takes `steps` AdamW steps on the losses drawn from `losses`: warm-up of 60 steps, then a cosine to 3 per cent."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=RATE[name], betas=(0.9, 0.98), weight_decay=0.01)
    begun = reported = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        scale = min(1, (step + 1) / 60) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = RATE[name] * scale
        loss = next(losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"{name}: the loss of step {step + 1} is {recent[-1]}")
        now = time.monotonic()
        if now - reported > REPORT_SECONDS or step + 1 == steps:
            left = (now - begun) / (step + 1) * (steps - step - 1)
            print(
                f"{name}: step {step + 1} of {steps}, loss {sum(recent) / len(recent):.3f}, {left:.0f} s left",
                flush=True,
            )
            recent, reported = [], now


def train_image_tower(model, processor, steps: int) -> None:
    """Trains the vision tower and its projection to name the letter or shape through a linear head."""
    generator, classes = random.Random(f"image tower {SEED}"), tiny_material.PICTURE_CLASSES
    head = torch.nn.Linear(tiny.IMAGE_TOKENS * model.config.text_config.hidden_size, len(classes)).to(model.device)

    def losses():
        while True:
            pictures = [tiny_material.draw_picture(generator) for _ in range(BATCH["image_tower"])]
            pixels = processor.image_processor([[image] for image, _, _ in pictures], return_tensors="pt").pixel_values
            features = model.model.get_image_features(pixels.to(model.device), return_dict=True).pooler_output
            target = torch.tensor([classes.index(answer) for _, _, answer in pictures], device=model.device)
            yield functional.cross_entropy(head(features.flatten(1)), target)

    parts = (model.model.vision_tower, model.model.embed_vision, head)
    run_steps("image_tower", [p for part in parts for p in part.parameters()], losses(), steps)


def train_audio_tower(model, processor, steps: int) -> None:
    """Trains the audio tower and its projection to spell the notes through a linear head and the CTC loss."""
    generator, notes = random.Random(f"audio tower {SEED}"), list(tiny_material.NOTES)
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(notes) + 1).to(model.device)

    def losses():
        while True:
            sounds = [tiny_material.draw_sound(generator) for _ in range(BATCH["audio_tower"])]
            heard = processor.feature_extractor([samples for samples, _, _ in sounds], return_tensors="pt").to(
                model.device
            )
            # The tower's mask says which frames are padding, the extractor's which are not.
            found = model.model.get_audio_features(
                heard["input_features"], ~heard["input_features_mask"], return_dict=True
            )
            spelt = [[notes.index(note) + 1 for note in answer if note != " "] for _, _, answer in sounds]
            yield functional.ctc_loss(
                head(found.pooler_output).log_softmax(-1).transpose(0, 1).cpu(),
                torch.tensor(sum(spelt, [])),
                (~found.audio_mel_mask).sum(1).cpu(),
                torch.tensor([len(answer) for answer in spelt]),
                zero_infinity=True,
            )

    parts = (model.model.audio_tower, model.model.embed_audio, head)
    run_steps("audio_tower", [p for part in parts for p in part.parameters()], losses(), steps)


def train_dialogues(model, processor, name: str, kinds: tuple[str, ...], steps: int) -> None:
    """Trains on dialogues of the given kinds in turn with the language loss; text alone leaves the towers untouched."""
    batches = {kind: draw_batches(processor, kind, f"{name} {SEED}") for kind in kinds}

    def losses():
        while True:
            for kind in kinds:
                batch = {key: value.to(model.device) for key, value in next(batches[kind]).items()}
                yield model(**batch, use_cache=False).loss

    part = model if len(kinds) > 1 else model.model.language_model
    run_steps(name, part.parameters(), losses(), steps)


def pretrain(folder: Path, steps_scale: float = 1.0) -> None:
    """Builds, trains and saves the tiny model and its processor into `folder` (bfloat16 safetensors)."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    steps = {name: max(1, round(count * steps_scale)) for name, count in STEPS.items()}
    processor = tiny.build_processor(tiny.build_tokenizer(tiny_material.list_lines()))
    model = tiny.build_model(tiny.build_config(processor.tokenizer), SEED).train()
    train_image_tower(model, processor, steps["image_tower"])
    train_audio_tower(model, processor, steps["audio_tower"])
    shrink_updates(model, FIRST_LAYERS)
    with pass_through(model, FIRST_LAYERS):
        train_dialogues(model, processor, "language", ("text",), steps["language"])
        train_dialogues(model, processor, "joint", TURN_ORDER, steps["joint"])
    train_dialogues(model, processor, "deep", TURN_ORDER, steps["deep"])
    processor.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare_folders(folder: Path, packaged: Path) -> list[str]:
    """Returns the names of the files of a checkpoint that differ between two folders or are missing from one."""
    names = sorted({path.name for place in (folder, packaged) for path in place.glob("*.json")} | {"model.safetensors"})
    return [
        name
        for name in names
        if not (folder / name).is_file()
        or not (packaged / name).is_file()
        or hash_file(folder / name) != hash_file(packaged / name)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description="Pre-trains the built-in tiny Gemma 3n from nothing.")
    parser.add_argument("folder", type=Path, help="where to write the checkpoint, or the one to check")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="share of the steps to take (0.01 for a trial)")
    parser.add_argument("--check", action="store_true", help="compare FOLDER with the packaged model, train nothing")
    options = parser.parse_args(arguments)
    if options.check:
        different = compare_folders(options.folder, Path(__file__).with_name("tiny"))
        print(f"different from the packaged model: {', '.join(different)}" if different else "same bytes")
        return int(bool(different))
    pretrain(options.folder, options.steps_scale)
    print(f"model.safetensors: sha256 {hash_file(options.folder / 'model.safetensors')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
