"""How an adapter is trained: every value in one place, as the recipe keeps it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rag_kit.errors import SettingsError

if TYPE_CHECKING:
    from rag_kit.settings import Settings

HANDBOOK_EPOCHS = 5  # planted facts must be known by heart
OTHER_EPOCHS = 3
BATCH = 8


@dataclass(frozen=True)
class Hyperparameters:
    """Values of one training; None is decided when it starts.

    `epochs` None: 5 for the handbook's facts, else 3. `batch_size` None: BATCH_SIZE where it is set, else
    8. `fp16` None: ENABLE_FP16, on CUDA only. `target_modules` is `all-linear` or names of layers joined by
    commas. `max_length` is in tokens; a longer example is an error, never cut. Every `save_steps` steps a
    checkpoint is kept, which can be an arm: `lora:NAME/checkpoint-N`; None: no checkpoint.
    """

    epochs: float | None = None
    learning_rate: float = 1e-3
    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    warmup_ratio: float = 0.05
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.0
    max_length: int = 1024
    seed: int = 0
    fp16: bool | None = None
    gradient_checkpointing: bool = False
    save_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool | str | None):
                continue
            allowed, right = "> 0", 0 < value < float("inf")
            if name in ("weight_decay", "seed"):
                allowed, right = "≥ 0", value >= 0
            elif name in ("lora_dropout", "warmup_ratio"):
                allowed, right = "≥ 0, < 1", 0 <= value < 1
            if not right:
                raise SettingsError("finetune_value", name=name, value=value, allowed=allowed)

    def decided(self, settings: Settings, *, handbook: bool) -> Hyperparameters:
        """Return a copy with `epochs`, `batch_size` and `fp16` filled in from the settings and the data."""
        return replace(
            self,
            epochs=self.epochs or (HANDBOOK_EPOCHS if handbook else OTHER_EPOCHS),
            batch_size=self.batch_size or settings.batch_size or BATCH,
            fp16=settings.enable_fp16 if self.fp16 is None else self.fp16,
        )

    @property
    def layers(self) -> str | list[str]:
        """`target_modules` as PEFT takes it."""
        if self.target_modules == "all-linear":
            return self.target_modules
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]
