"""A slice of a checkpoint at full size: made, compared with its source, loaded and run once; one line of JSON at the end.

    python -m benchmarks.slice CHECKPOINT OUT [--slice e2b] [--dtype bfloat16] [--rows 1] [--length 512]

CHECKPOINT is a folder with a Gemma 3n E4B, random weights do; OUT must not exist and is kept. The slice is made as `forgekit
slice` makes it. Printed: seconds and the process's peak memory while slicing, bytes on disk, every tensor compared with the
part of the source that it should be (read independently, by whole tensors), parameters, shapes and finite logits of a forward.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

from forgekit.config import Config, load_config
from forgekit.hardware import GIB


def read_peak() -> float:
    """Return this process's largest resident memory so far in GiB; pages of files that are mapped count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def measure_slice(config: Config, out: Path) -> dict[str, Any]:
    """Make the slice and return what it took."""
    import torch  # noqa: F401  # its own memory stands in the first peak
    import transformers  # noqa: F401

    from forgekit.model.slice import slice_checkpoint

    before, begun = read_peak(), time.monotonic()
    slice_checkpoint(config, out)
    seconds = time.monotonic() - begun
    disk = sum(file.stat().st_size for file in out.iterdir())
    return {
        "slice_seconds": round(seconds, 1),
        "peak_gib_before": round(before, 2),
        "peak_gib_slicing": round(read_peak(), 2),
        "disk_bytes": disk,
    }


def compare_tensors(source: Path, out: Path) -> dict[str, Any]:
    """Compare every tensor of a slice with the source's, cut here by layer number and width from slice.json alone.

    Raises AssertionError naming the first tensor that differs.
    """
    import torch
    from safetensors import safe_open

    record = json.loads((out / "slice.json").read_text(encoding="utf-8"))
    layers, widths = record["layers"], record["widths"]
    whole = json.loads((source / "config.json").read_text(encoding="utf-8"))
    count = whole.get("text_config", whole)["num_hidden_layers"]
    places = {}
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            places |= dict.fromkeys(file.keys(), shard)
    compared = 0
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                head, found, rest = name.partition("language_model.layers.")
                new, _, part = rest.partition(".")
                old_name = f"{head}{found}{layers[int(new)]}.{part}" if found else name
                with safe_open(places[old_name], "pt") as other:
                    expected = other.get_tensor(old_name)
                if found and part.startswith("mlp."):
                    width = widths[int(new)]
                    expected = expected[:, :width] if "down_proj" in part else expected[:width]
                elif "embed_tokens_per_layer" in name:
                    expected = expected.unflatten(1, (count, -1))[:, layers].flatten(1)
                elif "per_layer_model_projection" in name:
                    expected = expected.unflatten(0, (count, -1))[layers].flatten(0, 1)
                assert torch.equal(file.get_tensor(name), expected), f"{name} is not the source's {old_name}"
                compared += 1
    return {"tensors_equal": compared}


def run_forward(out: Path, dtype: str, rows: int, length: int) -> dict[str, Any]:
    """Load the slice and run it on random tokens; return shapes, sizes and seconds."""
    import torch
    from transformers import Gemma3nForConditionalGeneration

    device, begun = "cuda" if torch.cuda.is_available() else "cpu", time.monotonic()
    model, report = Gemma3nForConditionalGeneration.from_pretrained(
        out, dtype=getattr(torch, dtype), device_map={"": 0} if device == "cuda" else None, output_loading_info=True
    )
    loaded = time.monotonic() - begun
    text = model.config.text_config
    ids = torch.randint(10, min(1000, text.vocab_size), (rows, length), device=device)
    with torch.no_grad():
        model(input_ids=ids)  # the first one sets things up
        begun = time.monotonic()
        logits = model(input_ids=ids).logits
        finite = bool(torch.isfinite(logits).all())  # waits for the device
    return {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "load_seconds": round(loaded, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": text.num_hidden_layers,
        "sharing": text.num_kv_shared_layers,
        "widths": sorted(set(text.intermediate_size)),
        "table": list(model.model.language_model.embed_tokens_per_layer.weight.shape),
        "projection": list(model.model.language_model.per_layer_model_projection.weight.shape),
        "logits": list(logits.shape),
        "logits_finite": finite,
        "forward_seconds": round(time.monotonic() - begun, 3),
        "device": device,
    }


def main() -> None:
    """Run the parts one after the other and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--slice", default="e2b", help="as model.slice, read as YAML")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=512, help="tokens")
    options = parser.parse_args()
    from forgekit.recipe import parse_yaml

    settings = {"model.id": str(options.checkpoint), "model.slice": parse_yaml(options.slice, "--slice")}
    config = load_config(None, {**settings, "model.engine": "huggingface"}, origin="benchmark")
    results = measure_slice(config, options.out)
    print(json.dumps(results), flush=True)
    results |= compare_tensors(options.checkpoint, options.out)
    results |= run_forward(options.out, options.dtype, options.rows, options.length)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
