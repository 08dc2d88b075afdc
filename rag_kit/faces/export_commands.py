"""The commands `adapters export`, `serve-ollama` and `drift`: one call into a room, the result printed."""

from __future__ import annotations

import ipaddress
import json
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from rag_kit.errors import ModelError, RagKitError, message
from rag_kit.settings import start

if TYPE_CHECKING:
    from pathlib import Path

    from rag_kit.models.llamacpp.process import EngineProcess
    from rag_kit.settings import Settings

LOOK_S = 2.0  # between two looks at whether the engine lives


def adapters_export(arguments: Namespace) -> int:
    """Make an adapter a model of Ollama's."""
    from rag_kit.faces.commands import _prepare
    from rag_kit.models.export import export_adapter

    settings = start()
    _prepare(settings)
    how = {"how": arguments.how, "kind": arguments.kind, "name": arguments.to}
    how |= {"replace": arguments.replace, "forced": arguments.force}
    print(export_adapter(_reference(arguments.name), settings, progress=print, **how))
    return 0


def serve_ollama(arguments: Namespace) -> int:
    """Serve base and adapters to any Ollama client, until Ctrl-C."""
    from rag_kit.faces.commands import _prepare

    settings = start()
    _prepare(settings)
    host, port = arguments.host, arguments.port
    with serving(settings, (host, port), arguments.adapters, forced=arguments.force) as process:
        names = [process.name, *(f"{process.name}+{name}" for name in process.adapters)]
        address = f"[{host}]" if ":" in host else host
        print(message("serve_models", url=f"http://{address}:{port}", models=", ".join(names)))
        print(message("serve_how", address=f"{address}:{port}", model=names[-1]))
        if not _loopback(host):
            print(message("serve_open", host=host))
        print(message("serve_end"), flush=True)
        while True:
            time.sleep(LOOK_S)
            process.start()  # raises where the engine gave up


def serving(
    settings: Settings, public: tuple[str, int], names: list[str], *, forced: bool = False
) -> EngineProcess:
    """Return an engine process, not yet started, over the base and the named adapters (none: all that pass).

    Raises ModelError for a named adapter that the doctor refuses, unless `forced`; of all, it is left out and
    told. The adapters are checked before anything listens.
    """
    from rag_kit.models.adapters import adapter_folders
    from rag_kit.models.doctor import admit
    from rag_kit.models.llamacpp.adapter_gguf import adapter_gguf
    from rag_kit.models.llamacpp.process import EngineProcess
    from rag_kit.models.llamacpp.serving import serving_file
    from rag_kit.models.lora import LoRALanguageModel

    model = LoRALanguageModel(settings=settings, forced=forced)
    gguf = model.base_model.gguf
    if gguf is None:
        raise ModelError("export_no_gguf", base=model.base_model.name)
    served: dict[str, Path] = {}
    for name in names or [one for one in adapter_folders(settings.lora_model_path) if "/" not in one]:
        try:
            notes = admit(_reference(name), settings, forced=forced, model=model)
            adapter = model.adapter(_reference(name))
            assert adapter is not None
            served[adapter.name] = adapter_gguf(adapter, gguf, settings.cache_dir)
        except RagKitError as error:
            if names:
                raise
            notes = (message("serve_left_out", adapter=name, reason=error.message),)
        for note in notes:
            print(note)
    file = serving_file(gguf, settings.cache_dir, print)
    return EngineProcess(file.path, name="base", adapters=served, public=public)


def drift(arguments: Namespace) -> int:
    """Print the drift ladder of an adapter: which step from PEFT to a served file costs quality."""
    from rag_kit.compare.drift import drift as measure
    from rag_kit.data.sets import pick, question_set
    from rag_kit.faces.commands import _prepare

    settings = start()
    _prepare(settings)
    questions, _, _ = question_set(arguments.questions)
    chosen = pick(questions, split=arguments.split, limit=arguments.limit)
    quiet = arguments.json
    found = measure(_reference(arguments.name), chosen, settings, ollama=arguments.ollama,
                    max_new_tokens=arguments.max_new_tokens, progress=None if quiet else print)  # fmt: skip
    print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2) if quiet else f"\n{found}")
    return 0


def _reference(name: str) -> str:
    return name if name in ("base", "lora") or name.startswith("lora:") else f"lora:{name}"


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
