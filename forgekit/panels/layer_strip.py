"""The decoder's layers as a strip of buttons: what kind each is, and whether it learns."""

from typing import Any

import ipywidgets

from ..layer_groups import check_layers, write_ranges
from .selection import Selection, State

MARKS: dict[State, str] = {"all": "●", "part": "◐", "none": "○"}
WORDS: dict[State, str] = {"all": "learns", "part": "learns in part", "none": "does not learn"}
LEGEND = (
    "S sliding attention (square) · F full attention (round) · K gives keys and values to later layers (double edge) · "
    "small letter: uses them (dashed) · ● learns ◐ in part ○ not"
)


def describe_layer(selection: Selection, layer: int) -> tuple[str, str, list[str]]:
    """Return a layer's letters, its kind in words, and the classes that shape its button."""
    kinds = selection.kinds
    full, source, shared = (layer in kinds[kind] for kind in ("full", "kv_source", "kv_shared"))
    letter = ("f" if full else "s") if shared else ("F" if full else "S") + "K" * source
    words = f"{'full' if full else 'sliding'} attention"
    words += (
        ", its keys and values are used by later layers" * source + ", uses the keys and values of another" * shared
    )
    flags = {"fk-full": full, "fk-source": source, "fk-shared": shared}
    return letter, words, ["fk-cell", *(name for name, on in flags.items() if on)]


class LayerStrip:
    """Buttons, one a decoder layer, and a field for ranges; both change the selection and then call `changed`."""

    def __init__(self, selection: Selection, changed: Any) -> None:
        self.selection, self.changed = selection, changed
        self.shown: dict[int, State] = {}
        self.about = {layer: describe_layer(selection, layer) for layer in selection.by_layer}
        layout = ipywidgets.Layout(width="44px", height="40px")
        self.cells = {layer: ipywidgets.Button(layout=layout) for layer in selection.by_layer}
        for layer, cell in self.cells.items():
            cell.on_click(lambda _, layer=layer: self.toggle(layer))
        self.field = ipywidgets.Text(
            description="Layers that learn",
            placeholder="0-9,20 or last 8 or full",
            continuous_update=False,
            style={"description_width": "initial"},
            layout=ipywidgets.Layout(width="20em"),
        )
        self.field.observe(self.read_field, "value")
        self.message = ipywidgets.HTML()
        strip = ipywidgets.Box([*self.cells.values()], layout=ipywidgets.Layout(flex_flow="row wrap"))
        line = ipywidgets.Box([self.field, self.message], layout=ipywidgets.Layout(flex_flow="row wrap"))
        legend = ipywidgets.HTML(f"<div class='fk-quiet'>{LEGEND}</div>")
        self.box = ipywidgets.VBox([strip, line, legend])
        self.refresh()

    def toggle(self, layer: int) -> None:
        """Switch one layer."""
        self.selection.toggle_layer(layer)
        self.changed()

    def read_field(self, change: dict[str, Any]) -> None:
        """Let exactly the layers in the field learn, or say beside it why not."""
        text = change["new"].strip()
        if text == write_ranges(self.selection.layers()):
            return
        try:
            self.selection.set_layers(check_layers(text) if text else "")
        except ValueError as error:
            self.message.value = f"<div class='fk-warning'>Warning: {error}.</div>"
            return
        self.changed()

    def refresh(self) -> None:
        """Show what changed."""
        for layer, cell in self.cells.items():
            state = self.selection.layer_state(layer)
            if self.shown.get(layer) == state:
                continue
            letter, words, classes = self.about[layer]
            with cell.hold_sync():
                cell.description = f"{layer}\n{letter} {MARKS[state]}"
                cell.tooltip = f"Layer {layer}, {words}: {WORDS[state]}"
                cell._dom_classes = (*classes, *{"all": ["fk-on"], "part": ["fk-some"], "none": []}[state])
            self.shown[layer] = state
        self.message.value = ""
        self.field.value = write_ranges(self.selection.layers())
