"""What a training does for each batch beside the model's own computing, on the CPU.

    python -m benchmarks.trainer

Walking: E2B with an adapter, without weights (on the meta device). Collating: four rows of text, pictures or clips by the practice
model's tokenizer and by Gemma 3n's own settings of pictures and sound. Medians of some repetitions, in milliseconds.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

ROWS, TOKENS, SECONDS = 4, 1000, 10


def take_time(function: Callable[[], Any], times: int = 9) -> float:
    """Return milliseconds, the median of some calls behind a first one."""
    function()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        found.append(1000 * (time.perf_counter() - started))
    return median(found)


def time_walks() -> dict[str, float]:
    """Time what transformers' trainer does with all modules."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration

    from benchmarks.sides import TARGETS

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 30, "num_kv_shared_layers": 10}
    with torch.device("meta"):
        model = Gemma3nForConditionalGeneration(Gemma3nConfig(text_config=sizes))
        model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS))
    base, modules = model.get_base_model(), len(list(model.modules()))
    return {
        f"count the weights of {modules:,} modules": take_time(lambda: base.num_parameters(exclude_embeddings=True)),
        "set them to training": take_time(model.train),
        "set gradients to none": take_time(model.zero_grad),
    }


def time_collating() -> dict[str, float]:
    """Time what becomes of four rows before the model sees them, decoding left out."""
    import numpy
    from PIL import Image
    from transformers import Gemma3nAudioFeatureExtractor, SiglipImageProcessor

    from benchmarks.rows import make_rows
    from forgekit import load_config
    from forgekit.data.collate import Collator, get_tokenizer
    from forgekit.data.messages import check_example
    from forgekit.model.load import load_processor

    processor = load_processor(load_config(None, {"model.id": "tiny", "model.load_in": "16bit"}))
    rows = [{"messages": check_example(row)} for row in make_rows(get_tokenizer(processor), ROWS, TOKENS)]
    draw = numpy.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (600, 800, 3), dtype=numpy.uint8)) for _ in range(ROWS)]
    clips = [draw.standard_normal(16000 * SECONDS).astype("float32") for _ in range(ROWS)]
    resize, listen = SiglipImageProcessor(size={"height": 768, "width": 768}), Gemma3nAudioFeatureExtractor()
    return {
        f"{ROWS} rows of {TOKENS} tokens": take_time(lambda: Collator(processor)(rows)),
        f"{ROWS} pictures of 800 x 600": take_time(lambda: resize(pictures, return_tensors="pt")),
        f"{ROWS} clips of {SECONDS} s": take_time(lambda: listen(clips, return_tensors="pt", sampling_rate=16000)),
    }


def main() -> None:
    """Print a table."""
    print("| for each batch | ms |\n|---|---|")
    for name, value in (time_walks() | time_collating()).items():
        print(f"| {name} | {value:.1f} |", flush=True)


if __name__ == "__main__":
    main()
