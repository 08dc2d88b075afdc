"""Run the drift ladder: one adapter's answers through PEFT, merged, int8, GGUF of ever fewer bits, Ollama.

Each rung reads PEFT's own answers token by token and answers the same questions for itself. Its files are
temporary. Knows engines and files; what came of it stands in `ladder`. Shown in notebook 03.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx

from rag_kit.compare.ladder import Drift, Rung
from rag_kit.compare.metrics import token_f1
from rag_kit.data.questions import Question
from rag_kit.embedded import Progress, cache_root
from rag_kit.errors import ModelError, RagKitError, message
from rag_kit.models.adapters import Adapter, first_line
from rag_kit.models.base import Base
from rag_kit.models.device import Device, choose_device
from rag_kit.models.divergence import Row, divergence
from rag_kit.models.engine import Generation
from rag_kit.models.llamacpp.adapter_gguf import lora_pairs
from rag_kit.models.llamacpp.process import EngineProcess
from rag_kit.models.llamacpp.rewrite import rewrite
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.options import GenerationOptions
from rag_kit.models.parity import RawPrompt, begins_itself, raw_prompt, tokenizer_of
from rag_kit.models.prompt import build_messages
from rag_kit.models.transformers_engine import TransformersEngine
from rag_kit.ollama import client, explaining

if TYPE_CHECKING:
    from rag_kit.settings import Settings

KINDS = ("F16", "Q8_0", "Q5_0", "Q4_0")
TOKENIZER = ("token*.json", "special_tokens_map.json", "*.jinja", "generation_config.json")
PATIENCE_S = 300.0
NAMED = 256  # of 49,152 tokens: the whole vocabulary takes llama.cpp twenty times as long to tell


@dataclass(frozen=True)
class Case:
    """A question as PEFT answered it: the prompt, its answer's ids and text, and before each of the ids and
    behind the last the log-probabilities of the NAMED most probable tokens.
    """

    question: Question
    prompt: RawPrompt
    answer: tuple[int, ...]
    text: str
    rows: list[Row]


@dataclass(frozen=True)
class Side:
    """A rung at work: it answers a prompt greedily, and reads a given answer; None where it cannot."""

    size: int | None
    answer: Callable[[Case], str]
    read: Callable[[Case], list[Row]] | None = None


def drift(
    reference: str,
    questions: Sequence[Question],
    settings: Settings,
    *,
    max_new_tokens: int = 24,
    ollama: str | None = None,
    progress: Progress = None,
) -> Drift:
    """Put the same questions, without passages, through every form of the adapter that `reference` names.

    `ollama` names a model of the server at OLLAMA_BASE_URL as the last rung. A rung that cannot be had is a
    row with its reason. Raises ModelError where there is no adapter or no question, or PEFT cannot run it.
    """
    model = LoRALanguageModel(model=reference, settings=settings)
    adapter, base, say = model.adapter(), model.base_model, progress or (lambda _: None)
    if adapter is None or not questions:
        raise ModelError("drift_nothing", reference=reference, questions=len(questions))
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    device = replace(choose_device(settings), dtype="float32", quantization=None)
    root = cache_root(settings.cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix="drift-") as temporary:
        merged = replace(base, folder=Path(temporary) / "merged", gguf=None)
        rungs: list[tuple[str, Callable[[], AbstractContextManager[Side]]]] = [
            ("merged", partial(_merged, merged, device, options, base, adapter)),
            ("int8", partial(_merged, merged, replace(device, quantization="int8"), options, base, adapter)),
            *((f"GGUF {kind}", partial(_gguf, base, adapter, kind, Path(temporary), options))
              for kind in KINDS),
        ]  # fmt: skip
        if ollama:
            rungs.append((f"ollama:{ollama}", partial(_ollama, ollama, base, settings, options)))
        say(message("drift_step", number=1, total=len(rungs) + 1, rung="PEFT"))
        start = time.perf_counter()
        engine = TransformersEngine(base, device)
        with engine.holding(adapter) as key:
            cases = [_case(question, engine, key, options) for question in questions]
            peft = Side(engine.memory_bytes(), lambda case: case.text, lambda case: case.rows)
        made = [_measured("PEFT", peft, cases, start)]
        del engine
        for number, (name, enter) in enumerate(rungs, 2):
            say(message("drift_step", number=number, total=len(rungs) + 1, rung=name))
            start = time.perf_counter()
            try:
                with enter() as side:
                    made.append(_measured(name, side, cases, start))
            except Exception as error:  # of whatever library: the other rungs stand
                reason = error.message if isinstance(error, RagKitError) else first_line(error)
                made.append(Rung(name, reason=reason))
    return Drift(reference, tuple(made))


def _case(
    question: Question, engine: TransformersEngine, key: str | None, options: GenerationOptions
) -> Case:
    prompt = raw_prompt(engine.tokenizer, build_messages(question.text, language=question.language))
    answer = tuple(engine.generate(prompt.rendered.ids, key, options, Generation()))
    case = Case(question, prompt, answer, engine.tokenizer.decode(answer), [])
    return replace(case, rows=_read(engine, key, case))


def _measured(name: str, side: Side, cases: Sequence[Case], start: float) -> Rung:
    """Return the rung's row; whatever it answers is compared with PEFT's answer and with the references."""
    texts, apart, scores, agreeing = [], [], [], []
    for case in cases:
        text = side.answer(case)
        language = case.question.language
        seen = divergence(case.rows, side.read(case)) if side.read else None
        texts.append(text)
        apart.append((seen.kl, seen.top20, seen.argmax) if seen else (None, None, None))
        scores.append(token_f1(text, case.question.answers, language))
        agreeing.append(1.0 if text == case.text else token_f1(text, [case.text], language) or 0.0)
    kl, top20, argmax = zip(*apart, strict=True)
    told: dict[str, Any] = {
        "kl": kl,
        "top20": top20,
        "argmax": argmax,
        "agreement": tuple(agreeing),
        "f1": tuple(scores),
    }
    return Rung(name, tuple(texts), size=side.size, seconds=time.perf_counter() - start, **told)


def _read(engine: TransformersEngine, key: str | None, case: Case) -> list[Row]:
    ids = case.prompt.rendered.ids
    logits = engine.logits([*ids, *case.answer], key)[len(ids) - 1 :]
    best = logits.log_softmax(-1).topk(min(NAMED, logits.shape[-1]))
    return [
        dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _of_engine(engine: TransformersEngine, key: str | None, options: GenerationOptions) -> Side:
    def answer(case: Case) -> str:
        made = engine.generate(case.prompt.rendered.ids, key, options, Generation())
        return str(engine.tokenizer.decode(list(made)))

    return Side(engine.memory_bytes(), answer, partial(_read, engine, key))


@contextmanager
def _merged(
    merged: Base, device: Device, options: GenerationOptions, base: Base, adapter: Adapter
) -> Iterator[Side]:
    """The weights as PEFT merges them, in float32; int8 is made of the same folder."""
    if not merged.folder.exists():
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(base.folder, dtype="float32", use_safetensors=True)
        whole = PeftModel.from_pretrained(whole, str(adapter.folder)).merge_and_unload()
        whole.save_pretrained(merged.folder)
        for file in (file for pattern in TOKENIZER for file in base.folder.glob(pattern)):
            shutil.copyfile(file, merged.folder / file.name)
    yield _of_engine(TransformersEngine(merged, device), None, options)


@contextmanager
def _gguf(
    base: Base, adapter: Adapter, kind: str, folder: Path, options: GenerationOptions
) -> Iterator[Side]:
    """The base's GGUF with the adapter merged, in block type `kind`, served by an engine process."""
    if base.gguf is None:
        raise ModelError("export_no_gguf", base=base.name)
    file = rewrite(base.gguf, folder / f"{kind}.gguf", kind, lora_pairs(adapter, base.gguf))
    greedy = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": options.max_new_tokens}
    with EngineProcess(file, name="drift") as process:
        how: dict[str, Any] = {"headers": process.headers, "trust_env": False, "timeout": PATIENCE_S}
        with httpx.Client(base_url=process.url, **how) as http:

            def asked(route: str, ids: Sequence[int], **more: Any) -> list[dict[str, Any]]:
                body = {"ids": list(ids), "cache": True, **more}
                lines = [json.loads(line) for line in http.post(route, json=body).text.splitlines()]
                if "error" in lines[-1]:
                    raise ModelError("engine_said", reason=lines[-1]["error"])
                return lines

            def answer(case: Case) -> str:
                parts = asked("/engine/generate", case.prompt.rendered.ids, options=greedy)
                return "".join(part.get("text", "") for part in parts)

            def read(case: Case) -> list[Row]:
                ids, how = [*case.prompt.rendered.ids, *case.answer], greedy | {"num_predict": 1}
                ends = range(len(case.prompt.rendered.ids), len(ids) + 1)
                told = (asked("/engine/generate", ids[:end], options=how, logprobs=NAMED) for end in ends)
                return [dict(map(tuple, lines[0]["top"])) for lines in told]

            yield Side(file.stat().st_size, answer, read)
    file.unlink()


@contextmanager
def _ollama(model: str, base: Base, settings: Settings, options: GenerationOptions) -> Iterator[Side]:
    """What a model of Ollama's answers to the raw prompt; it tells no log-probabilities of a given answer."""
    greedy = {"temperature": 0.0, "repeat_penalty": 1.0, "num_predict": options.max_new_tokens}
    url = settings.ollama_base_url
    with explaining(url, model):
        server = client(url, PATIENCE_S)
        begins = begins_itself(server.show(model).modelinfo or {})

        def answer(case: Case) -> str:
            messages = build_messages(case.question.text, language=case.question.language)
            prompt = raw_prompt(tokenizer_of(base.folder), messages, begins=begins)
            return server.generate(model, prompt.text, raw=True, options=greedy).response or ""

        yield Side(None, answer)
