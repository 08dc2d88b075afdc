"""Which file to serve: of several block types the fastest on this machine that is still the same model.

Measured once, by the engine that will serve it. Knows the candidates, the tolerance and where the choice is
kept; knows nothing of how a file is asked, or of what it is served for.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rag_kit.embedded import Progress, cache_root, whole
from rag_kit.errors import ModelError, RagKitError, StoreError, message
from rag_kit.manifest import fingerprint, sha256, write_json
from rag_kit.models.adapters import WEIGHTS, Adapter
from rag_kit.models.divergence import Divergence, divergence
from rag_kit.models.llamacpp.adapter_gguf import adapter_gguf, lora_pairs
from rag_kit.models.llamacpp.gguf import Gguf, read_gguf
from rag_kit.models.llamacpp.probes import ANSWER, PROMPT, Probe, Rows, Served, probes, rows, served, timed
from rag_kit.models.llamacpp.rewrite import KINDS, rewrite
from rag_kit.models.llamacpp.runner import threads

FORMAT = 1  # raised when the choice changes, so that it is made again
RECORD = "serving.json"
ORIGINAL, SAFE = "F16", "Q8_0"
# Bits a weight; llama.cpp is no faster with other kinds than with Q8_0. 4 bits rounded to Q4_0 once more are
# another model, and so they are where only some of the tensors are rounded.
CANDIDATES = {ORIGINAL: 16.0, SAFE: 8.5, "Q4_0": 4.5}
KL, ARGMAX = 0.02, 0.9  # of a faithful file: mean KL (nats) at most, share of equal first choices at least
MERGED_KL = 2e-3  # of an adapter merged and beside its base, both in F16: a converter's tolerance
LARGEST = 1_000_000_000  # parameters, beyond which measuring takes many minutes and gigabytes
TURNS = 3

Record = dict[str, Any]


@dataclass(frozen=True)
class Serving:
    """A file to serve, its block type, why it was chosen, and the candidates that were measured.

    Of each: `kind`, `shipped`, `bytes`, `kl` (nats), `argmax` (share), `top20` (nats), `positions`,
    `faithful`, and but for merged files `prefill` and `decode` (tokens/s), `answer_s` (seconds), and `cpu_s`
    (seconds of processor time, by which the fastest is chosen).
    """

    path: Path
    kind: str
    reason: str
    table: list[Record]


def serving_file(source: Path, cache_dir: Path | None = None, progress: Progress = None) -> Serving:
    """Return the fastest faithful file of the GGUF `source`, found at its first use and then remembered.

    `source` itself where it is the fastest, and where nothing can be measured: it is too large, or the cache
    has no room; `reason` says which. Raises ModelError where `source` is no whole GGUF.
    """
    gguf = read_gguf(source)

    def build(folder: Path) -> Record:
        if progress:
            progress(message("serving_measuring", file=source.name))
        _room(folder, gguf, list(CANDIDATES))
        return _choice(gguf, folder)

    try:
        if gguf.parameters > LARGEST:
            raise ModelError("serving_large", parameters=gguf.parameters, limit=LARGEST)
        return _kept(source, "", build, cache_dir)
    except RagKitError as error:
        reason = message("serving_unmeasured", kind=gguf.quantization, reason=error.message)
        return Serving(source, gguf.quantization, reason, [])


def pinned_file(
    source: Path, adapter: Adapter, cache_dir: Path | None = None, progress: Progress = None
) -> Serving:
    """Return the GGUF `source` with `adapter` merged into it, faithful to the merge in F16.

    In the block type that serves the base; where that is not faithful in Q8_0, and at last in F16. Raises
    ModelError where the adapter cannot be merged, or is not the same merged and beside its base, StoreError
    where the cache has no room for it.
    """
    gguf = read_gguf(source)

    def build(folder: Path) -> Record:
        kind = serving_file(source, cache_dir, progress).kind
        if progress:
            progress(message("serving_merging", adapter=adapter.name, file=source.name))
        _room(folder, gguf, [ORIGINAL, ORIGINAL, SAFE])
        return _merged(gguf, adapter, kind, folder, cache_dir)

    return _kept(source, fingerprint([sha256(adapter.folder / WEIGHTS), adapter.config]), build, cache_dir)


def _kept(source: Path, adapter: str, build: Callable[[Path], Record], cache_dir: Path | None) -> Serving:
    """Return what `build` leaves in the cache for this file and machine; one process builds, others wait."""
    stat = source.stat()
    digest = _digest(source.absolute(), stat.st_size, stat.st_mtime_ns)
    origin = {"format": FORMAT, "file": source.name, "sha256": digest, "adapter": adapter}
    origin |= {"cpu": processor(), "xllamacpp": version("xllamacpp")}
    name = "+".join(filter(None, [f"{source.stem}-{digest[:12]}", adapter[:12]]))
    target = cache_root(cache_dir) / "serving" / name
    folder = whole(target, origin, lambda made: write_json(made / RECORD, build(made)))
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    path = folder / record["file"] if record["file"] else source
    return Serving(path, record["kind"], _reason(record), record["table"])


def _choice(gguf: Gguf, folder: Path) -> Record:
    """Measure the candidates, leave the winner alone in `folder`, and return the record."""
    start, shipped = time.monotonic(), gguf.quantization
    files = {kind: folder / f"{kind}.gguf" for kind in CANDIDATES} | {shipped: gguf.path}
    table: dict[str, Record] = {}
    with ExitStack() as stack:
        engines, reference, texts, prompt = dict[str, Served](), Rows(), list[Probe](), list[int]()
        for kind, path in files.items():
            if kind != shipped:
                rewrite(gguf.path, path, kind)
            engine = engines[kind] = stack.enter_context(served(path))
            if not texts:
                texts, prompt = probes(engine, gguf)
            found = rows(engine, texts)
            reference = reference or found
            table[kind] = _row(kind, path, divergence(reference, found)) | {"shipped": kind == shipped}
        times: dict[str, list[dict[str, float]]] = {kind: [] for kind in files}
        for turn in range(TURNS):  # one after the other, so that what disturbs does so alike
            for kind, engine in engines.items():
                if turn == 0 or table[kind]["faithful"]:
                    times[kind].append(timed(engine, prompt))
    for kind, row in table.items():
        row |= {what: round(median(one[what] for one in times[kind]), 3) for what in times[kind][0]}
    # The clock says who else was at work here while it was measured; the processor's time does not.
    best = min((kind for kind in table if table[kind]["faithful"]), key=lambda kind: table[kind]["cpu_s"])
    return _record(files, best, [*table.values()], start, gguf.path)


def _merged(gguf: Gguf, adapter: Adapter, first: str, folder: Path, cache_dir: Path | None) -> Record:
    """Merge, compare, leave the file to serve alone in `folder`, and return the record."""
    start, source, table = time.monotonic(), gguf.path, list[Record]()
    files = {ORIGINAL: rewrite(source, folder / f"{ORIGINAL}.gguf", ORIGINAL, lora_pairs(adapter, source))}
    files["plain"] = rewrite(source, folder / "plain.gguf", ORIGINAL)
    with served(files[ORIGINAL]) as engine:
        whole_texts, _ = probes(engine, gguf)
        texts = [Probe(ids, (begin + len(ids)) // 2) for ids, begin in whole_texts]  # half of each will do
        reference = rows(engine, texts)
    with served(files["plain"], {"beside": adapter_gguf(adapter, source, cache_dir)}) as engine:
        found = rows(engine, texts[-1:], "beside")
        beside = divergence(reference[-len(found) :], found)
    if beside.kl > MERGED_KL:
        raise ModelError("serving_merge", adapter=adapter.name, kl=beside.kl, limit=MERGED_KL)
    for kind in dict.fromkeys([first if first in KINDS else SAFE, SAFE, ORIGINAL]):
        if kind not in files:
            files[kind] = rewrite(files[ORIGINAL], folder / f"{kind}.gguf", kind)
        with served(files[kind]) as engine:
            apart = divergence(reference, rows(engine, texts))
        table.append(_row(kind, files[kind], apart))
        if table[-1]["faithful"]:
            break
    return _record(files, kind, table, start, source) | {"beside": asdict(beside)}


def _row(kind: str, path: Path, apart: Divergence) -> Record:
    faithful = apart.kl <= KL and apart.argmax >= ARGMAX
    return {"kind": kind, "bytes": path.stat().st_size, **asdict(apart), "faithful": faithful}


def _record(files: dict[str, Path], best: str, table: list[Record], start: float, source: Path) -> Record:
    """Return all that was found, after the files that lost are gone."""
    for kind, path in files.items():
        if path != source and kind != best:
            path.unlink()
    return {
        "kind": best,
        "file": None if files[best] == source else files[best].name,
        "table": table,
        "machine": {"cpu": processor(), "threads": threads()},
        "versions": {name: version(name) for name in ("rag-kit", "xllamacpp", "gguf")},
        "seconds": round(time.monotonic() - start, 1),
    }


def _reason(record: Record) -> str:
    row = next(row for row in record["table"] if row["kind"] == record["kind"])
    told = {key: row[key] for key in ("kind", "kl", "argmax")}
    if "cpu_s" not in row:
        return message("serving_merged", **told)
    shipped = next(row for row in record["table"] if row["shipped"])
    told |= {"seconds": row["cpu_s"], "shipped": shipped["kind"], "shipped_s": shipped["cpu_s"]}
    return message("serving_chosen", **told, prompt=PROMPT, answer=ANSWER)


def _room(folder: Path, gguf: Gguf, kinds: Sequence[str]) -> None:
    needed = sum(CANDIDATES[kind] / 8 for kind in kinds) * gguf.parameters
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError("serving_no_room", path=folder.parent, needed=needed / 1e9, free=free / 1e9)


@lru_cache(maxsize=64)
def _digest(path: Path, _size: int, _modified_ns: int) -> str:
    return sha256(path)


@cache
def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()
