"""Scores on held-out rows: what the model answers, how many answers are right, and how probable the right ones are to it."""

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..data.collate import IGNORE, Collator
from ..data.messages import get_answer, get_text
from ..data.show import show_turn
from ..run_folder import write_json
from .generate import generate_answers, inference

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset


@dataclass(frozen=True)
class Scores:
    """The scores of one model on some rows.

    exact_match: share of rows answered exactly; loss: mean negative log-likelihood of the right answers in nats a token.
    """

    exact_match: float
    loss: float
    tokens: int  # learned tokens that the loss is a mean of
    seconds: float
    rows: list[dict[str, Any]] = field(repr=False)  # question, reference, prediction, right

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, asdict(self))


def evaluate_model(model: Any, processor: Any, dataset: "Dataset", config: Config, path: Path | None = None) -> Scores:
    """Answer held-out rows greedily and score them, `evaluate.rows` of them at most.

    Args:
        dataset: rows that read as {"messages": [...]}; the last assistant turn is the reference.
        path: where the scores and every answer are written, for instance run.path / "metrics/baseline.json".

    Returns Scores, in the order of the rows.
    """
    started = time.monotonic()
    wanted = len(dataset) if config.evaluate.rows is None else min(config.evaluate.rows, len(dataset))
    chats = [example["messages"] for example in dataset.select(range(wanted))]
    loss, tokens = measure_loss(model, processor, chats, config.evaluate.per_device_eval_batch_size)
    predictions = answer_rows(model, processor, chats, config)
    rows: list[dict[str, Any]] = [
        {
            "question": get_text(chat[-2]),
            "reference": get_answer(chat),
            "prediction": answer,
            "right": answer == get_answer(chat),
        }
        for chat, answer in zip(chats, predictions, strict=True)
    ]
    right = sum(row["right"] for row in rows)
    scores = Scores(right / len(rows), loss, tokens, time.monotonic() - started, rows)
    if path:
        scores.save(path)
    return scores


def answer_rows(model: Any, processor: Any, chats: list[Any], config: Config) -> list[str]:
    """Answer every chat, those of similar length together, with at most ten lines of progress.

    The lines depend on the rows and not on the clock, so a notebook prints the same ones on every machine.
    """
    order = sorted(range(len(chats)), key=lambda i: len(str(chats[i])))
    size = config.evaluate.per_device_eval_batch_size
    answers = [""] * len(chats)
    shown = 0
    for start in range(0, len(order), size):
        some = order[start : start + size]
        for i, answer in zip(
            some,
            generate_answers(model, processor, [chats[i] for i in some], config.evaluate.max_new_tokens),
            strict=True,
        ):
            answers[i] = answer
        done = start + len(some)
        if done - shown >= len(chats) / 10 and done < len(chats):
            print(f"Answered {done} of {len(chats)} rows", flush=True)
            shown = done
    return answers


def measure_loss(model: Any, processor: Any, chats: list[Any], batch_size: int) -> tuple[float, int]:
    """Return the mean loss in nats over all learned tokens of the chats, computed in float32, and the number of tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    collate, total, count = Collator(processor), 0.0, 0
    for start in range(0, len(chats), batch_size):
        batch = collate([{"messages": chat} for chat in chats[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:].to(model.device)
        with inference(model), autocast(model):
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits[
                :, :-1
            ]
            chosen = labels != IGNORE
            total += float(cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum"))
        count += int(torch.count_nonzero(chosen))
    return total / count, count


def autocast(model: Any) -> Any:
    """Return autocast to the model's half precision on a GPU, as training has it; elsewhere a context that does nothing."""
    import torch

    half = model.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast("cuda", model.dtype) if model.device.type == "cuda" and half else contextlib.nullcontext()


def compare_scores(before: Scores, after: Scores) -> "pandas.DataFrame":
    """Return a table of both scores and their difference. Exact match in percent, loss in nats a token."""
    import pandas

    from ..table import Table

    rows = {
        "exact match, %": (100 * before.exact_match, 100 * after.exact_match),
        "loss, nats a token": (before.loss, after.loss),
        "rows": (len(before.rows), len(after.rows)),
    }
    table = pandas.DataFrame(rows, index=["before", "after"]).T
    table["change"] = table["after"] - table["before"]
    return Table(table.round(3))


def show_answers(
    before: Scores, after: Scores, number: int = 5, dataset: "Dataset | None" = None
) -> "pandas.DataFrame":
    """Return the first rows as a table: question, right answer, answer before, answer after, and whether it is right now.

    Args:
        dataset: the rows that were scored; with it the question is shown whole, with its pictures and players.
    """
    from ..table import Table

    number = min(number, len(after.rows))
    questions: list[Any] = [row["question"] for row in after.rows[:number]]
    if dataset is not None:
        questions = [show_turn(dataset[i]["messages"][-2]) for i in range(number)]
    rows = [
        {
            "question": question,
            "right answer": a["reference"],
            "before": b["prediction"],
            "after": a["prediction"],
            "right": "yes" if a["right"] else "no",
        }
        for question, b, a in zip(questions, before.rows[:number], after.rows[:number], strict=True)
    ]
    return Table(rows)
