"""Who answers for Ollama: itself, nobody, or the stand-in, which is always called so."""

import pytest

from rag_kit.answer import answer
from rag_kit.errors import ServiceError
from rag_kit.models.reference import known_references, load_model
from rag_kit.models.standin import find_ollama, ollama_state, resolve
from rag_kit.ollama import list_models
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.servers import closed_port, ollama


@pytest.fixture
def nobody(tmp_path):
    """A project on the embedded profile, where nothing listens at Ollama's address."""
    with closed_port() as url:
        yield Settings.load(tmp_path, ollama_base_url=url, max_new_tokens=8, temperature=0)


def test_a_server_that_is_there_is_asked_itself(tmp_path):
    with ollama() as wire:
        settings = Settings.load(tmp_path, ollama_base_url=wire.url, ollama_model="tiny")
        assert ollama_state(settings) == ("running", "0.13.0")
        assert find_ollama(settings).url == wire.url and resolve("ollama:tiny", settings) == "ollama:tiny"


@pytest.mark.parametrize("profile", ["embedded", "guide"])
def test_a_server_that_fails_is_down_and_never_replaced(tmp_path, profile):
    with ollama(mode="proxy") as wire:
        settings = Settings.load(tmp_path, ollama_base_url=wire.url, rag_kit_profile=profile)
        assert ollama_state(settings) == ("down", "HTTP 503")
        assert find_ollama(settings).url == wire.url
        with pytest.raises(ServiceError) as caught:
            load_model("ollama:qwen3:4b", settings).invoke("hi")
    says(caught.value, wire.url, "503", en="failed", zh="出错")


def test_on_the_guide_profile_nothing_stands_in(tmp_path):
    with closed_port() as url:
        settings = Settings.load(tmp_path, ollama_base_url=url, rag_kit_profile="guide")
        assert ollama_state(settings)[0] == "absent"
        with pytest.raises(ServiceError) as caught:
            load_model("ollama:qwen3:4b", settings).invoke("hi")
    says(caught.value, url, en="does not answer", zh="没有响应")


def test_the_stand_in_answers_for_ollamas_model_alone(nobody):
    assert ollama_state(nobody)[0] == "stand-in"
    assert known_references(nobody) == ["base", "ollama:stand-in"]
    assert resolve("ollama:qwen3:4b", nobody) == resolve("ollama:stand-in", nobody) == "ollama:stand-in"
    assert resolve("base", nobody) == "base"
    with pytest.raises(ServiceError) as caught:
        load_model("ollama:llama3", nobody)
    says(caught.value, nobody.ollama_base_url, "llama3", en="ollama serve", zh="没有任何服务")


def test_the_stand_in_is_one_child_on_a_port_of_its_own(nobody):
    first, second = find_ollama(nobody), find_ollama(nobody)
    assert first == second and first.state == "stand-in" and ":11434" not in first.url
    assert first.url != nobody.ollama_base_url and first.headers and "Bearer" not in repr(first)
    assert list_models(first.url, first.headers) == ["stand-in:latest"]
    model = load_model("ollama:qwen3:4b", nobody)
    assert "Bearer" not in repr(model)
    said = answer(model, "What is the capital of France?")
    assert "Paris" in said.text and said.usage["output_tokens"] <= 8
