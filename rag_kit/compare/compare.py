"""Ask every arm every question: passages frozen first, one model after the other, a row as it comes.

Knows arms and the order of work; how answers are scored stands in `metrics`, where rows lie in `run`,
what they say in `comparison`. Shown in notebook 03.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

from rag_kit.compare.comparison import Comparison
from rag_kit.compare.factors import Subject, subjects
from rag_kit.compare.rows import RECALL_AT, answered_row, failed_row
from rag_kit.compare.run import FrozenContext, Run, freeze
from rag_kit.errors import DataError, RagKitError, ServiceError
from rag_kit.manifest import fingerprint

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from tqdm import tqdm

    from rag_kit.answer import Answer
    from rag_kit.data.questions import Question
    from rag_kit.index.hit import Hit
    from rag_kit.models.options import GenerationOptions
    from rag_kit.settings import Settings

Context = Literal["none", "retrieved"]
FAILURES_IN_A_ROW = 3  # of a service: then it counts as down, and nothing waits for its time-outs


class Searchable(Protocol):
    """What `compare` asks of an index."""

    def search(self, query: str, k: int) -> "list[Hit]":
        """Return the `k` best hits for `query`, best first."""
        ...


@dataclass(frozen=True)
class Arm:
    """One column of a comparison: a model reference and what stands in its prompt.

    Its text form is `model+context`, as in `lora:mine+retrieved`; a model alone has the context `none`.
    Raises DataError for an unknown context.
    """

    model: str
    context: Context = "none"

    def __post_init__(self) -> None:
        if self.context not in get_args(Context) or not self.model:
            raise DataError("compare_arm", arm=str(self), contexts=", ".join(get_args(Context)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form; in a model name that holds a `+`, the last one begins the context."""
        model, plus, context = text.strip().rpartition("+")
        return cls(model, context) if plus else cls(context)  # type: ignore[arg-type]  # checked above

    def __str__(self) -> str:
        return f"{self.model}+{self.context}"


def compare(
    arms: Iterable[Arm | str],
    questions: "Iterable[Question]",
    *,
    store: Searchable | None = None,
    top_k: int = 4,
    options: "GenerationOptions | None" = None,
    run_folder: Path | str | None = None,
    settings: "Settings | None" = None,
    progress: bool = True,
    generation_config: bool = False,
    force_adapters: bool = False,
    load: "Callable[[str], BaseChatModel] | None" = None,
    ask: "Callable[..., Answer] | None" = None,
) -> Comparison:
    """Ask every arm every question and return the scored rows; greedy unless `options` says otherwise.

    Passages are retrieved once and frozen before the first answer, so that every `retrieved` arm gets
    the same `top_k`. Models of one base get the same prompt and options, with `generation_config` also what
    the base's maker suggests; what else differs stands in `factors`. An adapter that the doctor refuses
    answers only with `force_adapters`, and then every row says so. With a `run_folder` each row is on disk
    before the next question is asked; called again with the same arguments, finished rows are kept and only
    missing or failed ones are done. A model, index or question that fails becomes rows with an `error` and
    without scores; the rest goes on. `load` and `ask` stand in for `rag_kit.models.reference.load_model` and
    `rag_kit.rag.answer`. Raises DataError where the arguments do not fit together, or the folder holds
    another comparison, ModelError where a server does not say what a model of it is.
    """
    columns = list(dict.fromkeys(arm if isinstance(arm, Arm) else Arm.parse(arm) for arm in arms))
    questions = list(questions)
    _check(columns, questions, store, top_k)
    if options is None:
        from rag_kit.models.options import GenerationOptions
        from rag_kit.settings import get_settings

        options = GenerationOptions.from_settings(settings or get_settings()).greedy()
    if ask is None:
        from rag_kit.answer import answer

        ask = answer
    models = {arm.model: Subject(arm.model, options) for arm in columns}
    if load is None:
        from rag_kit.models.reference import load_model
        from rag_kit.models.standin import answering
        from rag_kit.settings import get_settings

        settings = known = settings or get_settings()
        # the stand-in under its own name; why another cannot answer, its rows will say
        columns = list(dict.fromkeys(replace(arm, model=answering(arm.model, settings)) for arm in columns))
        models = subjects(dict.fromkeys(arm.model for arm in columns), known, options, generation_config)

        def load(reference: str) -> "BaseChatModel":
            forced = {"forced": True} if force_adapters and reference.startswith("lora") else {}
            return load_model(reference, known, **models[reference].how, **forced)

    applied = {"generation_config": True} if generation_config else {}
    plan = {
        "arms": [str(arm) for arm in columns],
        "questions": {question.id: fingerprint(asdict(question)) for question in questions},
        "options": asdict(options) | applied,
        "top_k": top_k,
        "models": {reference: one.identity for reference, one in models.items()},
        "factors": {reference: one.factors for reference, one in models.items() if one.factors},
    }
    with Run.open(Path(run_folder) if run_folder is not None else None, plan) as run:
        if store is not None and any(arm.context == "retrieved" for arm in columns):
            _retrieve(run, store, questions, max(top_k, *RECALL_AT), progress)
        todo = [(arm, question) for arm in columns for question in questions if not run.has(arm, question.id)]
        with _bar(len(todo), progress) as bar:
            for model in dict.fromkeys(arm.model for arm, _ in todo):
                work = [(arm, question) for arm, question in todo if arm.model == model]
                asking = partial(ask, options=models[model].options, reference=models[model].label)
                admitted = partial(_admitted, load, force_adapters)
                for row in _answers(model, work, run.contexts, top_k, admitted, asking):
                    run.add(row)
                    bar.set_description(row["arm"], refresh=False)
                    bar.update()
        return run.finish()


def _check(arms: Sequence[Arm], questions: "Sequence[Question]", store: object, top_k: int) -> None:
    if not arms or not questions:
        raise DataError("compare_nothing", arms=len(arms), questions=len(questions))
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError("compare_same_id", id=question.id)
        seen.add(question.id)
    retrieving = [str(arm) for arm in arms if arm.context == "retrieved"]
    if retrieving and store is None:
        raise DataError("compare_no_store", arms=", ".join(retrieving))
    if top_k < 1:
        raise DataError("compare_top_k", top_k=top_k)


def _retrieve(run: Run, store: Searchable, questions: "Sequence[Question]", k: int, progress: bool) -> None:
    """Freeze the first `k` hits of each question that has none yet."""
    missing = [q for q in questions if q.id not in run.contexts or run.contexts[q.id].error]
    down: str | None = None
    with _bar(len(missing), progress) as bar:
        for question in missing:
            if down is None:
                started = perf_counter()
                try:
                    hits = store.search(question.text, k)
                except Exception as error:
                    run.contexts[question.id] = FrozenContext((), error=_reason(error))
                    down = _reason(error) if isinstance(error, ServiceError) else None
                else:
                    run.contexts[question.id] = freeze(hits, perf_counter() - started)
            else:
                run.contexts[question.id] = FrozenContext((), error=down)
            bar.update()
    if missing:
        run.save_contexts()


def _answers(
    reference: str,
    work: "Sequence[tuple[Arm, Question]]",
    contexts: dict[str, FrozenContext],
    top_k: int,
    load: "Callable[[str], tuple[BaseChatModel, tuple[str, ...]]]",
    ask: "Callable[..., Answer]",
) -> Iterator[dict[str, Any]]:
    """Yield one row for each (arm, question) of one model, which is loaded once."""
    broken, failures, started = None, 0, perf_counter()
    try:
        model, notes = load(reference)
    except Exception as error:
        broken = _reason(error)
    load_s = perf_counter() - started
    for arm, question in work:
        context = contexts[question.id] if arm.context == "retrieved" else FrozenContext(())
        passages = context.hits[:top_k]
        if reason := broken or context.error:
            yield failed_row(arm, question, passages, reason)
            continue
        try:
            result = ask(model, question.text, passages, language=question.language)
        except Exception as error:
            failures = failures + 1 if isinstance(error, ServiceError) else 0
            broken = _reason(error) if failures == FAILURES_IN_A_ROW else None
            yield failed_row(arm, question, passages, _reason(error))
        else:
            failures = 0
            result = replace(result, degraded=(*notes, *result.degraded))
            yield {**answered_row(arm, question, passages, context, result), "load_s": load_s}


def _admitted(
    load: "Callable[[str], BaseChatModel]", forced: bool, reference: str
) -> "tuple[BaseChatModel, tuple[str, ...]]":
    """Return a model in memory, and what is to be said of an adapter that the doctor would refuse."""
    from rag_kit.models.lora import LoRALanguageModel

    model = load(reference)
    if hasattr(model, "load"):
        model.load()  # now, so that the first answer's seconds are like the others'
    if not isinstance(model, LoRALanguageModel):
        return model, ()
    from rag_kit.models.doctor import admit

    # one that changes nothing would pass for a fair opponent
    return model, admit(reference, model.settings, forced=forced, model=model)


def _reason(error: Exception) -> str:
    """What the row says: our errors bring their hint, others their kind."""
    return str(error) if isinstance(error, RagKitError) else f"{type(error).__name__}: {error}"


@contextmanager
def _bar(total: int, progress: bool) -> "Iterator[tqdm]":
    from tqdm.auto import tqdm

    with tqdm(total=total, disable=not progress or total == 0, unit="q", leave=False) as bar:
        yield bar
