"""Ollama's wire: every option on it, no prompt cut, every failure in two sentences."""

from dataclasses import replace

import httpx
import pytest
from langchain_core.messages import HumanMessage, SystemMessage

from rag_kit.errors import ModelError, ServiceError
from rag_kit.models.ollama import OllamaLanguageModel
from rag_kit.models.options import GenerationOptions
from rag_kit.models.reference import load_model
from rag_kit.ollama import list_models
from rag_kit.settings import Settings
from tests.models.texts import says
from tests.servers import closed_port, ollama, scripted

EVERY = GenerationOptions(
    temperature=0.3, top_p=0.8, top_k=7, min_p=0.1, repetition_penalty=1.2, max_new_tokens=9, seed=5,
    stop=("停",), num_ctx=1024,
)  # fmt: skip


def model(wire, **how) -> OllamaLanguageModel:
    return OllamaLanguageModel(model="tiny", base_url=wire if isinstance(wire, str) else wire.url, **how)


def failure(wire, **how) -> ServiceError:
    """The error of streaming, which invoking and the asynchronous ways raise alike."""
    import asyncio

    chat = model(wire, **how)

    async def later() -> None:
        await chat.ainvoke("hi")

    errors = []
    for way in (lambda: list(chat.stream("hi")), lambda: chat.invoke("hi"), lambda: asyncio.run(later())):
        with pytest.raises(ServiceError) as caught:
            way()
        errors.append(caught.value)
    assert len({error.key for error in errors}) == 1
    return errors[0]


def test_every_option_is_on_the_wire():
    with ollama() as wire:
        model(wire).invoke("hi", options=EVERY)
        (sent,) = wire.sent("/api/chat")
    assert sent["options"] == {
        "temperature": 0.3, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "repeat_penalty": 1.2, "num_predict": 9,
        "seed": 5, "stop": ["停"], "num_ctx": 1024,
        # and what a Modelfile could set otherwise
        "repeat_last_n": 1024, "typical_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip


def test_defaults_are_sent_too_and_standard_parameters_taken():
    with ollama() as wire:
        model(wire, temperature=0.5, max_tokens=3, stop=["x"]).invoke("hi", stop=["y"])
        sent = wire.sent("/api/chat")[0]["options"]
    assert sent["temperature"] == 0.5 and sent["num_predict"] == 3 and sent["stop"] == ["y"]
    assert {"top_p", "top_k", "min_p", "repeat_penalty", "seed", "num_ctx"} <= sent.keys()


def test_settings_alone_decide_address_model_and_sampling(tmp_path):
    with ollama() as one, ollama() as two:
        for wire, temperature in ((one, 0.2), (two, 0.6)):
            (tmp_path / ".env").write_text(
                f"OLLAMA_BASE_URL={wire.url}\nTEMPERATURE={temperature}\nTOP_P=0.5\nMAX_NEW_TOKENS=4\n",
                encoding="utf-8",
            )
            load_model("ollama:tiny", Settings.load(tmp_path)).invoke("hi")
            sent = wire.sent("/api/chat")[0]["options"]
            assert (sent["temperature"], sent["top_p"], sent["num_predict"]) == (temperature, 0.5, 4)


def test_the_context_grows_in_steps_up_to_the_models_own():
    text = "修理需要两周。" * 200
    with ollama(context_length=10_000) as wire:
        chat = model(wire)
        for question in ("hi", text, text * 3):
            chat.invoke(question)
        steps = [body["options"]["num_ctx"] for body in wire.sent("/api/chat")]
    assert steps == [4096, 4096, 10_000]
    with ollama(context_length=2048) as wire:
        model(wire).invoke("hi")
        assert wire.sent("/api/chat")[0]["options"]["num_ctx"] == 2048


def test_a_prompt_beyond_the_context_is_an_error_and_is_never_sent():
    with ollama(context_length=512) as wire:
        with pytest.raises(ModelError) as caught:
            model(wire).invoke("修理需要两周。" * 200)
        says(caught.value, "tiny", 512, en="has a context of", zh="上下文只有")
        assert not wire.sent("/api/chat")


@pytest.mark.parametrize(
    ("thinking", "think", "sent"),
    [(None, None, False), (None, True, False), ("嗯", None, False), ("嗯", False, False), ("嗯", True, True)],
)
def test_think_is_sent_by_capability(thinking, think, sent):
    with ollama(thinking=thinking) as wire:
        answer = model(wire).invoke("hi", options=replace(GenerationOptions(), think=think))
        assert wire.sent("/api/chat")[0]["think"] is sent
    assert answer.text == "Hello!"
    assert answer.additional_kwargs.get("reasoning_content") == ("嗯" if sent else None)


def test_an_old_server_is_sent_no_think_and_its_marks_are_understood():
    with ollama(scripted("<th", "ink>\n嗯", "</thi", "nk>\n\n", "好", "。"), mode="old") as wire:
        chat = model(wire)
        answer, chunks = chat.invoke("hi"), list(chat.stream("hi"))
        assert "think" not in wire.sent("/api/chat")[0]
    assert answer.text == "好。" and answer.additional_kwargs["reasoning_content"] == "\n嗯"
    assert "".join(str(chunk.text) for chunk in chunks) == "好。"
    assert chunks[-1].chunk_position == "last"


@pytest.mark.parametrize(
    ("pieces", "text", "reasoning"),
    [
        (["<think>", "</think>", "Yes"], "Yes", None),
        (["<think>", "hm", " hm"], "", "hm hm"),
        (["<think"], "<think", None),
    ],
    ids=["empty", "unclosed", "unfinished mark"],
)  # fmt: skip
def test_the_other_forms_of_thinking_text(pieces, text, reasoning):
    with ollama(scripted(*pieces)) as wire:
        answer = model(wire).invoke("hi")
    assert answer.text == text and answer.additional_kwargs.get("reasoning_content") == reasoning


def test_missing_metrics_are_absent_and_not_zero():
    with ollama(mode="no_metrics") as wire:
        assert model(wire).invoke("hi").usage_metadata is None
    with ollama() as wire:
        assert model(wire).invoke("hi").usage_metadata["output_tokens"] == 3


def test_an_answer_without_streaming_is_read_too():
    import json

    with ollama() as wire:
        reply = httpx.post(
            f"{wire.url}/api/chat",
            json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False},
            trust_env=False,
        )
    assert json.loads(reply.text)["message"]["content"] == "Hello!"


def test_no_proxy_stands_before_the_server(monkeypatch):
    with closed_port() as dead, ollama() as wire:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, dead)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert model(wire).invoke("hi").text == "Hello!"
        assert list_models(wire.url) == ["tiny:latest"]


def test_a_server_that_refuses():
    with closed_port() as url:
        says(failure(url), url, "ollama serve", "OLLAMA_BASE_URL", en="does not answer", zh="没有响应")


def test_a_server_that_hangs(monkeypatch):
    monkeypatch.setattr("rag_kit.ollama.LOOK_S", 0.3)
    with ollama(mode="hang") as wire:
        says(failure(wire, timeout=0.3), wire.url, "ReadTimeout", en="does not answer", zh="没有响应")


def test_a_server_that_hangs_in_mid_answer():
    def slow(messages, body):
        yield "Hel"
        wire.closing.wait(5)

    with ollama(slow) as wire:
        says(failure(wire, timeout=0.3), "ReadTimeout")


@pytest.mark.parametrize("mode", ["reset", "unfinished", "garbage"])
def test_a_server_that_breaks_off(mode):
    with ollama(mode=mode) as wire:
        says(failure(wire), wire.url, "tiny", en="broke off", zh="中断")
        pieces = []
        with pytest.raises(ServiceError):
            pieces.extend(chunk.text for chunk in model(wire).stream("hi"))


def test_a_server_that_never_ends():
    with ollama(mode="endless") as wire:
        says(failure(wire, max_tokens=4), "num_predict", en="broke off", zh="中断")


def test_an_error_line_in_mid_answer():
    with ollama(mode="error_line") as wire:
        says(
            failure(wire),
            wire.url,
            "runner process has terminated",
            en="failed for tiny",
            zh="运行 tiny 时出错",
        )


def test_a_proxy_that_answers_with_a_page():
    with ollama(mode="proxy") as wire:
        says(failure(wire), "503", wire.url, en="failed for tiny", zh="出错")


def test_a_model_that_is_not_there():
    with ollama(models=("qwen3:4b", "小模型:latest")) as wire:
        says(
            failure(wire),
            "ollama pull tiny",
            "qwen3:4b, 小模型:latest",
            en="has no model tiny",
            zh="没有模型 tiny",
        )


def test_listing_the_models_of_a_dead_server():
    with closed_port() as url, pytest.raises(ServiceError) as caught:
        list_models(url)
    says(caught.value, url)


def test_system_and_history_go_along():
    with ollama() as wire:
        model(wire).invoke([SystemMessage("要简短"), HumanMessage("你好")])
        assert [m["content"] for m in wire.sent("/api/chat")[0]["messages"]] == ["要简短", "你好"]


def test_a_request_may_name_another_model():
    with ollama(models=("tiny:latest", "other:latest")) as wire:
        told = model(wire).invoke("hi", model="other").response_metadata["model_name"]
        assert told == "other" and [body["model"] for body in wire.sent("/api/show")] == ["other"]
        with pytest.raises(ServiceError) as caught:
            model(wire).invoke("hi", model="third")
    says(caught.value, "ollama pull third")
