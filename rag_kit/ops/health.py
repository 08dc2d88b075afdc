"""Is everything in order? A list of findings, each with its remedy, as Django's system checks do it.

Knows how findings become a verdict, a table and the guide's `/health`; what is looked at stands in `checks`.
Shown in notebook 04.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rag_kit.errors import RagKitError, message
from rag_kit.ops.checks import LOOKS, Check, Seen

if TYPE_CHECKING:
    from rag_kit.settings import Settings

COMPONENTS = ("rag_handler", "vector_store", "lora_model", "ollama_service")


@dataclass(frozen=True)
class Health:
    """What was found; `components` and `model_info` are those of the guide's `/health`."""

    checks: list[Check]
    components: dict[str, bool]
    model_info: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing is at error level."""
        return self.status != "unhealthy"

    @property
    def status(self) -> str:
        """`healthy`, `degraded` (a warning) or `unhealthy` (an error)."""
        levels = {check.level for check in self.checks}
        return "unhealthy" if "error" in levels else "degraded" if "warning" in levels else "healthy"

    def as_dict(self) -> dict[str, Any]:
        """Return the guide's answer of `/health`, with the checks beside it."""
        told = {"status": self.status, "components": self.components}
        checks = [asdict(check) for check in self.checks]
        return told | {"details": {"model_info": self.model_info}, "checks": checks}

    def _table(self, kind: str, arrow: str) -> str:
        from tabulate import tabulate

        lines = []
        for check in self.checks:
            texts = [check.name, check.finding + (f"{arrow}{check.remedy}" if check.remedy else "")]
            lines.append([message(f"health_level_{check.level}"), *texts])
        return tabulate(lines, tablefmt=kind, disable_numparse=True)

    def __str__(self) -> str:
        return f"{self._table('plain', chr(10) + '→ ')}\n\n{message(f'health_status_{self.status}')}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{self._table('html', ' → ')}<p>{escape(message(f'health_status_{self.status}'))}</p>"


def health(settings: Settings | None = None) -> Health:
    """Look at everything that an answer needs; never raises: what fails unexpectedly is a finding too."""
    seen = Seen(settings)
    for what, look in LOOKS.items():
        if seen.settings is None and what != "settings":
            continue  # nothing is known without them
        try:
            look(seen)
        except RagKitError as error:
            seen.tell("error", what, error)
        except Exception as error:  # a check that breaks must not hide the others
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            seen.tell("error", what, "health_failed", what=what, reason=reason)
    info = {"base_model": "", "using_lora": False}
    if given := seen.settings:
        info = {"base_model": given.base_model_name, "using_lora": given.use_lora_default}
    return Health(seen.checks, {name: name in seen.usable for name in COMPONENTS}, info)
