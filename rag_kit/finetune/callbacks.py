"""What happens beside a training: progress with time left, the losses, and the end at a broken loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rag_kit.errors import ModelError, message

OnLog = Callable[[dict[str, float]], None]


class Progress:
    """Shows a bar that both notebooks and terminals can draw, and keeps every step's loss in `history`.

    A Trainer callback by its methods (not by inheritance, which would import transformers here).
    transformers' own notebook bar is left out: nbval cannot read it.
    """

    def __init__(self, steps: int, *, show: bool, on_log: OnLog | None) -> None:
        from tqdm.auto import tqdm

        self.history: list[dict[str, float]] = []
        self._on_log = on_log
        self._bar = tqdm(total=steps, desc=message("finetune_progress"), disable=not show)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Do nothing at the events that are not listed here."""
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss of a step; raises ModelError where it is no finite number."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise ModelError("finetune_loss_broken", loss=loss, step=state.global_step)
        row = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0), 4),
            "loss": loss,
            "learning_rate": float(logs.get("learning_rate", 0.0)),
            "grad_norm": float(logs.get("grad_norm", 0.0)),
        }
        self.history.append(row)
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if self._on_log:
            self._on_log(row)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Move the bar."""
        self._bar.update(state.global_step - self._bar.n)

    def close(self) -> None:
        """Take the bar away; a training may end at any moment."""
        self._bar.close()
