"""What stands beside the answers: who served them, from which weights, with whose prompt and options."""

import json
from pathlib import Path
from typing import Any

import pytest

from rag_kit.compare import Comparison, compare
from rag_kit.compare.factors import subjects
from rag_kit.data.questions import Question
from rag_kit.embedded import base_gguf
from rag_kit.errors import DataError, ModelError, use_language
from rag_kit.manifest import sha256
from rag_kit.models.base import resolve_base
from rag_kit.models.options import GenerationOptions
from rag_kit.settings import Settings
from tests.compare.planted import Shelf
from tests.servers import closed_port, ollama
from tests.twin import qwen_twin

SHORT = GenerationOptions(max_new_tokens=6)
TWIN = {"engine": "transformers", "weights": "float32", "base": str(qwen_twin()), "prompt": "ours"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return tmp_path


def run(
    arms: list[str], questions: list[Question], settings: Settings, folder: Path, **how: Any
) -> Comparison:
    how = {"options": SHORT, "progress": False, "store": Shelf()} | how
    return compare(arms, questions, settings=settings, run_folder=folder, **how)


def test_the_stand_in_is_the_same_base_and_gets_our_prompt(root: Path, questions: list[Question]) -> None:
    """Its block type is another, and that stands beside the result."""
    with closed_port() as url:
        settings = Settings.load(root, ollama_base_url=url, engine="transformers", device="cpu")
        arms = ["base+none", "base+retrieved", "ollama:stand-in+none", "ollama:stand-in+retrieved"]
        found = run(arms, questions[:1] + questions[2:3], settings, root / "run")
    rows = Comparison.load(root / "run").rows
    assert rows.error.isna().all() and rows.degraded.str.len().eq(0).all()
    for _, same in rows.groupby(["question_id", "context"]):
        assert same.prompt_hash.nunique() == same.input_tokens.nunique() == 1 and len(same) == 2
    ours, theirs = found.factors["base"], found.factors["ollama:stand-in"]
    assert (ours["engine"], ours["weights"]) == ("transformers", "float32")
    assert (theirs["engine"], theirs["weights"]) == ("llama.cpp", "Q4_1")
    assert {name: ours[name] for name in ("base", "prompt", "thinking")} == {
        name: theirs[name] for name in ("base", "prompt", "thinking")
    }
    told = str(found)
    assert "Alike for all: base embedded; prompt ours; thinking no." in told
    assert "The models differ in more than their weights' values: engine, weights." in told
    assert "<td>Q4_1</td>" in found._repr_html_()
    assert json.loads((root / "run/manifest.json").read_text(encoding="utf-8"))["factors"] == found.factors
    use_language("zh")
    assert "各模型相同：基础模型 embedded" in str(found)


def test_a_run_is_not_resumed_by_another_engine_or_with_other_options(
    root: Path, questions: list[Question]
) -> None:
    one = Settings.load(root, base_model_name=str(qwen_twin()), device="cpu")
    first = run(["base"], questions[:1], one, root / "run", generation_config=True)
    assert first.factors["base"] == TWIN | {
        "thinking": "no",
        "generation_config": "temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.1: applied",
    }
    plain = run(["base"], questions[:1], one, root / "plain")
    assert plain.factors["base"]["generation_config"].endswith(": not applied")
    assert plain.rows.answer[0] != first.rows.answer[0]  # the penalty counts, however greedy
    with pytest.raises(DataError, match="generation_config: True → None"):
        run(["base"], questions[:1], one, root / "run")
    other = Settings.load(root, base_model_name=str(qwen_twin()), device="cpu", enable_fp16=True)
    with pytest.raises(DataError, match=r"base: .*transformers, float32 → .*transformers, bfloat16"):
        run(["base"], questions[:1], other, root / "plain")


def test_another_model_of_ollama_declares_itself(root: Path, questions: list[Question]) -> None:
    shown = {"template": "{{ .System }}{{ .Prompt }}"}
    with ollama(shown=shown, thinking="嗯") as wire:
        settings = Settings.load(
            root, ollama_base_url=wire.url, base_model_name=str(qwen_twin()), device="cpu"
        )
        penalty = GenerationOptions(max_new_tokens=6, repetition_penalty=1.2)
        found = run(["base", "ollama:tiny"], questions[:1], settings, root / "run", options=penalty)
        assert not wire.sent("/api/generate")[1:] and wire.sent("/api/chat")[0]["think"] is False
    factors = found.factors["ollama:tiny"]
    assert factors["engine"] == "Ollama 0.13.0" and factors["weights"] == "Q4_K_M"
    assert factors["base"] == "llama 1B (≠ architecture)" and factors["prompt"].startswith("template ")
    assert factors["thinking"] == "off" and factors["options"] == "repetition_penalty 1.2?"
    assert "engine, weights, base, prompt, thinking" in str(found)


def test_what_cannot_be_declared_stops_the_run_before_the_first_question(
    root: Path, questions: list[Question]
) -> None:
    with ollama(shown={"template": ""}) as wire:
        settings = Settings.load(root, ollama_base_url=wire.url)
        with pytest.raises(ModelError, match=r"does not say of tiny what it is \(missing: template\)"):
            run(["ollama:tiny"], questions[:1], settings, root / "run")
        assert not wire.sent("/api/chat") and not (root / "run").exists()


def test_the_same_base_on_ollama_gets_the_same_options(root: Path) -> None:
    modelfile = {"modelfile": f"FROM /blobs/sha256-{sha256(base_gguf())}"}
    with ollama(shown=modelfile) as wire:
        settings = Settings.load(root, ollama_base_url=wire.url, engine="transformers", device="cpu")
        found = subjects(["base", "ollama:tiny", "ollama:absent", "openai:x"], settings, SHORT, False)
    same = found["ollama:tiny"]
    assert same.how == {"same_base": resolve_base("embedded", settings).folder}
    assert same.identity == "sha256:tiny:latest (our prompt)" and same.factors["prompt"] == "ours"
    assert found["ollama:absent"].identity is None and not found["ollama:absent"].factors
    assert found["openai:x"].factors == {"engine": "openai"} and not found["openai:x"].how


def test_models_that_are_alike_in_all_are_said_to_be(questions: list[Question]) -> None:
    rows = [{"question_id": "q", "arm": arm, "answer": "x", "f1": 1.0} for arm in ("a", "b")]
    alike = Comparison.from_rows(
        rows, {"a": {"engine": "e", "weights": "F16"}, "b": {"engine": "e", "weights": "F16"}}
    )
    assert "Alike for all: engine e; weights F16." in str(alike) and "differ in more" not in str(alike)
    assert "engine" not in str(Comparison.from_rows(rows))
    lines = str(Comparison.from_rows(rows, {"a": {"engine": "<b>"}, "b": {}})).splitlines()
    assert any(line.split() == ["a", "<b>"] for line in lines) and any(
        line.split() == ["b", "–"] for line in lines
    )
    assert "&lt;b&gt;" in Comparison.from_rows(rows, {"a": {"engine": "<b>"}, "b": {}})._repr_html_()
