"""Model references: every kind behind one door, the unknown told."""

import sys

import pytest

from rag_kit.answer import answer
from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.ollama import OllamaLanguageModel
from rag_kit.models.options import GenerationOptions
from rag_kit.models.reference import is_local, known_references, load_model
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.servers import closed_port, ollama, openai


@pytest.fixture
def project(tmp_path, twin, make_adapter):
    make_adapter(tmp_path / "lora_adapters" / "red")
    return tmp_path


def test_local_references(project, twin):
    settings = Settings.load(project, base_model_name=str(twin.folder), max_new_tokens=4)
    for reference in ("base", "lora", "lora:red"):
        model = load_model(reference, settings, temperature=0)
        assert isinstance(model, LoRALanguageModel) and model.model == reference
        assert model.invoke("你好").usage_metadata["output_tokens"] <= 4


def test_an_adapter_that_is_missing_is_told_before_anything_is_loaded(tmp_path):
    settings = Settings.load(tmp_path)
    with pytest.raises(AdapterNotFoundError):
        load_model("lora", settings)
    with pytest.raises(AdapterNotFoundError) as caught:
        load_model("lora:green", settings)
    says(caught.value, "green")


def test_ollama_models_of_the_env_file(tmp_path):
    with ollama(models=("qwen3:4b",)) as wire:
        (tmp_path / ".env").write_text(f"OLLAMA_BASE_URL={wire.url}\n", encoding="utf-8")
        model = load_model("ollama:qwen3:4b", Settings.load(tmp_path))
        assert isinstance(model, OllamaLanguageModel) and model.invoke("hi").text == "Hello!"


def test_an_openai_compatible_server(tmp_path, monkeypatch):
    with openai() as wire:
        monkeypatch.setenv("OPENAI_API_BASE", f"{wire.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        model = load_model("openai:my-vllm", Settings.load(tmp_path), temperature=0.25)
        assert model.invoke("hi").text == "Hello!"
        options = GenerationOptions(
            temperature=0.5, top_p=0.9, max_new_tokens=7, stop=("停",), seed=3, top_k=9
        )
        told = answer(model, "你好", options=options, reference="openai:my-vllm")
    first, second = (body for _, body in wire.requests)
    assert first["model"] == "my-vllm" and first["temperature"] == 0.25
    assert (told.text, told.model, told.finish_reason) == ("Hello!", "openai:my-vllm", "stop")
    assert second["temperature"] == 0.5 and second["top_p"] == 0.9 and second["stop"] == ["停"]
    assert second.get("max_tokens") or second.get("max_completion_tokens") == 7
    assert second["seed"] == 3 and second["top_k"] == 9 and "min_p" not in second


def test_an_openai_compatible_server_that_is_down(tmp_path, monkeypatch):
    from rag_kit.errors import ServiceError

    with closed_port() as url:
        monkeypatch.setenv("OPENAI_API_BASE", f"{url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        model = load_model("openai:my-vllm", Settings.load(tmp_path), max_retries=0)
        with pytest.raises(ServiceError) as caught:
            answer(model, "hi", reference="openai:my-vllm")
    says(caught.value, "openai:my-vllm", "OPENAI_API_BASE", en="failed to answer", zh="回答失败")


def test_a_missing_key_is_told(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelError) as caught:
        load_model("openai:gpt", Settings.load(tmp_path))
    says(caught.value, "openai:gpt", en="could not be made", zh="无法创建模型")


def test_a_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "langchain_anthropic", None)
    with pytest.raises(ModelError) as caught:
        load_model("anthropic:claude", Settings.load(tmp_path))
    says(caught.value, "anthropic:claude", "langchain", en="could not be made", zh="无法创建模型")


@pytest.mark.parametrize("reference", ["gpt", "", "lor", "ollama", "ollama:", "nobody:model", "Base"])
def test_the_unknown_is_told_with_what_is_known(project, reference):
    with ollama(models=("qwen3:4b",)) as wire, pytest.raises(ModelError) as caught:
        load_model(reference, Settings.load(project, ollama_base_url=wire.url))
    says(
        caught.value,
        reference,
        "base, lora, lora:red, ollama:qwen3:4b",
        en="is not a model reference",
        zh="不是模型引用",
    )


def test_what_is_known_without_adapters_and_without_ollama(tmp_path):
    with ollama(mode="proxy") as wire:
        assert known_references(Settings.load(tmp_path, ollama_base_url=wire.url)) == ["base", "ollama:MODEL"]


def test_what_is_local():
    assert [is_local(r) for r in ("base", "lora", "lora:x", "ollama:lora", "loral")] == [
        True,
        True,
        True,
        False,
        False,
    ]
