"""The guard of fair comparisons: what is the same base, and what else tells two ways of serving apart.

The same base has the same architecture, tokens and merges, and the same values in two norm tensors, which
every file format keeps; the block type of the rest is a factor. Knows files, and what Ollama tells of its
models; knows nothing of arms and rows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import ollama
from langchain_core.messages import BaseMessage

from rag_kit.embedded import base_gguf
from rag_kit.errors import ModelError, RagKitError, message
from rag_kit.manifest import fingerprint, sha256
from rag_kit.models.base import PROBE_TOLERANCE, PROBED, Base
from rag_kit.models.blobs import blob_of
from rag_kit.models.llamacpp.gguf import Gguf, read_gguf
from rag_kit.models.render import Rendered, render, text_of
from rag_kit.models.standin import find_ollama
from rag_kit.ollama import LOOK_S, explaining

if TYPE_CHECKING:
    from rag_kit.settings import Settings

NORMS = dict(zip(PROBED, ("output_norm.weight", "blk.0.attn_norm.weight"), strict=True))
OWN_NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}  # model types that GGUF calls otherwise
BEGIN = ("llama3", "llama-v3", "llama-bpe")  # pre-tokenizers that begin a text by themselves, unsaid
CUT = 0.9  # fewer tokens than this share of a prompt, and the server has cut it


@dataclass(frozen=True)
class Weights:
    """What a model's weights are; None is what nobody told. `file` is the SHA-256 of its GGUF."""

    architecture: str | None = None
    tokens: str | None = None
    merges: str | None = None
    tensors: Mapping[str, Sequence[float]] | None = None
    file: str | None = None

    def against(self, other: Weights) -> str:
        """Return "" where both are the same base, else what differs (≠ …) or was not told (? …)."""
        if self.file and self.file == other.file:
            return ""
        mine, theirs = vars(self), vars(other)
        parts = ("architecture", "tokens", "tensors")
        unknown = [part for part in parts if not mine[part] or not theirs[part]]
        pairs = [(p, mine[p], theirs[p]) for p in (*parts, "merges") if mine[p] and theirs[p]]
        differing = [part for part, a, b in pairs if not (_close(a, b) if part == "tensors" else a == b)]
        return f"≠ {', '.join(differing)}" if differing else f"? {', '.join(unknown)}" if unknown else ""


@dataclass(frozen=True)
class Served:
    """How a model answers: its `factors` by name; `same_base` gets the prompt that the local arms get."""

    factors: dict[str, str]
    same_base: bool = False


@dataclass(frozen=True)
class RawPrompt:
    """Our prompt as a string, for a server that takes no ids; `notes` say what could not be kept."""

    text: str
    rendered: Rendered
    notes: tuple[str, ...] = field(default=())
    alike: bool = True  # whether the string is cut into the ids again, as far as our tokenizer tells

    def checked(self, count: int | None) -> tuple[str, ...]:
        """Return what is to be said of a server that counted so many tokens; ModelError where it cut them."""
        ours = len(self.rendered.ids)
        if count is not None and count < CUT * ours:
            raise ModelError("parity_cut", ours=ours, theirs=count)
        if count == ours and self.alike:
            return self.notes
        return *self.notes, message("parity_count", ours=ours, theirs="?" if count is None else count)


@lru_cache(maxsize=4)
def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of the base in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def raw_prompt(
    tokenizer: Any, messages: Sequence[BaseMessage], *, begins: bool = False, think: bool | None = None
) -> RawPrompt:
    """Return `messages` as the one string that becomes the renderer's ids where control tokens are read.

    What would be a control token in foreign text gets a blank inside, and a note says so. `begins`: the
    server puts the first token before every text by itself.
    """
    named = [name for name in tokenizer.get_added_vocab() if re.fullmatch(r"\S{2,}", name)]
    foreign = [text_of(one) for one in messages]
    harmless = [_neutral(text, named) for text in foreign]
    safe = [one.model_copy(update={"content": text}) for one, text in zip(messages, harmless, strict=True)]
    rendered = render(tokenizer, safe, enable_thinking=bool(think))
    text = rendered.text
    alike = tuple(tokenizer.encode(text, add_special_tokens=False)) == rendered.ids
    if begins and tokenizer.bos_token and rendered.ids[:1] == (tokenizer.bos_token_id,):
        text = text.removeprefix(tokenizer.bos_token)
    notes = () if foreign == harmless else (message("parity_neutralised"),)
    return RawPrompt(text, rendered, notes, alike)


def begins_itself(info: Mapping[str, Any]) -> bool:
    """Whether a GGUF's metadata say that its first token is put before every text."""
    said = info.get("tokenizer.ggml.add_bos_token")
    unsaid = info.get("tokenizer.ggml.model") == "llama" or info.get("tokenizer.ggml.pre") in BEGIN
    return unsaid if said is None else bool(said)


@lru_cache(maxsize=4)
def weights_of_base(base: Base) -> Weights:
    """Return what the base in a Hugging Face folder is."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    kind, tokenizer = config["model_type"], tokenizer_of(base.folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model.get("merges") or ()]
    return Weights(
        architecture=OWN_NAMES.get(kind, kind),
        tokens=_hash({number: token for token, number in tokenizer.get_vocab().items()}),
        merges=fingerprint(merges) if merges else None,
        tensors=base.fingerprint()["tensor_probe"],
        file=sha256(base.gguf) if base.gguf else None,
    )


def weights_of_gguf(gguf: Gguf) -> Weights:
    """Return what the model in a GGUF is."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    tensors, told = {}, weights_told(gguf.metadata)
    with gguf.path.open("rb") as file:
        for name, own in NORMS.items():
            if (tensor := gguf.tensors.get(own)) is not None:
                file.seek(tensor.offset)
                data = np.frombuffer(file.read(32 if tensor.kind == 0 else 16), dtype=np.uint8)
                values = dequantize(data, GGMLQuantizationType(tensor.kind)).ravel()[:8]
                shift = 1.0 if gguf.architecture.startswith("gemma") else 0.0  # its converter adds one
                tensors[name] = [round(float(value) - shift, 6) for value in values]
    return Weights(told.architecture, told.tokens, told.merges, tensors)


def weights_told(info: Mapping[str, Any], file: str | None = None) -> Weights:
    """Return what a GGUF's metadata tell, without its tensors."""
    tokens, merges = info.get("tokenizer.ggml.tokens"), info.get("tokenizer.ggml.merges")
    hashed = _hash(dict(enumerate(tokens))) if tokens else None
    merged = fingerprint(merges) if merges else None
    return Weights(info.get("general.architecture"), hashed, merged, file=file)


def served_by_ollama(model: str, settings: Settings, base: Base | None, think: bool | None = None) -> Served:
    """Return how Ollama's (or the stand-in's) `model` answers beside `base`, if there is one.

    Of another model the factor `base` says what differs (≠) or was not told (?). Raises ServiceError where
    nobody answers for it, ModelError where the server does not say what it is.
    """
    server = find_ollama(settings, model)
    stands_in = server.state == "stand-in"
    gguf = None
    with suppress(RagKitError):  # its file is not on this machine, or cannot be read: then /api/show must do
        file = base_gguf(settings.cache_dir) if stands_in else blob_of(model)
        gguf = read_gguf(file) if file else None
    with explaining(server.url, model, server.headers):
        told, version = _ask(server.url, server.headers, model, verbose=base is not None and gguf is None)
    details, info = told["details"], told.get("model_info") or {}
    modelfile, template = told.get("modelfile") or "", told.get("template")
    blob = re.search(r"^FROM\s.*sha256[-:]([0-9a-f]{64})", modelfile, re.MULTILINE)
    if gguf and blob and not stands_in and blob[1] not in gguf.path.name:
        gguf = None  # of another machine's Ollama: the file here only has its name
    family = info.get("general.architecture") or details.get("family")
    weights = gguf.quantization if gguf else details.get("quantization_level")
    own = re.search(r"^RENDERER\s+(\S+)", modelfile, re.MULTILINE)
    prompt = own[1] if own else template and f"template {fingerprint(template.encode())[:8]}"
    said = {"architecture": family, "quantization": weights, "template": prompt}
    if missing := [name for name, value in said.items() if not value]:
        raise ModelError("parity_undeclared", model=model, url=server.url, missing=", ".join(missing))
    difference = ""
    if base is not None:
        told_of = weights_told(info | {"general.architecture": family}, blob and blob[1])
        difference = weights_of_base(base).against(weights_of_gguf(gguf) if gguf else told_of)
    same = base is not None and not difference
    size = " ".join(filter(None, (family, details.get("parameter_size"))))
    adapter = " + ADAPTER" if re.search(r"^ADAPTER\s", modelfile, re.MULTILINE) else ""
    capable = told.get("capabilities")
    factors = {
        "engine": "llama.cpp" if stands_in else f"Ollama {version}",
        "weights": str(weights),
        "base": (base.name if base and same else f"{size} ({difference})" if base else size) + adapter,
        "prompt": "ours" if same else str(prompt),
        "thinking": "?" if capable is None else thinking("thinking" in capable, think),
    }
    return Served(factors, same)


def thinking(capable: bool, asked: bool | None) -> str:
    """Return the factor of a model that is asked to think, or not: `no` where it cannot."""
    return ("on" if asked else "off") if capable else "no"


def _ask(url: str, headers: Mapping[str, str], model: str, verbose: bool) -> tuple[dict[str, Any], str]:
    """Return what `/api/show` says of a model, the list's details among it, and the server's version."""
    with httpx.Client(base_url=url, headers=dict(headers), trust_env=False, timeout=LOOK_S) as asked:
        reply = asked.post("/api/show", json={"model": model, "verbose": verbose})
        if not reply.is_success:
            raise ollama.ResponseError(reply.text, reply.status_code)
        told: dict[str, Any] = reply.json()
        name = model if ":" in model else f"{model}:latest"
        listed = {one.get("name"): one.get("details") for one in asked.get("/api/tags").json()["models"]}
        told["details"] = (listed.get(name) or {}) | (told.get("details") or {})
        return told, str(asked.get("/api/version").json()["version"])


def _hash(tokens: Mapping[int, str]) -> str:
    """Hash tokens by number, without those that only fill a matrix up."""
    return fingerprint([one for one in sorted(tokens.items()) if not re.fullmatch(r"\[PAD\d+\]", one[1])])


def _close(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> bool:
    both = ours.keys() & theirs.keys()
    pairs = [pair for name in both for pair in zip(ours[name], theirs[name], strict=False)]
    return bool(pairs) and all(math.isclose(a, b, rel_tol=PROBE_TOLERANCE, abs_tol=1e-5) for a, b in pairs)


def _neutral(text: str, named: Sequence[str]) -> str:
    """Put a blank into whatever `named` stands in `text`, until nothing of it is left."""
    found = re.compile("|".join(map(re.escape, named)) or "(?!)")
    while (safe := found.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", text)) != text:
        text = safe
    return text
