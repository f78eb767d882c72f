"""Peak memory of params/gpu/8gb.yaml on a GPU: while loading, and in some optimiser steps under the trainer.

    python -m benchmarks.small_gpu CHECKPOINT [--steps 6] [--tokens 1000]

CHECKPOINT is a folder of Gemma 3n E2B; random weights do. The table of per-layer embeddings has to be outside of the GPU at the end.
"""

import argparse
import os
import sys
import tempfile

from benchmarks.rows import make_rows
from forgekit import add_adapter, load_config, load_data, load_model, sft_trainer, start_engine, start_run
from forgekit.data.collate import get_tokenizer
from forgekit.hardware import GIB

RECIPE = "params/gpu/8gb.yaml"


def main(arguments: list[str]) -> None:
    """Load, train, and print what the allocator counted and what it took from the GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1000, help="of each row, about")
    options = parser.parse_args(arguments)
    config = load_config(RECIPE, {"model.id": options.checkpoint, "train.max_steps": options.steps})
    start_engine(config)
    import torch

    from forgekit.model.table import find_table

    with tempfile.TemporaryDirectory() as folder:
        os.environ["FORGEKIT_RUNS"] = folder
        model, processor = load_model(config)
        report("loading")
        number = options.steps * config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
        data = load_data(config, processor, rows=make_rows(get_tokenizer(processor), number, options.tokens))
        model = add_adapter(model, config)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        sft_trainer(model, processor, data, config, start_run(config, "small")).train()
        report("training")
        base = model.get_base_model()
        print(f"table of per-layer embeddings: on {base.get_submodule(find_table(base)).weight.device.type}")


def report(what: str) -> None:
    """Print the peaks so far."""
    import torch

    peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    print(f"{what}: {peaks[0]:.2f} GiB at most, {peaks[1]:.2f} GiB taken from the GPU", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
