"""What a file is asked to be compared with another one: its log-probabilities, and the time of an answer.

The texts are the sample handbook's, English and Chinese, as plain text and in a chat. Knows how the engine
process is asked; knows nothing of which file is good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from rag_kit.data.loaders import sample_handbook
from rag_kit.errors import ModelError, message
from rag_kit.models.llamacpp.gguf import Gguf
from rag_kit.models.llamacpp.process import EngineProcess

CONTEXT, PROMPT, ANSWER = 1024, 640, 48  # tokens: of the engine, and of a request like that of RAG
POSITIONS, NAMED = 64, 500  # of each text, and of most probable tokens at each
TEXTS = ("en/tidewright-m3.md", "zh/wengcheng-w3.md", "en/veltra-k7.md")

Ask = Callable[..., list[dict[str, Any]]]
Rows = list[dict[int, float]]


class Probe(NamedTuple):
    """A text as token ids, and its first position to compare."""

    ids: list[int]
    first: int


@contextmanager
def asked(path: Path, adapters: Mapping[str, Path] = MappingProxyType({})) -> Iterator[Ask]:
    """Serve a file; yields what posts to a route of ours there and returns the lines of the answer."""
    import httpx

    with EngineProcess(path, name="probe", context=CONTEXT, adapters=adapters) as engine:
        how: dict[str, Any] = {"headers": engine.headers, "trust_env": False, "timeout": None}
        with httpx.Client(base_url=engine.url, **how) as client:

            def ask(route: str, **body: Any) -> list[dict[str, Any]]:
                try:
                    reply = client.post(f"/engine/{route}", json=body)
                except httpx.HTTPError as error:
                    raise ModelError("engine_lost", reason=error) from error
                lines = [json.loads(line) for line in reply.text.splitlines()]
                if "error" in lines[-1]:
                    raise ModelError("engine_said", reason=lines[-1]["error"])
                return lines

            yield ask


def probes(ask: Ask, gguf: Gguf) -> tuple[list[Probe], list[int]]:
    """Return the texts to be compared, the chat last, and the prompt to be timed."""
    texts = [(sample_handbook() / name).read_text(encoding="utf-8") for name in TEXTS]
    english, chinese, other = (ask("tokenize", text=text)[0]["ids"] for text in texts)
    bos = gguf.metadata.get("tokenizer.ggml.bos_token_id")
    begin = [] if bos is None or gguf.metadata.get("tokenizer.ggml.add_bos_token") is False else [bos]
    limit = gguf.context(CONTEXT) - 1
    chat = ask("tokenize", text=_chat(gguf, texts[2][:600]), special=True)[0]["ids"] or other
    found = [Probe((begin + ids)[: min(POSITIONS, limit)], 1) for ids in (english, chinese)]
    last = chat[-limit:]
    found.append(Probe(last, max(len(last) - POSITIONS, 1)))
    return found, (begin + english + other)[: min(PROMPT, limit - ANSWER)]


def _chat(gguf: Gguf, text: str) -> str:
    """Return a question about `text` by the file's chat template, and the beginning of the text as answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    known, told = gguf.metadata["tokenizer.ggml.tokens"], gguf.metadata
    named = {f"{end}_token": known[told.get(f"tokenizer.ggml.{end}_token_id", 0)] for end in ("bos", "eos")}
    chat = [{"role": "user", "content": message("serving_probe", lang="en", text=text)}]
    how = {"chat_template": gguf.template, "add_generation_prompt": True, **named}
    try:
        return str(render_jinja_template([chat], **how)[0][0]) + text[:200]
    except Exception:  # whatever a template raises, or none is there
        return ""


def rows(ask: Ask, texts: list[Probe], adapter: str | None = None) -> Rows:
    """Return the most probable tokens at each position to compare: {id: log-probability}."""
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": 1}
    how = {"options": options, "logprobs": NAMED, "cache": True, "adapter": adapter}
    prompts = [text.ids[:at] for text in texts for at in range(text.first, len(text.ids))]
    return [dict(map(tuple, ask("generate", ids=ids, **how)[0]["top"])) for ids in prompts]


def timed(ask: Ask, prompt: list[int]) -> list[float]:
    """Return prefill and decode (tokens/s) and the seconds of an answer; its first token is the prefill's."""
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": ANSWER, "ignore_eos": True}
    last = ask("generate", ids=prompt, options=options)[-1]
    read, wrote = (last[f"{what}_duration"] / 1e9 for what in ("prompt_eval", "eval"))
    return [len(prompt) / read, (last["eval_count"] - 1) / wrote, read + wrote]
