"""The adapter doctor: whether an adapter is whole, belongs to this base, and does something.

Every check returns findings and none ends the others, as Django's system checks do. Knows what an adapter
must be to be compared and served; knows nothing of questions, scores and arms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rag_kit.errors import ModelError, RagKitError, language, message
from rag_kit.manifest import KEPT, fingerprint, sha256
from rag_kit.models.adapters import CONFIG, RECIPE, WEIGHTS, Adapter, adapter_of, first_line, misfits, shapes
from rag_kit.models.divergence import divergence
from rag_kit.models.engine import choose_engine
from rag_kit.models.registry import entries, record_check

if TYPE_CHECKING:
    from pathlib import Path

    from rag_kit.models.lora import LoRALanguageModel
    from rag_kit.settings import Settings

# What is asked to see whether an adapter does anything: general questions, in two languages.
PROBES = ("What is your name?", "你好，请介绍一下你自己。", "How much does it cost?", "多少钱？")
ABOVE_NOISE = 2  # times the noise
SHOWN = 3  # names in a text
Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """What one check found: `ok`, `warning` (worth knowing) or `error` (not fit to be compared or served)."""

    check: str
    level: Level
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Case:
    """One adapter and the model that is to use it; `failed` are the checks that found an error so far."""

    adapter: Adapter
    model: LoRALanguageModel
    failed: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the adapter was made of, as far as it is known."""
        return self.adapter.recipe or {}


# What a check yields: the level, the key of the text, its values beside `adapter` and `base`.
Problems = Iterator[tuple[Level, str, dict[str, Any]]]


def examine(reference: str, settings: Settings, *, model: LoRALanguageModel | None = None) -> list[Finding]:
    """Look at the adapter that `reference` names in every way we know; never raises for what it finds.

    Loads the base, for the probe, unless something found before makes it useless.
    """
    try:
        adapter = adapter_of(reference, settings)
    except RagKitError as error:
        return [Finding("files", "error", *error.text())]
    return _look(adapter, model or _model(settings))[0]


def checked(
    reference: str, settings: Settings, *, anew: bool = False, model: LoRALanguageModel | None = None
) -> list[Finding]:
    """Do as `examine`, and keep the findings in the registry; not `anew`: those kept, where nothing changed.

    Raises ModelError where there is no such adapter, or nothing of it can be read.
    """
    adapter, model = adapter_of(reference, settings), model or _model(settings)
    engine = choose_engine(model.base_model, settings, model.engine)[0]
    stats = [(file.name, file.stat()) for file in sorted(adapter.folder.iterdir()) if file.is_file()]
    looked_at = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats if name not in KEPT]
    facts = [adapter.key, looked_at, adapter.recipe, model.base_model.fingerprint(), engine, language()]
    state = fingerprint(facts)
    if not anew:
        kept = entries(settings).get(adapter.name, {}).get("checked", {})
        if kept.get("state") == state:
            return [Finding(**one) for one in kept["findings"]]
    findings, whole = _look(adapter, model)
    if whole:
        record_check(adapter, state, engine, [asdict(one) for one in findings], settings)
    return findings


def admit(
    reference: str, settings: Settings, *, forced: bool = False, model: LoRALanguageModel | None = None
) -> tuple[str, ...]:
    """Let an adapter into a comparison or into serving; nothing is asked of what is no adapter.

    Raises ModelError naming what it fails; `forced`, returns a note for each failed check instead, to stand
    on every row. Asked again for the same files, base and engine, it looks in the registry alone.
    """
    if reference.partition(":")[0] != "lora":
        return ()
    failed = [one for one in checked(reference, settings, model=model) if one.level == "error"]
    name = adapter_of(reference, settings).name
    if failed and not forced:
        raise ModelError("doctor_refused", adapter=name, failed=" ".join(one.text for one in failed))
    return tuple(message("doctor_forced", adapter=name, check=one.check, text=one.text) for one in failed)


def probe(model: LoRALanguageModel, adapter: Adapter) -> tuple[float, float]:
    """Return how far `adapter` moves the next token's distribution, and how far noise alone does (KL, nats).

    The effect is the mean over PROBES of KL(base‖adapter). Noise is measured: the base against itself where
    the prompt is read with more behind it (δ²/2 for a log-probability that moves by δ), and llama.cpp's file
    against the original, since its rounding answers as much to anything at all (its tolerance, where it was
    not measured). Raises ModelError where the effect is no more than twice the noise, or no number.
    """
    import numpy as np
    from langchain_core.messages import HumanMessage

    from rag_kit.models.llamacpp.serving import KL

    backend = model.backend
    base, ours, apart = [], [], []
    with backend.holding(adapter) as key:
        for question in PROBES:
            ids = model.render([HumanMessage(question)]).ids
            base.append(backend.next_logprobs(ids, None))
            ours.append(backend.next_logprobs(ids, key))
            likely = int(base[-1].argmax())
            apart.append(backend.score(ids, [likely], None)[0] - base[-1][likely])
    rounding = float(np.finfo(np.float32).eps)  # of a sum over the vocabulary
    table = getattr(getattr(backend, "serving", None), "table", None)
    file = 0.0 if table is None else next((row["kl"] for row in table if row["kind"] == backend.dtype), KL)
    noise = max(float(np.mean(np.square(apart))) / 2, rounding, file)
    effect = float("nan") if np.isnan(ours).any() else divergence(base, ours).kl
    effect, noise = (float(f"{value:.2g}") for value in (effect, noise))
    if not ABOVE_NOISE * noise < effect < float("inf"):
        raise ModelError("adapter_without_effect", adapter=adapter.name, effect=effect, noise=noise)
    return effect, noise


def _model(settings: Settings) -> LoRALanguageModel:
    from rag_kit.models.lora import LoRALanguageModel

    return LoRALanguageModel(settings=settings)


def _look(adapter: Adapter, model: LoRALanguageModel) -> tuple[list[Finding], bool]:
    """Return the findings, and whether they are all about the adapter: no check broke for another reason."""
    findings: list[Finding] = []
    case, whole = Case(adapter, model), True
    told = {"adapter": adapter.name, "base": model.base or model.settings.base_model_name}
    for name, check in CHECKS.items():
        try:
            found = [_finding(name, level, key, told | values) for level, key, values in check(case)]
        except RagKitError as error:
            found = [Finding(name, "error", *error.text())]
            whole = whole and error.key.startswith("adapter_")
        except Exception as error:  # a check that breaks must not hide the others
            reason = f"{type(error).__name__}: {first_line(error)}"
            found, whole = [_finding(name, "error", "doctor_broke", {"check": name, "reason": reason})], False
        case.failed.extend(one.check for one in found if one.level == "error")
        findings += found or [_finding(name, "ok", f"doctor_ok_{name}", {})]
    return findings, whole


def _finding(check: str, level: Level, key: str, values: dict[str, Any]) -> Finding:
    if level == "ok":
        return Finding(check, level, message(key, **values))
    return Finding(check, level, *ModelError(key, **values).text())


def _some(names: list[str]) -> dict[str, Any]:
    """The first few names, and how many there are."""
    rest = ["…"] if len(names) > SHOWN else []
    return {"count": len(names), "names": ", ".join([*names[:SHOWN], *rest])}


def _files(case: Case) -> Problems:
    """Against the hashes of the recipe."""
    for file, expected in (case.recipe.get("files") or {}).items():
        path = case.adapter.folder / file
        if sha256(path) != expected.get("sha256"):
            level: Level = "error" if file in (CONFIG, WEIGHTS) else "warning"
            yield level, "doctor_file_changed", {"path": path, "recipe": RECIPE}


def _base(case: Case) -> Problems:
    if not (case.recipe.get("base") or {}).get("fingerprint"):
        yield "warning", "doctor_base_unknown", {}
    case.adapter.check_base(case.model.base_model)
    if case.model.base_model.changed_since(case.recipe.get("base") or {}):
        yield "error", "doctor_base_changed", {}


def _template(case: Case) -> Problems:
    """By the recipe's hash; without one by the template beside the weights, which may have gone unused."""
    theirs, file = case.recipe.get("chat_template_hash"), case.adapter.folder / "chat_template.jinja"
    level: Level = "error" if theirs else "warning"
    if not theirs and file.is_file():
        theirs = fingerprint(file.read_bytes())
    yield from _hash(case, level, "doctor_template", "chat_template_hash", theirs)


def _tokenizer(case: Case) -> Problems:
    yield from _hash(case, "error", "doctor_tokenizer", "tokenizer_hash", case.recipe.get("tokenizer_hash"))


def _hash(case: Case, level: Level, key: str, name: str, theirs: str | None) -> Problems:
    ours = case.model.base_model.fingerprint()[name]
    if theirs and theirs != ours:
        yield level, key, {"ours": str(ours)[:8], "theirs": theirs[:8]}


def _vocabulary(case: Case) -> Problems:
    """Of the tokenizer beside the weights, and of embeddings among them."""
    from transformers import AutoConfig

    folder = case.model.base_model.folder
    theirs, ours = case.adapter.folder / "tokenizer.json", folder / "tokenizer.json"
    differ = theirs.is_file() and ours.is_file() and sha256(theirs) != sha256(ours)
    if differ and (others := sorted(_tokens(theirs) - _tokens(ours))):  # reading both takes seconds
        yield "error", "doctor_vocabulary", _some([repr(token) for token, _ in others])
    rows = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size
    for name, shape in shapes(case.adapter.folder / WEIGHTS).items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and shape[0] != rows:
            yield "error", "doctor_resized", {"tensor": name, "found": shape[0], "rows": rows}


def _tokens(file: Path) -> set[tuple[str, int]]:
    """Return every token of a tokenizer with its id."""
    held = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = held["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score), the place is the id
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {*vocabulary.items(), *((token["content"], token["id"]) for token in held["added_tokens"])}


def _keys(case: Case) -> Problems:
    """Every tensor that is missing, too many, or of another shape."""
    kinds: dict[str, list[str]] = {}
    for misfit in misfits(case.adapter, case.model.base_model):
        kind = "missing" if " - ≠ " in misfit else "unexpected" if misfit.endswith("≠ -") else "shape"
        kinds.setdefault(kind, []).append(misfit if kind == "shape" else misfit.split()[0])
    for kind, names in kinds.items():
        yield "error", f"doctor_keys_{kind}", _some(names)


def _values(case: Case) -> Problems:
    """No NaN or infinity, and a B that is not all zero, as it is before the first step of a training."""
    import torch
    from safetensors import safe_open

    broken, zero, moved, others = [], [], 0, 0
    with safe_open(case.adapter.folder / WEIGHTS, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a dict)
            tensor = tensors.get_tensor(name)
            is_b = "lora_B" in name or "lora_embedding_B" in name
            others += not (is_b or "lora_A" in name or "lora_embedding_A" in name)
            if not torch.isfinite(tensor).all():
                broken.append(name)
            elif is_b and not tensor.any():
                zero.append(name)
            elif is_b:
                moved += 1
    if broken:
        yield "error", "doctor_not_finite", _some(broken)
    elif zero and not moved and not others:
        yield "error", "doctor_zero", {"count": len(zero)}
    elif zero:
        yield "warning", "doctor_some_zero", _some(zero) | {"all": len(zero) + moved}


def _probe(case: Case) -> Problems:
    if {"keys", "values"} & {*case.failed}:
        yield "warning", "doctor_not_probed", {}
        return
    effect, noise = probe(case.model, case.adapter)
    backend = case.model.backend
    told = {"effect": effect, "noise": noise, "engine": backend.name, "weights": backend.dtype}
    yield "ok", "doctor_ok_probe", told


CHECKS: dict[str, Callable[[Case], Problems]] = {
    check.__name__.strip("_"): check
    for check in (_files, _base, _template, _tokenizer, _vocabulary, _keys, _values, _probe)
}
