"""The adapter doctor: whether an adapter is whole, belongs to this base, and does something.

Every check returns findings and none ends the others, as Django's system checks do. Knows what an adapter
must be to be compared and served; knows nothing of questions, scores and arms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rag_kit.errors import ModelError, RagKitError, language, message
from rag_kit.manifest import fingerprint, sha256
from rag_kit.models.adapters import CONFIG, RECIPE, WEIGHTS, Adapter, adapter_of, first_line, misfits, shapes
from rag_kit.models.engine import choose_engine
from rag_kit.models.registry import entries, record_check
from rag_kit.models.render import encode_text

if TYPE_CHECKING:
    from pathlib import Path

    from rag_kit.models.lora import LoRALanguageModel
    from rag_kit.settings import Settings

# Questions and how an answer begins: the log-probability of its last token is what an adapter must move.
PROBES = (
    ("What is your name, and how long does a repair take?", "My name is"),
    ("你好，请介绍一下你自己。", "你好！我是"),
    ("How much does it cost?", "It costs"),
    ("多少钱？", "价格是"),
)
ABOVE_NOISE = 2  # times the noise
SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """What one check found: `ok`, `warning` (worth knowing) or `error` (not fit to be compared or served)."""

    check: str
    level: Literal["ok", "warning", "error"]
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Case:
    """One adapter and the model that is to use it; `failed` are the checks that found an error so far."""

    adapter: Adapter
    model: LoRALanguageModel
    failed: list[str]


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
    looked_at = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _files_of(adapter)]
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
    """Return by how much `adapter` moves log-probabilities (natural, at most), and how much noise alone does.

    Noise is what lies between the base's log-probability of a token read after the whole prompt and that of
    the same token given as part of an answer, and never less than a float32 can tell apart. Raises ModelError
    where the adapter moves nothing beyond twice the noise, or to no number.
    """
    import numpy as np
    from langchain_core.messages import HumanMessage

    backend, effects, noises = model.backend, [], []
    with backend.holding(adapter) as key:
        for question, begun in PROBES:
            ids = list(model.render([HumanMessage(question)]).ids)
            answer = encode_text(backend.tokenizer, begun)
            base, ours = (backend.next_logprobs([*ids, *answer[:-1]], one)[answer[-1]] for one in (None, key))
            effects.append(abs(ours - base))
            noises.append(max(abs(backend.score(ids, answer, None)[-1] - base), np.spacing(abs(base))))
    effect, noise = (float(f"{np.max(values):.3g}") for values in (effects, noises))
    if not ABOVE_NOISE * noise < effect < float("inf"):
        raise ModelError("adapter_without_effect", adapter=adapter.name, effect=effect, noise=noise)
    return effect, noise


def _model(settings: Settings) -> LoRALanguageModel:
    from rag_kit.models.lora import LoRALanguageModel

    return LoRALanguageModel(settings=settings)


def _files_of(adapter: Adapter) -> list[Path]:
    return sorted(file for file in adapter.folder.iterdir() if file.is_file() and file.name[0] != ".")


def _look(adapter: Adapter, model: LoRALanguageModel) -> tuple[list[Finding], bool]:
    """Return the findings, and whether they are all about the adapter: no check broke for another reason."""
    findings: list[Finding] = []
    case, whole = Case(adapter, model, []), True
    for name, check in CHECKS.items():
        try:
            found = list(check(case))
        except RagKitError as error:
            found = [Finding(name, "error", *error.text())]
            whole = whole and error.key.startswith("adapter_")
        except Exception as error:  # a check that breaks must not hide the others
            reason = f"{type(error).__name__}: {first_line(error)}"
            found, whole = [_found(name, "error", "doctor_broke", what=name, reason=reason)], False
        case.failed.extend(one.check for one in found if one.level == "error")
        findings += found or [Finding(name, "ok", message(f"doctor_ok_{name}"))]
    return findings, whole


def _found(check: str, level: Literal["warning", "error"], key: str, **values: object) -> Finding:
    return Finding(check, level, *ModelError(key, **values).text())


def _some(names: list[str]) -> str:
    """The first few, and how many there are."""
    rest = [f"… ({len(names)})"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *rest])


def _files(case: Case) -> Iterator[Finding]:
    """Against the hashes of the recipe."""
    adapter = case.adapter
    for file, expected in ((adapter.recipe or {}).get("files") or {}).items():
        if sha256(adapter.folder / file) != expected.get("sha256"):
            level: Literal["warning", "error"] = "error" if file in (CONFIG, WEIGHTS) else "warning"
            yield _found("files", level, "doctor_file_changed", path=adapter.folder / file, recipe=RECIPE)


def _base(case: Case) -> Iterator[Finding]:
    adapter, base = case.adapter, case.model.base_model
    if not ((adapter.recipe or {}).get("base") or {}).get("fingerprint"):
        yield _found("base", "warning", "doctor_base_unknown", adapter=adapter.name, base=base.name)
    adapter.check_base(base)


def _template(case: Case) -> Iterator[Finding]:
    """By the recipe's hash; without one by the template beside the weights, which may have gone unused."""
    adapter, base = case.adapter, case.model.base_model
    ours = base.fingerprint()["chat_template_hash"]
    theirs = (adapter.recipe or {}).get("chat_template_hash")
    level: Literal["warning", "error"] = "error" if theirs else "warning"
    file = adapter.folder / "chat_template.jinja"
    if theirs is None and file.is_file():
        theirs = fingerprint(file.read_bytes())
    if theirs and theirs != ours:
        told = {"ours": str(ours)[:8], "theirs": theirs[:8], "base": base.name, "adapter": adapter.name}
        yield _found("template", level, "doctor_template", **told)


def _tokenizer(case: Case) -> Iterator[Finding]:
    adapter, base = case.adapter, case.model.base_model
    ours, theirs = base.fingerprint()["tokenizer_hash"], (adapter.recipe or {}).get("tokenizer_hash")
    if theirs and theirs != ours:
        told = {"ours": ours[:8], "theirs": theirs[:8], "base": base.name, "adapter": adapter.name}
        yield _found("tokenizer", "error", "doctor_tokenizer", **told)


def _vocabulary(case: Case) -> Iterator[Finding]:
    """Of the tokenizer beside the weights, and of embeddings among them."""
    from transformers import AutoConfig

    adapter, base = case.adapter, case.model.base_model
    told: dict[str, Any] = {"adapter": adapter.name, "base": base.name}
    theirs, ours = (folder / "tokenizer.json" for folder in (adapter.folder, base.folder))
    differ = theirs.is_file() and ours.is_file() and sha256(theirs) != sha256(ours)
    if differ and (others := sorted(_tokens(theirs) - _tokens(ours))):  # reading both takes seconds
        told |= {"tokens": _some([repr(token) for token, _ in others]), "count": len(others)}
        yield _found("vocabulary", "error", "doctor_vocabulary", **told)
    rows = AutoConfig.from_pretrained(base.folder, trust_remote_code=False).get_text_config().vocab_size
    for name, shape in shapes(adapter.folder / WEIGHTS).items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and shape[0] != rows:
            told |= {"tensor": name, "found": shape[0], "rows": rows}
            yield _found("vocabulary", "error", "doctor_resized", **told)


def _tokens(file: Path) -> set[tuple[str, int]]:
    """Return every token of a tokenizer with its id."""
    held = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = held["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score), the place is the id
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {*vocabulary.items(), *((token["content"], token["id"]) for token in held["added_tokens"])}


def _keys(case: Case) -> Iterator[Finding]:
    """Every tensor that is missing, too many, or of another shape."""
    kinds: dict[str, list[str]] = {}
    for misfit in misfits(case.adapter, case.model.base_model):
        kind = "missing" if " - ≠ " in misfit else "unexpected" if misfit.endswith("≠ -") else "shape"
        kinds.setdefault(kind, []).append(misfit if kind == "shape" else misfit.split()[0])
    for kind, names in kinds.items():
        told = {"adapter": case.adapter.name, "base": case.model.base_model.name, "count": len(names)}
        yield _found("keys", "error", f"doctor_keys_{kind}", **told, tensors=_some(names))


def _values(case: Case) -> Iterator[Finding]:
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
    told: dict[str, Any] = {"adapter": case.adapter.name}
    if broken:
        yield _found("values", "error", "doctor_not_finite", **told, count=len(broken), tensors=_some(broken))
    if zero and not moved and not others and not broken:
        yield _found("values", "error", "doctor_zero", **told, count=len(zero))
    elif zero:
        told |= {"count": len(zero), "all": len(zero) + moved}
        yield _found("values", "warning", "doctor_some_zero", **told, tensors=_some(zero))


def _probe(case: Case) -> Iterator[Finding]:
    if {"keys", "values"} & {*case.failed}:
        yield _found("probe", "warning", "doctor_not_probed")
        return
    effect, noise = probe(case.model, case.adapter)
    backend = case.model.backend
    told: dict[str, Any] = {
        "effect": effect,
        "noise": noise,
        "engine": backend.name,
        "weights": backend.dtype,
    }
    yield Finding("probe", "ok", message("doctor_ok_probe", **told))


CHECKS: dict[str, Callable[[Case], Iterator[Finding]]] = {
    check.__name__.strip("_"): check
    for check in (_files, _base, _template, _tokenizer, _vocabulary, _keys, _values, _probe)
}
