"""A comparison of real models: the twin, an adapter that does something, one that does nothing."""

from pathlib import Path
from typing import Any

import pytest

from rag_kit.compare import compare
from rag_kit.data.questions import Question
from rag_kit.models.options import GenerationOptions
from rag_kit.settings import Settings
from tests.twin import qwen_twin

QUESTIONS = [
    Question("en", "Where is the workshop?", ("Port Lune",)),
    Question("zh", "工坊在哪里？", ("月港",), language="zh"),
]
SHORT = GenerationOptions(max_new_tokens=4)


def adapter(folder: Path, scale: float) -> None:
    """Write a LoRA adapter of the twin whose B matrices are `scale` everywhere."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(qwen_twin()), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(scale)
    model.save_pretrained(folder)


def test_an_adapter_without_effect_may_not_be_compared(tmp_path: Path) -> None:
    adapter(tmp_path / "lora_adapters" / "works", 0.5)
    adapter(tmp_path / "lora_adapters" / "nothing", 0.0)
    settings = Settings.load(tmp_path, base_model_name=str(qwen_twin()))
    arms = ["base", "lora:works", "lora:nothing", "lora:absent"]
    result = compare(arms, QUESTIONS, options=SHORT, settings=settings, progress=False)
    rows = result.rows.set_index(["model", "question_id"])
    assert rows.loc[["base", "lora:works"]].error.isna().all()
    assert (rows.loc["base"].answer != rows.loc["lora:works"].answer).all()
    for name, reason in (
        ("nothing", "The adapter nothing may not be compared"),
        ("absent", "There is no adapter called absent"),
    ):
        assert rows.loc[f"lora:{name}"].error.str.contains(reason).all()
        assert rows.loc[f"lora:{name}"].f1.isna().all()
    forced = compare(
        ["lora:nothing"], QUESTIONS, options=SHORT, settings=settings, progress=False, force_adapters=True
    )
    assert forced.rows.error.isna().all() and forced.rows.degraded.str.len().gt(0).all()
    assert forced.rows.degraded.str.join(" ").str.contains("nothing").all()


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_KIT_LANG", "en")
    monkeypatch.delenv("LORA_MODEL_PATH", raising=False)
