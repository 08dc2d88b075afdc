"""One answer: a model, a question, its passages, and what came of it.

Knows the one prompt and the stream of a chat model; knows nothing of indexes or of which model to ask.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rag_kit.data.language import detect_language
from rag_kit.errors import ModelError, RagKitError, ServiceError
from rag_kit.manifest import fingerprint
from rag_kit.models.options import GenerationOptions
from rag_kit.models.prompt import build_messages

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessageChunk, BaseMessage

    from rag_kit.index.hit import Hit

OFF = GenerationOptions()
IN_ONE_PIECE = 10_000  # tokens a second: faster than this the answer was not streamed, and shows no speed
_CITED = re.compile(r"[\[【［〔]\s*(\d{1,3}(?:\s*[,，、;；]\s*\d{1,3})*)\s*[\]】］〕]")


@dataclass(frozen=True)
class Answer:
    """An answer with its evidence.

    `reasoning` is never scored, cited or fed back; `citations` are numbers of `sources`, from 1;
    `usage` counts tokens (`input_tokens`, `output_tokens`), absent where the server does not say;
    `timings` are seconds (`retrieval_s`, `load_s`, `first_token_s`, `total_s`); `degraded` says what was
    missing and why.
    """

    text: str
    model: str
    sources: tuple[Hit, ...] = ()
    citations: tuple[int, ...] = ()
    reasoning: str = ""
    finish_reason: str = ""
    usage: dict[str, int] | None = None
    timings: dict[str, float] | None = None
    prompt_hash: str = ""
    degraded: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text}\n\n{self.evidence()}".strip()

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of decoding: (output tokens - 1) / (total - first token seconds).

        The first token's time is the prompt's. None where it is not known, or came in one piece.
        """
        times, tokens = self.timings or {}, (self.usage or {}).get("output_tokens") or 0
        if tokens < 2 or not {"first_token_s", "total_s"} <= times.keys():
            return None
        seconds = times["total_s"] - times["first_token_s"]
        return (tokens - 1) / seconds if seconds > (tokens - 1) / IN_ONE_PIECE else None

    def evidence(self) -> str:
        """Return the sources, the cited ones starred, then what answered and what was degraded."""
        lines = []
        for number, hit in enumerate(self.sources, 1):
            place = f"{hit.document.metadata.get('source')}:{hit.document.metadata.get('start')}"
            lines.append(f"{'*' if number in self.citations else ' '}[{number}] {place} ({hit.score:.3f})")
        seconds = (self.timings or {}).get("total_s", 0.0)
        lines.append(f"{self.model} · {seconds:.1f} s")
        return "\n".join([*lines, *(f"! {note}" for note in self.degraded)])


def citations_in(text: str, sources: int) -> tuple[int, ...]:
    """Return the numbers of sources cited in `text`, as `[1]`, `【1】` or `[1, 2]`, in order, once each."""
    numbers = (int(number) for found in _CITED.findall(text) for number in re.findall(r"\d+", found))
    return tuple(dict.fromkeys(number for number in numbers if 1 <= number <= sources))


def answer(model: BaseChatModel, question: str, passages: Sequence[Hit] = (), **how: Any) -> Answer:
    """Return the model's answer to `question` from `passages`; `how` as for `stream_answer`."""
    *_, last = stream_answer(model, question, passages, **how)
    assert isinstance(last, Answer)
    return last


def stream_answer(
    model: BaseChatModel,
    question: str,
    passages: Sequence[Hit] = (),
    *,
    language: str | None = None,
    options: GenerationOptions | None = None,
    history: Sequence[tuple[str, str]] = (),
    reference: str | None = None,
    system: str | None = None,
) -> Iterator[str | Answer]:
    """Yield the pieces of the answer's text as they come, and last the whole Answer.

    Raises what the model raises: ModelError, ServiceError.
    """
    language = language or detect_language(question)
    texts = [hit.document.page_content for hit in passages]
    messages = build_messages(question, texts, language=language, history=history, system=system)
    reference = reference or str(getattr(model, "model", "") or type(model).__name__)
    start, first, whole = time.perf_counter(), None, None
    text = held = ""  # blank space at the end of a piece waits: none ends the answer
    for chunk in _chunks(model, messages, options, reference):
        if first is None and (chunk.text or chunk.additional_kwargs.get("reasoning_content")):
            first = time.perf_counter() - start
        whole = chunk if whole is None else whole + chunk
        held += str(chunk.text)
        piece = held.rstrip() if text else held.strip()
        if piece:
            held = held[len(held.rstrip()) :]
            text += piece
            yield piece
    total = time.perf_counter() - start
    if whole is None:
        raise ModelError("empty_stream", reference=reference)
    told = whole.response_metadata
    counts = whole.usage_metadata
    usage = {name: counts[name] for name in ("input_tokens", "output_tokens")} if counts else {}  # type: ignore[literal-required]
    timings = {"total_s": total} | ({} if first is None else {"first_token_s": first})
    yield Answer(
        text=text,
        # a local model tells which adapter `lora` was
        model=str(told["model_name"]) if told.get("model_provider") == "rag-kit" else reference,
        sources=tuple(passages),
        citations=citations_in(text, len(passages)),
        reasoning=str(whole.additional_kwargs.get("reasoning_content", "")),
        finish_reason=str(told.get("finish_reason") or told.get("done_reason") or ""),
        usage=usage,
        timings=timings,
        degraded=tuple(told.get("degraded", ())),
        prompt_hash=told.get("prompt_hash") or fingerprint([[m.type, str(m.text)] for m in messages]),
    )


def _chunks(
    model: BaseChatModel, messages: Sequence[BaseMessage], options: GenerationOptions | None, reference: str
) -> Iterator[AIMessageChunk]:
    """Yield the model's chunks; what a provider's own package raises becomes a ServiceError."""
    try:
        yield from model.stream(list(messages), **_request(model, options))
    except RagKitError:
        raise
    except Exception as error:
        if _is_ours(model):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ServiceError("provider_broke", reference=reference, reason=reason) from error


def _is_ours(model: BaseChatModel) -> bool:
    return type(model).__module__.startswith("rag_kit.")


def _request(model: BaseChatModel, options: GenerationOptions | None) -> dict[str, Any]:
    """Return the keywords that carry `options` to this kind of model."""
    if options is None:
        return {}
    if _is_ours(model):
        return {"options": options}
    request: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_tokens": options.max_new_tokens,
    }
    if type(model).__module__.startswith("langchain_openai"):
        request["seed"] = options.seed
        # OpenAI itself refuses these; vLLM and llama.cpp take them, and all have them off by default
        names = ("top_k", "min_p", "repetition_penalty")
        own = {name: getattr(options, name) for name in names}
        if extra := {name: value for name, value in own.items() if value != getattr(OFF, name)}:
            request["extra_body"] = extra
    return request | ({"stop": list(options.stop)} if options.stop else {})
