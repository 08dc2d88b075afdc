"""The process's way to the network and to the disk: mirror, proxies, caches, and the model hub.

Knows the environment variables that other libraries read, and how a snapshot is fetched; knows nothing
of what is in it. Nothing is set by an import: `settings.start` calls `apply_network`.
"""

import os
import sys
import threading
from collections.abc import Callable
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rag_kit.embedded import cache_root
from rag_kit.errors import ServiceError, message
from rag_kit.settings import Settings, redact

HUB = "https://huggingface.co"
HUB_SECONDS = 7.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Where other libraries keep what they write; each under CACHE_DIR/rag-kit unless the user said otherwise.
CACHES = {
    "HF_HOME": "huggingface",
    "HF_XET_CACHE": "huggingface/xet",
    "HF_DATASETS_CACHE": "huggingface/datasets",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
    "IPYTHONDIR": "ipython",
    "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
    "PIP_CACHE_DIR": "pip",
}

_exported: dict[str, tuple[str | None, str]] = {}


def apply_network(settings: Settings) -> list[str]:
    """Set the environment that hub, HTTP and cache libraries read; returns warnings.

    The mirror (with the hub's Xet path off, which mirrors do not serve), the proxies, the hosts that
    bypass them (this machine and Ollama's host, always), and with CACHE_DIR every cache under it.
    What the user has set himself stays, but for what is also a setting of ours.
    """
    if settings.hf_endpoint:
        export("HF_ENDPOINT", settings.hf_endpoint)
        if settings.hf_endpoint != HUB:
            export("HF_HUB_DISABLE_XET", "1")
    for name in ("http_proxy", "https_proxy"):
        if value := getattr(settings, name):
            export(name.upper(), value)
            export(name, value)
    # Without a proxy in the environment NO_PROXY stays unset: alone it would hide the system's own proxy.
    if any(os.environ.get(name) for name in ("http_proxy", "https_proxy", "all_proxy", "ALL_PROXY")):
        asked = [host.strip() for host in (settings.no_proxy or "").split(",") if host.strip()]
        direct = dict.fromkeys(
            [*asked, *LOOPBACK, urlsplit(settings.ollama_base_url).hostname or "localhost"]
        )
        export("NO_PROXY", ",".join(direct))
        export("no_proxy", ",".join(direct))
    return [*_move_caches(settings.cache_dir), *_late(settings)]


def export(name: str, value: str) -> None:
    """Set an environment variable, remembering what stood there, for `withdraw`."""
    former = _exported[name][0] if name in _exported else os.environ.get(name)
    _exported[name] = former, value
    os.environ[name] = value


def withdraw() -> None:
    """Undo every `export` that nobody has overwritten since, so that settings can be read anew."""
    for name, (former, ours) in _exported.items():
        if os.environ.get(name) == ours:
            if former is None:
                del os.environ[name]
            else:
                os.environ[name] = former
    _exported.clear()


def hub_snapshot(repo_id: str, settings: Settings, *, allow_patterns: list[str] | None = None) -> Path:
    """Return the folder of a hub repository's files, downloaded unless a local copy is complete.

    Looked for first in `CACHE_DIR/models--ORG--NAME` (files directly in it, or the hub's layout) or the
    hub's own cache. Raises ServiceError: the hub cannot be reached (known within ten seconds), it does
    not know the repository or refuses it, or the files cannot be written.
    """
    from huggingface_hub import snapshot_download

    if settings.cache_dir:
        plain = settings.cache_dir / f"models--{repo_id.replace('/', '--')}"
        if (plain / "config.json").is_file():
            return plain
    return _fetched(snapshot_download, repo_id, repo_id, settings, allow_patterns=allow_patterns)


def hub_file(repo_id: str, file: str, settings: Settings) -> Path:
    """Return one file of a hub repository, downloaded unless it is at hand; raises as `hub_snapshot` does."""
    from huggingface_hub import hf_hub_download

    return _fetched(hf_hub_download, repo_id, f"{repo_id}/{file}", settings, filename=file)


def _fetched(fetch: Callable[..., str], repo_id: str, name: str, settings: Settings, **wanted: Any) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted |= {
        "repo_id": repo_id,
        "cache_dir": settings.cache_dir,
        "endpoint": settings.hf_endpoint,
        "etag_timeout": HUB_SECONDS,
    }
    try:
        try:
            return Path(fetch(**wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            _knock(repo_id, settings)
            return Path(fetch(**wanted))
    except Exception as error:
        raise _explain(error, name, settings) from error


def _knock(repo_id: str, settings: Settings) -> None:
    """Ask the hub for the repository, and give up in time.

    `snapshot_download` sets no limit on its first request, and no limit of a client holds while a name
    is looked up; so the question is put on a thread that can be left behind.
    """
    from huggingface_hub import HfApi

    failure: list[Exception] = [TimeoutError(f"> {HUB_SECONDS:g} s")]

    def ask() -> None:
        try:
            HfApi(endpoint=settings.hf_endpoint).model_info(repo_id, timeout=HUB_SECONDS)
            failure.clear()
        except Exception as error:
            failure[:] = [error]

    thread = threading.Thread(target=ask, daemon=True, name="rag-kit-hub")
    thread.start()
    thread.join(HUB_SECONDS)
    for error in failure:
        raise error


def _explain(error: Exception, repo_id: str, settings: Settings) -> Exception:
    """Return the error that tells the reader what failed; an error of another kind as it is."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    told = {"repo": repo_id, "endpoint": redact(settings.hf_endpoint or os.environ.get("HF_ENDPOINT") or HUB)}
    if isinstance(error, GatedRepoError):
        return ServiceError("hub_gated", **told)
    unknown = (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, HFValidationError)
    if isinstance(error, unknown):
        return ServiceError("hub_unknown", **told)
    beyond = (
        httpx2.HTTPError,
        httpx2.InvalidURL,
        ConnectionError,
        TimeoutError,
        FileNotFoundError,
        JSONDecodeError,
    )
    if isinstance(error, beyond) or (isinstance(error, OSError) and error.errno is None):
        return ServiceError("hub_unreachable", **told, reason=_reason(error))
    if isinstance(error, OSError):
        folder = settings.cache_dir or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        return ServiceError("hub_unwritable", repo=repo_id, folder=folder, reason=_reason(error))
    return error


def _reason(error: BaseException) -> str:
    """Return one line: the first line of an error's text, or its kind where it has none."""
    first = next(iter(str(error).strip().splitlines()), "")
    return redact(first[:200]) or type(error).__name__


def _move_caches(cache_dir: Path | None) -> list[str]:
    if cache_dir is None:
        return []
    _export_default("HF_HUB_CACHE", str(cache_dir))
    try:
        cache_root(cache_dir).mkdir(parents=True, exist_ok=True)  # IPython wants the parent of its folder
    except OSError as error:
        return [message("cache_dir_unwritable", folder=cache_dir, reason=_reason(error))]
    token = Path.home() / ".cache" / "huggingface" / "token"
    if token.is_file() and "HF_HOME" not in os.environ:
        _export_default("HF_TOKEN_PATH", str(token))  # a login outlives the move of HF_HOME
    for name, folder in CACHES.items():
        _export_default(name, str(cache_root(cache_dir) / folder))
    return []


def _export_default(name: str, value: str) -> None:
    if not os.environ.get(name):
        export(name, value)


def _late(settings: Settings) -> list[str]:
    """Warn where the hub's library was imported before its address was set: it reads it only once."""
    used = getattr(sys.modules.get("huggingface_hub.constants"), "ENDPOINT", None)
    wanted = settings.hf_endpoint
    if used is None or wanted is None or used == wanted:
        return []
    return [message("hub_imported_early", used=used, wanted=redact(wanted))]
