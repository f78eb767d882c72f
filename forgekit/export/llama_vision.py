"""What llama.cpp makes of a picture with an mmproj file alone: the soft tokens that it would put before the text model.

No part of the binding's own interface hands them out, so its library (mtmd) is called directly. That interface is marked
experimental: the layout of its settings is compared with what the library itself writes there before anything is read.
"""

import contextlib
import ctypes
import functools
import tempfile
from collections.abc import Iterator
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from .gguf_types import load_ggml
from .llama import count_threads

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

MARKER = b"<__media__>"  # stands for the picture in a text
PICTURE = 1  # kind of a piece of input, MTMD_INPUT_CHUNK_TYPE_IMAGE
NO_FLASH = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
WORDS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))


class Settings(Structure):
    """mtmd_context_params (llama.cpp, tools/mtmd/mtmd.h, as of build 10581)."""

    _fields_ = (
        ("use_gpu", c_bool),
        ("device", c_void_p),
        ("print_timings", c_bool),
        ("n_threads", c_int),
        ("image_marker", c_char_p),
        ("media_marker", c_void_p),
        ("flash_attn_type", c_int),
        ("warmup", c_bool),
        ("image_min_tokens", c_int),
        ("image_max_tokens", c_int),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("batch_max_tokens", c_int32),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
    )


class Text(Structure):
    """mtmd_input_text."""

    _fields_ = (("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool))


class ModelSettings(Structure):
    """llama_model_params, handed on unchanged: room for it. By value a longer structure is passed and returned like it."""

    _fields_ = (("room", ctypes.c_uint64 * 64),)


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
ERROR = 4  # GGML_LOG_LEVEL_ERROR
FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name -> result, arguments
    "llama_backend_init": (None,),
    "llama_log_set": (None, LOG, c_void_p),
    "llama_model_default_params": (ModelSettings,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelSettings),
    "llama_model_free": (None, c_void_p),
    "mtmd_log_set": (None, LOG, c_void_p),
    "mtmd_default_marker": (c_void_p,),
    "mtmd_context_params_default": (Settings,),
    "mtmd_init_from_file": (c_void_p, c_char_p, c_void_p, Settings),
    "mtmd_free": (None, c_void_p),
    "mtmd_bitmap_init": (c_void_p, c_uint32, c_uint32, c_char_p),
    "mtmd_bitmap_free": (None, c_void_p),
    "mtmd_input_chunks_init": (c_void_p,),
    "mtmd_input_chunks_free": (None, c_void_p),
    "mtmd_input_chunks_size": (c_size_t, c_void_p),
    "mtmd_input_chunks_get": (c_void_p, c_void_p, c_size_t),
    "mtmd_input_chunk_get_type": (c_int, c_void_p),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, c_void_p),
    "mtmd_tokenize": (c_int32, c_void_p, c_void_p, POINTER(Text), POINTER(c_void_p), c_size_t),
    "mtmd_encode_chunk": (c_int32, c_void_p, c_void_p),
    "mtmd_get_output_embd": (POINTER(c_float), c_void_p),
}
said: list[str] = []  # errors that the library wrote into its log since the last call


@LOG
def keep_error(level: int, text: bytes, _: Any) -> None:
    """Keep the library's errors for the message and drop the rest of its log."""
    if level >= ERROR and text.strip():
        said.append(text.decode(errors="replace").strip())


@functools.cache
def load_mtmd() -> Any:
    """Return llama.cpp's library for pictures. Raises ExportError for a version whose settings are laid out otherwise."""
    library = load_ggml()
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    found = library.mtmd_context_params_default()
    values = (found.use_gpu, found.print_timings, found.n_threads, found.flash_attn_type, found.warmup)
    marker = found.media_marker == library.mtmd_default_marker()  # the same place in memory
    if values != (True, True, 4, -1, True) or not marker or found.batch_max_tokens != 1024:
        raise ExportError(
            "This version of xllamacpp lays out llama.cpp's picture settings in a way that forgekit does not know, so gguf:mmproj cannot be "
            "verified. Install xllamacpp==2026.10.11549, or leave gguf:mmproj out of export.formats."
        )
    library.llama_backend_init()
    return library


def read_soft_tokens(path: Path, picture: "Image", width: int) -> "numpy.ndarray":
    """Return what llama.cpp makes of a picture, on the CPU: float32 [soft tokens, width].

    Args:
        path: an mmproj file.
        picture: in RGB; llama.cpp scales it where it does not have the tower's size.
        width: of the text model.

    Raises ExportError for a file that llama.cpp does not take.
    """
    import numpy

    with open_tower(path, width) as (library, context), contextlib.ExitStack() as stack:
        pixels = library.mtmd_bitmap_init(picture.width, picture.height, picture.convert("RGB").tobytes())
        stack.callback(library.mtmd_bitmap_free, pixels)
        pieces = library.mtmd_input_chunks_init()
        stack.callback(library.mtmd_input_chunks_free, pieces)
        text = Text(MARKER, len(MARKER), False, False)
        check(library.mtmd_tokenize(context, pieces, ctypes.byref(text), (c_void_p * 1)(pixels), 1) == 0, path)
        found = [
            library.mtmd_input_chunks_get(pieces, place) for place in range(library.mtmd_input_chunks_size(pieces))
        ]
        piece = next(piece for piece in found if library.mtmd_input_chunk_get_type(piece) == PICTURE)
        check(library.mtmd_encode_chunk(context, piece) == 0, path)
        shape = (library.mtmd_input_chunk_get_n_tokens(piece), width)
        return numpy.ctypeslib.as_array(library.mtmd_get_output_embd(context), shape).copy()


@contextlib.contextmanager
def open_tower(path: Path, width: int) -> Iterator[tuple[Any, int]]:
    """Yield (library, context of an mmproj file). A text model has to stand behind it, of which only width and words are read."""
    library = load_mtmd()
    said.clear()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        library.llama_log_set(keep_error, None)
        library.mtmd_log_set(keep_error, None)
        text = write_carrier(Path(folder) / "text.gguf", width)
        model = library.llama_model_load_from_file(str(text).encode(), library.llama_model_default_params())
        check(model, text)
        stack.callback(library.llama_model_free, model)
        settings = library.mtmd_context_params_default()
        settings.use_gpu = settings.warmup = settings.print_timings = False
        settings.n_threads, settings.flash_attn_type = count_threads(), NO_FLASH
        context = library.mtmd_init_from_file(str(path).encode(), model, settings)
        check(context, path)
        stack.callback(library.mtmd_free, context)
        yield library, context


def check(worked: Any, path: Path) -> None:
    """Raise ExportError with what llama.cpp said when one of its functions did not work."""
    if not worked:
        raise ExportError(
            f"{path}: llama.cpp cannot read pictures with this file: {' '.join(said) or 'it gave no reason'}"
        )


def write_carrier(path: Path, width: int) -> Path:
    """Write a text model that has a width and words and can do nothing: picture files are loaded beside a text model."""
    import numpy
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(width // 32)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(WORDS))
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256])
    shapes = {"token_embd": (len(WORDS), width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}  # fmt: skip
    shapes |= {"blk.0.attn_q": (width, width), "blk.0.attn_k": (32, width), "blk.0.attn_v": (32, width), "blk.0.attn_output": (width, width)}  # fmt: skip
    shapes |= {"blk.0.ffn_gate": (32, width), "blk.0.ffn_up": (32, width), "blk.0.ffn_down": (width, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numpy.zeros(shape, numpy.float32 if len(shape) == 1 else numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
