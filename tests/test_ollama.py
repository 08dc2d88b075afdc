"""What stands at Ollama's address, and the models that it has."""

import socket

import pytest

from rag_kit.errors import ServiceError
from rag_kit.ollama import list_models, models, probe
from tests.servers import closed_port, ollama, openai


def test_what_stands_at_an_address():
    with ollama() as wire:
        assert probe(wire.url) == ("running", "0.13.0")
    with closed_port() as url:
        assert probe(url) == ("absent", "connection refused")
    with ollama(mode="proxy") as wire:
        assert probe(wire.url) == ("down", "HTTP 503")
    with openai() as wire:  # another service on that port
        assert probe(wire.url)[0] == "down"
    assert probe("http://no-such-host.invalid:11434")[0] == "down"


def test_a_server_that_never_speaks_is_down(monkeypatch):
    monkeypatch.setattr("rag_kit.ollama.PROBE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert probe(f"http://127.0.0.1:{mute.getsockname()[1]}") == ("down", "timed out")


def test_the_models_of_a_server_with_what_it_says_of_them():
    names = ("tiny:latest", "张三/合同-lora:latest")
    with ollama(models=names, adapters=names[1:], loaded=["tiny:latest"], context_length=4096) as wire:
        plain, adapted = models(wire.url)
        assert list_models(wire.url) == list(names)
    assert (plain.name, plain.size, plain.quantization, plain.parameters) == (
        "tiny:latest",
        10**6,
        "Q4_K_M",
        "1B",
    )
    assert (plain.context, plain.capabilities, plain.template) == (4096, ("completion",), "{{ .Prompt }}")
    assert (plain.loaded, plain.adapter, plain.digest) == (2 * 10**6, False, "sha256:tiny:latest")
    assert (adapted.loaded, adapted.adapter) == (None, True)


def test_an_old_server_does_not_say_what_a_model_can():
    with ollama(mode="old", context_length=None) as wire:
        (model,) = models(wire.url)
    assert model.capabilities is None and model.context is None


def test_a_model_that_is_removed_meanwhile_is_left_out(monkeypatch):
    with ollama(models=("gone:latest", "tiny:latest")) as wire:
        import ollama as package

        shown = package.Client.show

        def show(self, name):
            wire.models = ("tiny:latest",)
            return shown(self, name)

        monkeypatch.setattr(package.Client, "show", show)
        assert [model.name for model in models(wire.url)] == ["tiny:latest"]


def test_a_server_that_is_down_is_told():
    with closed_port() as url, pytest.raises(ServiceError, match="Ollama does not answer at"):
        models(url)
