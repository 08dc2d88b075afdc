"""Ollama's bodies: what is asked, with Ollama's own defaults, and what is answered.

Knows names and forms; knows nothing of HTTP or of llama.cpp.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from rag_kit.errors import ModelError, message
from rag_kit.models.llamacpp.gguf import Gguf

UNSERVED = ("images", "tools", "suffix", "template", "context", "dimensions", "logprobs")


class Sampling(BaseModel):
    """The options that have an effect; what else Ollama knows is for its own runner and is passed over."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = -1
    ignore_eos: bool = False
    stop: list[str] | str = []
    num_predict: int = -1
    num_ctx: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    def limit(self, context: int) -> int:
        """Return the tokens that prompt and answer may have; raises ModelError where `context` has fewer."""
        if (self.num_ctx or 0) > context:
            raise ModelError("engine_context_beyond", asked=self.num_ctx, context=context)
        return self.num_ctx or context

    def after(self, tokens: int, context: int) -> dict[str, Any]:
        """Return llama.cpp's sampling after a prompt of `tokens`; raises ModelError where it does not fit."""
        limit = self.limit(context)
        if tokens >= limit:
            raise ModelError("engine_prompt_too_long", tokens=tokens, limit=limit)
        room = limit - tokens
        new = min(self.num_predict, room) if self.num_predict > 0 else room
        stop = [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop) if text]
        looked_at = {} if self.repeat_last_n >= 0 else {"repeat_last_n": context}  # -1 is the whole of it
        sent = self.model_dump(exclude={"num_predict", "num_ctx"})
        return {**sent, **looked_at, "stop": stop, "n_predict": new}


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]  # a template takes it as its own text
    content: str = ""


class Asked(BaseModel):
    """What can be asked of a model; other fields are kept, so that they can be refused by name."""

    model_config = ConfigDict(extra="allow")
    model: str
    stream: bool = True
    options: Sampling = Sampling()
    keep_alive: str | float | None = None
    think: bool | str | None = None
    format: str | dict[str, Any] | None = None
    messages: list[Message] = []  # of a chat
    prompt: str = ""
    system: str = ""
    raw: bool = False
    input: str | list[str] = []  # to be embedded
    truncate: bool = True

    @property
    def leaves(self) -> bool:
        """Whether the model shall be unloaded afterwards."""
        return str(self.keep_alive).rstrip("smh") in ("0", "0.0")

    def refusal(self) -> str | None:
        """Return why this cannot be answered, in Ollama's words where it has some."""
        field = next((field for field in UNSERVED if (self.model_extra or {}).get(field)), None)
        if self.think:
            return f'"{self.model}" does not support thinking'
        if field == "tools":
            return f"{self.model} does not support tools"
        return message("engine_unserved", field=field) if field else None

    def grammar(self) -> dict[str, Any]:
        """Return what llama.cpp takes for `format`: `json`, or a schema."""
        schema = {"type": "object"} if isinstance(self.format, str) else self.format
        return {"json_schema": schema} if self.format else {}


class Own(BaseModel):
    """What our own routes take: `text` to ids, where control tokens are recognised only if `special`, or
    `ids` to an answer, with so many `logprobs` of each token, or an `answer` to be scored. With `cache`, what
    the adapter's last prompt begins with too is not computed again.
    """

    text: str = ""
    special: bool = False
    ids: list[int] = []
    options: Sampling = Sampling()
    answer: list[int] = []
    logprobs: int = 0
    adapter: str | None = None
    cache: bool = False


def time_of(timestamp: float) -> str:
    """Return a time as Ollama writes it."""
    return datetime.fromtimestamp(timestamp, UTC).isoformat().replace("+00:00", "Z")


def entry(gguf: Gguf, name: str, digest: str, base: str = "", adapter: Path | None = None) -> dict[str, Any]:
    """Return the model's entry in the list of models: that of a base, or of an adapter on it."""
    size = gguf.size + (adapter.stat().st_size if adapter and adapter.exists() else 0)
    named = {"name": name, "model": name, "size": size, "digest": digest}
    when = time_of(gguf.path.stat().st_mtime)
    return {**named, "modified_at": when, "details": _details(gguf, base)}


def shown(gguf: Gguf, base: str = "", adapter: Path | None = None) -> dict[str, Any]:
    """Return the answer to `POST /api/show`; long lists are left out, as Ollama leaves them out."""
    info = {key: None if isinstance(value, list) and len(value) > 64 else value
            for key, value in gguf.metadata.items() if key != "tokenizer.chat_template"}  # fmt: skip
    return {
        "modelfile": f"FROM {gguf.path.name}" + (f"\nADAPTER {adapter.name}" if adapter else ""),
        "template": gguf.template or "",
        "details": _details(gguf, base),
        "model_info": info | {"general.parameter_count": gguf.parameters},
        "capabilities": ["completion"] if adapter else ["completion", "embedding"],
    }


def _details(gguf: Gguf, base: str) -> dict[str, Any]:
    count, family = gguf.parameters, gguf.architecture
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
    kind = {"format": "gguf", "family": family, "families": [family], "parent_model": base}
    return {**kind, "parameter_size": size, "quantization_level": gguf.quantization}
