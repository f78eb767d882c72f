"""Rows a second and memory of reading and checking: python -m benchmarks.reading [--rows N] [--gigabyte]

Writes JSON lines to a temporary folder, loads them with the built-in practice model's processor (or its tokenizer alone,
with --tokenizer) and prints rows a second, where the time goes, and the memory of this process before and at its peak.
--gigabyte makes the file 10**9 bytes.
"""

import argparse
import cProfile
import json
import platform
import pstats
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MEGABYTE = 1_000_000


def write_rows(path: Path, rows: int, size: int) -> int:
    """Write orders as prompt and completion until there are `rows` of them or the file has `size` bytes; return how many."""
    from forgekit.data.samples.orders import draw_order, write_sentence

    generator, written = random.Random(3407), 0
    with open(path, "w", encoding="utf-8") as file:
        while written < rows and file.tell() < size:
            block = []
            for _ in range(min(1000, rows - written)):
                order = draw_order(generator)
                prompt = f"Order {written + len(block)}. {write_sentence(order, generator)}"
                block.append(json.dumps({"prompt": prompt, "completion": json.dumps(order)}) + "\n")
            file.writelines(block)
            written += len(block)
    return written


def write_documents(path: Path, size: int) -> int:
    """Write rows of about 1600 bytes, as an instruction set with long answers has them, until the file has `size` bytes."""
    from forgekit.data.samples.orders import draw_order, write_sentence

    generator, written, length = random.Random(3407), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while length < size:
            sentences = [write_sentence(draw_order(generator), generator) for _ in range(20)]
            line = (
                json.dumps({"prompt": f"Summary {written}. {sentences[0]}", "completion": " ".join(sentences[1:])})
                + "\n"
            )
            length += file.write(line)
            written += 1
    return written


class Peak(threading.Thread):
    """Watches the resident memory of this process, 20 times a second."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.bytes = self.process.memory_info().rss

    def run(self) -> None:
        while not self.done.wait(0.05):
            self.bytes = max(self.bytes, self.process.memory_info().rss)


def measure(path: Path, rows: int, processor: Any, profile: bool) -> None:
    """Load the file and print what it took."""
    from forgekit import load_config, load_data

    config = load_config(None, {"data.path": str(path), "data.test": 100, "model.max_length": 4096})
    peak = Peak()
    peak.start()
    profiler = cProfile.Profile()
    start, cpu, alone = time.perf_counter(), time.process_time(), time.thread_time()
    if profile:
        profiler.enable()
    data = load_data(config, processor)
    profiler.disable()
    seconds, cpu, alone = time.perf_counter() - start, time.process_time() - cpu, time.thread_time() - alone
    peak.done.set()
    assert sum(map(len, data.values())) == rows
    print(
        f"{rows} rows, {path.stat().st_size / MEGABYTE:.0f} MB: {seconds:.1f} s, {rows / seconds:.0f} rows/s, "
        f"{path.stat().st_size / MEGABYTE / seconds:.1f} MB/s; "
        f"CPU time {cpu:.1f} s, {alone:.1f} s of it in one thread; resident memory {peak.before / MEGABYTE:.0f} MB before, "
        f"{peak.bytes / MEGABYTE:.0f} MB at the peak"
    )
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def load_reader(tokenizer: bool) -> Any:
    """Return the practice model's processor, or only its tokenizer, without the libraries that the rest brings along."""
    from forgekit import load_config, load_processor
    from forgekit.model.load import BUILT_IN

    if tokenizer:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(BUILT_IN["tiny"])
    settings = {"model.id": "tiny", "model.engine": "huggingface", "model.device": "cpu", "model.load_in": "16bit"}
    return load_processor(load_config(None, settings))


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--gigabyte", action="store_true", help="a file of 10**9 bytes, of rows of about 1600 bytes")
    parser.add_argument(
        "--tokenizer", action="store_true", help="the tokenizer alone, as a text-only checkpoint has it"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes (slower)")
    options = parser.parse_args()
    import datasets
    import tokenizers
    import transformers

    print(
        f"Python {platform.python_version()}, datasets {datasets.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write_documents(path, 10**9) if options.gigabyte else write_rows(path, options.rows, 10**12)
        measure(path, rows, load_reader(options.tokenizer), options.profile)


if __name__ == "__main__":
    main()
