"""What a GGUF file says beside its tensors: shape of the model, tokenizer, chat template, name, licence, base."""

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

LICENSE_LINK = "https://ai.google.dev/gemma/terms"


def add_metadata(writer: Any, folder: Path, settings: dict[str, Any], kind: str, about: dict[str, Any]) -> None:
    """Add every field to a gguf.GGUFWriter.

    Args:
        folder: the merged model: tokenizer.json and chat_template.jinja are read from it.
        settings: its config.json.
        about: name, base (a Hub id or None), license.
    """
    writer.add_type("model")
    add_description(writer, kind, about)
    add_shape(writer, settings.get("text_config", settings))
    add_tokenizer(writer, folder, settings.get("text_config", settings)["vocab_size"])


def add_description(writer: Any, kind: str, about: dict[str, Any]) -> None:
    """Add what a person reads: name, base, licence, and the kind of file."""
    from gguf import LlamaFileType

    writer.add_name(about["name"])
    writer.add_finetune("forgekit")
    writer.add_license(about["license"])
    if about["license"] == "gemma":
        writer.add_license_link(LICENSE_LINK)
    if about["base"]:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about["base"].split("/")[-1])
        writer.add_base_model_organization(0, about["base"].split("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{about['base']}")
    file_type = LlamaFileType.ALL_F32 if kind == "F32" else LlamaFileType[f"MOSTLY_{kind}"]
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def add_shape(writer: Any, text: dict[str, Any]) -> None:
    """Add the numbers that llama.cpp builds the model from."""
    from .gguf_tensors import PER_LAYER_WIDTH

    width = text["intermediate_size"]
    rope = text.get("rope_parameters") or {}
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(width[0] if isinstance(width, list) else width)
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_vocab_size(text["vocab_size"])
    # transformers 5 names one base a kind of layer; older configs have two numbers
    writer.add_rope_freq_base(rope.get("full_attention", {}).get("rope_theta") or text.get("rope_theta") or 1e6)
    writer.add_rope_freq_base_swa(
        rope.get("sliding_attention", {}).get("rope_theta") or text.get("rope_local_base_freq") or 1e4
    )
    writer.add_sliding_window(text["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in text["layer_types"]])
    writer.add_final_logit_softcapping(text["final_logit_softcapping"])
    writer.add_altup_active_idx(text["altup_active_idx"])
    writer.add_altup_num_inputs(text["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(PER_LAYER_WIDTH)
    writer.add_shared_kv_layers(text["num_kv_shared_layers"])
    shares = text["activation_sparsity_pattern"]
    writer.add_activation_sparsity_scale([NormalDist().inv_cdf(share) if share else float("-inf") for share in shares])


def add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Add tokens, their scores, types and merges, the special ids and the chat template.

    `gemma4` is llama.cpp's name for Gemma's byte-pair tokenizer with its merges; programs that know `llama` alone can
    still cut by the scores, which follow from the order of the merges.
    """
    tokens, scores, types, merges = read_tokenizer(folder, size)
    writer.add_tokenizer_model("gemma4")
    writer.add_tokenizer_pre("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    ids = {token: index for index, token in enumerate(tokens)}
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_eot_token_id(ids["<end_of_turn>"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))


def read_tokenizer(folder: Path, size: int) -> tuple[list[str], list[float], list[int], list[str]]:
    """Read (tokens, scores, types, merges) from tokenizer.json; ids without a token become unused ones up to `size`."""
    from gguf import TokenType

    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = saved["model"]["vocab"]
    merges = [merge if isinstance(merge, list) else merge.split(" ", 1) for merge in saved["model"]["merges"]]
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    tokens = [f"[PAD{index}]" for index in range(size)]
    scores, types = [-1e4] * size, [int(TokenType.UNUSED)] * size
    for piece, index in vocabulary.items():
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        tokens[index], scores[index] = piece, -float(rank.get(piece, len(merges)))
        types[index] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in saved["added_tokens"]:
        text, index = added["content"], added["id"]
        tokens[index], scores[index] = text if added["special"] else text.replace("\u2581", " "), -1e3
        types[index] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if saved["model"].get("unk_token") in vocabulary:
        types[vocabulary[saved["model"]["unk_token"]]] = TokenType.UNKNOWN
    return tokens, scores, types, [f"{left} {right}" for left, right in merges]
