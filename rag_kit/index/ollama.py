"""Embeddings that an Ollama server computes, with its failures told in two sentences.

Knows Ollama's `/api/embed`; the server has no tokenizer to ask, so lengths are bounded from above.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import ollama

from rag_kit.data.chunker import conservative_count
from rag_kit.errors import DataError, ServiceError, message
from rag_kit.index.contract import ContractEmbeddings, Vectors, instructions_for, normalised
from rag_kit.ollama import LOOK_S, client, explaining

BATCH = 16  # texts a request
EMBED_S = 120.0  # the first request loads the model
SPECIAL = 2  # tokens around a text: BERT's [CLS] and [SEP]
DEFAULT_CONTEXT = 512
CHUNK_TOKENS = 448  # in the bound, which is 1.5 to 3 times the true count


class OllamaEmbeddings(ContractEmbeddings):
    """A model of the Ollama server at `base_url` as an embedder; no proxy stands before it.

    `truncate` is off, so a text over the model's limit is an error. Raises ServiceError: the server
    refuses, hangs, breaks off or fails, or has no such model.
    """

    def __init__(
        self, model: str, base_url: str, reference: str | None = None, timeout: float = EMBED_S
    ) -> None:
        self.model, self.base_url = model, base_url
        self.reference = reference or f"ollama:{model}"
        self.instructions = instructions_for(model)
        self._client = client(base_url, timeout)
        self._looker = client(base_url, min(LOOK_S, timeout))
        self._warned = threading.Event()

    @cached_property
    def limit(self) -> int:
        """The model's own context in tokens, as the server tells it."""
        with self._explaining():
            facts = self._looker.show(self.model).modelinfo or {}
        found = [value for key, value in facts.items() if key.endswith(".context_length")]
        return int(found[0]) if found else DEFAULT_CONTEXT

    @property
    def max_tokens(self) -> int:  # type: ignore[override]
        """How many tokens a passage may have, in `count_tokens`."""
        return self.limit - SPECIAL - conservative_count(self.instructions.passage)

    @property
    def chunk_tokens(self) -> int:  # type: ignore[override]
        """A good size of a chunk, in `count_tokens`."""
        return min(CHUNK_TOKENS, self.max_tokens)

    def count_tokens(self, text: str) -> int:
        """Return a bound that the model's tokenizer stays below on natural text."""
        return conservative_count(text)

    def encode(self, texts: Sequence[str], instruction: str) -> Vectors:
        """Return one normalised vector a text (n × dimension); raises DataError for one that is too long."""
        from tqdm.auto import tqdm

        parts = []
        with tqdm(total=len(texts), desc=message("embedding"), disable=len(texts) < 4 * BATCH) as bar:
            for start in range(0, len(texts), BATCH):
                batch = [instruction + text for text in texts[start : start + BATCH]]
                parts.append(self._request(batch))
                bar.update(len(batch))
        return normalised(np.concatenate(parts)) if parts else np.zeros((0, 0), dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        """Return backend, model and revision (the manifest's digest)."""
        return {"backend": "ollama", "model": self.model, "revision": self.revision, "pooling": None}

    @cached_property
    def revision(self) -> str:
        """The digest under which the server knows the model."""
        with self._explaining():
            entries = {str(entry.model): str(entry.digest) for entry in self._looker.list().models}
        full = self.model if ":" in self.model.rsplit("/", 1)[-1] else f"{self.model}:latest"
        return entries.get(full, "unknown")

    def _request(self, texts: list[str]) -> Vectors:
        with self._explaining(texts):
            answer = self._client.embed(self.model, texts, truncate=False)
        vectors = np.asarray(answer.embeddings, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            reason = f"{len(answer.embeddings)} / {len(texts)} embeddings"
            raise ServiceError("ollama_failed", url=self.base_url, model=self.model, reason=reason)
        self._check_bound(texts, answer.prompt_eval_count)
        return vectors

    def _check_bound(self, texts: list[str], counted: int | None) -> None:
        """Warn once where the server counted more tokens than the bound: chunks may come out too long."""
        bound = sum(SPECIAL + conservative_count(text) for text in texts)
        if counted is not None and counted > bound and not self._warned.is_set():
            self._warned.set()
            told = message("embed_bound_exceeded", model=self.model, counted=counted, bound=bound)
            warnings.warn(told, stacklevel=4)

    @contextmanager
    def _explaining(self, texts: Sequence[str] = ()) -> Iterator[None]:
        """Tell a text that is too long by its beginning; the rest as `rag_kit.ollama.explaining` does."""
        with explaining(self.base_url, self.model):
            try:
                yield
            except ollama.ResponseError as error:
                if error.status_code != 400 or "context length" not in str(error.error):
                    raise
                longest = max(texts, key=conservative_count, default="")
                values = {"start": longest[:40], "tokens": conservative_count(longest), "model": self.model}
                raise DataError("embed_too_long", **values, limit=self.limit) from error
