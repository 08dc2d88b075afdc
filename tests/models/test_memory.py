"""What is loaded into Ollama by us goes when memory is short; what others loaded stays, and is named."""

import logging

import psutil
import pytest

from rag_kit.models import memory
from rag_kit.models.ollama import OllamaLanguageModel
from tests.servers import ollama

MODELS = ("ours:latest", "theirs:latest", "next:latest")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory, "_ours", {})


@pytest.fixture
def short(monkeypatch):
    """A machine whose memory holds no more models."""
    told = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: told)


def chat(wire, name: str) -> OllamaLanguageModel:
    return OllamaLanguageModel(model=name, base_url=wire.url)


def test_a_model_is_loaded_once(caplog):
    with ollama(models=MODELS) as wire:
        model = chat(wire, "ours")
        model.load()
        model.load()
        assert wire.loaded == ["ours:latest"] and len(wire.sent("/api/generate")) == 1
        assert wire.sent("/api/generate")[0]["options"]["num_ctx"] == 4096
    assert caplog.text == ""


def test_memory_that_is_short_takes_ours_and_names_theirs(short, caplog):
    with ollama(models=MODELS, loaded=["theirs:latest"]) as wire:
        chat(wire, "ours").load()
        with caplog.at_level(logging.WARNING):
            chat(wire, "next").load()
        assert wire.loaded == ["theirs:latest", "next:latest"]
    assert "unloaded ours:latest from Ollama" in caplog.text
    assert (
        f"loading next:latest at {wire.url} may push out theirs:latest, which this program did not load"
        in caplog.text
    )


def test_with_room_nobody_goes(caplog):
    with ollama(models=MODELS, loaded=["theirs:latest"]) as wire:
        chat(wire, "ours").load()
        chat(wire, "next").load()
        assert wire.loaded == ["theirs:latest", "ours:latest", "next:latest"]
    assert caplog.text == ""


def test_a_model_that_was_there_is_not_ours(short):
    with ollama(models=MODELS, loaded=["theirs:latest"]) as wire:
        chat(wire, "theirs").load()
        assert memory.make_room(10**12) == [] and wire.loaded == ["theirs:latest"]
