"""One table of perplexities: the model in memory, its merged folder in each precision, and what others measured."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from forgekit import evaluate_model, load_model, measure_precisions
from forgekit.errors import ExportError
from forgekit.evaluate import precision
from forgekit.evaluate.precision import TRAINED
from forgekit.files import read_json

from .test_answers import make_rows


def fail() -> float:
    raise ExportError("llama.cpp refused the file.\nmore")


def test_each_precision_is_a_line_with_a_number_or_a_reason(
    make_config: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    import torch

    config = make_config({"evaluate.rows": 4, "evaluate.metric": "perplexity"})
    model, processor = load_model(config)
    others = {"GGUF Q8_0": 12.5, "GGUF F16": lambda: 12.25, "GGUF Q4_K_M": fail}
    path = tmp_path / "precision.json"
    found = measure_precisions(model, processor, make_rows(5), config, tiny_folder, others, path)
    lines = {one.name: one for one in found.found}
    assert list(lines) == [TRAINED, "merged, 16-bit", "8-bit", "4-bit", *others]
    expected = evaluate_model(model, processor, make_rows(5), config).perplexity
    assert lines[TRAINED].perplexity == pytest.approx(expected, rel=1e-6)
    assert lines["merged, 16-bit"].perplexity == pytest.approx(expected, rel=1e-6)
    if not torch.cuda.is_available():
        assert lines["4-bit"].perplexity is lines["8-bit"].perplexity is None
        assert lines["4-bit"].reason.startswith("model.load_in: 4bit needs an NVIDIA GPU (bitsandbytes)")
    assert (lines["GGUF Q8_0"].perplexity, lines["GGUF F16"].perplexity) == (12.5, 12.25)
    assert (lines["GGUF Q4_K_M"].perplexity, lines["GGUF Q4_K_M"].reason) == (None, "llama.cpp refused the file.")
    table = found.table
    assert table.loc["GGUF Q8_0", "against the first"] == f"{12.5 / lines[TRAINED].perplexity - 1:+.2%}"
    lines_shown = [line.split() for line in repr(found).splitlines()]
    assert (
        lines_shown[5][:3] == ["GGUF", "Q8_0", "12.5000"]
        and lines_shown[7][2:] == "llama.cpp refused the file.".split()
    )
    assert "Perplexity on 4 rows" in repr(found) and "llama.cpp refused" in found._repr_html_()
    assert read_json(path)["precisions"][-1]["reason"] == "llama.cpp refused the file."


def test_a_mistake_in_the_code_is_no_line_of_the_table() -> None:
    with pytest.raises(ZeroDivisionError):
        precision.try_measure("x", lambda: 1 / 0)
    assert math.isnan(precision.try_measure("x", math.nan).perplexity or 0)
    assert "unsloth" not in sys.modules  # a precision is loaded by the engine of the run
