"""The job form as a person sees it: our environment, parameters, and the sentence that a misspelt one gets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forgekit.__main__ import main

from .conftest import SECONDS, Server, serve
from .pages import photographing

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def job_lab(tmp_path: Path, project_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """JupyterLab as `forgekit lab` starts it."""
    pytest.importorskip("jupyter_scheduler", reason="needs jupyter-scheduler: pip install forgekit[jobs]")
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter_data_dir"))
    folder = tmp_path / "work"
    assert main(["init", str(folder)]) == 0
    options = ["lab", "--no-browser", "--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with serve(folder, project_folder, "forgekit", *options) as server:
        yield server


def test_the_job_form_takes_settings_and_shows_what_is_wrong(job_lab: Server, browser: Any, pictures: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.set_default_timeout(SECONDS)
    with photographing(page, pictures / "job-failed.png"):
        page.goto(job_lab.find("/lab/tree/notebooks/01_text.ipynb") + "&reset")
        page.locator("jp-button[data-command='scheduling:create-from-notebook'], button[data-command='scheduling:create-from-notebook']").first.click()  # fmt: skip
        page.get_by_role("button", name="Add new parameter").wait_for()
        for number, (name, value) in enumerate((("train.max_steps", "60"), ("adapter.rr", "32"))):
            page.get_by_role("button", name="Add new parameter").click()
            page.locator(f"[name='parameter-{number}-name']").fill(name)
            page.locator(f"[name='parameter-{number}-value']").fill(value)
            page.locator(f"[name='parameter-{number}-value']").blur()  # its check moves the buttons below
            page.wait_for_timeout(300)
        page.screenshot(path=pictures / "job-form.png", full_page=True)
        form = page.locator("body").inner_text()
        assert "Settings, versions, scores and state" in form and "Metrics of each step" in form
        page.get_by_role("button", name="Create", exact=True).click()
        page.locator("td", has_text="Failed").wait_for()
        page.locator("td a", has_text="01_text").first.click()
        page.get_by_text("adapter.rr: no such parameter or setting. Did you mean adapter.r?").wait_for()
        page.screenshot(path=pictures / "job-detail.png", full_page=True)
    page.close()
