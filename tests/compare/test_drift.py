"""The drift ladder: what is planted on a rung is found there, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rag_kit.compare.drift import KINDS, drift
from rag_kit.compare.ladder import Drift, Rung
from rag_kit.data.questions import Question
from rag_kit.errors import ModelError, use_language
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.servers import closed_port
from tests.tiny_project import tiny_project

TEXTS = ("How long is the warranty?", "保修期是多久？", "Where do parcels go?")
ASKED = [
    Question(f"q{n}", text, ("48 个月",), (), True, "zh" if n == 1 else "en", "test")
    for n, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tiny_project(tmp_path_factory.mktemp("drift"), "desk")
    return Settings.load(root, base_model_name="./base", cache_dir=str(root / "cache"))


@pytest.fixture(scope="module")
def ladder(settings: Settings) -> Iterator[tuple[Drift, list[str]]]:
    told: list[str] = []
    use_language("en")
    with closed_port() as url:  # Ollama is not there: its rung says so, and the others stand
        absent = settings.model_copy(update={"ollama_base_url": url})
        yield drift("lora:desk", ASKED, absent, max_new_tokens=6, ollama="desk", progress=told.append), told
    use_language("auto")


def test_every_rung_is_measured_against_peft(ladder: tuple[Drift, list[str]], settings: Settings) -> None:
    found, told = ladder
    assert [rung.name for rung in found.rungs] == [
        "PEFT",
        "merged",
        "int8",
        *(f"GGUF {k}" for k in KINDS),
        "ollama:desk",
    ]
    peft, merged, _, f16, *_, q4, ollama = found.rungs
    assert peft.mean("kl") == 0 and peft.mean("argmax") == 1 and peft.mean("agreement") == 1
    assert merged.mean("kl") < 1e-6 and merged.answers == peft.answers and all(peft.answers)
    assert f16.mean("kl") < 1e-3 and f16.mean("argmax") > 0.9 and f16.mean("top20") < 0.25
    assert (
        q4.mean("kl") > 10 * f16.mean("kl")
        and q4.size is not None
        and q4.size < (f16.size or 0) < (merged.size or 0)
    )
    assert ollama.answers == () and "does not answer" in ollama.reason and "int8" not in ollama.reason
    assert len(told) == 8 and "[1/8] PEFT" in told[0]
    assert not list((settings.cache_dir or Path()).glob("rag-kit/drift-*"))  # nothing is left behind


def test_it_is_shown_as_table_text_picture_and_json(ladder: tuple[Drift, list[str]]) -> None:
    found, _ = ladder
    frame = found.table()
    assert list(frame.index) == [rung.name for rung in found.rungs]
    assert frame.loc["ollama:desk", "reason"] and frame["kl"].isna().sum() == 1
    assert "GGUF Q4_0" in str(found) and "F1 with PEFT's answer" in str(found)
    assert json.loads(json.dumps(found.as_dict(), ensure_ascii=False))["rungs"][0]["answers"] == list(
        found.rungs[0].answers
    )
    figure = found.plot()
    left, right = figure.axes
    assert len(left.lines[0].get_xdata()) == 7 and len(right.get_xticklabels()) == 7
    use_language("zh")
    assert "与 PEFT 的 KL" in str(found) and "未显示任何一步" in found.verdict
    use_language("en")


def test_an_adapter_that_is_none_and_no_questions_are_refused(settings: Settings) -> None:
    for reference, questions in (("base", ASKED), ("lora:desk", [])):
        with pytest.raises(ModelError) as caught:
            drift(reference, questions, settings)
        says(caught.value, reference, len(questions), en="nothing to put", zh="没有可测量")


def planted(n: int, **rungs: tuple[float, float]) -> Drift:
    """A ladder of (F1, KL) by rung, with a little of each question's own in the KL."""
    made = [
        Rung(name, answers=("x",) * n, f1=(f1,) * n, kl=tuple(kl + 0.001 * at for at in range(n)))
        for name, (f1, kl) in rungs.items()
    ]
    return Drift("lora:x", tuple(made))


def test_the_step_that_costs_quality_is_named_where_it_is_beyond_noise() -> None:
    found = planted(8, peft=(0.9, 0.0), q8=(0.9, 0.01), q4=(0.5, 0.4), q3=(0.45, 0.5))
    worst = found.worst_step
    assert worst is not None and str(worst) == "q8 → q4" and round(worst.difference.mean, 6) == -0.4
    assert "q8 → q4" in found.verdict and "-0.400" in found.verdict and "0.3900" in found.verdict


def test_few_questions_and_gains_name_no_step() -> None:
    assert planted(5, peft=(0.9, 0.0), q4=(0.1, 0.5)).worst_step is None
    better = planted(8, peft=(0.5, 0.0), q4=(0.9, 0.5))
    assert better.worst_step is None and "No step" in better.verdict and "peft → q4" in better.verdict


def test_a_rung_that_failed_is_stepped_over() -> None:
    found = planted(8, peft=(0.9, 0.0), int8=(0.9, 0.0), q4=(0.5, 0.4))
    found = replace(found, rungs=(found.rungs[0], Rung("int8", reason="no"), found.rungs[2]))
    assert str(found.worst_step) == "peft → q4"
    mixed = replace(found.rungs[2], f1=(None, *found.rungs[2].f1[1:]))
    assert replace(found, rungs=(found.rungs[0], mixed)).steps("f1")[0].difference.n == 7
