"""The packaged tiny Gemma 3n: a real checkpoint with every feature on, what its tokenizer does, how it is reproduced."""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Gemma3nForConditionalGeneration, Gemma3nProcessor

from forgekit.model import tiny, tiny_material, tiny_pretrain
from forgekit.model.timm_args import restore_model_args

FOLDER = Path(tiny.__file__).with_name("tiny")


@pytest.fixture(autouse=True)
def keep_torch_settings():
    """Pre-training sets one thread and deterministic kernels for its process; the other tests keep theirs."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return Gemma3nForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def encode_one(processor, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Encodes one dialogue of a kind with media drawn from a seed, always the same words."""
    generator = random.Random(seed)
    images = [tiny_material.draw_picture(generator)[0]] if kind == "image" else None
    sounds = [tiny_material.draw_sound(generator)[0]] if kind == "audio" else None
    return tiny_pretrain.encode_dialogues(processor, ["Read this."], ["A"], images, sounds)


def test_folder_loads_as_the_real_classes(model, processor):
    assert type(model) is Gemma3nForConditionalGeneration and type(processor) is Gemma3nProcessor
    assert type(model.model.audio_tower).__name__ == "Gemma3nAudioEncoder"
    assert type(model.model.vision_tower.timm_model).__name__ == "MobileNetV5Encoder"


def test_every_feature_of_gemma3n_is_on(model):
    text = model.config.text_config
    assert (text.num_hidden_layers, text.num_kv_shared_layers) == (25, 5)
    assert text.layer_types == (["sliding_attention"] * 4 + ["full_attention"]) * 5
    assert text.activation_sparsity_pattern == [0.95] * 10 + [0.0] * 15
    assert (text.altup_num_inputs, text.laurel_rank, text.hidden_size_per_layer_input) == (4, 16, 16)
    assert text.final_logit_softcapping == 30.0
    assert model.config.audio_config.conf_num_hidden_layers == 2
    # transformers pads sound with the embedding of the last id: it has to be the audio vocabulary's.
    audio = model.config.audio_config
    assert text.vocab_size == audio.vocab_offset + audio.vocab_size


def test_weights_are_small_and_bfloat16():
    from safetensors import safe_open

    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 8_000_000
    with safe_open(path, "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_card_names_the_packaged_weights():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\b[0-9a-f]{64}\b", card) == [tiny_pretrain.hash_file(FOLDER / "model.safetensors")]
    assert "python -m forgekit.model.tiny_pretrain" in card and "practice model" in card and "Apache-2.0" in card


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_answer_depends_on_what_is_seen_and_heard(model, processor, kind):
    with torch.no_grad():
        first, other = (model(**encode_one(processor, kind, seed)).logits[0, -3] for seed in (1, 2))
    assert torch.isfinite(first).all() and (first - other).abs().max() > 0.1


def test_every_trained_tensor_gets_a_gradient(processor):
    model = Gemma3nForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).train()
    for kind in ("image", "audio"):
        model(**encode_one(processor, kind, 1), use_cache=False).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == []


def test_shared_layers_train_the_keys_of_their_source(processor):
    model = Gemma3nForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).train()
    layers = model.model.language_model.layers
    assert [hasattr(layer.self_attn, "k_proj") for layer in layers] == [True] * 20 + [False] * 5
    for source in (18, 19):  # their own attention is silenced: what reaches their keys comes from the sharing layers
        torch.nn.init.zeros_(layers[source].self_attn.o_proj.weight)
    model(**encode_one(processor, "text", 1), use_cache=False).loss.backward()
    assert all(layers[source].self_attn.k_proj.weight.grad.abs().max() > 0 for source in (18, 19))


def test_special_tokens_have_gemmas_ids_without_gaps(processor):
    ids = processor.tokenizer.get_vocab()
    assert [ids[name] for name in tiny.SPECIAL_TOKENS] == list(range(8))
    assert [ids[name] for name in tiny.MEDIA_TOKENS] == list(range(len(ids) - 4, len(ids)))
    assert sorted(ids.values()) == list(range(len(ids))) and 1000 <= len(ids) <= 2000
    special = [ids[name] for name in tiny.SPECIAL_TOKENS + tiny.MEDIA_TOKENS]
    assert processor.tokenizer.decode(special, skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    "text", ['{"city": "Zürich", "n": 12}', "東京 ☂\tx", " two  spaces\n\nand é", "ordinary words"]
)
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids) == text


def test_template_writes_gemmas_turns(processor):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A ring."}]},
        {"role": "user", "content": "And this? "},
    ]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\n<image_soft_token>What is it?<end_of_turn>\n"
        "<start_of_turn>model\nA ring.<end_of_turn>\n"
        "<start_of_turn>user\nAnd this?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(Exception, match="must alternate"):
        processor.apply_chat_template(messages[2:], tokenize=False)


def test_labels_are_the_answer_and_its_end(processor):
    batch = tiny_pretrain.encode_dialogues(processor, ["Hi.", "Which letter is shown?"], ["Good day.", "A"])
    for row, answer in zip(batch["labels"], ["Good day.<end_of_turn>", "A<end_of_turn>"], strict=True):
        assert processor.tokenizer.decode(row[row != -100]) == answer


def test_generation_ends_at_the_end_of_a_turn(model):
    assert model.generation_config.eos_token_id == [1, 5]
    assert (model.generation_config.pad_token_id, model.generation_config.bos_token_id) == (0, 2)


def test_base_knows_its_own_material(model, processor):
    # Read back greedily from unseen draws; LoRA on a base that knows nothing hardly learns.
    generator = random.Random("unseen")
    pairs = [tiny_material.draw_text(generator) for _ in range(24)]
    batch = tiny_pretrain.encode_dialogues(processor, *zip(*pairs, strict=True))
    with torch.no_grad():
        guesses = model(**batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    assert (guesses == labels)[labels != -100].float().mean() > 0.9


def test_loaded_model_can_be_saved(tmp_path):
    model = Gemma3nForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.bfloat16)
    restore_model_args(model, FOLDER)
    model.save_pretrained(tmp_path)
    saved = (json.loads((folder / "config.json").read_text())["vision_config"] for folder in (FOLDER, tmp_path))
    assert next(saved)["model_args"] == next(saved)["model_args"]
    Gemma3nForConditionalGeneration.from_pretrained(tmp_path)


def test_restoring_leaves_other_checkpoints_alone(tmp_path):
    class Plain:
        config = type("Config", (), {"vision_config": None})()

    restore_model_args(Plain(), tmp_path)  # no config.json is read


def test_pre_training_twice_gives_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        tiny_pretrain.pretrain(tmp_path / name, steps_scale=0.001)
    assert tiny_pretrain.compare_folders(tmp_path / "first", tmp_path / "second") == []


def test_check_names_the_files_that_differ(tmp_path, capsys):
    for path in FOLDER.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert tiny_pretrain.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert tiny_pretrain.main([str(tmp_path), "--check"]) == 1
    assert "model.safetensors" in capsys.readouterr().out.splitlines()[-1]


def test_five_layers_pass_through_and_come_back(model, processor):
    batch = encode_one(processor, "text", 1)
    with torch.no_grad():
        before = model(**batch).logits
        with tiny_pretrain.pass_through(model, tiny_pretrain.FIRST_LAYERS):
            assert not torch.equal(model(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)


LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
TARGETS = {
    "orders": LANGUAGE,
    "digits": LANGUAGE
    + r"|.*embed_vision\.embedding_projection|.*vision_tower\.timm_model\..*(pw_exp\.conv|pw_proj\.conv|"
    + r"(query|key|value|output)\.proj)|.*timm_model\.blocks\.0\.\d+\.(conv_exp|conv_pwl)",
    "tones": LANGUAGE
    + r"|.*embed_audio\.embedding_projection|.*audio_tower\..*(ffw_layer_1|ffw_layer_2|q_proj|k_proj|v_proj|post|"
    + r"linear_start|linear_end|input_proj_linear)",
}
STEPS = {"orders": 150, "digits": 150, "tones": 150}
GAIN = {"orders": 0.5, "digits": 0.6, "tones": 0.5}


def read_row(row: dict) -> tuple[str, str, object]:
    """Returns the question, the answer and the picture or sound of a row."""
    if "message" in row:
        return f"Turn this order into JSON: {row['message']}", json.dumps(row["order"]), None
    if "image" in row:
        return "Which digit is this?", row["text"], row["image"]
    return "Which number was dialled?", row["text"], row["audio"]["array"]


def encode_rows(processor, name: str, rows: list[dict]) -> dict[str, torch.Tensor]:
    questions, answers, media = zip(*map(read_row, rows), strict=True)
    images, sounds = media if name == "digits" else None, media if name == "tones" else None
    return tiny_pretrain.encode_dialogues(processor, questions, answers, images, sounds)


def score_rows(model, processor, name: str, rows: list[dict]) -> float:
    """Returns the share of rows whose greedy answer is exactly right."""
    right = 0
    for row in rows:
        batch = encode_rows(processor, name, [row])
        start = int((batch["labels"][0] != -100).nonzero()[0])
        prompt = {key: value[:, :start] if value.shape[1:] == batch["labels"].shape[1:] else value
                  for key, value in batch.items() if key != "labels"}  # fmt: skip
        with torch.no_grad():
            tokens = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, start:]
        right += processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() == read_row(row)[1]
    return right / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["orders", "digits", "tones"])
def test_lora_learns_the_task(processor, name, seed):
    from peft import LoraConfig, get_peft_model

    from forgekit.data.samples import SAMPLES

    rows = SAMPLES[name]()
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    model = Gemma3nForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    before = score_rows(model, processor, name, test[:50])
    assert before <= 0.1
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS[name])).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
    generator = random.Random(seed)
    epochs = itertools.chain.from_iterable(generator.sample(train, len(train)) for _ in itertools.count())
    for step in range(STEPS[name]):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 8) * (1 - step / STEPS[name])
        batch = encode_rows(processor, name, list(itertools.islice(epochs, 16)))
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = score_rows(model.eval(), processor, name, test[:100])
    print(f"{name}, seed {seed}: {before:.2f} before, {after:.2f} after")
    assert after >= before + GAIN[name] and np.isfinite(after)
