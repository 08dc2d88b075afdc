"""How an answer is generated: one set of options, every value sent explicitly to every engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_kit.settings import Settings

SUGGESTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationOptions:
    """Sampling and limits of one request.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off, and work
    in the order penalty (on every token of prompt and answer), top_k, top_p, min_p, temperature. `num_ctx`
    None is the model's own context (tokens); `think` is off unless True, where it can be switched. One `seed`
    repeats an engine's answer; another engine draws otherwise from the same distribution.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_ctx: int | None = None
    think: bool | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> GenerationOptions:
        """Take MAX_NEW_TOKENS, TEMPERATURE and TOP_P; the rest is off."""
        return cls(
            temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens
        )

    def greedy(self) -> GenerationOptions:
        """Return the same limits without sampling: what comparisons use."""
        return replace(self, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)

    def updated(self, **changes: Any) -> GenerationOptions:
        """Return a copy with the given values; None leaves a value as it is."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def with_generation_config(self, own: Mapping[str, Any]) -> GenerationOptions:
        """Return a copy with what a base's maker suggests; greedy stays greedy, but a penalty counts."""
        sampled = self.temperature > 0 and own.get("do_sample", True)
        names = SUGGESTED if sampled else ("repetition_penalty",)
        return self.updated(**{name: own.get(name) for name in names})


def generation_config(folder: Path) -> dict[str, Any]:
    """Return what the maker of the base in `folder` suggests of SUGGESTED, and `do_sample`; often nothing."""
    try:
        own = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return {name: own[name] for name in ("do_sample", *SUGGESTED) if own.get(name) is not None}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
