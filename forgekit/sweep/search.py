"""Points drawn by Optuna: TPE learns which values do well, successive halving (ASHA) says which runs are too weak.

The study is an SQLite file in the sweep's folder, so a sweep that was broken off goes on with the same points.
"""

import json
import math
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..run_folder import DONE
from .plan import Plan, read_state
from .points import Point

STORAGE, DEFINITION = "search.db", "definition"


class OptunaSearch:
    """A source of points that asks Optuna for each, and tells it how the run went."""

    def __init__(self, plan: Plan, folder: Path):
        """Open the sweep's study, or begin it. Raises ConfigError without Optuna, or for a study of another space."""
        assert plan.sweep.search is not None
        self.optuna = import_optuna()
        self.plan, self.search = plan, plan.sweep.search
        folder.mkdir(parents=True, exist_ok=True)
        self.study = self.open_study(folder / STORAGE)
        self.before = self.list_trials()  # of a sweep that was broken off, or of one that came to its end
        self.check_same()
        self.weak = {self.name(t.number) for t in self.before if t.state == self.optuna.trial.TrialState.PRUNED}
        self.open: dict[str, Any] = {}

    def open_study(self, file: Path) -> Any:
        """Return the study in this file."""
        optuna, search = self.optuna, self.search
        prune, seed = search.prune, search.seed
        pruner = optuna.pruners.NopPruner()
        if prune:
            pruner = optuna.pruners.SuccessiveHalvingPruner(
                min_resource=prune.first_step, reduction_factor=prune.reduction
            )
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{file}",
            study_name=self.plan.sweep.name,
            direction="maximize" if self.plan.maximize else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
        # with the seed alone a sampler that begins anew would draw the first points once more
        study.sampler = optuna.samplers.TPESampler(
            seed=(seed + len(study.get_trials(deepcopy=False))) % 2**32, n_startup_trials=search.first_draws
        )
        return study

    def list_trials(self) -> list[Any]:
        """Return all trials of the study, in their order."""
        return self.study.get_trials(deepcopy=False)

    def check_same(self) -> None:
        """Raise ConfigError when the study, or one of its completed runs, was made from another file than this one."""
        self.check_space()
        now = self.describe()
        made = self.study.user_attrs.get(DEFINITION)
        if made is None:
            self.study.set_user_attr(DEFINITION, now)
            made = now
        changed = [name for name in now if made.get(name) != now[name]]
        problems = [f"{name} was {json.dumps(made.get(name))}, and is {json.dumps(now[name])} now" for name in changed]
        try:
            # a sweep that was killed while it drew leaves a trial without all of its values
            drawn = [trial for trial in self.before if set(self.search.space) <= set(trial.params)]
            points = [self.make_point(trial) for trial in drawn] if not changed else []
        except ValueError as error:  # Optuna's: a value that was drawn does not lie in the space
            points, problems = [], [str(error)]
        for point in points:
            if read_state(self.plan.root / point.name) == DONE:
                problems += [f"run {point.name}: {words}" for words in self.plan.check_same(point)]
        if problems:
            raise ConfigError(
                f"the search {self.plan.sweep.name!r} has begun with other settings: {'; '.join(problems)}. "
                "Give the sweep another name."
            )

    def describe(self) -> dict[str, Any]:
        """Return what all trials of a study have in common; how many there are, and which end early, may change."""
        sweep = self.plan.sweep
        space = {name: {place.kind: place.values} for name, place in self.search.space.items()}
        found = {"notebook": sweep.notebook, "recipe": sweep.recipe, "settings": sweep.settings, "space": space}
        # as it comes back from the study's file
        return json.loads(json.dumps(found | {"score": self.plan.score, "maximize": self.plan.maximize}, default=str))

    def check_space(self) -> None:
        """Raise ConfigError when the study has learned from other settings or in the other direction."""
        direction = "maximize" if self.plan.maximize else "minimize"
        names = {name for trial in self.list_trials() for name in trial.params}
        if self.study.direction.name.lower() != direction or (names and names != set(self.search.space)):
            raise ConfigError(
                f"the search {self.plan.sweep.name!r} was begun with {', '.join(sorted(names)) or 'another direction'} "
                f"({self.study.direction.name.lower()}), and now asks for {', '.join(self.search.space)} ({direction}). "
                "Give the sweep another name."
            )

    def name(self, number: int) -> str:
        """Return the name of a trial's run."""
        return f"{self.plan.sweep.name}-{number:03d}"

    def take(self) -> Point | None:
        """Return the earlier trials in their order, then new ones, up to the number that was asked for."""
        if self.before:
            trial = self.before.pop(0)
            if trial.state == self.optuna.trial.TrialState.RUNNING:
                # nobody has told its end; the constructor is the only way back to a trial of the storage
                trial = self.optuna.trial.Trial(self.study, trial._trial_id)
                self.open[self.name(trial.number)] = trial
        elif len(self.list_trials()) < self.search.runs:
            trial = self.study.ask()
            self.open[self.name(trial.number)] = trial
        else:
            return None
        return self.make_point(trial)

    def make_point(self, trial: Any) -> Point:
        """Return a trial's point. Raises ValueError when it was drawn from another space."""
        return Point(
            self.name(trial.number), {name: place.ask(name, trial) for name, place in self.search.space.items()}
        )

    def left(self) -> bool:
        """Say whether there are earlier trials to take up, or new ones to draw."""
        return bool(self.before) or len(self.list_trials()) < self.search.runs

    def pruned(self, name: str) -> bool:
        """Say whether a run was ended early."""
        return name in self.weak

    def report(self, name: str, step: int, value: float) -> bool:
        """Note a loss; say whether others did better at that step. Where more of the score is better, so is less loss."""
        trial = self.open.get(name)
        if trial is None or self.search.prune is None:
            return False
        trial.report(-value if self.plan.maximize else value, step)
        return trial.should_prune()

    def close(self, name: str, score: float | None, pruned: bool) -> None:
        """Tell the study how a trial ended."""
        trial = self.open.pop(name, None)
        if trial is None:
            return
        state = self.optuna.trial.TrialState
        if pruned:
            self.weak.add(name)
            self.study.tell(trial, state=state.PRUNED)
        elif score is None or not math.isfinite(score):
            self.study.tell(trial, state=state.FAIL)
        else:
            self.study.tell(trial, score)


def import_optuna() -> Any:
    """Return Optuna. Raises ConfigError with the line that installs it."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "`search:` needs Optuna: pip install 'forgekit[search]'. grid, list and random do without."
        ) from None
    return optuna
