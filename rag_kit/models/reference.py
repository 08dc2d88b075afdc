"""Model references: `base`, `lora`, `lora:NAME`, `ollama:MODEL`, `openai:MODEL`, `PROVIDER:MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel

from rag_kit.errors import ModelError, ServiceError
from rag_kit.models.adapters import FLAT, adapter_folders

if TYPE_CHECKING:
    from rag_kit.settings import Settings


def load_model(reference: str, settings: Settings | None = None, **options: Any) -> BaseChatModel:
    """Return the chat model that `reference` names; nothing heavy is loaded before its first answer.

    `options` are the model's own fields (`temperature`, `max_tokens`, …). Raises ModelError for a
    reference that is unknown (the known ones are listed) or an adapter that does not fit.
    """
    from rag_kit.settings import get_settings

    settings = settings or get_settings()
    provider, _, name = reference.partition(":")
    if is_local(reference):
        from rag_kit.models.lora import LoRALanguageModel

        model = LoRALanguageModel(model=reference, settings=settings, **options)
        if provider == "lora":
            model.adapter()  # an adapter that is missing or of another base is told now
        return model
    if provider == "ollama" and name:
        from rag_kit.models.ollama import OllamaLanguageModel
        from rag_kit.models.standin import find_ollama, resolve

        name = resolve(reference, settings).partition(":")[2]
        server = find_ollama(settings, name)
        served = {"base_url": server.url, "client_kwargs": {"headers": server.headers}}
        return OllamaLanguageModel(model=name, **served, **(_defaults(settings) | options))
    if not name:
        raise ModelError(
            "reference_unknown", reference=reference, known=", ".join(known_references(settings))
        )
    from langchain.chat_models import init_chat_model

    try:
        chosen: BaseChatModel = init_chat_model(name, model_provider=provider, **options)
        return chosen
    except (ImportError, ValueError) as error:
        if "Unsupported" in str(error):
            known = ", ".join(known_references(settings))
            raise ModelError("reference_unknown", reference=reference, known=known) from error
        raise ModelError("provider_failed", reference=reference, reason=_first_sentence(error)) from error
    except Exception as error:  # a provider's own complaint, such as a missing key
        raise ModelError("provider_failed", reference=reference, reason=_first_sentence(error)) from error


def is_local(reference: str) -> bool:
    """Whether `reference` runs on the base in this process."""
    return reference in ("base", "lora") or reference.startswith("lora:")


def known_references(settings: Settings) -> list[str]:
    """Return what can be asked for here: base, adapters, the models that Ollama has now."""
    adapters = adapter_folders(settings.lora_model_path)
    references = ["base"]
    if adapters:
        references += ["lora", *(f"lora:{name}" for name in adapters if name != FLAT)]
    try:
        from rag_kit.models.standin import STAND_IN, ollama_state
        from rag_kit.ollama import list_models

        stands_in = ollama_state(settings)[0] == "stand-in"
        names = [STAND_IN] if stands_in else list_models(settings.ollama_base_url)
        references += [f"ollama:{name}" for name in names]
    except ServiceError:
        references.append("ollama:MODEL")
    return references


def _defaults(settings: Settings) -> dict[str, Any]:
    from rag_kit.models.options import GenerationOptions

    return {"options": GenerationOptions.from_settings(settings)}


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
