"""Uploads: only with the flag, only what was verified, the token of no setting and kept nowhere."""

import logging
from pathlib import Path
from typing import Any

import pytest

from forgekit import export_model, start_run
from forgekit.errors import ExportError
from forgekit.export import model as module
from forgekit.export.push import name_repositories, push_exports

TOKEN = "hf_secret_of_this_test"  # shorter than a real one: removed because it is the variable's value


class Hub:
    """A stand-in for huggingface_hub.HfApi: remembers what would have been sent."""

    def __init__(self, token: str | None = None, error: Exception | None = None):
        self.token, self.error = token, error
        self.repositories: list[tuple[str, dict[str, Any]]] = []
        self.uploads: list[dict[str, Any]] = []

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        self.repositories.append((repo_id, settings))

    def upload_folder(self, **settings: Any) -> None:
        if self.error:
            raise self.error
        self.uploads.append(settings | {"files": sorted(file.name for file in Path(settings["folder_path"]).iterdir())})

    def upload_file(self, **settings: Any) -> None:
        self.uploads.append(settings)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"x")
    return tmp_path / "lora"


def test_a_folder_is_uploaded_to_a_private_repository(make_config: Any, folder: Path, online: None) -> None:
    hub = Hub()
    pushed = push_exports({"adapter": folder}, make_config({"export.push": "me/orders"}), hub)
    assert pushed == {"adapter": "https://huggingface.co/me/orders"}
    assert hub.repositories == [("me/orders", {"private": True, "exist_ok": True})]
    (upload,) = hub.uploads
    assert upload["repo_id"] == "me/orders" and upload["files"] == ["adapter_model.safetensors"]


def test_the_token_comes_from_the_environment(
    make_config: Any, folder: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    made: list[Hub] = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: made.append(Hub(token)) or made[-1])
    push_exports({"adapter": folder}, make_config({"export.push": "me/orders"}))
    assert [hub.token for hub in made] == [TOKEN]


def test_several_formats_have_a_repository_each(tmp_path: Path) -> None:
    exports = {"adapter": tmp_path / "lora", "merged": tmp_path / "merged", "gguf": tmp_path / "model-Q8_0.gguf"}
    names = {"adapter": "me/a-lora", "merged": "me/a-merged", "gguf": "me/a-model-Q8_0"}
    assert name_repositories(exports, "me/a") == names


def test_a_whole_export_leaves_the_token_nowhere(
    make_learned: Any, online: None, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: Hub(token))
    caplog.set_level(logging.DEBUG)
    model, processor, config = make_learned({"export.push": "me/orders"})
    run = start_run(config, "pushed")
    export_model(model, processor, config, run)
    assert run.record["pushed"] == {"adapter": "https://huggingface.co/me/orders"}
    out, err = capfd.readouterr()
    assert "adapter: uploaded to https://huggingface.co/me/orders" in out
    assert TOKEN not in out + err + caplog.text
    for file in run.path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


def test_only_what_was_verified_is_uploaded(make_learned: Any, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(module, "push_exports", lambda exports, config: given.append(exports) or {})
    real = module.FORMATS["adapter"]
    spoilt = real._replace(verify=lambda *arguments: module.Verdict((), 1, 1))
    monkeypatch.setitem(module.FORMATS, "adapter", spoilt)
    model, processor, config = make_learned({"export.push": "me/orders", "export.formats": ["adapter", "merged"]})
    written = export_model(model, processor, config, start_run(config, "half"))
    assert given == [{"merged": written["merged"]}]


def test_without_a_token_nothing_is_begun(make_learned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    model, processor, config = make_learned({"export.push": "me/orders"})
    run = start_run(config, "no-token")
    with pytest.raises(ExportError, match="environment variable HF_TOKEN is not set"):
        export_model(model, processor, config, run)
    assert not (run.path / "models").exists()


def test_offline_it_is_refused(make_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ExportError, match="this process is offline"):
        push_exports({"adapter": folder}, make_config({"export.push": "me/orders"}), Hub())


def test_what_the_hub_says_is_told_without_the_token(make_config: Any, folder: Path, online: None) -> None:
    hub = Hub(error=OSError(f"403 for {TOKEN}\nmore"))
    with pytest.raises(ExportError) as caught:
        push_exports({"adapter": folder}, make_config({"export.push": "me/orders"}), hub)
    message = str(caught.value)
    assert "adapter could not be uploaded to me/orders: 403 for (token removed)." in message and TOKEN not in message
    assert caught.value.__cause__ is None and "What was written here stays" in message
