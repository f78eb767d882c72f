"""Time to build the layer panel and to answer a click: python -m benchmarks.panel [--size E4B] [--clicks N]

In this process, without a browser: the imports; from `LayerPanel(config)` to its widgets, the first time (the model is built
on the meta device) and again; and from a click on a widget to the new totals and to the last widget that changes. tests/browser measures
the same click in JupyterLab, with the way through server and browser. The recipe is params/text.yaml of the checkout.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).resolve().parent.parent / "params" / "text.yaml"


def take_time(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds that a function takes, and what it returns."""
    start = time.perf_counter()
    result = act()
    return (time.perf_counter() - start) * 1000, result


def list_clicks(widgets: Any) -> dict[str, Callable[[int], None]]:
    """Return name -> the n-th click of a kind; each one changes the choice."""
    buttons = {button.description: button for button in widgets.controls.box.children[0].children}
    tower = next(row for row in widgets.rows.rows if row.node.label == "audio")
    ranges = ("0-9,20,25-29", "last 8")
    presets = (buttons["Everything"], buttons["Attention only"])
    return {
        "a layer": lambda n: widgets.strip.cells[n % len(widgets.strip.cells)].click(),
        "a range": lambda n: setattr(widgets.strip.field, "value", ranges[n % 2]),
        "a tower": lambda n: setattr(tower.check, "value", not tower.check.value),
        "a preset": lambda n: presets[n % 2].click(),
    }


def measure_click(widgets: Any, act: Callable[[], None]) -> tuple[float, float]:
    """Return the milliseconds from a click to new totals, and to the end of all that it changes."""
    shown = []
    start = time.perf_counter()
    note = lambda change: shown.append((time.perf_counter() - start) * 1000)  # noqa: E731
    widgets.totals.observe(note, "value")
    act()
    whole = (time.perf_counter() - start) * 1000
    widgets.totals.unobserve(note, "value")
    return shown[-1], whole


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("E2B", "E4B"), default="E4B")
    parser.add_argument("--clicks", type=int, default=20, help="clicks of each kind")
    options = parser.parse_args()
    start = time.perf_counter()
    import ipywidgets
    import timm  # noqa: F401  # transformers imports it for the vision tower
    import torch
    import transformers

    from forgekit import LayerPanel, load_config
    from forgekit.model.shapes import make_released_config

    settings = make_released_config(options.size)
    transformers.Gemma3nForConditionalGeneration  # noqa: B018  # transformers imports a model's classes when they are named
    imports = (time.perf_counter() - start) * 1000
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, ipywidgets {ipywidgets.__version__}"
    )
    print(f"Python {platform.python_version()}, {versions}; {torch.get_num_threads()} threads\n")
    config = load_config(RECIPE)

    def build() -> Any:
        panel = LayerPanel(config, settings)
        return panel.widget and panel._widget

    first, _ = take_time(build)
    again, widgets = take_time(build)
    print(
        f"| {options.size} | |\n|---|---|\n| imports | {imports:.0f} ms |\n| build, first | {first:.0f} ms |\n| build, again | {again:.0f} ms |\n"
    )
    print("| click on | to new totals, median | slowest | to the last change, median |\n|---|---|---|---|")
    for name, act in list_clicks(widgets).items():
        act(0)
        times = [measure_click(widgets, lambda n=n, act=act: act(n)) for n in range(1, options.clicks + 1)]
        totals, whole = zip(*times, strict=True)
        print(
            f"| {name} | {statistics.median(totals):.0f} ms | {max(totals):.0f} ms | {statistics.median(whole):.0f} ms |"
        )


if __name__ == "__main__":
    main()
