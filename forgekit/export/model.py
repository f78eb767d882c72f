"""Everything that `export.formats` names: written beside its place, read back, compared, then put into the run's folder."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..evaluate.gates import check_gates
from ..faults import strike
from ..run_folder import Run, shorten_path
from .api import write_api
from .card import update_gates, write_card
from .checks import check_export
from .compare import Reference
from .formats import FORMATS
from .place import UNVERIFIED, check_absent, drafted, is_file, place_unverified, remove_export, settle
from .push import check_push, push_exports
from .verdict import Verdict

if TYPE_CHECKING:
    from datasets import Dataset


def export_model(
    model: Any,
    processor: Any,
    config: Config,
    run: Run,
    scores: dict[str, Any] | None = None,
    dataset: "Dataset | None" = None,
) -> dict[str, Path]:
    """Write each format of `export.formats`, verify it, and note it in run.json; the gates, judged then, go into the cards.

    Args:
        scores: figures for the model card, name -> value; the run's own score files are read in any case.
        dataset: held-out rows that the verification compares on; None: a few chats in words.

    Returns the folder or file of each format. One that is not the trained model stands under models/unverified/, and
    the printed line and run.json say so. With `export.push` the verified ones are uploaded.

    Raises ExportError before anything is written: nothing learned, another base, another vocabulary, an export that is
    there already, too little disk. Formats written before stay.
    """
    check_push(config)
    check_export(model, processor, config)
    targets = {name: run.path / FORMATS[name].place for name in config.export.formats}
    for target in targets.values():
        check_absent(target, config.export.replace)
    reference = Reference(model, processor, dataset)
    written: dict[str, Path] = {}
    verdicts: dict[str, Verdict] = {}
    for name, target in targets.items():
        with drafted(target) as draft:
            FORMATS[name].write(model, processor, config, draft, scores)
            verdicts[name] = verdict = FORMATS[name].verify(reference, draft, config)
            verdict.save(draft)
            describe_export(draft, name, target, config, run, scores, verdict)
            strike("export")
            written[name] = put(draft, target, run.path / "models", verdict)
        print(
            f"{name}: {shorten_path(written[name])} ({measure_size(written[name]) / 1e6:.1f} MB), {verdict.describe()}"
        )
        note_exports(run, written, verdicts)
    if check_gates(run).verdicts:
        for card in {find_card(path) for path in written.values()}:
            update_gates(card, run)
    if config.export.push:
        pushed = push_exports({name: written[name] for name in written if verdicts[name].verified}, config)
        run.update(pushed=pushed)
    return written


def describe_export(
    draft: Path, name: str, target: Path, config: Config, run: Run, scores: dict[str, Any] | None, verdict: Verdict
) -> None:
    """Write the model card beside the weights and, for a whole model, the description of its web interface."""
    if is_file(target):  # several files share one folder, whose card its own format writes
        return
    write_card(draft, config, name, scores, run=run, verdict=verdict, place=target)
    if name != "adapter":
        write_api(draft / "openapi.json", config, run.path.name)


def find_card(path: Path) -> Path:
    """Return where the model card of an export stands."""
    return (path.parent if is_file(path) else path) / "README.md"


def put(draft: Path, target: Path, models: Path, verdict: Verdict) -> Path:
    """Move a draft to its place, or under models/unverified/ when a bound did not hold; an older one goes only then."""
    unverified = place_unverified(target, models)
    if unverified.exists():
        remove_export(unverified)
        with contextlib.suppress(OSError):  # others may stand there
            (models / UNVERIFIED).rmdir()
    return settle(draft, target if verdict.verified else unverified)


def note_exports(run: Run, written: dict[str, Path], verdicts: dict[str, Verdict]) -> None:
    """Put places and verdicts into run.json; formats of an earlier call stay named as long as their files do."""
    before = {name: place for name, place in run.record.get("exports", {}).items() if (run.path / place).exists()}
    exports = before | {name: str(path.relative_to(run.path)) for name, path in written.items()}
    verified = run.record.get("verified", {}) | {name: verdict.verified for name, verdict in verdicts.items()}
    run.update(exports=exports, verified={name: verified[name] for name in exports if name in verified})


def measure_size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
