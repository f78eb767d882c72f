"""ChatPanel: talk to the trained model, and beside it to the base it was trained from."""

import contextlib
import functools
import html
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ..data.clean import BadRow
from ..data.messages import check_message, make_message
from ..data.parts import load_parts
from ..data.show import show_turn
from ..errors import ModelError
from ..evaluate.generate import generate_answer
from .upload import read_uploads
from .view import NARROW, PANEL, make_bundle, say

SHOW_SECONDS = 0.1  # at most ten updates of an answer a second
BUSY = "A cell is running; send again when it has ended."


class StopAnswer(Exception):
    """Raised inside an answer to end it."""


class ChatPanel:
    """A chat with one model or with two sides of it: trained, and with its adapter switched off (no second copy).

    An answer is made in a thread of its own, so that Stop works. It never runs beside a cell: while one runs nothing is
    sent, and a cell that starts ends the answer first, because both may use the same model.
    """

    def __init__(self, model: Any, processor: Any, base: bool | None = None):
        """Take a model from `add_adapter` or `load_export`.

        Raises ModelError for base=True and a model that has no adapter.

        Args:
            base: show the base model's answers too; None: where the model has an adapter to switch off.
        """
        from peft import PeftModel

        adapted = isinstance(model, PeftModel)
        if base and not adapted:
            raise ModelError("base=True needs a model with an adapter; this one has none that could be switched off.")
        self.model, self.processor = model, processor
        self.sides: dict[str, Callable[[], Any]] = {"Tuned model": contextlib.nullcontext}
        if adapted and base is not False:
            self.sides["Base model"] = model.disable_adapter
        self.chats: dict[str, list[dict[str, Any]]] = {side: [] for side in self.sides}
        self.cancel = threading.Event()
        self.worker: threading.Thread | None = None
        self.cell_runs = False

    def __repr__(self) -> str:
        return f"ChatPanel: {' and '.join(self.sides)}; without a front end, ask with forgekit.generate_answer(...)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return make_bundle(lambda: self.box, repr(self))

    @functools.cached_property
    def box(self) -> Any:
        """The panel's outermost widget."""
        import ipywidgets as widgets

        w = self.widgets = SimpleNamespace(
            turns=widgets.VBox(),
            message=widgets.Textarea(description="Message", rows=2, layout={"width": "auto"}, style=NARROW),
            send=widgets.Button(description="Send", tooltip="Ask the model"),
            stop=widgets.Button(description="Stop answer", tooltip="End the answer here", disabled=True),
            clear=widgets.Button(description="New chat", tooltip="Forget what was said"),
            attach=widgets.HBox(),
            status=widgets.HTML(say("")),
            temperature=widgets.BoundedFloatText(1.0, min=0, max=5, step=0.1, description="temperature"),
            top_p=widgets.BoundedFloatText(0.95, min=0.01, max=1, step=0.05, description="top_p"),
            top_k=widgets.BoundedIntText(64, min=1, max=1000, description="top_k"),
            max_new_tokens=widgets.BoundedIntText(256, min=1, max=8192, description="max_new_tokens"),
        )
        for field in (w.temperature, w.top_p, w.top_k, w.max_new_tokens):
            field.style, field.layout = NARROW, {"width": "auto"}
        self.renew_upload()
        w.send.on_click(lambda button: self.send())
        w.stop.on_click(lambda button: self.cancel.set())
        w.clear.on_click(lambda button: self.forget())
        wrap = {"flex_flow": "row wrap", "align_items": "center"}
        settings = widgets.HBox([w.temperature, w.top_p, w.top_k, w.max_new_tokens], layout=wrap)
        buttons = widgets.HBox([w.send, w.stop, w.attach, w.clear, w.status], layout=wrap)
        box = widgets.VBox([w.turns, w.message, buttons, settings])
        box.add_class(PANEL)
        self.yield_to_cells()
        return box

    def renew_upload(self) -> None:
        """Put a fresh FileUpload into the panel: ipywidgets 7 has no way to empty one."""
        import ipywidgets as widgets

        self.upload = widgets.FileUpload(accept="image/*,audio/*,video/*", multiple=True, description="Attach")
        self.widgets.attach.children = (self.upload,)

    # ---- cells and answers take turns -------------------------------------------------------------------------------

    def yield_to_cells(self) -> None:
        """Learn from IPython when cells start and end; the panel is made inside one."""
        from IPython import get_ipython

        shell = get_ipython()
        if shell is None:
            return
        self.cell_runs = True
        shell.events.register("pre_run_cell", self.begin_cell)
        shell.events.register("post_run_cell", self.end_cell)

    def begin_cell(self, info: Any = None) -> None:
        """Leave the model to a cell that starts."""
        self.cell_runs = True
        self.end_answer()

    def end_answer(self) -> None:
        """End the answer that is being made, if there is one, and wait until the model is as it was."""
        self.cancel.set()
        if self.worker:
            self.worker.join()

    def end_cell(self, result: Any = None) -> None:
        """Let messages be sent again."""
        self.cell_runs = False

    def forget(self) -> None:
        """Start a new chat."""
        self.end_answer()
        self.chats = {side: [] for side in self.sides}
        self.widgets.turns.children = ()
        self.widgets.status.value = say("New chat")

    def send(self) -> None:
        """Take message and attachments as the next turn and have it answered in a thread."""
        w = self.widgets
        if self.cell_runs:
            w.status.value = say(BUSY)
            return
        if self.worker and self.worker.is_alive():
            return
        try:
            parts = [
                *read_uploads(self.upload.value),
                *([make_text(w.message.value)] if w.message.value.strip() else []),
            ]
            turn = load_parts([check_message({"role": "user", "content": parts})])[0]
        except BadRow as error:
            w.status.value = say(str(error))
            return
        if not parts:
            w.status.value = say("Write a message first.")
            return
        settings = {name: getattr(w, name).value for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
        answers = self.add_turn(turn)
        w.message.value = ""
        self.renew_upload()
        self.cancel.clear()
        w.send.disabled, w.stop.disabled = True, False
        self.worker = threading.Thread(target=self.answer, args=(turn, answers, settings), daemon=True)
        self.worker.start()

    def add_turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        """Show a question and room for its answers; return one HTML widget a side."""
        import ipywidgets as widgets

        half = {"flex": "1 1 0", "min_width": "0", "margin": "0 16px 0 0"}
        question = widgets.HTML(f"<div style='margin-top:8px'><b>You:</b> {show_turn(turn).html}</div>")
        answers = {side: widgets.HTML(write_answer(side, ""), layout=half) for side in self.sides}
        row = widgets.HBox(list(answers.values()), layout={"width": "100%"})
        self.widgets.turns.children = (*self.widgets.turns.children, question, row)
        return answers

    def answer(self, turn: dict[str, Any], answers: dict[str, Any], settings: dict[str, Any]) -> None:
        """Answer one turn on every side, after each other; runs in the panel's thread."""
        w = self.widgets
        try:
            for side in self.sides:
                w.status.value = say(f"{side} answers")
                text = self.stream(side, [*self.chats[side], turn], answers[side], settings)
                # the template wants user and assistant in turn, so an answer cut at once leaves its mark
                self.chats[side] += [turn, make_message("assistant", text or "...")]
            w.status.value = say("Stopped" if self.cancel.is_set() else "Answered")
        except Exception as error:  # noqa: BLE001  # nobody else sees what happens in this thread
            w.status.value = say(f"{type(error).__name__}: {error}")
        finally:
            w.send.disabled, w.stop.disabled = False, True

    def stream(self, side: str, chat: list[dict[str, Any]], place: Any, settings: dict[str, Any]) -> str:
        """Have one side answer, word by word into its place; return the answer, or as much as there is of a stopped one."""
        if self.cancel.is_set():
            return ""
        pieces: list[str] = []
        shown = 0.0

        def show(piece: str) -> None:
            nonlocal shown
            if self.cancel.is_set():
                raise StopAnswer
            pieces.append(piece)
            if time.monotonic() - shown > SHOW_SECONDS:
                shown = time.monotonic()
                place.value = write_answer(side, "".join(pieces))

        with contextlib.suppress(StopAnswer), self.sides[side]():
            generate_answer(self.model, self.processor, chat, stream=show, **settings)
        text = "".join(pieces).strip()
        place.value = write_answer(side, text)
        return text


def make_text(text: str) -> dict[str, Any]:
    """Return a text part."""
    return {"type": "text", "text": text.strip()}


def write_answer(side: str, text: str) -> str:
    """Return an answer under its side's name as HTML."""
    body = f"<div style='white-space:pre-wrap;overflow-wrap:anywhere'>{html.escape(text)}</div>"
    return f"<div style='line-height:1.4'><b>{side}:</b>{body}</div>"
