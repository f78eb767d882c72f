"""Files that a person attached with ipywidgets' FileUpload, as parts of a turn."""

import mimetypes
from collections.abc import Mapping
from typing import Any

from ..data.clean import BadRow
from ..data.parts import KINDS


def read_uploads(value: Any) -> list[dict[str, Any]]:
    """Return the parts of a FileUpload's value. Raises BadRow for a file that is no picture, sound or film.

    ipywidgets 7   {"cat.png": {"metadata": {"name": ..., "type": "image/png", ...}, "content": bytes}}
    ipywidgets 8   ({"name": "cat.png", "type": "image/png", "content": memoryview, ...},)
    after          [{"type": "image", "image": bytes}]
    """
    if isinstance(value, Mapping):
        files = [{**file["metadata"], "content": file["content"]} for file in value.values()]
    else:
        files = list(value)
    return [make_part(file["name"], file["type"], bytes(file["content"])) for file in files]


def make_part(name: str, media_type: str, content: bytes) -> dict[str, Any]:
    """Return one file as a part; a browser that knows no type for it leaves that to the file's name."""
    kind = (media_type or mimetypes.guess_type(name)[0] or "").split("/")[0]
    if kind == "text" or kind not in KINDS:
        raise BadRow(
            "unknown_part", f"{name} is {media_type or 'of no known type'}; attach a picture, a sound or a film."
        )
    return {"type": kind, kind: content}
