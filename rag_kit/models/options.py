"""How an answer is generated: one set of options, every value sent explicitly to every engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_kit.settings import Settings


@dataclass(frozen=True)
class GenerationOptions:
    """Sampling and limits of one request.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 are off;
    `num_ctx` None is the model's own context (tokens); `think` None is what the model can do at
    least: off where it can be switched.
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
