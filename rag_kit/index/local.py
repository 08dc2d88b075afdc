"""Embeddings computed here by sentence-transformers: from a folder, or from the model hub.

Knows devices, number types and batches; which folder a reference means is told in `embeddings`.
"""

import copy
import json
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rag_kit.embedded import ORIGIN
from rag_kit.errors import DataError, ModelError, StoreError, message
from rag_kit.index.contract import ContractEmbeddings, Vectors, instructions_for, normalised
from rag_kit.manifest import read_manifest, sha256

BATCH_TOKENS = 2048  # on CPUs the fastest of 512 to 8,192: more padding and cache misses beyond
SHOW_FROM = 64  # texts; a bar for less would only flicker
CHUNK_TOKENS = 256


class LocalEmbeddings(ContractEmbeddings):
    """A sentence-transformers folder as an embedder; safe to share between threads.

    `device` is `auto`, `cpu` or `cuda`; bf16 where the processor has it natively, else f32. Vectors are
    float32 and normalised. Raises ModelError where the folder cannot be loaded.
    """

    def __init__(self, folder: Path, reference: str, model: str | None = None, device: str = "auto") -> None:
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        self.folder, self.reference = folder, reference
        self.model = model or _name(folder)
        self._device, dtype = _device(device)
        self.dtype = str(dtype).removeprefix("torch.")
        disable_progress_bar()  # of loading, which takes seconds; long embedding shows its own
        try:
            self._model = SentenceTransformer(
                str(folder), device=self._device, model_kwargs={"dtype": dtype}, local_files_only=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError("embedder_unreadable", path=folder, reason=reason) from error
        self._lock = threading.Lock()
        self._tokenizer = _counter(self._model.tokenizer)
        self.instructions = instructions_for(self.model, self._model.prompts)
        self.limit = int(self._model.max_seq_length or 512)
        # A space at the end of an instruction melts into the text's first word, so it is not counted here.
        self._overhead = self._length(self.instructions.passage.rstrip())
        self.max_tokens = self.limit - self._overhead
        self.chunk_tokens = min(CHUNK_TOKENS, self.max_tokens)

    def count_tokens(self, text: str) -> int:
        """Return the tokens that `text` adds to a passage, by the model's own tokenizer."""
        return self._length(self.instructions.passage + text) - self._overhead

    def encode(self, texts: Sequence[str], instruction: str) -> Vectors:
        """Return one normalised vector a text (n × dimension); raises DataError for one that is too long."""
        from tqdm.auto import tqdm

        lengths = [self._length(instruction + text) for text in texts]
        for text, length in zip(texts, lengths, strict=True):
            if length > self.limit:
                raise DataError(
                    "embed_too_long", start=text[:40], tokens=length, limit=self.limit, model=self.model
                )
        vectors = np.zeros((len(texts), self._model.get_embedding_dimension() or 0), dtype=np.float32)
        with tqdm(total=len(texts), desc=message("embedding"), disable=len(texts) < SHOW_FROM) as bar:
            for batch in _batches(lengths):
                with self._lock:
                    vectors[batch] = self._model.encode(
                        [texts[index] for index in batch],
                        prompt=instruction,
                        batch_size=len(batch),
                        show_progress_bar=False,
                    )
                bar.update(len(batch))
        return normalised(vectors)

    def describe(self) -> dict[str, Any]:
        """Return backend, model, revision (hash of the weights), pooling and number type."""
        pooling = next((m.pooling_mode for m in self._model if hasattr(m, "pooling_mode")), None)
        return {
            "backend": "sentence-transformers",
            "model": self.model,
            "revision": self.revision,
            "pooling": pooling if isinstance(pooling, str) else str(pooling),
            "dtype": self.dtype,
        }

    @cached_property
    def revision(self) -> str:
        """The SHA-256 of the weights; of a folder that we wrote, as its manifest has it."""
        try:
            files = read_manifest(self.folder)["files"]
            return str(files["model.safetensors"]["sha256"])
        except (StoreError, KeyError):
            weights = sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("pytorch_model*.bin")])
            return ",".join(sha256(path) for path in weights) or "unknown"

    def _length(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices by falling length, at most BATCH_TOKENS of padded tokens together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _device(asked: str) -> tuple[str, Any]:
    """Return (torch device, dtype): CUDA unless the CPU is asked for; bf16 only where it is native."""
    import torch

    if asked != "cpu" and torch.cuda.is_available():
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if asked == "cuda":
        raise ModelError("embedder_no_cuda")
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "cpu", torch.bfloat16 if native else torch.float32


def _counter(tokenizer: Any) -> Any:
    """Return a copy of the fast tokenizer that cuts and pads nothing: safe beside the model's own use."""
    counter = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", tokenizer))
    counter.no_truncation()
    counter.no_padding()
    return counter


def _name(folder: Path) -> str:
    """Return the model's name: what our own conversion wrote down, else the folder's."""
    try:
        return str(json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["model"])
    except (OSError, ValueError, KeyError):
        return folder.name
