"""An adapter becomes a model of an Ollama server, or leaves no trace there: over real sockets and engines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ollama
import pytest
from transformers import AutoTokenizer

from rag_kit.embedded import base_folder
from rag_kit.errors import ModelError, RagKitError, ServiceError
from rag_kit.models.base import Base
from rag_kit.models.export import export_adapter
from rag_kit.models.go_template import go_template
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.ollama_double import Double, ollama_double, said
from tests.servers import closed_port
from tests.tiny_project import tiny_project
from tests.twin import qwen_twin

NAME = "客服"  # a name that Ollama would not take
CHATS = (
    [("user", "保修多久？")],
    [("system", "回答要简短。"), ("user", "保修多久？")],
    [("user", "Hello"), ("assistant", "你好！"), ("user", "保修多久？")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tiny_project(tmp_path_factory.mktemp("export"), NAME)
    return SimpleNamespace(root=root, folder=root / "base", gguf=root / "base/model.gguf")


@pytest.fixture(scope="module")
def server(project: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Double]:
    tokenizer = AutoTokenizer.from_pretrained(project.folder)
    with ollama_double(tmp_path_factory.mktemp("blobs"), project.gguf, tokenizer) as running:
        yield running


@pytest.fixture
def double(server: Double) -> Iterator[Double]:
    """The server without models, blobs or faults."""
    yield server
    server.models.clear()
    server.requests.clear()
    server.fault, server.version = "", "0.13.0"
    for blob in server.folder.iterdir():
        blob.unlink()


def settings(project: Any, url: str, **more: Any) -> Settings:
    how: dict[str, Any] = {
        "base_model_name": "./base",
        "engine": "transformers",
        "max_new_tokens": 12,
        "temperature": 0.0,
    }
    return Settings.load(
        project.root, ollama_base_url=url, cache_dir=str(project.root / "cache"), **how | more
    )


def export(project: Any, double: Double, name: str | None = "desk", **how: Any) -> Any:
    return export_adapter("lora", settings(project, double.url), name=name, **how)


def has(double: Double, project: Any) -> None:
    """Put the base's file there, as a pull would."""
    from rag_kit.manifest import sha256

    shutil.copy(project.gguf, double.blob(f"sha256:{sha256(project.gguf)}"))


def answers_as_here(project: Any, double: Double, name: str) -> None:
    """Ollama's own client gets through the made template what the adapter says here."""
    ours = LoRALanguageModel(model="lora", settings=settings(project, double.url))
    for chat in CHATS[:2]:
        told = ollama.Client(double.url).chat(name, [{"role": role, "content": text} for role, text in chat])
        here = str(ours.invoke([{"role": role, "content": text} for role, text in chat]).text)
        assert told.message.content == here and here
        assert ours.invoke([{"role": r, "content": t} for r, t in chat], model="base").text != here


def test_merged_weights_answer_there_as_here(project: Any, double: Double) -> None:
    told: list[str] = []
    made = export(project, double, how="merged", kind="F16", progress=told.append)
    assert [*double.models] == ["desk:latest"] and made.how == "merged" and made.name == "desk"
    assert made.agreement.kl < 0.01 and made.agreement.argmax > 0.9 and made.agreement.positions >= 8
    assert made.sent == next(double.folder.iterdir()).stat().st_size and f"{made.sent / 1e6:.0f} MB" in str(
        made
    )
    assert any("20 of" in line or "20 /" in line for line in told) or len(told) >= 4
    (asked,) = [body for path, body in double.requests if path == "/api/create"]
    assert asked["parameters"]["stop"] == ["<|im_end|>"]
    assert asked["parameters"]["num_ctx"] == 512 and asked["parameters"]["repeat_penalty"] == 1.0
    answers_as_here(project, double, "desk")


def test_a_gguf_adapter_on_a_base_that_the_server_has(project: Any, double: Double) -> None:
    has(double, project)
    made = export(project, double)
    assert made.how == "adapter" and 0 < made.sent < 1e6 and [*double.models] == ["desk:latest"]
    answers_as_here(project, double, "desk")


def test_a_server_that_takes_no_adapters_gets_merged_weights(project: Any, double: Double) -> None:
    has(double, project)
    double.fault = "refuses"
    told: list[str] = []
    made = export(project, double, kind="F16", progress=told.append)
    assert made.how == "merged" and any("no longer supported" in line for line in told)
    with pytest.raises(ServiceError) as caught:
        export(project, double, "other", how="adapter")
    says(caught.value, "no longer supported")
    assert [*double.models] == ["desk:latest"]


def test_a_server_without_log_probabilities_is_asked_for_text(project: Any, double: Double) -> None:
    double.fault = "no_logprobs"
    made = export(project, double, how="merged", kind="F16")
    assert made.agreement.kl != made.agreement.kl and made.agreement.argmax >= 0.8


@pytest.mark.parametrize("kind", ["F16", "no_logprobs"])
def test_other_weights_there_are_seen_and_deleted(project: Any, double: Double, kind: str) -> None:
    double.fault = "weights"
    with pytest.raises(ServiceError) as caught:
        export(project, double, how="merged", kind="F16")
    says(caught.value, "desk", double.url, en="deleted again", zh="已被删除")
    assert double.models == {}


def test_a_former_model_of_that_name_stays_until_the_new_one_is_proven(project: Any, double: Double) -> None:
    double.models["desk:latest"] = {"template": "former"}
    with pytest.raises(ModelError) as caught:
        export(project, double)
    says(caught.value, "desk", "--replace", en="already has", zh="已有")
    double.fault = "weights"
    with pytest.raises(ServiceError):
        export(project, double, how="merged", kind="F16", replace=True)
    assert double.models == {"desk:latest": {"template": "former"}}
    double.fault = ""
    export(project, double, how="merged", kind="F16", replace=True)
    assert "files" in double.models["desk:latest"] and len(double.models) == 1


@pytest.mark.parametrize("fault", ["blob", "create"])
def test_a_disk_that_is_full_leaves_no_model(project: Any, double: Double, fault: str) -> None:
    double.fault = fault
    with pytest.raises(ServiceError) as caught:
        export(project, double, kind="F16")
    says(caught.value, "desk", "no space left on device", en="not made", zh="没有创建")
    assert double.models == {}


def test_a_server_that_hangs_up_amid_the_upload(project: Any, double: Double) -> None:
    double.fault = "cut"
    with pytest.raises(ServiceError) as caught:
        export(project, double, how="merged", kind="F16")
    says(caught.value, double.url)
    assert double.models == {} and not [*double.folder.iterdir()]


def test_a_prompt_that_is_read_otherwise_there(project: Any, double: Double) -> None:
    double.fault = "truncates"
    with pytest.raises(ServiceError) as caught:
        export(project, double, how="merged", kind="F16")
    says(caught.value, "desk", en="tokens where", zh="词元")
    assert double.models == {}


def test_servers_that_cannot_make_models(project: Any, double: Double) -> None:
    double.fault = "no_create"
    with pytest.raises(ServiceError) as caught:
        export(project, double, how="merged", kind="F16")
    says(caught.value, double.url, "OLLAMA_BASE_URL")
    double.version = "0.5.4"
    with pytest.raises(ServiceError) as caught:
        export(project, double)
    says(caught.value, "0.5.4", "0.5.5")
    with closed_port() as url, pytest.raises(ServiceError) as caught:
        export_adapter("lora", settings(project, url), name="desk")
    says(caught.value, url)


def test_what_cannot_be_exported_is_told_before_anything_is_sent(project: Any, double: Double) -> None:
    def told(reference: str, name: str | None = "desk", how: Any = "auto", **more: Any) -> RagKitError:
        with pytest.raises(RagKitError) as caught:
            export_adapter(reference, settings(project, double.url, **more), name=name, how=how)
        return caught.value

    says(told("lora", None), NAME, "--to")
    says(told("lora", "../x"), "../x", "--to")
    says(told("base"), "rag-kit adapters list")
    says(told("lora", how="adapter"), "ollama:", en="this very file", zh="完全相同的文件")
    bare = Base("twin", project.root / "bare")
    shutil.copytree(project.folder, bare.folder, ignore=shutil.ignore_patterns("*.gguf"))
    says(told("lora", base_model_name="./bare"), "./bare", "ollama:")
    assert double.models == {} and "/api/create" not in [path for path, _ in double.requests]


# Llama 3 trims and begins with a token of its own; Gemma calls the assistant otherwise and has no system.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set s = '' %}{% set rest = messages %}{% if messages[0].role == 'system' %}"
    "{% set s = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + (s if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ ' ' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}" + QWEN3


def with_template(tokenizer: Any, template: str | None) -> Any:
    from copy import copy

    changed = copy(tokenizer)
    changed.chat_template = template
    return changed


def test_templates_say_in_go_what_they_say_in_jinja(server: Double) -> None:
    own = [base_folder() / "chat_template.jinja", qwen_twin() / "chat_template.jinja"]
    templates = [*(path.read_text(encoding="utf-8") for path in own), QWEN3, LLAMA3, GEMMA3]
    made = [with_template(server.tokenizer, template) for template in templates]
    cases = [*((one, False) for one in made), *((one, True) for one in made[3:])]
    for tokenizer, begins in cases:
        template = go_template(tokenizer, begins=begins)
        for chat in CHATS:
            messages = [{"role": role, "content": text} for role, text in chat]
            expected = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            expected = expected.removeprefix(tokenizer.bos_token) if begins else expected
            assert said(template, messages) == expected


@pytest.mark.parametrize("template", [None, NUMBERED, NO_SYSTEM])
def test_a_template_that_cannot_be_said_is_refused(server: Double, template: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        go_template(with_template(server.tokenizer, template))
    says(caught.value)
