"""One arm's column: its drop-down, its retrieval, its answer.

Knows the widgets of one arm and what they show of a run; who puts questions to it stands in `page`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rag_kit.answer import Answer
from rag_kit.compare.compare import Arm
from rag_kit.errors import message
from rag_kit.faces.dashboard.render import run_html
from rag_kit.faces.dashboard.work import Run
from rag_kit.models.standin import STAND_IN
from rag_kit.rag import TOP_K, LoRARAGHandler

if TYPE_CHECKING:
    from ipywidgets import Dropdown


class Column:
    """One of the arms side by side; `run` is what has come of the last question."""

    def __init__(self, arm: Arm, lang: str) -> None:
        from ipywidgets import HTML, Checkbox, VBox

        self.lang, self.run, self._painted = lang, Run("idle"), Run()
        self.model = choice(message("dashboard_model", lang), arm.model)
        label = message("dashboard_retrieval", lang)
        self.retrieval = Checkbox(arm.context == "retrieved", description=label, indent=False)
        self.view = HTML()
        self.box = VBox([self.model, self.retrieval, self.view])
        self.box.add_class("rk-column")
        self.paint()

    @property
    def arm(self) -> Arm:
        """The model and what stands in its prompt, as chosen."""
        return Arm(self.model.value, "retrieved" if self.retrieval.value else "none")

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return self.run.text

    @property
    def answer(self) -> Answer | None:
        """The whole answer, with sources and timings; None until it is there."""
        return self.run.answer

    def ask(self, handler: LoRARAGHandler, question: str, **how: Any) -> None:
        """Put the question to the arm; the caller's thread waits for the answer."""
        how |= {"model": self.arm.model, "top_k": TOP_K if self.retrieval.value else 0}
        self.run.work(lambda: handler.stream(question, **how))

    def paint(self) -> None:
        """Show what has come of the question so far."""
        if self.run is not self._painted:
            if self.run.over:  # nothing will change: this is the last time
                self._painted = self.run
            self.view.value = run_html(self.run, self.lang)


def choice(label: str, reference: str) -> "Dropdown":
    """Return a drop-down of model references with one chosen."""
    from ipywidgets import Dropdown

    return Dropdown(options=[(reference, reference)], description=label, style={"description_width": "auto"})


def offer(dropdown: "Dropdown", references: Sequence[str], lang: str) -> None:
    """Give a drop-down these references; what was chosen stays, and says so where it is gone."""
    chosen = next((one for one in references if one == f"{dropdown.value}:latest"), dropdown.value)
    labels = {one: one for one in references}
    labels.setdefault(chosen, message("dashboard_gone", lang, reference=chosen))
    if (stand_in := f"ollama:{STAND_IN}") in references:
        labels[stand_in] = message("dashboard_standin_option", lang, reference=stand_in)
    options = tuple((label, reference) for reference, label in labels.items())
    if dropdown.options != options:
        dropdown.options = options
        dropdown.value = chosen
