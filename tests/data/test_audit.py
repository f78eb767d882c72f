"""The audit counts what the training batch holds, draws the cut-off and repeats why rows were set aside."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from forgekit import audit_data, load_data
from forgekit.data.collate import IGNORE, Collator

PAIRS = [("2 + 2?", "4"), ("3 + 3?", "6"), ("2 + 2?", "four"), ("Say more.", "much " * 30)]


def make_example(question: str, answer: str, *media: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "text", "text": question}
    return {"messages": [{"role": "user", "content": [*media, text]},
                         {"role": "assistant", "content": [{"type": "text", "text": answer}]}]}  # fmt: skip


def make_table(examples: list[dict[str, Any]]) -> Dataset:
    """A table that reads as `load_data`'s do: Arrow holds numbers, the examples come by a transform."""
    table = Dataset.from_dict({"number": list(range(len(examples)))})
    return table.with_transform(lambda batch: {"messages": [examples[i]["messages"] for i in batch["number"]]})


def test_tokens_and_learned_tokens_are_those_of_the_batch(small_tokenizer: Any) -> None:
    examples = [make_example(*pair) for pair in PAIRS]
    batch = Collator(small_tokenizer)(examples)
    lengths = batch["attention_mask"].sum(1).tolist()
    learned = int((batch["labels"] != IGNORE).sum())
    column = audit_data(DatasetDict(train=make_table(examples)), small_tokenizer).table["train"]
    assert column["rows"] == "4"
    assert column["tokens a row, longest"] == str(max(lengths))
    assert column["tokens in all"] == str(sum(lengths))
    assert column["learned tokens"] == f"{learned / sum(lengths):.0%}"
    assert column["rows with a repeated prompt"] == "2"
    assert column["answers a row"] == "1"


def test_media_are_counted_by_kind_and_measured_with_their_soft_tokens(tiny_folder: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_folder)
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    examples = [make_example("What?", "grey", picture, picture), make_example("And?", "nothing")]
    column = audit_data(DatasetDict(train=make_table(examples)), processor).table["train"]
    assert column["image parts a row"] == "1"
    assert int(column["tokens a row, longest"]) == int(Collator(processor)(examples[:1])["attention_mask"].sum())


def test_limit_and_reasons_stand_in_table_and_figure(make_config: Any, small_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1?", "completion": str(i + 1)} for i in range(20)]
    rows += [{"prompt": "long", "completion": "much " * 300}, {"prompt": "empty", "completion": " "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "rows.jsonl")
    config = make_config({"data.path": path, "data.max_bad": 0.5, "data.test": 5, "model.max_length": 48})
    data = load_data(config, small_tokenizer, None, tmp_path / "quarantine.jsonl")
    run: Any = SimpleNamespace(path=tmp_path)
    audit = audit_data(data, small_tokenizer, config, run)
    assert list(audit.table.columns) == ["train", "test", "set aside"]
    aside = audit.table["set aside"]
    assert (aside["rows"], aside["set aside: too_long"], aside["set aside: empty_answer"]) == ("2", "1", "1")
    assert audit.table["train"]["longest, share of the limit"].endswith("of 48")
    lengths, fate = audit.figure.axes
    assert any("48" in str(line.get_label()) for line in lengths.get_lines())
    assert [label.get_text() for label in fate.get_yticklabels()][:2] == ["train", "test"]
    assert sum(bar.get_width() for bar in fate.patches) == len(rows)


def test_a_large_split_is_sampled_and_the_table_says_so(small_tokenizer: Any) -> None:
    examples = [make_example(f"{i} + 1?", str(i + 1)) for i in range(50)]
    table = make_table(examples)
    assert audit_data(DatasetDict(train=table), small_tokenizer, rows=10).table["train"]["rows"] == "50, 10 measured"


def test_a_notebook_gets_a_table_and_a_picture(small_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda value, **how: shown.append(value))
    audit = audit_data(DatasetDict(train=make_table([make_example(*PAIRS[0])])), small_tokenizer)
    audit._ipython_display_()
    assert shown[0] is audit.table and shown[1]["image/png"]
    assert "tokens a row" in repr(audit)
