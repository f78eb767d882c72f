"""Everything that `export.formats` names, written into the run's folder."""

from pathlib import Path
from typing import Any

from ..config import Config
from ..run_folder import Run, share_files, shorten_path
from .adapter import export_adapter
from .merged import export_merged

# format -> (folder below the run, function that writes it)
FORMATS = {"adapter": ("models/lora", export_adapter), "merged": ("models/merged", export_merged)}


def export_model(
    model: Any, processor: Any, config: Config, run: Run, scores: dict[str, Any] | None = None
) -> dict[str, Path]:
    """Write each format of `export.formats` and note it in run.json.

    Args:
        scores: figures for the model card, name -> value.

    Returns the folder of each format. Raises ExportError; formats written before stay.
    """
    written: dict[str, Path] = {}
    for name in config.export.formats:
        place, write = FORMATS[name]
        written[name] = write(model, processor, config, run.path / place, scores)
        share_files(written[name])
        size = sum(file.stat().st_size for file in written[name].rglob("*") if file.is_file())
        print(f"{name}: {shorten_path(written[name])} ({size / 1e6:.1f} MB)")
        run.update(exports={name: str(path.relative_to(run.path)) for name, path in written.items()})
    return written
