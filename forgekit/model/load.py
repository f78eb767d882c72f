"""Weights and processor from a Hub id or a folder, through Unsloth or transformers, returned as transformers' own objects."""

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.collate import get_tokenizer
from ..environment import set_environment
from ..errors import ModelError
from ..faults import strike
from ..hardware import choose_device, choose_dtype, choose_engine, detect_hardware, settle_threads
from ..tokens import offer_token
from .compiler import wait_for_stores
from .timm_args import restore_model_args
from .trust import NO_CODE, SAFE_ONLY, check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUILT_IN = {"tiny": Path(__file__).parent / "tiny"}  # ids that stand for a packaged folder
# Modules that stay in 16 bit under 4-bit and 8-bit loading: AltUp clamps its weights in place, which packed ones cannot take;
# the towers are small beside the language model and lose most. Patterns, because transformers compares each with the start
# or the end of a module's whole name.
KEEP_16BIT = [rf".*\b{name}\b" for name in ("altup", "altup_projections", "altup_unembed_projections", "lm_head", "per_layer_model_projection", "vision_tower", "audio_tower", "embed_vision", "embed_audio")]  # fmt: skip


def start_engine(config: Config) -> str:
    """Prepare the libraries for the configured engine and return its name; call it before importing transformers.

    Unsloth rewrites transformers, TRL and PEFT while it is imported, so it has to come first. Calling this again is free.

    Raises:
        ModelError: Unsloth is wanted and cannot be imported, or one of those libraries was imported before it; or
            transformers is wanted plain and Unsloth has already rewritten it.
    """
    set_environment()
    offer_token()
    quiet_libraries()
    engine = choose_engine(config)
    if engine == "unsloth" and "unsloth" not in sys.modules:
        early = [name for name in ("transformers", "trl", "peft") if name in sys.modules]
        if early:
            raise ModelError(
                f"{', '.join(early)} was imported before unsloth, which must come first to speed it up. Restart the kernel and "
                "call forgekit before importing it yourself, or set model.engine: huggingface."
            )
        try:
            import unsloth  # noqa: F401
        except (ImportError, NotImplementedError, RuntimeError) as error:
            raise ModelError(
                f"Unsloth cannot be imported here: {error}. Install it (pip install unsloth), or set model.engine: huggingface."
            ) from error
    if engine == "huggingface" and "unsloth" in sys.modules:
        raise ModelError(
            "model.engine: huggingface was asked for, but this process has imported unsloth, which has rewritten transformers. "
            "Restart the kernel, or set model.engine: unsloth."
        )
    return engine


def quiet_libraries() -> None:
    """Silence warnings that libraries give about each other while they are imported and that no user can act on."""
    for name in ("torch.utils._pytree", "bitsandbytes.backends.cpu.ops", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide transformers' bars for reading and writing weights: each is a widget, whose state is saved with the notebook.

    The Hub's bars stay, because a download takes minutes.
    """
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def find_model(config: Config) -> str:
    """Return what `from_pretrained` is to be given: a folder's path, or the Hub id.

    Raises ModelError for a folder that holds no checkpoint.
    """
    name = config.model.id
    folder = BUILT_IN.get(name) or Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"model.id: {name} is a folder but no checkpoint: it has no config.json (it holds {found})."
            )
        return str(folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"model.id: the folder {name} does not exist.")
    return name


def find_weights(config: Config) -> str:
    """Return the folder or Hub id whose weights are loaded: `find_model`'s, or with `model.slice` its slice, made once."""
    if not config.model.slice:
        return find_model(config)
    from .slice import make_slice

    return str(make_slice(config))


def explain_load_error(config: Config, error: Exception) -> ModelError:
    """Turn what the Hub client or transformers says into one sentence with a remedy."""
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("TRANSFORMERS_OFFLINE") == "1"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        first = "it asks to run code of its own (auto_map), because transformers knows no such model or processor"
        remedy = "forgekit never runs code that comes with weights. Take a checkpoint without it."
    elif config.model.id in BUILT_IN or Path(config.model.id).expanduser().exists():
        remedy = "Its files do not make a whole checkpoint: fetch or save it again."
    elif offline:
        remedy = "This process is offline (HF_HUB_OFFLINE=1) and the model is not in the cache: unset it, or name a folder or `tiny`."
    elif "gated" in str(error).lower() or "401" in str(error):
        remedy = (
            "Accept the model's terms on its Hub page and log in (hf auth login), or use the id of an ungated copy."
        )
    else:
        remedy = "Check the spelling, the connection to the Hub, and model.revision."
    return ModelError(f"model.id: {config.model.id} cannot be loaded: {first.rstrip('.')}. {remedy}")


def load_processor(config: Config) -> Any:
    """Load tokenizer, image processor and feature extractor, without weights.

    Returns a transformers processor, or a tokenizer when the checkpoint is text only. Raises ModelError.
    """
    start_engine(config)
    from transformers import AutoConfig, AutoProcessor

    name = find_model(config)
    try:
        processor = AutoProcessor.from_pretrained(name, revision=config.model.revision, **NO_CODE)
        settings = AutoConfig.from_pretrained(name, revision=config.model.revision, **NO_CODE)
    except (
        OSError,
        ValueError,
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # half a checkpoint trips it up anywhere
        raise explain_load_error(config, error) from error
    note_longest_clip(processor, settings)
    if get_tokenizer(processor).chat_template is None and getattr(processor, "chat_template", None) is None:
        raise ModelError(
            f"{config.model.id} has no chat template, so turns cannot be written. Use an instruction-tuned (-it) checkpoint."
        )
    return processor


def note_longest_clip(processor: Any, settings: Any) -> None:
    """Note on the feature extractor how many seconds the model's soft tokens cover: 30 with the released checkpoints.

    A soft token stands for frames of 10 ms, thinned out by the tower's two convolutions and its reduction factor; 8 frames
    are left for what those convolutions look ahead (`data/parts/audio.py`).
    """
    audio = getattr(settings, "audio_config", None)
    if audio is not None and hasattr(processor, "feature_extractor"):
        frames = settings.audio_soft_tokens_per_image * audio.conf_reduction_factor
        frames *= math.prod(stride[0] for stride in audio.sscp_conv_stride_size)
        processor.feature_extractor.max_seconds = min(30.0, (frames - 8) / 100)


def load_model(config: Config) -> tuple["PreTrainedModel", Any]:
    """Load weights and processor as `config.model` says.

    Returns (model, processor): a transformers model on its device, frozen unless `load_in: full`, and its processor.

    Raises:
        ModelError: the id or folder cannot be loaded, or the hardware cannot do what was asked.
    """
    engine = start_engine(config)
    strike("load")
    processor = load_processor(config)  # a wrong id or a missing template shows before weights are read
    from safetensors import SafetensorError

    dtype, name = choose_dtype(config), find_weights(config)
    if Path(name).is_dir():
        check_weights(Path(name), f"model.id: {config.model.id}")
    print(
        f"Loading {config.model.id}{' (its slice)' if config.model.slice else ''}: {engine}, {config.model.load_in}, {str(dtype).removeprefix('torch.')}, {detect_hardware()}"
    )
    try:
        with hide_progress_bars():
            model = load_unsloth(config, name, dtype) if engine == "unsloth" else load_transformers(config, name, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise explain_load_error(config, error) from error
    except NotImplementedError as error:
        raise ModelError(f"Unsloth does not support this here: {error} Set model.engine: huggingface.") from error
    if Path(name).is_dir():
        restore_model_args(model, name)
    if choose_device(config) == "cpu":
        settle_threads(model.config.get_text_config().hidden_size)
    if config.model.load_in != "full":
        model.requires_grad_(False)
    return model, processor


def choose_unsloth_checkpointing(config: Config) -> str | bool:
    """Return `train.gradient_checkpointing` as Unsloth's functions take it: its own kind, or none."""
    return False if config.train.gradient_checkpointing == "off" else "unsloth"


def load_unsloth(config: Config, name: str, dtype: Any) -> "PreTrainedModel":
    """Load through unsloth.FastModel, with its own gradient checkpointing."""
    from unsloth import FastModel

    wait_for_stores()  # Unsloth compiles what it loads
    model, _ = FastModel.from_pretrained(
        name,
        max_seq_length=config.model.max_length,
        dtype=dtype,
        load_in_4bit=config.model.load_in == "4bit",
        load_in_8bit=config.model.load_in == "8bit",
        load_in_16bit=config.model.load_in == "16bit",
        full_finetuning=config.model.load_in == "full",
        use_gradient_checkpointing=choose_unsloth_checkpointing(config),
        random_state=config.train.seed,
        revision=config.model.revision,
        **SAFE_ONLY,
    )
    return model


def load_transformers(config: Config, name: str, dtype: Any) -> "PreTrainedModel":
    """Load the checkpoint's own class through transformers; 4-bit is NF4, double quantised, through bitsandbytes."""
    import torch
    import transformers

    from .table import place_beside_table, settle_table

    settings = transformers.AutoConfig.from_pretrained(name, revision=config.model.revision, **NO_CODE)
    architecture = (settings.architectures or ["AutoModelForCausalLM"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise ModelError(
            f"transformers {transformers.__version__} has no {architecture}, which {config.model.id} asks for. Update transformers."
        )
    if not architecture.startswith("AutoModel") and not (
        isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    ):
        raise ModelError(
            f"model.id: {config.model.id} names {architecture} as its architecture, which is no model. Fetch the checkpoint again."
        )
    quantisation = {
        "4bit": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        },
        "8bit": {"load_in_8bit": True},
    }.get(config.model.load_in)
    device = choose_device(config)
    has_table = bool(getattr(settings.get_text_config(), "vocab_size_per_layer_input", None))  # Gemma 3n alone
    lent = device == "cuda" and has_table and keeps_table_back(config)
    places = place_beside_table(kind, settings, 0) if lent else {"": 0} if device == "cuda" else None
    if quantisation:  # the last word lets a module that is not packed stay on the CPU
        quantisation = transformers.BitsAndBytesConfig(
            **quantisation, llm_int8_skip_modules=KEEP_16BIT, llm_int8_enable_fp32_cpu_offload=lent
        )
    model, report = kind.from_pretrained(
        name,
        revision=config.model.revision,
        dtype=dtype,
        quantization_config=quantisation,
        device_map=places,
        ignore_mismatched_sizes=True,  # reported below, with the missing ones
        output_loading_info=True,
        **SAFE_ONLY,
    )
    check_complete(config, report)
    if lent:
        settle_table(model, torch.device("cuda", 0))
    return model


def keeps_table_back(config: Config) -> bool:
    """Say whether the per-layer table is to stay in the machine's memory while transformers loads; one that learns cannot."""
    return config.model.offload_ple == "on" and config.model.load_in != "full"


def check_complete(config: Config, report: dict[str, Any]) -> None:
    """Raise ModelError when weights were missing or of another shape: transformers fills those with random numbers."""
    lost = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if lost:
        raise ModelError(
            f"model.id: {config.model.id} lacks {len(lost)} of the weights that its config.json describes, or has them in "
            f"another shape, for instance {lost[0]}; they would be random. Its files do not make a whole checkpoint: fetch or save it again."
        )
