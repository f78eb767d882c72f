"""The layer panel: choose what learns by clicks or keys, and see what that means before paying for it."""

from pathlib import Path
from typing import Any

from ..adapter.memory import MemoryEstimate
from ..adapter.plan import LayerPlan, find_shapes, plan_layers, weight_bytes
from ..config import Config
from ..errors import ConfigError
from ..files import write_text
from .memory import describe_memory, find_cards, predict_memory
from .preview import measure_fixed, preview_plan
from .selection import make_selection
from .totals import Totals, count_totals, describe_change, describe_totals
from .view import make_bundle
from .write import change_config, write_recipe


class LayerPanel:
    """Shows which layers a config trains, and lets a person choose others; `panel.config` is the config with that choice.

    Shown as the last line of a cell it is a panel of widgets, elsewhere a table. Nothing waits for it: untouched,
    `panel.config` is the given config.

    Args:
        model: a loaded model, a transformers config, `Shapes`, or None: the config of `model.id`, without weights.

    Raises ModelError when the model's config cannot be read.
    """

    def __init__(self, config: Config, model: Any = None) -> None:
        self.given = config
        self.shapes = find_shapes(config, model)
        self.full_bytes = weight_bytes(config)
        self.selection = make_selection(config, self.shapes, self.full_bytes)
        self.start = self.selection.copy()
        self.fixed = measure_fixed(config, self.shapes, self.selection, self.full_bytes)
        self.cards = find_cards()
        self.card = next(iter(self.cards))  # that the predicted memory is compared with
        self._made: tuple[Any, Config] | None = None
        self._planned: tuple[Config, LayerPlan] | None = None
        self._widget: Any = None

    @property
    def all_weights(self) -> bool:
        """Whether the whole language model learns (model.load_in: full), so that there is nothing to choose."""
        return self.given.model.load_in == "full"

    @property
    def touched(self) -> bool:
        """Whether anything else is chosen than the given config chooses."""
        return self.selection.key() != self.start.key()

    @property
    def config(self) -> Config:
        """The config with what is chosen here, origin "panel". Raises ConfigError when nothing is chosen."""
        if not self.touched:
            return self.given
        key = self.selection.key()
        if self._made is None or self._made[0] != key:
            self._made = key, change_config(self.given, self.selection, self.shapes)
        return self._made[1]

    @property
    def plan(self) -> LayerPlan:
        """Exactly which modules learn. Raises ConfigError for a choice that cannot learn."""
        config = self.config
        if self._planned is None or self._planned[0] is not config:
            self._planned = config, plan_layers(config, self.shapes)
        return self._planned[1]

    @property
    def preview(self) -> LayerPlan:
        """The same plan without its notes, fast enough for every click."""
        if self.given.adapter.bias != "none" or self.all_weights:
            return self.plan  # biases follow the modules by rules of PEFT's, which the plan knows
        return preview_plan(self.selection, self.fixed)

    def count(self, plan: LayerPlan) -> tuple[Totals, MemoryEstimate]:
        """Return what a plan costs: modules, parameters, file and predicted memory."""
        estimate = predict_memory(plan, self.given, self.shapes)
        return count_totals(plan, estimate.total), estimate

    def describe_memory(self, estimate: MemoryEstimate) -> str:
        """Return one line on the predicted memory against the chosen card."""
        return describe_memory(estimate, self.card, self.cards[self.card])

    def find_problems(self) -> list[str]:
        """Return why the present choice cannot learn, one sentence each."""
        try:
            self.plan  # noqa: B018
        except ConfigError as error:
            return error.problems
        return []

    def find_cheap_problems(self) -> list[str]:
        """Return the same after a click: candidates can all learn, so a plan is asked only where no adapter is chosen."""
        adapted = any(not self.selection.candidates[name].whole for name in self.selection.chosen)
        return [] if self.touched and adapted else self.find_problems()

    def to_yaml(self, path: str | Path | None = None) -> "RecipeText":
        """Return the recipe that reproduces this choice headless, and save it when a path is given.

        Save it beside the recipe that it came from, so that relative names of data files keep their meaning.
        """
        source = " + ".join(Path(recipe).name for recipe in self.given.recipes.split(" + ")) or "settings"
        comment = f"Written by forgekit's layer panel from {source}.\n{describe_totals(self.count(self.preview)[0])}."
        text = RecipeText(write_recipe(self.config, comment))
        if path is not None:
            write_text(Path(path), text)
        return text

    @property
    def widget(self) -> Any:
        """The widgets, made when they are first shown."""
        if self._widget is None:
            from .layer_widgets import LayerWidgets

            self._widget = LayerWidgets(self)
        return self._widget.box

    def __repr__(self) -> str:
        problems = self.find_problems()
        if problems:
            return "\n".join(f"Warning: {problem}" for problem in problems)
        totals, estimate = self.count(self.plan)
        lines = [repr(self.plan), describe_totals(totals), self.describe_memory(estimate)]
        if self.touched:
            change = describe_change(self.count(preview_plan(self.start, self.fixed))[0], totals)
            lines.append(f"Changed in the panel: {change or 'settings with the same totals'}")
        return "\n".join(lines)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        page = None if self.find_problems() else self.plan._repr_html_()
        return make_bundle(lambda: self.widget, repr(self), page)


class RecipeText(str):
    """The text of a recipe, shown in a notebook line by line."""

    def __repr__(self) -> str:
        return str(self)
