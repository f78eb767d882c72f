"""Which number format each tensor of a GGUF file gets, and how float32 becomes it.

The mix of a 4-bit file is the one that llama.cpp's own quantizer makes of this architecture: AltUp, LAuReL and the
projection of the per-layer embeddings stay in 16 bit, the vocabulary's tables and the layers that suffer most get 6.
"""

import ctypes
import functools
from typing import TYPE_CHECKING, Any

from ..errors import ExportError

if TYPE_CHECKING:
    import numpy

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_K_M")  # F32 only for comparisons
KEPT = ("altup_proj", "altup_unembd_proj", "altup_router", "laurel_", "per_layer_model_proj")
ALWAYS_FLOAT = ("norm.weight", "altup_correct_coef.weight", "altup_predict_coef.weight", "altup_correct_scale.weight")
TABLES = ("token_embd", "per_layer_token_embd")


def choose_type(name: str, shape: tuple[int, ...], kind: str, layers: int) -> Any:
    """Return the gguf.GGMLQuantizationType of one tensor in a file of one kind.

    Blocks of K types hold 256 values and those of Q8_0 32: a row that is no multiple falls back to the next finer type.
    """
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1 or name.endswith(ALWAYS_FLOAT):
        return Type.F32
    if kind in ("F32", "F16", "BF16"):
        return Type[kind]
    if any(part in name for part in KEPT):
        return Type.F16
    wanted = Type.Q8_0 if kind == "Q8_0" else choose_four_bit_type(name, layers)
    fitting = (some for some in (wanted, Type.Q8_0) if shape[-1] % GGML_QUANT_SIZES[some][0] == 0)
    return next(fitting, Type.F16)


def choose_four_bit_type(name: str, layers: int) -> Any:
    """Return Q6_K for the tables and for the values and feed-forward outputs of the first, the last and every third layer
    between, else Q4_K: llama.cpp, src/llama-quant.cpp, `use_more_bits`."""
    from gguf import GGMLQuantizationType as Type

    if name.startswith(TABLES):
        return Type.Q6_K
    if "attn_v." in name or "ffn_down." in name:
        layer, eighth = int(name.split(".")[1]), layers // 8
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            return Type.Q6_K
    return Type.Q4_K


def stored_bytes(shape: tuple[int, ...], type: Any) -> int:
    """Return the bytes that a tensor takes in the file, without the padding behind it."""
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[type]
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def quantize(data: "numpy.ndarray", type: Any) -> "numpy.ndarray":
    """Return float32 rows in a GGUF type, as bytes: through the gguf package, and through ggml itself for the K types."""
    import numpy
    from gguf import GGMLQuantizationType as Type
    from gguf import quants

    if type == Type.F32:
        return numpy.ascontiguousarray(data, numpy.float32)
    if type == Type.F16:
        return data.astype(numpy.float16)
    if type not in (Type.Q4_K, Type.Q6_K):
        return quants.quantize(data, type)
    data = numpy.ascontiguousarray(data, numpy.float32)
    out = numpy.empty(stored_bytes(data.shape, type), numpy.uint8)
    done = load_ggml().ggml_quantize_chunk(int(type), data.ctypes.data, out.ctypes.data, 0, data.size // data.shape[-1], data.shape[-1], None)  # fmt: skip
    if done != out.nbytes:
        raise ExportError(f"llama.cpp wrote {done} bytes for a tensor of type {type.name} that takes {out.nbytes}.")
    return out


@functools.cache
def load_ggml() -> Any:
    """Return llama.cpp's library, which holds the code of the K types; the gguf package can only read them."""
    import xllamacpp.xllamacpp as binding

    library = ctypes.CDLL(binding.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library
