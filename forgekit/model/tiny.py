"""The built-in tiny Gemma 3n: the real transformers classes at a size that trains on two CPU cores.

    build_tokenizer -> build_processor
          |
     build_config -> build_model          tiny_pretrain.py trains it and writes the folder tiny/

Text: 25 layers of width 96, 20 with keys and values of their own and 5 that share them, the first 10 sparse: the
depths that llama.cpp fixes for Gemma 3n. Pictures: 64 x 64 pixels, 16 soft tokens. Sound: up to 2.5 s, 32 tokens.
"""

import copy
import json
from collections.abc import Iterable
from typing import Any

from .timm_args import set_model_args

IMAGE_PIXELS = 64
IMAGE_TOKENS = 16  # a 4 x 4 grid
AUDIO_TOKENS = 32  # 80 ms each
AUDIO_REDUCTION = 2  # Conformer frames of 40 ms for one soft token
UPDATE_SCALE = 0.3  # first weight of the norms behind attention, feed-forward, LAuReL and per-layer embedding
MEDIA_VOCABULARY = 2  # <end_of_...> and the soft token itself, behind the text vocabulary, for images and for audio

# MobileNetV5's four stages with its own kinds of block, in timm's notation: 9 blocks instead of 84, 16 to 64 channels.
# Tried: timm's smaller `mobilenetv5_base` narrowed by channel_multiplier; its 39 blocks hardly learn (loss 3.2 after 200
# steps, where these nine stand at 0.9) although they would not need restore_model_args.
VISION_STAGES = (
    ("er_r1_k3_s2_e2_c16",),
    ("uir_r1_a3_k5_s2_e3_c32", "uir_r1_a5_k0_s1_e2_c32"),
    ("uir_r1_a5_k5_s2_e3_c48", "mqa_r1_k3_h4_v2_s1_d16_c48", "uir_r1_a0_k0_s1_e2_c48"),
    ("uir_r1_a5_k5_s2_e3_c64", "mqa_r1_k3_h4_s1_d16_c64", "uir_r1_a0_k0_s1_e2_c64"),
)

# Gemma's special tokens, in this order from id 0; the bytes and the learned pieces follow.
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<start_of_audio>",
)
MEDIA_TOKENS = ("<end_of_image>", "<image_soft_token>", "<end_of_audio>", "<audio_soft_token>")

# Gemma 3n's chat template, laid out to be read: no system role, its text goes before the first user turn's.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set turns = messages -%}
{%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set content = messages[0]['content'] -%}
    {%- set system = (content if content is string else content[0]['text']) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' -}}
    {%- if loop.first -%}{{- system -}}{%- endif -%}
    {%- if turn['content'] is string -%}
        {{- turn['content'] | trim -}}
    {%- elif turn['content'] is iterable -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image_soft_token>' -}}
            {%- elif part['type'] == 'audio' -%}
                {{- '<audio_soft_token>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] | trim -}}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- raise_exception('Invalid content type') -}}
    {%- endif -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""


def build_tokenizer(lines: Iterable[str], text_vocabulary: int = 1280) -> Any:
    """Trains a byte-pair tokenizer with byte fallback on `lines` and gives it Gemma's special tokens and template.

    Ids: 0..7 SPECIAL_TOKENS, 8..263 the bytes, then the learned pieces, at the end MEDIA_TOKENS. Digits and the signs
    of JSON stay single tokens. Returns a PreTrainedTokenizerFast.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9\n]|▁?[^\w\s▁]+"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=text_vocabulary - 256 - len(SPECIAL_TOKENS),
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)

    saved = json.loads(bpe.to_str())
    pieces = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].get)
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *MEDIA_TOKENS]
    ids = {name: index for index, name in enumerate(names)}
    saved["model"]["vocab"] = ids
    saved["added_tokens"] = [
        {"id": ids[name], "content": name, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for name in (*SPECIAL_TOKENS, *MEDIA_TOKENS)
    ]
    bpe = Tokenizer.from_str(json.dumps(saved))
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "audio_token": "<audio_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
    )


def build_processor(tokenizer: Any) -> Any:
    """Joins the tokenizer, 64 x 64 pixel images and Gemma 3n's own sound features into a Gemma3nProcessor."""
    from transformers import SiglipImageProcessor
    from transformers.models.gemma3n import Gemma3nAudioFeatureExtractor, Gemma3nProcessor

    images = SiglipImageProcessor(size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}, do_normalize=False, resample=2)
    return Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        images,
        tokenizer,
        chat_template=tokenizer.chat_template,
        audio_seq_length=AUDIO_TOKENS,
        image_seq_length=IMAGE_TOKENS,
    )


def build_config(tokenizer: Any, hidden_size: int = 96, layers: int = 25, shared_layers: int = 5) -> Any:
    """Describes the tiny model as a Gemma3nConfig, with every feature of the large one switched on.

    `vocab_size` ends with the audio vocabulary, because transformers pads sound with the embedding of the last id.
    """
    from timm.models._efficientnet_builder import decode_arch_def
    from transformers import Gemma3nConfig

    ids = tokenizer.get_vocab()
    text_vocabulary = len(ids) - len(MEDIA_TOKENS)
    text = {
        "vocab_size": len(ids),
        "vocab_size_per_layer_input": text_vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 16,
        "altup_num_inputs": 4,
        "layer_types": ["full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(layers)],
        "activation_sparsity_pattern": [0.95 if i < 10 else 0.0 for i in range(layers)],
        "sliding_window": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.125,
    }
    vision = {
        "architecture": "mobilenetv5_300m_enc",
        "model_args": {
            "block_args": json.loads(json.dumps(decode_arch_def([list(stage) for stage in VISION_STAGES]))),
            "stem_size": 16,
            "msfa_output_resolution": int(IMAGE_TOKENS**0.5),
            "layer_scale_init_value": 0.5,
        },
        "hidden_size": 2048,  # timm's fusion layer ends in 2048 channels
        "vocab_size": MEDIA_VOCABULARY,
        "vocab_offset": text_vocabulary,
    }
    audio = {
        "vocab_size": MEDIA_VOCABULARY,
        "vocab_offset": text_vocabulary + MEDIA_VOCABULARY,
        "hidden_size": 64,
        "conf_num_attention_heads": 4,
        "conf_num_hidden_layers": 2,
        "conf_reduction_factor": AUDIO_REDUCTION,
        "sscp_conv_channel_size": [8, 8],
    }
    return Gemma3nConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        vision_soft_tokens_per_image=IMAGE_TOKENS,
        audio_soft_tokens_per_image=AUDIO_TOKENS,
        boi_token_id=ids["<start_of_image>"],
        eoi_token_id=ids["<end_of_image>"],
        image_token_id=ids["<image_soft_token>"],
        boa_token_id=ids["<start_of_audio>"],
        eoa_token_id=ids["<end_of_audio>"],
        audio_token_id=ids["<audio_soft_token>"],
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["<eos>"],
        bos_token_id=ids["<bos>"],
    )


def build_model(config: Any, seed: int = 0) -> Any:
    """Makes a Gemma3nForConditionalGeneration with random float32 weights that can be trained from nothing."""
    import torch
    from timm.models._efficientnet_builder import efficientnet_init_weights
    from torch.nn.init import constant_, normal_, ones_
    from transformers import Gemma3nForConditionalGeneration, GenerationConfig

    torch.manual_seed(seed)
    model = Gemma3nForConditionalGeneration(copy.deepcopy(config))
    set_model_args(model, config.vision_config.model_args)
    language, text = model.model.language_model, config.text_config
    # transformers drew the vision tower again from N(0, 0.02), too small for convolutions.
    efficientnet_init_weights(model.model.vision_tower.timm_model)
    with torch.no_grad():
        for layer in language.layers:
            ones_(layer.altup.correct_output_scale)  # zero would cut the per-layer embeddings off
            # The query-key scale is 1: unit norms would give logits of size sqrt(head_dim).
            for name, parameter in layer.self_attn.named_parameters():
                if name in ("q_norm.weight", "k_norm.weight"):
                    constant_(parameter, text.head_dim**-0.25)
            # Each layer halves the stream's power before it adds: full-size updates would drown the input by layer 25.
            for norm in list_update_norms(layer):
                constant_(norm.weight, UPDATE_SCALE)
        # transformers leaves the <pad> rows at zero, and AltUp's division by the magnitude then gives NaN gradients.
        for table in (language.embed_tokens, language.embed_tokens_per_layer):
            normal_(table.weight[config.pad_token_id], 0, text.initializer_range)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=[config.eos_token_id, SPECIAL_TOKENS.index("<end_of_turn>")],
    )
    return model


def list_update_norms(layer: Any) -> list:
    """Returns the norms of a text layer through which everything passes that the layer adds to the stream."""
    return [
        layer.post_attention_layernorm,
        layer.post_feedforward_layernorm,
        layer.post_per_layer_input_norm,
        layer.laurel.post_laurel_norm,
    ]
