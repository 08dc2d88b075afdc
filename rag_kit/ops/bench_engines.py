"""The bench `engines`: how long loading, the first token, each further token and an answer take, by arm.

Knows the arms that are at hand and what an engine's speed is bounded by; knows nothing of processes. One
definition holds for all engines: tokens a second = (n - 1) / (time of the last token - time of the first).
"""

from __future__ import annotations

import atexit
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_kit.errors import RagKitError, StoreError, message
from rag_kit.models.options import GenerationOptions
from rag_kit.ollama import probe
from rag_kit.ops.bench import Plan
from rag_kit.ops.measure import Row, Side, Worker

if TYPE_CHECKING:
    from langchain_core.documents import Document

    from rag_kit.settings import Settings

HERE = "rag_kit.ops.bench_engines"
READ_BYTES = 256 << 20
ADAPTERS = 8  # of which requests come in turn
CHARACTERS = 2130  # of passages: with system text and question some 640 tokens of SmolLM2
OURS, OTHER = "llama.cpp", "transformers"
# What is compared, and in which of a side's numbers: all warm, but for the memory.
ALIKE = {
    "decode_vs_peft": ("lora llama.cpp", "lora transformers", "token_s"),
    "decode_pinned_vs_peft": ("lora pinned", "lora transformers", "token_s"),
    "adapter_vs_base_decode": ("lora llama.cpp", "base llama.cpp", "token_s"),
    "answer_cold_vs_peft": ("lora llama.cpp", "lora transformers", "answer_s"),
    "answer_pinned_cold_vs_peft": ("lora pinned", "lora transformers", "answer_s"),
    "answer_warm_vs_peft": ("lora cached", "lora transformers", "answer_s"),
    "base_decode_vs_transformers": ("base llama.cpp", "base transformers", "token_s"),
    "base_answer_vs_transformers": ("base llama.cpp", "base transformers", "answer_s"),
}


def plan(settings: Settings, quick: bool, repeats: int | None, threads: int) -> Plan:
    """Return the arms at hand, the prompts and the ratios, after a look at how fast memory is read."""
    from rag_kit.models.adapters import default_adapter
    from rag_kit.models.base import resolve_base
    from rag_kit.models.engine import choose_engine

    names = (name for name in type(settings).model_fields if settings.origin(name) == "argument")
    given = {name: str(settings.raw(name)) for name in names}
    place = {"root": str(settings.root), "given": given}
    notes: list[str] = []
    served: Path | None = None
    try:
        base = resolve_base(settings.base_model_name, settings)
        served = base.gguf
        notes += [] if served else [choose_engine(base, settings)[1]]
    except RagKitError as error:
        notes.append(error.message)

    def arm(name: str, reference: str, engine: str = OTHER, **how: Any) -> Side:
        return Side(name, f"{HERE}:arm", {"reference": reference, "how": {"engine": engine, **how}, **place})

    sides = [arm("base llama.cpp", "base", OURS)] if served else []
    sides += [arm("base transformers", "base"), Side("retrieval", f"{HERE}:retrieval", place)]
    try:
        lora = f"lora:{default_adapter(settings).name}"
        peft = [
            arm("lora transformers", lora),
            Side("adapters transformers", f"{HERE}:adapters", place | {"engine": OTHER}),
        ]
        fast = [arm("lora llama.cpp", lora, OURS), arm("lora pinned", lora, OURS, pinned=True)]
        fast += [arm("lora cached", lora, OURS, keep_prompt=True)]
        fast += [Side("adapters llama.cpp", f"{HERE}:adapters", place | {"engine": OURS})]
        sides = [*(fast if served else []), *peft, *sides]
    except RagKitError as error:
        notes.append(message("bench_no_adapter", reason=error.message))
    state, reason = probe(settings.ollama_base_url)
    if state == "running":
        sides.append(arm("ollama", f"ollama:{settings.ollama_model}"))
    else:
        notes.append(message("bench_no_ollama", url=settings.ollama_base_url, reason=reason))

    with closing(Worker(Side("memory", f"{HERE}:memory"), threads)) as worker:
        reads = [worker.ask({})["byte_s"] for _ in range(7)][2:]
    requests = _requests(max(repeats or (3 if quick else 7), 1) + 1)
    told = {"tokens": requests[0]["tokens"], "adapters": ADAPTERS, "threads": threads}
    about = message("bench_engines_about", speed=1e-9 / statistics.median(reads), **told).strip()
    ratios: dict[str, Any] = {
        key: ((a, what, "warm"), (b, what, "warm")) for key, (a, b, what) in ALIKE.items()
    }
    both = ("adapters llama.cpp", "adapters transformers")
    ratios["adapters_memory_ratio"] = (both[0], "peak_mb", "cold"), (both[1], "peak_mb", "cold")
    ratios["switch_ms"] = (both[0], "switch_s", "warm"), (both[0], "stay_s", "warm")
    if served is not None:
        from rag_kit.models.llamacpp.serving import serving_file

        serving = serving_file(served, settings.cache_dir)
        weights = serving.path.stat().st_size
        floor = [weights * seconds for seconds in reads]  # of one token
        ceiling = 1 / statistics.median(floor)
        about += message("bench_ceiling", kind=serving.kind, megabytes=weights / 1e6, ceiling=ceiling)
        ratios["roofline_share"] = ("base llama.cpp", "token_s", "warm"), floor
    return Plan(about, sides, requests, 1 if quick else 3, ratios, notes)


def _requests(count: int) -> list[Row]:
    """Return so many questions of the sample handbook with passages, no two alike: no cache answers them."""
    from rag_kit.data.loaders import sample_handbook
    from rag_kit.data.questions import load_questions
    from rag_kit.data.sets import pick

    questions = pick(load_questions(sample_handbook() / "questions.jsonl"), split="test", language="en")
    text = " ".join(chunk.page_content for chunk in _sample_chunks())
    requests = []
    for number in range(count):
        start = number * CHARACTERS * 2 // 3 % (len(text) - CHARACTERS)
        asked = message("bench_retell", lang="en", question=questions[number % len(questions)].text)
        passages = [text[start : start + CHARACTERS // 2], text[start + CHARACTERS // 2 : start + CHARACTERS]]
        requests.append({"question": asked, "passages": passages, "tokens": 48})
    return requests


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


def arm(reference: str, how: Row, root: str, given: dict[str, str]) -> Callable[[Row], Row]:
    """Load a model and answer greedily: exactly `tokens` tokens where the engine is ours to tell.

    With a cache, the passages were asked about before: the answer that is measured reads but the question.
    """
    from rag_kit.models.prompt import build_messages
    from rag_kit.models.reference import is_local, load_model
    from rag_kit.settings import start

    local = is_local(reference)
    model: Any = load_model(reference, start(Path(root), **given), **(how if local else {}))
    if local:
        model.load()
        model.backend.end_ids = ()  # an answer that ends early would be a shorter one to measure
    tokens = _local_tokens if local else _served_tokens

    def answer(request: Row) -> Row:
        messages = build_messages(request["question"], request["passages"])
        options = GenerationOptions(max_new_tokens=request["tokens"])
        numbers: Row = {}
        if how.get("keep_prompt"):
            before = build_messages("?", request["passages"])
            list(tokens(model, before, options.updated(max_new_tokens=1), {}))
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

    ids, state = model.render(messages).ids, Generation(cache=model.keep_prompt)
    with model.holding() as key:
        yield from model.backend.stream(ids, key, options, state)
    numbers |= {"input_tokens": len(ids), "output_tokens": state.output_tokens}


def adapters(engine: str, root: str, given: dict[str, str]) -> Callable[[Row], Row]:
    """Load the default adapter under ADAPTERS names and ask each in turn, and as often one alone."""
    from shutil import copytree, rmtree
    from tempfile import mkdtemp

    from rag_kit.models.adapters import default_adapter
    from rag_kit.models.lora import LoRALanguageModel
    from rag_kit.settings import Settings, start

    folder = mkdtemp()
    atexit.register(rmtree, folder, ignore_errors=True)
    source = default_adapter(start(Path(root), **given)).folder
    names = [f"a{number}" for number in range(ADAPTERS)]
    for name in names:
        copytree(source, Path(folder) / name)
    settings = Settings.load(Path(root), **(given | {"lora_model_path": folder}))
    model = LoRALanguageModel(model="lora:a0", engine=engine, settings=settings)
    for name in names:
        model.load(f"lora:{name}")
    options = GenerationOptions(max_new_tokens=4)

    def seconds(order: list[str]) -> float:
        begun = time.perf_counter()
        for name in order:
            model.invoke("How long does a repair take?", model=f"lora:{name}", options=options)
        return (time.perf_counter() - begun) / len(order)

    def answer(_: Row) -> Row:
        stay, switch = seconds(names[:1] * ADAPTERS), seconds(names)
        return {"stay_s": stay, "switch_s": switch}

    return answer


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
