"""An export is not done until it was read back and compared with the trained model in memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Config
from ..errors import ExportError
from .compare import Reference
from .formats import FORMATS, find_format
from .verdict import Verdict

if TYPE_CHECKING:
    from datasets import Dataset


def verify_export(model: Any, processor: Any, folder: Path | str, dataset: "Dataset | None", config: Config) -> Verdict:
    """Read an export back, compare it with the trained model on held-out rows, and write verify.json.

    Args:
        model, processor: as trained, in memory.
        folder: what export_model returned for one format: models/lora, models/merged or a .gguf file.
        dataset: rows that read as {"messages": [...]}, of which the first are compared; None: a few chats in words.

    Returns the Verdict: each figure with its bound. Raises ExportError when the folder is no export.
    """
    path = Path(folder)
    name = find_format(path) if path.exists() else None
    if name is None:
        raise ExportError(f"{path} is no export: it holds neither an adapter nor a model ({', '.join(FORMATS)}).")
    verdict = FORMATS[name].verify(Reference(model, processor, dataset), path, config)
    verdict.save(path)
    return verdict
