"""What a file is asked to be compared with another one: its log-probabilities, and the time of an answer.

The texts are the sample handbook's, English and Chinese, as plain text and in a chat. Knows how the engine
process is asked; knows nothing of which file is good.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from rag_kit.data.loaders import sample_handbook
from rag_kit.errors import ModelError, message
from rag_kit.models.llamacpp.gguf import Gguf
from rag_kit.models.llamacpp.process import EngineProcess

if TYPE_CHECKING:
    import httpx

CONTEXT, PROMPT, ANSWER = 1024, 640, 48  # tokens: of the engine, and of a request like that of RAG
POSITIONS, NAMED = 64, 500  # of each text, and of most probable tokens at each
TEXTS = ("en/tidewright-m3.md", "zh/wengcheng-w3.md", "en/veltra-k7.md")

Rows = list[dict[int, float]]


class Probe(NamedTuple):
    """A text as token ids, and its first position to compare."""

    ids: list[int]
    first: int


@dataclass(frozen=True)
class Served:
    """A file that is being served, and the way to our routes there."""

    process: EngineProcess
    client: httpx.Client

    def ask(self, route: str, **body: Any) -> list[dict[str, Any]]:
        """Return the lines of the answer; raises ModelError where the engine refuses, or is gone."""
        import httpx

        try:
            reply = self.client.post(f"/engine/{route}", json=body)
        except httpx.HTTPError as error:
            raise self.process.lost(error) from error
        lines = [json.loads(line) for line in reply.text.splitlines()]
        if "error" in lines[-1]:
            raise ModelError("engine_said", reason=lines[-1]["error"])
        return lines

    def processor_s(self) -> float:
        """Return the processor time that the engine has taken: what else runs here does not change it."""
        import psutil

        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@contextmanager
def served(path: Path, adapters: Mapping[str, Path] = MappingProxyType({})) -> Iterator[Served]:
    """Serve a file, with these adapters, for the block."""
    import httpx

    with EngineProcess(path, name="probe", context=CONTEXT, adapters=adapters) as engine:
        how: dict[str, Any] = {"headers": engine.headers, "trust_env": False, "timeout": None}
        with httpx.Client(base_url=engine.url, **how) as client:
            yield Served(engine, client)


def probes(engine: Served, gguf: Gguf) -> tuple[list[Probe], list[int]]:
    """Return the texts to be compared, the chat last, and the prompt to be timed."""
    texts = [(sample_handbook() / name).read_text(encoding="utf-8") for name in TEXTS]
    english, chinese, other = (engine.ask("tokenize", text=text)[0]["ids"] for text in texts)
    bos = gguf.metadata.get("tokenizer.ggml.bos_token_id")
    begin = [] if bos is None or gguf.metadata.get("tokenizer.ggml.add_bos_token") is False else [bos]
    limit = gguf.context(CONTEXT) - 1
    chat = engine.ask("tokenize", text=_chat(gguf, texts[2][:600]), special=True)[0]["ids"] or other
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


def rows(engine: Served, texts: list[Probe], adapter: str | None = None) -> Rows:
    """Return the most probable tokens at each position to compare: {id: log-probability}."""
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": 1}
    how = {"options": options, "logprobs": NAMED, "cache": True, "adapter": adapter}
    prompts = [text.ids[:at] for text in texts for at in range(text.first, len(text.ids))]
    return [dict(map(tuple, engine.ask("generate", ids=ids, **how)[0]["top"])) for ids in prompts]


def timed(engine: Served, prompt: list[int]) -> dict[str, float]:
    """Return `prefill` and `decode` (tokens/s), and of the answer `answer_s` and processor time `cpu_s`."""
    options = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": ANSWER, "ignore_eos": True}
    start = engine.processor_s()
    last = engine.ask("generate", ids=prompt, options=options)[-1]
    read, wrote = (last[f"{what}_duration"] / 1e9 for what in ("prompt_eval", "eval"))
    # an answer's first token comes of the prompt
    speed = {"prefill": len(prompt) / read, "decode": (last["eval_count"] - 1) / wrote}
    return {**speed, "answer_s": read + wrote, "cpu_s": engine.processor_s() - start}
