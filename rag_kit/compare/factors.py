"""What stands beside each model's answers, and what tells it from a later one of its name.

Knows references and the guard of `rag_kit.models.parity`; knows nothing of questions and rows.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_kit.errors import RagKitError, ServiceError, message
from rag_kit.manifest import sha256
from rag_kit.models.options import SUGGESTED, GenerationOptions, generation_config

if TYPE_CHECKING:
    from rag_kit.models.adapters import Adapter
    from rag_kit.models.base import Base
    from rag_kit.settings import Settings

Factors = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """One model of a comparison: how it is named, asked and told from others.

    `identity` None is not known; `how` is what `load_model` takes for it beside the settings.
    """

    label: str
    options: GenerationOptions
    identity: str | None = None
    factors: Factors = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)


def subjects(
    references: Iterable[str], settings: "Settings", options: GenerationOptions, suggested: bool
) -> dict[str, Subject]:
    """Return each model by its reference; `suggested` applies the base's own generation config.

    A model that cannot answer has no factors: why, its rows will say. Raises ModelError for one that is there
    and does not say what it is.
    """
    from rag_kit.models.base import resolve_base
    from rag_kit.models.reference import is_local

    references = list(references)
    base = None
    if any(map(is_local, references)):
        with suppress(RagKitError):  # the rows of the local arms will say why
            base = resolve_base(settings.base_model_name, settings)
    own = generation_config(base.folder) if base else {}
    ours = options.with_generation_config(own) if suggested else options
    found = {}
    for reference in references:
        if is_local(reference):
            subject = _local(reference, settings, ours, base)
        elif reference.startswith("ollama:"):
            subject = _ollama(reference, settings, options, ours, base)
        else:
            subject = Subject(reference, options, factors={"engine": reference.partition(":")[0]})
        if own and subject.factors and (is_local(reference) or subject.how):
            subject.factors["generation_config"] = _told(own, applied=suggested)
        found[reference] = subject
    return found


def _local(reference: str, settings: "Settings", options: GenerationOptions, base: "Base | None") -> Subject:
    from rag_kit.models.adapters import WEIGHTS, adapter_of
    from rag_kit.models.parity import thinking, tokenizer_of

    if base is None:
        return Subject(reference, options)
    try:
        adapter = None if reference == "base" else adapter_of(reference, settings)
        engine, weights = _engine(base, adapter, settings)
    except RagKitError:
        return Subject(reference, options)  # its rows will say why
    able = "enable_thinking" in (tokenizer_of(base.folder).chat_template or "")
    factors = {"engine": engine, "weights": weights, "base": base.name, "prompt": "ours"}
    factors["thinking"] = thinking(able, options.think)
    served = f"{settings.base_model_name}, {engine}, {weights}"
    if adapter is None:
        return Subject(reference, options, served, factors)
    identity = f"{sha256(adapter.folder / WEIGHTS)} ({served})"
    return Subject(f"lora:{adapter.name}", options, identity, factors)


def _engine(base: "Base", adapter: "Adapter | None", settings: "Settings") -> tuple[str, str]:
    """Return the engine that will run the base, and the number or block type of its weights."""
    from rag_kit.models.device import choose_device
    from rag_kit.models.engine import choose_engine

    name, _ = choose_engine(base, settings)
    if name == "transformers" or base.gguf is None:
        device = choose_device(settings)
        return name, device.quantization or device.dtype
    from rag_kit.models.llamacpp.serving import pinned_file, serving_file

    if adapter is not None and adapter.name == settings.lora_pinned:
        return name, f"{pinned_file(base.gguf, adapter, settings.cache_dir).kind}, merged"
    return name, serving_file(base.gguf, settings.cache_dir).kind


def _ollama(
    reference: str,
    settings: "Settings",
    options: GenerationOptions,
    ours: GenerationOptions,
    base: "Base | None",
) -> Subject:
    from rag_kit.models.parity import served_by_ollama
    from rag_kit.models.standin import find_ollama
    from rag_kit.ollama import digests

    name = reference.partition(":")[2]
    try:
        server = find_ollama(settings, name)
        digest = digests(server.url, server.headers).get(name if ":" in name else f"{name}:latest")
    except RagKitError:
        return Subject(reference, options)  # its rows will say why
    try:
        served = served_by_ollama(name, settings, base, options.think)
    except ServiceError:
        return Subject(reference, options, digest)
    if server.state != "stand-in" and options.repetition_penalty != 1:
        # some of Ollama's runners pass it over, and none says so
        served.factors["options"] = f"repetition_penalty {options.repetition_penalty:g}?"
    if not served.same_base or base is None:
        return Subject(reference, options, digest, served.factors)
    return Subject(reference, ours, f"{digest} (our prompt)", served.factors, {"same_base": base.folder})


def _told(own: Mapping[str, Any], *, applied: bool) -> str:
    values = ", ".join(f"{name} {own[name]:g}" for name in SUGGESTED if name in own)
    return f"{values}: {message('compare_applied' if applied else 'compare_not_applied')}"
