"""Scoring with what training has: the loss of held-out rows by the fast path, where `train.fast` allows it.

evaluate/   answers, metrics, intervals; the loss by the model's own forward
here        the same functions, their losses computed on labelled rows alone: same numbers, fewer products, no logits
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..config import Config
from ..evaluate import baseline, scores
from ..evaluate.loss import RowLosses, sum_losses

if TYPE_CHECKING:
    from .fast_path import FastPath

Function = TypeVar("Function", bound=Callable[..., Any])


def with_fast_losses(function: Function) -> Function:
    """Return a scoring function of (model, processor, rows, config, ...) that computes losses by the fast path."""

    @functools.wraps(function)
    def score(model: Any, processor: Any, dataset: Any, config: Config, *args: Any, **named: Any) -> Any:
        with open_losses(model, config) as losses:
            return function(model, processor, dataset, config, *args, **{"losses": losses, **named})

    return cast(Function, score)


evaluate_model = with_fast_losses(scores.evaluate_model)
score_baseline = with_fast_losses(baseline.score_baseline)
check_regression = with_fast_losses(baseline.check_regression)


@contextlib.contextmanager
def open_losses(model: Any, config: Config) -> Iterator[RowLosses]:
    """Yield the way to the losses of rows: by the fast path while it is on, or can be, else by the model's own forward."""
    from .fast_path import disable_fast_path, enable_fast_path, find_obstacle, get_fast_path, unwrap

    path = get_fast_path(model)
    if path is not None:
        yield functools.partial(sum_losses_fast, path)
    elif config.train.fast == "off" or find_obstacle(unwrap(model)):
        yield sum_losses
    else:
        path = enable_fast_path(model, memory="high")
        try:
            yield functools.partial(sum_losses_fast, path) if path else sum_losses
        finally:
            disable_fast_path(model)


def sum_losses_fast(path: "FastPath", model: Any, batch: dict[str, Any]) -> Any:
    """Return the summed loss of each row, as `sum_losses` does; no logit of a row without a label is computed."""
    import torch

    from .row_skip import run_model
    from .rows import choose_rows

    values = {name: tensor.to(model.device) for name, tensor in batch.items()}
    rows = choose_rows(values["labels"], values.get("attention_mask"), path.windows)
    if rows is None:
        return sum_losses(model, batch)
    tokens = run_model(path, values, rows, statistics=False).loss[: rows.learned]
    sums = torch.zeros(rows.batch, device=tokens.device)
    return sums.index_add(0, rows.upper.row[: rows.learned], tokens.float())
