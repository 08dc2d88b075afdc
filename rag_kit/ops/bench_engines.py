"""The bench `engines`: how long loading, the first token, each further token and an answer take, by arm.

Knows the arms that are at hand and what an engine's speed is bounded by; knows nothing of processes. One
definition holds for all engines: tokens a second = (n - 1) / (time of the last token - time of the first).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_kit import embedded
from rag_kit.errors import RagKitError, StoreError, message
from rag_kit.models.options import GenerationOptions
from rag_kit.ops.bench import Plan
from rag_kit.ops.measure import Row, Side, Worker

if TYPE_CHECKING:
    from langchain_core.documents import Document

    from rag_kit.settings import Settings

HERE = "rag_kit.ops.bench_engines"
READ_BYTES = 256 << 20
# Keys of llama.cpp with adapters, which it does not serve yet.
LATER = (
    "decode_vs_peft", "decode_pinned_vs_peft", "adapter_vs_base_decode", "answer_cold_vs_peft",
    "answer_pinned_cold_vs_peft", "answer_warm_vs_peft", "switch_ms", "adapters_memory_ratio",
)  # fmt: skip
# What is compared of the base in llama.cpp and in transformers: which seconds, of which phase.
ALIKE = {
    "base_decode_vs_transformers": ("token_s", "warm"),
    "base_answer_warm_vs_transformers": ("answer_s", "warm"),
    "base_answer_cold_vs_transformers": ("cold_s", "cold"),
}


def plan(settings: Settings, quick: bool, repeats: int | None, threads: int) -> Plan:
    """Return the arms at hand, the prompts and the ratios, after a look at how fast memory is read."""
    from rag_kit.models.adapters import default_adapter
    from rag_kit.models.standin import STAND_IN, ollama_state

    names = (name for name in type(settings).model_fields if settings.origin(name) == "argument")
    given = {name: str(settings.raw(name)) for name in names}
    place = {"root": str(settings.root), "given": given}

    def arm(reference: str) -> Side:
        return Side(reference, f"{HERE}:arm", {"reference": reference} | place)

    notes = []
    sides = [arm("base"), Side("retrieval", f"{HERE}:retrieval", place)]
    try:
        sides.insert(1, arm(f"lora:{default_adapter(settings).name}"))
    except RagKitError as error:
        notes.append(message("bench_no_adapter", reason=error.message))
    state, reason = ollama_state(settings)
    if state in ("running", "stand-in"):
        sides.insert(0, arm(f"ollama:{STAND_IN if state == 'stand-in' else settings.ollama_model}"))
    else:
        notes.append(message("bench_no_ollama", url=settings.ollama_base_url, reason=reason))

    with closing(Worker(Side("memory", f"{HERE}:memory"), threads)) as worker:
        reads = [worker.ask({})["byte_s"] for _ in range(7)][2:]
    requests = _requests(quick, max(repeats or (3 if quick else 7), 1) + 1)
    told = {"tokens": requests[0]["tokens"], "passages": len(requests[0]["passages"]), "threads": threads}
    about = message("bench_engines_about", speed=1e-9 / statistics.median(reads), **told).strip()
    ratios: dict[str, Any] = dict.fromkeys(LATER, message("bench_needs_adapters"))
    ratios |= dict.fromkeys([*ALIKE, "roofline_share"], message("bench_not_alike"))
    if state == "stand-in" and settings.base_model_name == "embedded":
        weights = embedded.base_gguf(settings.cache_dir).stat().st_size
        floor = [weights * seconds for seconds in reads]  # of one token
        about += message("bench_ceiling", megabytes=weights / 1e6, ceiling=1 / statistics.median(floor))
        for key, what in ALIKE.items():
            ratios[key] = (sides[0].name, *what), ("base", *what)
        ratios["roofline_share"] = (sides[0].name, "token_s", "warm"), floor
    return Plan(about, sides, requests, 1 if quick else 3, ratios, notes)


def _requests(quick: bool, count: int) -> list[Row]:
    """Return so many questions of the sample handbook with passages, no two alike: no cache answers them."""
    from rag_kit.data.loaders import sample_handbook
    from rag_kit.data.questions import load_questions
    from rag_kit.data.sets import pick

    questions = pick(load_questions(sample_handbook() / "questions.jsonl"), split="test", language="en")
    texts = [chunk.page_content for chunk in _sample_chunks()]
    passages, tokens = (2, 16) if quick else (4, 48)
    return [
        {
            "question": message("bench_retell", lang="en", question=questions[number % len(questions)].text),
            "passages": [texts[(number * passages + place) % len(texts)] for place in range(passages)],
            "tokens": tokens,
        }
        for number in range(count)
    ]


def _sample_chunks() -> list[Document]:
    from rag_kit.data.chunker import chunk_documents, conservative_count
    from rag_kit.data.loaders import load_documents, sample_handbook

    documents = load_documents(sample_handbook() / "en")
    return chunk_documents(documents, count_tokens=conservative_count, max_tokens=256)


# What runs in the sides' processes


def memory() -> Callable[[Row], Row]:
    """Read memory: a scalar product touches each byte once and computes next to nothing."""
    vector = np.ones(READ_BYTES // 4, dtype=np.float32)

    def read(_: Row) -> Row:
        start = time.perf_counter()
        vector @ vector
        return {"byte_s": (time.perf_counter() - start) / READ_BYTES}

    return read


def arm(reference: str, root: str, given: dict[str, str]) -> Callable[[Row], Row]:
    """Load a model and answer greedily: exactly `tokens` tokens where the engine is ours to tell."""
    from rag_kit.models.prompt import build_messages
    from rag_kit.models.reference import is_local, load_model
    from rag_kit.settings import start

    model: Any = load_model(reference, start(Path(root), **given))
    if is_local(reference):
        model.load()
        model.engine.end_ids = ()  # an answer that ends early would be a shorter one to measure
    tokens = _local_tokens if is_local(reference) else _served_tokens

    def answer(request: Row) -> Row:
        messages = build_messages(request["question"], request["passages"])
        options = GenerationOptions(max_new_tokens=request["tokens"])
        numbers: Row = {}
        begun = time.perf_counter()
        times = [time.perf_counter() for _ in tokens(model, messages, options, numbers)]
        numbers["answer_s"] = time.perf_counter() - begun
        if times:
            numbers["first_token_s"] = times[0] - begun
        if (n := numbers["output_tokens"]) > 1 < len(times):
            numbers["token_s"] = (times[-1] - times[0]) / (n - 1)
            numbers["tokens_per_s"] = 1 / numbers["token_s"]
        return numbers

    return answer


def _local_tokens(model: Any, messages: Any, options: GenerationOptions, numbers: Row) -> Iterator[Any]:
    from rag_kit.models.engine import Generation

    ids, state = model.render(messages).ids, Generation()
    with model.engine.holding(model.adapter()) as key:
        yield from model.engine.generate(ids, key, options, state)
    numbers |= {"input_tokens": len(ids), "output_tokens": state.output_tokens}


def _served_tokens(model: Any, messages: Any, options: GenerationOptions, numbers: Row) -> Iterator[Any]:
    whole: Any = None
    for chunk in model.stream(messages, options=options):
        whole = chunk if whole is None else whole + chunk
        if chunk.text or chunk.additional_kwargs.get("reasoning_content"):
            yield chunk
    counts = whole.usage_metadata or {}  # which a server may keep to itself
    numbers |= {name: counts.get(name, 0) for name in ("input_tokens", "output_tokens")}


def retrieval(root: str, given: dict[str, str]) -> Callable[[Row], Row]:
    """Open the index that the settings mean, or make one of some sample passages, and search it."""
    from rag_kit.index.embeddings import load_embeddings
    from rag_kit.index.store import FaissStore, open_store
    from rag_kit.settings import start

    settings = start(Path(root), **given)
    try:
        store = open_store(settings)
    except StoreError:
        store = FaissStore(load_embeddings(settings=settings))
        store.add_documents(_sample_chunks()[:4])

    def search(request: Row) -> Row:
        begun = time.perf_counter()
        store.search(request["question"])
        return {"answer_s": time.perf_counter() - begun}

    return search
