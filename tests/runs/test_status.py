"""status.json has every name that other programs look for, from the beginning, and never says that a dead run runs."""

from pathlib import Path

from forgekit.files import read_json, write_json
from forgekit.runs.status import close_status, open_status

NAMES = (
    "running step total_steps epoch total_epochs loss learning_rate eta_seconds started_at checkpoint_at error".split()
)


def test_a_run_that_begins_replaces_the_file_of_an_earlier_one_in_both_places(tmp_path: Path) -> None:
    places = [tmp_path / "status.json", tmp_path / ".factory" / "training-status.json"]
    write_json(places[1], {"running": False, "step": 900})
    open_status(places)
    for place in places:
        status = read_json(place)
        assert list(status) == NAMES
        assert (status["running"], status["step"], status["error"]) == (True, 0, None) and status["started_at"]


def test_a_killed_run_no_longer_runs_and_keeps_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_json(file, {"running": True, "step": 7, "loss": 1.5, "error": None})
    close_status([file, tmp_path / "taken-away.json"], "The run crashed.")
    assert read_json(file) == {"running": False, "step": 7, "loss": 1.5, "error": "The run crashed."}
    assert not (tmp_path / "taken-away.json").exists()


def test_what_training_wrote_at_its_end_stays(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    for error in (None, "ValueError: x"):
        write_json(file, {"running": False, "step": 60, "error": error})
        before = file.read_bytes()
        close_status([file], None if error is None else "The run failed.")
        assert file.read_bytes() == before
