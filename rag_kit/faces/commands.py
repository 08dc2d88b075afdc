"""What each command does: settings first, one call into a room, the result printed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import message
from rag_kit.settings import Settings, describe, start

if TYPE_CHECKING:
    from rag_kit.compare.comparison import Comparison


def setup(_arguments: Namespace) -> int:
    """Prepare the embedded models, as far as the settings name them."""
    began = time.perf_counter()
    for folder in _prepare(start()):
        print(message("cli_ready", folder=folder))
    print(message("cli_setup_done", seconds=time.perf_counter() - began))
    return 0


def _prepare(settings: Settings) -> list[Path]:
    """Return the folders of the embedded models that the settings name, made where they are not there."""
    from rag_kit import embedded

    wanted = (
        (settings.base_model_name, embedded.base_folder),
        (settings.embedding_model, embedded.embedder_folder),
    )
    folders = [prepare(settings.cache_dir, progress=print) for name, prepare in wanted if name == "embedded"]
    if settings.base_model_name == "embedded":
        from rag_kit.models.llamacpp.serving import serving_file

        base = embedded.base_gguf(settings.cache_dir)
        folders.append(serving_file(base, settings.cache_dir, progress=print).path)
    return folders


def test(arguments: Namespace) -> int:
    """Run the tests, then every notebook against its committed outputs; return pytest's status."""
    from rag_kit.ops.notebooks import own_places

    settings = start()
    _prepare(settings)
    environment = {k: v for k, v in os.environ.items() if k.lower() not in Settings.model_fields}
    environment |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONUTF8": "0"}
    pytest = [sys.executable, "-m", "pytest"]
    workers = ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile"]  # some 2 GB each
    chosen = arguments.arguments or workers
    status = subprocess.call(
        [*pytest, *chosen], cwd=settings.root, env={"OMP_NUM_THREADS": "1", **environment}
    )
    if status or arguments.arguments:
        return status
    with own_places() as places:
        nbval = ["--nbval", "--nbval-current-env", "notebooks"]
        return subprocess.call([*pytest, *nbval], cwd=settings.root, env=environment | places)


def refresh_notebooks(arguments: Namespace) -> int:
    """Execute numbered notebooks and keep their outputs."""
    from rag_kit.ops.notebooks import find_notebooks, refresh

    refresh(find_notebooks(start(), arguments.notebooks), print)
    return 0


def config(_arguments: Namespace) -> int:
    """Print each setting, its value and its origin; secrets are redacted."""
    settings = start()
    _table(describe(settings), "variable", "value", "origin", "meaning")
    print(message("cli_root", folder=settings.root))
    return 0


def index_build(arguments: Namespace) -> int:
    """Build an index from documents."""
    from rag_kit.data.loaders import load_documents, sample_handbook
    from rag_kit.index.embeddings import load_embeddings
    from rag_kit.index.store import build_index

    settings = start()
    source = arguments.documents or sample_handbook()
    documents = load_documents(source)
    folder = settings.vector_store_path / (arguments.name or source.resolve().stem)
    store = build_index(documents, folder, load_embeddings(settings=settings))
    print(message("cli_indexed", documents=len(documents), chunks=len(store), folder=folder))
    return 0


def index_list(_arguments: Namespace) -> int:
    """Print the indexes at hand."""
    from rag_kit.index.store import list_indexes

    for folder in list_indexes(start().vector_store_path):
        print(folder.name)
    return 0


def index_verify(arguments: Namespace) -> int:
    """Check every file of an index against its hash."""
    from rag_kit.index.store import find_index, verify

    folder = find_index(start(), arguments.name)
    verify(folder)
    print(message("cli_verified", folder=folder))
    return 0


def index_search(arguments: Namespace) -> int:
    """Print the best chunks for a question."""
    from rag_kit.index.store import open_store

    for hit in open_store(start(), arguments.name).search(arguments.question, arguments.top_k):
        place = f"{hit.document.metadata['source']}:{hit.document.metadata['start']}"
        print(f"[{hit.rank}] {hit.score:.3f} {place}\n{hit.document.page_content}\n")
    return 0


def finetune(arguments: Namespace) -> int:
    """Train a LoRA adapter with the guide's flags."""
    from rag_kit.finetune.arguments import from_arguments

    overrides, given = from_arguments(arguments)
    settings = start(**overrides)
    from rag_kit.finetune import finetune as train

    result = train(**given, settings=settings)
    told = {"folder": result.folder, "seconds": result.seconds, "examples": result.recipe["data"]["examples"]}
    print(message("cli_trained", first=result.losses[0], last=result.losses[-1], **told))
    if result.kept:
        print(message("cli_kept", folder=result.kept))
    return 0


def ask(arguments: Namespace) -> int:
    """Print the answer as it is generated, then its sources and what was degraded."""
    from rag_kit.rag import LoRARAGHandler

    handler = LoRARAGHandler(start(), force_adapters=arguments.force)
    use_lora = None if arguments.use_lora is None else arguments.use_lora == "true"
    how = {"model": arguments.model, "use_lora": use_lora, "top_k": arguments.top_k}
    last: Any = None
    for piece in handler.stream(arguments.question, **how):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        last = piece
    print(f"\n\n{last.evidence()}")
    return 0


def compare(arguments: Namespace) -> int:
    """Put arms side by side over a question set and print table and verdicts."""
    from dataclasses import replace

    from rag_kit.compare.compare import compare as run_comparison
    from rag_kit.data.questions import without_spans
    from rag_kit.data.sets import pick, question_set
    from rag_kit.index.embeddings import load_embeddings
    from rag_kit.index.store import ensure_index
    from rag_kit.models.options import GenerationOptions
    from rag_kit.ops.notebooks import new_run_folder

    settings = start()
    questions, documents, name = question_set(arguments.questions, arguments.documents)
    chosen = pick(questions, split=arguments.split, language=arguments.language, limit=arguments.limit)
    if missing := without_spans(chosen):
        print(message("cli_no_spans", missing=missing, questions=len(chosen)))
    store = None
    if any(not arm.endswith("+none") for arm in arguments.arms):
        store = ensure_index(documents, settings.vector_store_path / name, load_embeddings(settings=settings))
    options = GenerationOptions.from_settings(settings).greedy()
    if arguments.max_new_tokens:
        options = replace(options, max_new_tokens=arguments.max_new_tokens)
    folder = new_run_folder(settings, arguments.run_name)
    how = {"store": store, "top_k": arguments.top_k, "options": options, "settings": settings}
    how |= {"generation_config": arguments.generation_config, "force_adapters": arguments.force}
    result = run_comparison(arguments.arms, chosen, run_folder=folder, **how)
    print(result)
    _keep_scores(result, settings)
    print(message("cli_run_lies", folder=folder))
    return 0


def _keep_scores(result: Comparison, settings: Settings) -> None:
    """Write down in the registry what each adapter scored."""
    from rag_kit.models.registry import record_scores

    for line in result.summary(["model_label", "context"]).to_dict("records"):
        kind, _, name = str(line["model_label"]).partition(":")
        if kind == "lora" and line["scored"]:
            record_scores(name, {line["context"]: {"f1": line["f1"], "n": line["scored"]}}, settings)


def _table(rows: Iterable[Sequence[object]], *headings: str) -> None:
    from tabulate import tabulate

    print(tabulate(rows, [message(f"cli_column_{name}") for name in headings], disable_numparse=True))
