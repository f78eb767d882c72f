"""The panel's upper lines: buttons of the presets, the common rank and scale, the graphics card."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets

from .presets import PRESETS, apply_preset, find_members
from .selection import Selection

WRAP = {"flex_flow": "row wrap", "align_items": "center"}


class LayerControls:
    """Buttons and fields that change the selection as a whole; each calls `changed` afterwards."""

    def __init__(
        self, selection: Selection, start: Selection, cards: Iterable[str], changed: Callable[[], None]
    ) -> None:
        self.selection, self.start, self.changed, self.refreshing = selection, start, changed, False
        layers = max(1, len(selection.by_layer))
        self.number = ipywidgets.BoundedIntText(min(8, layers), min=1, max=layers, description="n")
        self.number.layout.width, self.number.style.description_width = "7em", "1.5em"
        self.r = ipywidgets.BoundedIntText(selection.r, min=1, max=1024, description="r")
        self.alpha = ipywidgets.BoundedFloatText(
            selection.lora_alpha, min=0.001, max=1e6, step=1, description="lora_alpha"
        )
        self.r.layout.width, self.r.style.description_width = "7em", "1.5em"
        self.alpha.layout.width, self.alpha.style.description_width = "11em", "5.5em"
        for field in (self.r, self.alpha):
            field.observe(self.read_common, "value")
        self.card = ipywidgets.Dropdown(options=[*cards], description="graphics card")
        self.card.layout.width, self.card.style.description_width = "22em", "7em"
        self.card.observe(lambda _: self.changed(), "value")
        lines = (self.make_buttons(), [self.r, self.alpha, self.card])
        self.box = ipywidgets.VBox([ipywidgets.Box(line, layout=ipywidgets.Layout(**WRAP)) for line in lines])

    def make_buttons(self) -> list[Any]:
        """Return a button for each preset, off where the model has nothing of it, and the way back."""
        buttons = []
        for key, preset in PRESETS.items():
            button = self.make_button(preset.label, preset.help, functools.partial(self.apply, key))
            button.disabled = not find_members(preset, self.selection, 1)
            buttons += [button, self.number] if preset.last else [button]
        return [*buttons, self.make_button("As given", "back to what the settings say", self.restore)]

    def make_button(self, label: str, help: str, act: Callable[[], None]) -> Any:
        """Return a button as wide as its label."""
        button = ipywidgets.Button(description=label, tooltip=help, layout=ipywidgets.Layout(width="auto"))
        button.on_click(lambda _: act())
        return button

    def apply(self, key: str) -> None:
        """Put a preset in place of the present choice."""
        apply_preset(key, self.selection, self.number.value)
        self.changed()

    def restore(self) -> None:
        """Go back to what the given config chooses."""
        self.selection.restore(self.start)
        self.changed()

    def read_common(self, _: Any) -> None:
        """Take over the common rank and scale."""
        if not self.refreshing:
            self.selection.r, self.selection.lora_alpha = self.r.value, self.alpha.value
            self.changed()

    def refresh(self) -> None:
        """Show the common rank and scale; what the fields are told here is no input."""
        self.refreshing = True
        self.r.value, self.alpha.value = self.selection.r, self.selection.lora_alpha
        self.refreshing = False
