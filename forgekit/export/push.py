"""Upload to the Hub: only when `export.push` names a repository, only what was verified, with a token that is no setting."""

import os
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ExportError
from ..scrub import remove_tokens
from ..tokens import HUB, find_token


def check_push(config: Config) -> None:
    """Raise ExportError when an upload is wanted and could not be made, before anything is written."""
    if not config.export.push:
        return
    if find_token() is None:
        raise ExportError(
            f"export.push: {config.export.push} asks for an upload, and there is no token: the environment variable {HUB} is not set, Colab and "
            "Kaggle hold no such secret, and nobody is logged in (hf auth login). Set one that may write there; it is kept nowhere."
        )
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ExportError(
            f"export.push: {config.export.push} asks for an upload, and this process is offline (HF_HUB_OFFLINE is set). Unset it, or leave push empty."
        )


def name_repositories(exports: dict[str, Path], repository: str) -> dict[str, str]:
    """Return the repository of each format: the one named, or with several formats one each, with the folder's name behind."""
    if len(exports) == 1:
        return dict.fromkeys(exports, repository)
    return {name: f"{repository}-{path.stem}" for name, path in exports.items()}


def push_exports(exports: dict[str, Path], config: Config, api: Any = None) -> dict[str, str]:
    """Upload each verified export to a repository of its own, private when it is new; return format -> address.

    Args:
        api: a huggingface_hub.HfApi; None makes one with the token that `find_token` finds.

    Raises ExportError with what the Hub said; what was written here stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_push(config)
    token = find_token()
    api = api or HfApi(token=token and token.value)
    pushed = {}
    for name, repository in name_repositories(exports, config.export.push or "").items():
        path = exports[name]
        try:
            api.create_repo(repository, private=True, exist_ok=True)
            upload = api.upload_folder if path.is_dir() else api.upload_file
            where = (
                {"folder_path": str(path)}
                if path.is_dir()
                else {"path_or_fileobj": str(path), "path_in_repo": path.name}
            )
            upload(repo_id=repository, commit_message=f"{name} written and verified by forgekit", **where)
        except (HfHubHTTPError, OSError, ValueError) as error:
            said = remove_tokens(str(error).splitlines()[0]) if str(error) else type(error).__name__
            raise ExportError(
                f"export.push: {name} could not be uploaded to {repository}: {said.rstrip('.')}. What was written here stays; call export_model "
                "again with export.replace: true, or upload the folder with `hf upload`."
            ) from None
        pushed[name] = f"https://huggingface.co/{repository}"
        print(f"{name}: uploaded to {pushed[name]}")
    return pushed
