"""The layer panel's widgets: controls, live totals, the strip of layers, the tree and the recipe. State is in the panel."""

import html
from typing import TYPE_CHECKING, Any

import ipywidgets

from .layer_controls import LayerControls
from .layer_rows import Rows
from .layer_strip import LayerStrip
from .style import STYLE
from .totals import Totals, describe_change, describe_totals
from .tree import build_tree
from .view import PANEL

if TYPE_CHECKING:
    from .layers import LayerPanel

ALL_WEIGHTS = "model.load_in: full trains every weight of the language model, so there are no layers to choose."


class LayerWidgets:
    """All widgets of one panel; `box` holds them. Every action ends in `refresh`, which shows what the state now is."""

    def __init__(self, panel: "LayerPanel") -> None:
        self.panel, self.selection = panel, panel.selection
        self.last: Totals | None = None
        self.controls = LayerControls(self.selection, panel.start, panel.cards, self.refresh)
        self.strip = LayerStrip(self.selection, self.refresh)
        self.rows = Rows(self.selection, self.refresh)
        self.totals, self.memory, self.change, self.problems, self.recipe = (ipywidgets.HTML() for _ in range(5))
        source = f"{panel.shapes.type}, sizes from {panel.shapes.source}"
        head = ipywidgets.HTML(f"{STYLE}<div class='fk-quiet'>{html.escape(source)}</div>")
        figures = [self.totals, self.memory, self.change, self.problems]
        if panel.all_weights:
            body = [head, ipywidgets.HTML(f"<div>{ALL_WEIGHTS}</div>"), *figures]
        else:
            body = [head, self.controls.box, *figures, *self.make_choices()]
        self.box = ipywidgets.VBox([*body, self.make_recipe_button(), self.recipe])
        self.box.add_class(PANEL)
        self.box.add_class("fk-panel")
        self.refresh()

    def make_choices(self) -> list[Any]:
        """Return the strip and the tree, each below its heading."""
        tree = ipywidgets.VBox(self.rows.add(build_tree(self.selection, self.panel.shapes), 0))
        tree.layout.max_height = "28em"  # so that the totals stay in sight while layers are chosen one by one
        tree.layout.overflow = "auto"
        headings = [ipywidgets.HTML(f"<h4>{text}</h4>") for text in ("Decoder layers", "What learns, and its rank")]
        return [headings[0], self.strip.box, headings[1], tree]

    def make_recipe_button(self) -> Any:
        """Return the button that shows and hides the recipe."""
        self.show_recipe = ipywidgets.ToggleButton(
            description="Show the recipe", tooltip="the settings that reproduce this choice without a panel"
        )
        self.show_recipe.observe(lambda _: self.write_recipe(), "value")
        return self.show_recipe

    def refresh(self) -> None:
        """Show the state everywhere, and what the last action changed."""
        self.panel.card = self.controls.card.value
        problems = self.panel.find_cheap_problems()
        self.problems.value = "".join(f"<div class='fk-warning'>Warning: {html.escape(p)}</div>" for p in problems)
        if problems:
            self.totals.value = self.memory.value = self.change.value = ""
        else:
            self.show_totals()  # first, because it is what people wait for
        self.strip.refresh()
        self.rows.refresh()
        self.controls.refresh()
        self.write_recipe()

    def show_totals(self) -> None:
        """Show what the choice costs, and the difference to the last one."""
        now, estimate = self.panel.count(self.panel.preview)
        change = describe_change(self.last or now, now)
        fits = now.memory <= self.panel.cards[self.panel.card]
        kind, start = ("fk-quiet", "") if fits else ("fk-warning", "Warning: ")
        self.totals.value = f"<div class='fk-totals' role='status'>{html.escape(describe_totals(now))}</div>"
        self.memory.value = f"<div class='{kind}'>{start}{html.escape(self.panel.describe_memory(estimate))}</div>"
        self.change.value = f"<div class='fk-quiet'>Last change: {change or 'none'}</div>"
        self.last = now

    def write_recipe(self) -> None:
        """Show the recipe when it was asked for and there is one."""
        asked = self.show_recipe.value and not self.problems.value
        self.recipe.value = f"<pre>{html.escape(self.panel.to_yaml())}</pre>" if asked else ""
