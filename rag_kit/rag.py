"""Where everything meets: a question, its passages, a model, an answer with its sources.

`RAGHandler` answers with the models that Ollama serves; `LoRARAGHandler` adds the local base and its
adapters and switches between them while it runs. Shown in notebooks 02 and 03.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rag_kit.answer import Answer, stream_answer
from rag_kit.data.language import detect_language, is_greeting
from rag_kit.embedded import BASE
from rag_kit.errors import ModelError, RagKitError, message
from rag_kit.models.adapters import adapter_folders
from rag_kit.models.base import SPEAKS
from rag_kit.models.options import GenerationOptions
from rag_kit.models.reference import is_local, load_model
from rag_kit.models.standin import STAND_IN, answering, resolve

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

    from rag_kit.index.hit import Hit
    from rag_kit.index.store import FaissStore
    from rag_kit.settings import Settings

logger = logging.getLogger("rag_kit.rag")

TOP_K = 4


class RAGHandler:
    """Answers questions from the index with OLLAMA_MODEL: the guide's original service.

    `store` and `settings` come from the environment where they are not given. Without an index it
    answers without sources, and every answer says so. An adapter that the doctor refuses answers only with
    `force_adapters`, and then every answer says so.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: FaissStore | None = None,
        force_adapters: bool = False,
    ) -> None:
        from rag_kit.settings import get_settings

        self.settings, self._forced = settings or get_settings(), force_adapters
        self._admitted: dict[str, tuple[str, ...]] = {}
        self._store = store
        self._models: dict[str, BaseChatModel] = {}
        self._lock = threading.Lock()
        self._reference = f"ollama:{self.settings.ollama_model}"
        if self.settings.preload_models:
            self.preload()

    @property
    def reference(self) -> str:
        """The model reference that answers when a request names none."""
        return self._reference

    @property
    def store(self) -> FaissStore:
        """The index, opened at first use; raises StoreError where there is none that fits."""
        with self._lock:
            if self._store is None:
                from rag_kit.index.store import open_store

                self._store = open_store(self.settings)
            return self._store

    def model(self, reference: str) -> BaseChatModel:
        """Return the model behind `reference`, made once."""
        with self._lock:
            if reference not in self._models:
                # one person's next question often has the same passages
                how = {"keep_prompt": True, "forced": self._forced} if is_local(reference) else {}
                self._models[reference] = load_model(reference, self.settings, **how)
            return self._models[reference]

    def preload(self) -> None:
        """Bring model and index into memory now; what is missing is logged and told by each answer."""
        for load in (lambda: self.store.search("preload", 1), lambda: self._load(self.reference)):
            try:
                load()
            except RagKitError as error:
                logger.warning("%s", error)

    def _load(self, reference: str) -> float:
        """Bring a local model into memory; return the seconds it took."""
        start = time.perf_counter()
        model = self.model(reference)
        if hasattr(model, "load"):
            model.load()
        self._notes(reference)
        return time.perf_counter() - start

    def _notes(self, reference: str) -> tuple[str, ...]:
        """Return what is to be said of an adapter that answers by force; raises for a refused one."""
        if not reference.startswith("lora"):
            return ()
        from rag_kit.models.doctor import admit

        model: Any = self.model(reference)
        key = model.adapter().key  # another one, once the adapter is trained anew
        if key not in self._admitted:
            self._admitted[key] = admit(reference, self.settings, forced=self._forced, model=model)
        return self._admitted[key]

    def retrieve(self, question: str, top_k: int = TOP_K) -> list[Hit]:
        """Return the best `top_k` chunks for `question`; raises StoreError."""
        return self.store.search(question, top_k)

    def ask(self, question: str, **how: Any) -> Answer:
        """Return the answer to `question`; `how` as for `stream`."""
        *_, last = self.stream(question, **how)
        assert isinstance(last, Answer)
        return last

    def stream(
        self,
        question: str,
        *,
        model: str | None = None,
        use_lora: bool | None = None,
        top_k: int = TOP_K,
        history: Sequence[tuple[str, str]] = (),
        options: GenerationOptions | None = None,
    ) -> Iterator[str | Answer]:
        """Yield the answer's text as it is generated, and last the Answer.

        `model` and `use_lora` (False means OLLAMA_MODEL) hold for this request alone. A `model` that cannot
        answer is an error; for the default and for `use_lora` the next in line answers, and says so.
        """
        language = detect_language(question)
        degraded: list[str] = []
        hits: list[Hit] = []
        start = time.perf_counter()
        greeting = is_greeting(question)
        if top_k > 0 and not greeting:
            try:
                hits = self.retrieve(question, top_k)
            except RagKitError as error:
                reason = " ".join(error.text(language))
                degraded.append(message("degraded_no_sources", lang=language, reason=reason))
        retrieval_s = time.perf_counter() - start
        options = options or GenerationOptions.from_settings(self.settings)
        failures: list[RagKitError] = []
        meant = self._meant(use_lora, model)
        line = [meant] if model else self._line(meant)
        if greeting:  # an adapter that knows facts by heart greets with a fact; its base does not
            line = list(dict.fromkeys("base" if is_local(reference) else reference for reference in line))
        for reference in line:
            try:
                used = resolve(reference, self.settings)
                load_s = self._load(used)
                asked, notes = self._speakable(question, used, language, greeting)
                how: dict[str, Any] = {"options": options, "history": history, "reference": used}
                if greeting:  # a small model drawn at random makes up a name and a life
                    how["options"] = options.greedy()
                    how["system"] = message("greeting_system", lang=detect_language(asked))
                pieces = stream_answer(self.model(used), asked, hits, **how)
                first = next(pieces)  # a model that cannot answer fails here, before anything was shown
            except RagKitError as error:
                failures.append(error)
                continue
            if failures:
                reason = " ".join(failures[0].text(language))
                note = message("degraded_model", lang=language, wanted=line[0], used=used, reason=reason)
                degraded.append(note)
            if used != reference:
                told = {"url": self.settings.ollama_base_url, "wanted": reference, "used": used}
                degraded.append(message("degraded_stand_in", lang=language, model=BASE.model, **told))
            timings = {"retrieval_s": retrieval_s, "load_s": load_s}
            degraded += [*self._notes(used), *notes]
            yield from self._finished(first, pieces, degraded, timings, language, greeting)
            return
        raise failures[0]

    def _finished(
        self,
        first: str | Answer,
        pieces: Iterator[str | Answer],
        degraded: list[str],
        timings: dict[str, float],
        language: str,
        greeting: bool,
    ) -> Iterator[str | Answer]:
        """Pass the pieces on and complete the Answer with what the handler knows."""
        for piece in itertools.chain([first], pieces):
            if isinstance(piece, str):
                yield piece
                continue
            text = piece.text
            if greeting:
                remark = "\n\n" + message("no_source_used", lang=language)
                text += remark
                yield remark
            every = (*degraded, *piece.degraded)
            yield replace(piece, text=text, timings=timings | (piece.timings or {}), degraded=every)

    def _speakable(
        self, question: str, reference: str, language: str, greeting: bool
    ) -> tuple[str, list[str]]:
        """Return the question to put to this model, and a note where it does not speak the language."""
        spoken = self._languages(reference)
        if not spoken or language in spoken:
            return question, []
        names = ", ".join(message(f"language_{code}", lang=language) for code in spoken)
        note = message("degraded_language", lang=language, model=reference, spoken=names)
        return (message("introduce_yourself", lang=spoken[0]) if greeting else question), [note]

    def _languages(self, reference: str) -> tuple[str, ...]:
        """Return the languages that a local base says it speaks; empty where it does not say."""
        if reference == f"ollama:{STAND_IN}":
            return SPEAKS.get(BASE.model, ())
        base = getattr(self.model(reference), "base_model", None)
        return base.languages() if base is not None else ()

    def _meant(self, use_lora: bool | None, model: str | None = None) -> str:
        """Return what `use_lora` and `model` ask for; the default where they say nothing.

        Raises ModelError where they disagree.
        """
        meant = None if use_lora is None else "lora" if use_lora else f"ollama:{self.settings.ollama_model}"
        if model and meant and model.split(":")[0] != meant.split(":")[0]:
            raise ModelError("switch_disagrees", use_lora=str(use_lora).lower(), model=model)
        return model or meant or self.reference

    def _line(self, chosen: str) -> list[str]:
        """Return the references to try, `chosen` first."""
        return [chosen]

    def model_info(self) -> dict[str, Any]:
        """Return the guide's `/model_info`: paths and names as they were written in the settings."""
        raw = self.settings.raw
        cache_dir = raw("cache_dir")
        return {
            "base_model": self.settings.base_model_name,
            "lora_model_path": str(raw("lora_model_path")),
            "lora_exists": bool(adapter_folders(self.settings.lora_model_path)),
            "using_lora": self.reference.startswith("lora"),
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "vector_store_path": str(raw("vector_store_path")),
            "embedding_model": self.settings.embedding_model,
            "model": answering(self.reference, self.settings),
        }


class LoRARAGHandler(RAGHandler):
    """Answers with the base, an adapter or Ollama, and switches between them while it runs.

    USE_LORA_DEFAULT chooses what answers first: the default adapter, or OLLAMA_MODEL.
    """

    def __init__(self, settings: Settings | None = None, **how: Any) -> None:
        from rag_kit.settings import get_settings

        settings = settings or get_settings()
        self._initial = "lora" if settings.use_lora_default else f"ollama:{settings.ollama_model}"
        self._switched: str | None = None
        super().__init__(settings, **how)

    @property
    def reference(self) -> str:
        """The model reference that answers when a request names none."""
        return self._switched or self._initial

    def switch_model(self, *, use_lora: bool | None = None, model: str | None = None) -> str:
        """Change what answers from now on and return its reference; requests that run are not touched.

        `use_lora` False means OLLAMA_MODEL, or what stands in for it. Raises ModelError where both are
        given and disagree, and whatever keeps the new model from answering; then nothing changes.
        """
        if use_lora is None and model is None:
            raise ModelError("switch_nothing")
        wanted = self._meant(use_lora, model)
        answers = resolve(wanted, self.settings)
        self._load(answers)  # raises where it could not answer now
        describe = getattr(self.model(answers), "describe", None)
        if describe is not None:
            describe()
        self._switched = wanted
        return answers

    def _line(self, chosen: str) -> list[str]:
        """Return what was chosen, then the nearest that may answer in its place."""
        others = ["base", f"ollama:{self.settings.ollama_model}"]
        if chosen.startswith("ollama:"):
            others = ["lora", "base"]
        return [chosen, *(other for other in others if other != chosen)]
