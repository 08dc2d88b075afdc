"""The page: question, arms, default model and health, with all work beside it.

A callback hands over to a thread and returns; threads touch the page only by setting traits, and the
answers are painted by one of them, a dozen times a second. Arms that this machine runs for us answer one
after another, for two at once would halve each other's speed; servers answer beside them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rag_kit.compare.compare import Arm
from rag_kit.errors import DataError, language, message
from rag_kit.faces.dashboard.column import Column, choice, offer
from rag_kit.faces.dashboard.render import error_html, health_html, reference_html, style
from rag_kit.faces.dashboard.work import Run, beside, explained
from rag_kit.models.adapters import adapter_folders
from rag_kit.models.options import GenerationOptions
from rag_kit.models.reference import is_local, known_references
from rag_kit.models.standin import STAND_IN
from rag_kit.rag import LoRARAGHandler

if TYPE_CHECKING:
    from rag_kit.settings import Settings

MOST = 4  # arms
PAINT_S = 0.08
TYPED_S = 0.2  # in which the text arrives that Enter sends, where it has changed


class Dashboard:
    """Up to four arms side by side; shows itself as the last expression of a cell.

    `models` are the arms to begin with, as in `base` or `lora:mine+none` (with retrieval unless it says
    otherwise): by default base and adapter, or the base without and with retrieval. `lang` is `en` or
    `zh`, by default the reader's. Raises DataError for more than four arms or an unknown context.

    `columns` are the arms shown, `box` is the widget that holds the page. What a person does with the
    mouse, `ask`, `stop`, `switch` and `refresh` do from Python; with `wait` they return when it is done.
    """

    def __init__(
        self,
        settings: "Settings | None" = None,
        *,
        handler: LoRARAGHandler | None = None,
        models: Sequence[str] = (),
        lang: str | None = None,
    ) -> None:
        self.handler = handler or LoRARAGHandler(settings)
        self.lang = lang or language()
        self._busy, self._typed, self._ended = threading.Lock(), threading.Event(), threading.Event()
        self._ended.set()
        adapters = adapter_folders(self.handler.settings.lora_model_path)
        models = models or (("base", "lora") if adapters else ("base+none", "base+retrieved"))
        if len(models) > MOST:
            raise DataError("dashboard_arms_many", count=len(models), most=MOST)
        arms = [Arm.parse(model if "+" in model else f"{model}+retrieved") for model in models]
        more = [Arm("base", "retrieved")] * (MOST - len(arms))
        self._all = [Column(arm, self.lang) for arm in (*arms, *more)]
        self._build(len(arms))
        self.refresh()

    def _build(self, arms: int) -> None:
        from ipywidgets import HTML, Box, Button, Dropdown, HBox, Layout, Text, VBox

        def button(name: str, act: Callable[[], Any]) -> Any:
            made = Button(description=self._say(name))
            made.add_class(f"rk-{name}")
            made.on_click(lambda _: self._guarded(act))
            return made

        labelled = {"style": {"description_width": "auto"}}
        self.question = Text(
            description=self._say("question"), placeholder=self._say("placeholder"), **labelled
        )
        self.question.continuous_update = False  # then the text arrives right behind the key that sends it
        self.question.on_msg(self._keyed)
        self.question.observe(lambda _: self._typed.set(), "value")
        numbers = range(1, MOST + 1)
        self._count = Dropdown(options=numbers, value=arms, description=self._say("arms"), **labelled)
        self._count.observe(lambda _: self._arrange(), "value")
        self._default = choice(self._say("default"), self.handler.reference)
        acts = {"ask": self._asked, "stop": self.stop, "refresh": self.refresh}
        acts["switch"] = lambda: self.switch(self._default.value)
        self._buttons = {name: button(name, act) for name, act in acts.items()}
        self._state, self._notice, self._health, self._grid = HTML(), HTML(), HTML(), Box()
        ask, stop, refresh, switch = self._buttons.values()
        question = HBox([self.question, ask, stop])
        controls = HBox([self._count, self._default, switch, self._state, self._health, refresh])
        for part, name in ((question, "question"), (controls, "controls"), (self._grid, "grid")):
            part.add_class(f"rk-{name}")
        looks = HTML(style(), layout=Layout(display="none"))
        self.box = VBox([looks, question, controls, self._notice, self._grid])
        self.box.add_class("rk-page")
        self._arrange()
        self._enable(True)
        self._show_default(self.handler.reference)

    def _repr_mimebundle_(self, **how: Any) -> Any:
        arms = " | ".join(str(column.arm) for column in self.columns)
        return self.box._repr_mimebundle_(**how) | {"text/plain": arms}

    # --- what a person or a notebook asks for ----------------------------------------------------

    @property
    def columns(self) -> list[Column]:
        """The arms that are shown."""
        return self._all[: self._count.value]

    @property
    def running(self) -> bool:
        """Whether an arm still answers."""
        return not self._ended.is_set()

    def ask(
        self, question: str | None = None, *, wait: bool = False, options: GenerationOptions | None = None
    ) -> None:
        """Put `question`, by default what is typed, to every arm; what still runs is stopped first."""
        if question is not None:
            self.question.value = question
        asked = self.question.value.strip()
        with self._busy:
            self.stop()
            self._ended.wait()
            self._notice.value = "" if asked else self._say("empty")
            if not asked:
                return
            self._ended.clear()
            for column in self.columns:
                column.run = Run()
            self._enable(False)
            beside(self._conduct, self.columns, asked, options)
        if wait:
            self.wait()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until every arm has ended; False where it took longer than `seconds`."""
        try:
            return self._ended.wait(seconds)
        except KeyboardInterrupt:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop every arm at once."""
        for column in self._all:
            column.run.stop()

    def switch(self, reference: str, *, wait: bool = False) -> None:
        """Make `reference` what answers when nobody names a model; one that cannot answer changes nothing."""
        self._beside("switch", lambda: self._switched(reference), wait)

    def refresh(self, *, wait: bool = False) -> None:
        """Look again which models there are, and whether all is well."""
        self._beside("refresh", self._looked, wait)

    # --- on threads beside the page ---------------------------------------------------------------

    def _beside(self, button: str, work: Callable[[], None], wait: bool) -> None:
        def guarded() -> None:
            self._guarded(work)
            self._buttons[button].disabled = False

        self._buttons[button].disabled = True
        thread = beside(guarded)
        if wait:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do it; what fails is shown."""
        try:
            work()
        except Exception as error:
            self._notice.value = error_html(explained(error), self.lang)

    def _conduct(self, columns: list[Column], question: str, options: GenerationOptions | None) -> None:
        def answer(lane: list[Column]) -> None:
            for column in lane:
                column.ask(self.handler, question, options=options)

        def paint() -> None:
            over = False
            while not over:
                time.sleep(PAINT_S)
                over = all(column.run.over for column in columns)
                for column in columns:
                    column.paint()

        here = [one for one in columns if is_local(one.arm.model) or one.arm.model == f"ollama:{STAND_IN}"]
        for lane in (here, *([column] for column in columns if column not in here)):
            beside(answer, lane)
        self._guarded(paint)
        self._enable(True)
        self._ended.set()

    def _switched(self, reference: str) -> None:
        self._state.value = escape(self._say("switching", reference=reference))
        used = self.handler.reference
        try:
            used = self.handler.switch_model(model=reference)
            self._notice.value = ""
        finally:
            self._show_default(used)

    def _looked(self) -> None:
        from rag_kit.ops.health import health

        references = [one for one in known_references(self.handler.settings) if one != "ollama:MODEL"]
        for dropdown in (self._default, *(column.model for column in self._all)):
            offer(dropdown, references, self.lang)
        self._health.value = health_html(health(self.handler.settings), self.lang)

    # --- the page itself --------------------------------------------------------------------------

    def _say(self, name: str, **values: object) -> str:
        return message(f"dashboard_{name}", self.lang, **values)

    def _show_default(self, used: str) -> None:
        """Show what answers when nobody names a model, and what stands in for it."""
        shown = (reference_html(one, self.lang) for one in dict.fromkeys((self.handler.reference, used)))
        self._state.value = f'<div class="rk-default">{self._say("now")} {" → ".join(shown)}</div>'

    def _arrange(self) -> None:
        self._grid.children = [column.box for column in self.columns]

    def _enable(self, free: bool) -> None:
        """Let the page be changed, or only stopped."""
        self._buttons["stop"].disabled = free
        chosen = (control for column in self._all for control in (column.model, column.retrieval))
        for control in (*chosen, self._count, self._buttons["ask"]):
            control.disabled = not free

    def _keyed(self, _widget: object, content: dict[str, Any], _buffers: object) -> None:
        """Send on Enter: the key is told before the text, and not while it confirms a candidate."""

        def entered() -> None:
            self._typed.wait(TYPED_S)
            self._guarded(self._asked)

        if content.get("event") == "submit":
            self._typed.clear()
            beside(entered)

    def _asked(self) -> None:
        if not self.running:
            self.ask()
