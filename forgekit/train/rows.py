"""Which tokens of a batch are computed where: padding nowhere, rows that teach nothing only below the shared layers.

    batch, 2 rows      . . p p p a a n     p = prompt, a = answer (learned), n = behind the answer, . = padding
                       p p a a p p a n
    tokens             p p p a a  p p a a p p a      lower layers: what is not padding and not behind the last answer
    kept               ^ of      ^ p a ...           upper layers: tokens whose next token is learned

All tokens stand in one line, row after row and in order, so padding costs nothing and a batch of mixed lengths is one length.
A query may look at the keys from `first` up to itself; both attention kinds and the row's limits are in that one number.
"""

from dataclasses import dataclass

import torch

IGNORE = -100
PARTS = 8  # sizes from one power of two to the next, where batches are to have few


@dataclass(frozen=True)
class Line:
    """The queries of one stage, and where they stand.

    index [Q]: places of the queries among the batch's tokens. row, place [Q]: row in the batch, place among the row's queries
    of this stage. counts [rows + 1]: queries of each row; the last entry counts the filling.
    """

    index: torch.Tensor
    row: torch.Tensor
    place: torch.Tensor
    counts: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Rows:
    """A batch's tokens in one line.

    flat [N]: row * columns + column of each token. positions [N]: its column. first {kind: [N]}: the first token of the line
    that it may look at. lower, upper: the queries of the two stages. targets [M]: what the kept tokens are to predict.
    filling: tokens of the line behind the batch's own. whole: no unmasked token stands between masked ones. suffix: the kept tokens
    of each row are its last ones.
    """

    batch: int
    columns: int
    flat: torch.Tensor
    positions: torch.Tensor
    first: dict[str, torch.Tensor]
    lower: Line
    upper: Line
    targets: torch.Tensor
    tokens: int
    learned: int
    filling: int
    whole: bool
    suffix: bool


def choose_rows(
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None,
    windows: dict[str, int | None],
    multiple: int = 1,
    coarse: int = 0,
) -> Rows | None:
    """Choose the tokens of each stage.

    Args:
        labels: int64 of [rows, columns], -100 where nothing is learned; token t predicts label t + 1.
        attention_mask: [rows, columns], 0 at padding.
        windows: attention kind -> keys that a query sees, itself included; None for all before it.
        multiple: both stages are filled up to a multiple of so many tokens, with tokens that nobody reads.
        coarse: lines of up to so many tokens have one of few sizes (`round_up`), filling included.

    Returns None when a masked token would have to predict something, where the library's result depends on its kernel.
    """
    batch, columns = labels.shape
    real = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    column = torch.arange(columns, device=labels.device)
    needed = torch.zeros_like(real)
    needed[:, :-1] = labels[:, 1:] != IGNORE
    last = torch.where(needed, column, -1).amax(1, keepdim=True)
    wanted = real & (column <= last)
    # a batch that teaches nothing still needs one token: the loss must hang on the weights
    spare = torch.where(real, column, columns).amin(1, keepdim=True)
    wanted |= real & (column == spare) & ~needed.any()
    kept = needed & real
    width, upper_width = wanted.sum(1), kept.sum(1)
    span = torch.where(real.any(1), columns - real.flip(1).int().argmax(1) - real.int().argmax(1), 0)
    first_kept = torch.where(kept, column, columns).amin(1)
    facts = [width.sum(), upper_width.sum(), (needed & ~real).sum(), (span != real.sum(1)).sum()]
    facts += [((last[:, 0] + 1 - first_kept).clamp(min=0) != upper_width).sum(), width.max(), upper_width.max()]
    # the one place where the CPU waits for the GPU
    tokens, learned, masked, holes, gaps, longest, longest_kept = torch.stack(facts).tolist()
    if masked or not tokens:
        return None

    kept_size, size = fill_up(tokens, max(learned, 1), multiple, PARTS)
    if size > coarse:
        kept_size, size = fill_up(tokens, max(learned, 1), multiple)
    flat, lower = line_up(wanted, width, tokens, size, longest)
    if not learned:  # one token stands for the kept ones, in its own row
        kept = torch.zeros_like(kept)
        kept.view(-1)[flat[0]] = True
        upper_width = kept.sum(1)
    in_line = torch.zeros(size, dtype=torch.bool, device=labels.device)
    in_line[:tokens] = kept.flatten()[flat[:tokens]]
    order = torch.argsort((~in_line).int(), stable=True)[:kept_size]
    upper = stand_in_rows(order, flat, columns, upper_width, max(learned, 1), longest_kept or 1)
    following = labels.flatten()[(flat[order] + 1).clamp(max=batch * columns - 1)]
    targets = torch.where(in_line[order], following, IGNORE) if learned else torch.full_like(following, IGNORE)
    return Rows(
        batch=batch,
        columns=columns,
        flat=flat,
        positions=flat % columns,
        first={kind: find_first(flat, columns, tokens, window) for kind, window in windows.items()},
        lower=lower,
        upper=upper,
        targets=targets,
        tokens=tokens,
        learned=learned,
        filling=size - tokens,
        whole=not holes,
        suffix=not (holes or gaps),
    )


def fill_up(tokens: int, learned: int, multiple: int, parts: int | None = None) -> tuple[int, int]:
    """Return the sizes of the kept tokens and of the whole line, in which the filling of the kept ones has its place, too.

    Eight parts add up to an eighth for each of the two, a quarter of the line at the worst; 7 % on batches of random lengths.
    """
    kept = round_up(learned, multiple, parts)
    return kept, round_up(tokens + kept - learned, multiple, parts)


def round_up(number: int, multiple: int, parts: int | None = None) -> int:
    """Return the next multiple; with `parts`, of a larger one if need be, so that so many lie between two powers of two."""
    if parts:
        multiple = max(multiple, (1 << (number.bit_length() - 1)) // parts)
    return -(-number // multiple) * multiple


def line_up(
    wanted: torch.Tensor, width: torch.Tensor, tokens: int, size: int, longest: int
) -> tuple[torch.Tensor, Line]:
    """Put the wanted tokens of [rows, columns] in one line of `size`, filled up with copies of the first."""
    order = torch.argsort((~wanted.flatten()).int(), stable=True)[:tokens]
    flat = torch.cat([order, order[:1].expand(size - tokens)])
    index = torch.arange(size, device=flat.device)
    return flat, stand_in_rows(index, flat, wanted.shape[1], width, tokens, longest)


def stand_in_rows(
    index: torch.Tensor, flat: torch.Tensor, columns: int, counts: torch.Tensor, size: int, longest: int
) -> Line:
    """Describe where queries stand; those behind the first `size` are filling and belong to a row of their own."""
    batch = counts.numel()
    place = torch.arange(index.numel(), device=index.device)
    row = torch.where(place < size, flat[index] // columns, batch)
    counts = torch.cat([counts, (index.numel() - counts.sum())[None]])
    start = counts.cumsum(0) - counts
    return Line(index, row, place - start[row], counts, longest)


def find_first(flat: torch.Tensor, columns: int, tokens: int, window: int | None) -> torch.Tensor:
    """Return for each token the first one of the line that it may look at; filling looks at itself alone.

    Columns are counted as the library counts them, padding included.
    """
    start = flat // columns * columns
    oldest = start if window is None else torch.maximum(start, flat - window + 1)
    first = torch.searchsorted(flat[:tokens].contiguous(), oldest)
    place = torch.arange(flat.numel(), device=flat.device)
    return torch.where(place < tokens, first, place)
