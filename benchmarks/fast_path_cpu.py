"""Steps of the practice model on a CPU, with the fast path and without, and the most that skipping rows can give.

    python -m benchmarks.fast_path_cpu [SHARE_OF_PROMPT ...]

Batches are 16 rows of 64 tokens, as in the quick text recipe; the two sides take turns in one process, and the median of each
counts. The ceiling is the library's products over ours (`FastPath.estimate_gain`); attention and small operations are not in it.
"""

import sys
import time
from statistics import median
from typing import Any

from forgekit import add_adapter, load_config, load_model

ROWS, TOKENS, STEPS = 16, 64, 12


def make_batch(prompt: float, words: int) -> dict[str, Any]:
    """Random words; the share behind the prompt is learned."""
    import torch

    ids = torch.randint(300, words, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : int(prompt * TOKENS)] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False}


def time_step(model: Any, batch: dict[str, Any]) -> float:
    """Return the seconds of a forward and backward."""
    started = time.perf_counter()
    model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def main(arguments: list[str]) -> None:
    """Print one row of the table for each share of the prompt."""
    import torch

    from forgekit.train.fast_path import disable_fast_path, enable_fast_path

    config = load_config(None, {"model.id": "tiny", "model.load_in": "16bit", "model.engine": "huggingface", "model.device": "cpu"})  # fmt: skip
    model, _ = load_model(config)
    model = add_adapter(model, config).train()
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| prompt | transformers | forgekit | gain | ceiling |\n|---|---|---|---|---|")
    for prompt in map(float, arguments or ["0", "0.5", "0.75", "0.9"]):
        batch = make_batch(prompt, 1200)
        times: dict[bool, list[float]] = {False: [], True: []}
        ceiling = 1.0
        for _ in range(STEPS):
            for fast in (False, True):
                path = enable_fast_path(model) if fast else None
                times[fast].append(time_step(model, batch))
                ceiling = path.estimate_gain() if path else ceiling
                disable_fast_path(model)
        library, ours = (median(times[fast][2:]) for fast in (False, True))
        print(f"| {prompt:.0%} | {1000 * library:.0f} ms | {1000 * ours:.0f} ms | {library / ours:.2f} | {ceiling:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
