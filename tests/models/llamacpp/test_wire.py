"""Ollama's wire, as Ollama's own client sees it, over a real socket."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import httpx
import ollama
import pytest

from rag_kit.models.llamacpp.routes import application
from rag_kit.models.llamacpp.server import guarded
from tests.models.llamacpp.conftest import GREEDY

ASK = [{"role": "user", "content": "Say hello in one short sentence."}]
METRICS = ("total_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration")


def short(tokens: int = 8, **more: object) -> dict[str, object]:
    return {**GREEDY, "num_predict": tokens, **more}


def refused(http: httpx.Client, route: str, **body: object) -> tuple[int, str]:
    reply = http.post(route, json={"model": "stand-in", **body})
    return reply.status_code, reply.json()["error"]


def test_the_engine_says_that_it_is_ours_and_lists_its_model(client, http, engine):
    assert "rag-kit" in http.get("/").text and http.head("/").status_code == 200
    assert "rag-kit" in http.get("/api/version").json()["engine"]
    (model,) = client.list().models
    assert (model.model, model.size, len(model.digest)) == ("stand-in:latest", 98_362_432, 64)
    assert (model.details.format, model.details.family) == ("gguf", "llama")
    assert (model.details.parameter_size, model.details.quantization_level) == ("134.52M", "Q4_1")
    (running,) = client.ps().models
    assert running.context_length == 2048 and running.size > 100_000_000


@pytest.mark.parametrize("name", ["stand-in", "stand-in:latest"])
def test_show_tells_template_capabilities_and_sizes(client, name):
    shown = client.show(name)
    assert "<|im_start|>" in shown.template and "completion" in shown.capabilities
    assert shown.modelinfo["general.architecture"] == "llama"
    assert shown.modelinfo["llama.context_length"] == 8192
    assert shown.modelinfo["tokenizer.ggml.tokens"] is None


def test_chat_streams_the_answer_that_it_gives_whole(client):
    lines = list(client.chat("stand-in", ASK, stream=True, options=short()))
    whole = client.chat("stand-in:latest", ASK, options=short())
    said = "".join(line.message.content for line in lines)
    assert said == whole.message.content and len(said) > 5 and len(lines) > 4
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    for last in (lines[-1], whole):
        assert last.done_reason == "length" and last.eval_count == 8 and last.created_at.endswith("Z")
        assert all(isinstance(getattr(last, key), int) and getattr(last, key) > 0 for key in METRICS)
    assert whole.model == "stand-in:latest" and lines[0].model == "stand-in"


def test_an_answer_that_ends_by_itself_says_stop(client):
    answer = client.chat("stand-in", ASK, options=short(80))
    assert answer.done_reason == "stop" and answer.eval_count < 80
    assert "<|im_end|>" not in answer.message.content


def test_generate_raw_or_by_the_template(client):
    raw = client.generate("stand-in", "The capital of France is", raw=True, options=short(3))
    assert raw.response.startswith(" Paris") and raw.prompt_eval_count == 5
    chat = client.chat("stand-in", [{"role": "system", "content": "短"}, *ASK], options=short())
    same = client.generate("stand-in", ASK[0]["content"], system="短", options=short())
    assert same.response == chat.message.content and same.prompt_eval_count == chat.prompt_eval_count
    streamed = client.generate("stand-in", "The capital", raw=True, stream=True, options=short(3))
    assert len([part.response for part in streamed]) == 4


def test_greedy_answers_repeat_and_seeds_hold(client):
    def ask(**options: object) -> str:
        return client.generate("stand-in", "一", raw=True, options=options | {"num_predict": 12}).response

    assert ask(temperature=0) == ask(temperature=0)
    assert ask(temperature=1.5, seed=7) == ask(temperature=1.5, seed=7) != ask(temperature=1.5, seed=8)


def test_options_have_an_effect(client):
    def ask(**options: object) -> ollama.GenerateResponse:
        prompt = "one two one two one two one"
        return client.generate("stand-in", prompt, raw=True, options=short() | options)

    plain = ask()
    assert " two" in plain.response
    stopped = ask(stop=[" two"])
    assert stopped.done_reason == "stop" and " two" not in stopped.response
    assert ask(seed=None, num_ctx=None).response == plain.response  # as langchain-ollama's embeddings say
    assert ask(repeat_penalty=1.9).response != plain.response
    narrow = ask(num_ctx=12)
    assert narrow.done_reason == "length" and narrow.eval_count == 12 - narrow.prompt_eval_count
    assert ask(temperature=3.0, top_k=1).response == plain.response
    assert ask(temperature=3.0, seed=1).response != plain.response
    assert ask(temperature=3.0, seed=1, min_p=1.0).response == plain.response
    assert ask(temperature=3.0, seed=1, top_p=0.0).response == plain.response


def test_an_answer_in_a_form_is_json(client):
    schema = {"type": "object", "properties": {"城市": {"enum": ["北京", "Paris"]}}, "required": ["城市"]}
    answer = client.generate("stand-in", "Where?", format=schema, options=short(40))
    assert json.loads(answer.response)["城市"] in ("北京", "Paris")


def test_what_does_not_fit_is_refused_and_never_cut(http):
    status, text = refused(http, "/api/generate", prompt="一" * 3000, raw=True)
    assert status == 400 and "3000" in text and "2048" in text
    status, text = refused(http, "/api/chat", messages=ASK, options={"num_ctx": 20})
    assert status == 400 and "holds 20" in text
    status, text = refused(http, "/api/chat", messages=ASK, options={"num_ctx": 4096})
    assert status == 400 and "4096" in text and "2048" in text


def test_ollamas_words_for_what_it_refuses(client, http):
    for call in (client.chat, client.generate, client.embed, client.show):
        with pytest.raises(ollama.ResponseError) as caught:
            call("llama3")
        assert (caught.value.status_code, caught.value.error) == (404, "model 'llama3' not found")
    assert refused(http, "/api/chat", messages=ASK, think=True) == (
        400,
        '"stand-in" does not support thinking',
    )
    assert refused(http, "/api/chat", messages=ASK, think=False, stream=False, tools=[{}])[0] == 400
    assert "images" in refused(http, "/api/generate", prompt="x", images=["aGk="])[1]
    assert refused(http, "/api/chat", messages="x")[0] == 400
    assert refused(http, "/api/chat", messages=[{"role": "<|im_end|>", "content": "x"}])[0] == 400
    assert refused(http, "/api/chat", messages=ASK, options="x")[0] == 400
    assert refused(http, "/api/chat", model=None)[0] == 400
    assert http.post("/api/chat", content=b"{no").status_code == 400
    assert http.post("/api/pull", json={}).json() == {"error": "Not Found"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d says
    assert http.post("/api/show", content=b'{"model": "stand-in"}', headers=form).is_success


def test_only_requests_of_this_machine_with_the_key_are_let_in(engine, http):
    for route in ("/", "/api/tags", "/engine/state", "/nothing"):
        assert httpx.get(engine.url + route, trust_env=False).status_code == 401
    wrong = {"Authorization": "Bearer no"}
    assert "error" in httpx.get(engine.url, headers=wrong, trust_env=False).json()
    assert http.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert http.get("/", headers={"Host": engine.url.replace("http://127.0.0.1", "localhost")}).is_success


def test_vectors_are_of_length_one_and_long_texts_are_cut_only_if_allowed(client, http):
    texts = ["The cat sleeps.", "A cat is sleeping.", "股票价格今天下跌。"]
    reply = client.embed("stand-in", texts)
    vectors = reply.embeddings
    assert [len(vector) for vector in vectors] == [576] * 3 and reply.prompt_eval_count > 10

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert all(abs(cosine(vector, vector) - 1) < 1e-5 for vector in vectors)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    assert client.embed("stand-in", texts[0]).embeddings[0] == pytest.approx(vectors[0], abs=1e-6)
    assert client.embed("stand-in", []).embeddings == []
    status, text = refused(http, "/api/embed", input="一 " * 40, truncate=False, options={"num_ctx": 20})
    assert status == 400 and "20" in text
    assert client.embed("stand-in", "一 " * 40, options={"num_ctx": 20}).prompt_eval_count == 20


def test_the_model_is_unloaded_and_loaded_when_asked(client, http):
    assert client.generate("stand-in", "", keep_alive=0).done_reason == "unload"
    assert client.ps().models == [] and http.get("/engine/state").json()["loaded"] is False
    assert client.chat("stand-in", []).done_reason == "load"
    assert len(client.ps().models) == 1
    left = client.generate("stand-in", "The capital", raw=True, keep_alive="0s", options=short(2))
    assert left.eval_count == 2 and client.ps().models == []
    again = client.generate("stand-in", "The capital", raw=True, options=short(2))
    assert again.response == left.response and again.load_duration > 10_000_000


def test_requests_at_the_same_time_wait_their_turn(client):
    def ask(number: int) -> str:
        prompt = f"{number} + 1 ="
        return client.generate("stand-in", prompt, raw=True, options=short(6)).response

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


def test_an_error_amid_a_stream_is_a_line():
    """Only a fault can bring it about: an engine that breaks after its first word, behind the real routes."""
    import contextlib
    import socket

    import uvicorn

    class Broken:
        adapters: ClassVar[dict] = {}
        context, gguf = 100, None

        @contextlib.asynccontextmanager
        async def turn(self):
            yield 0

        async def render(self, messages, name):
            return [1]

        async def generate(self, ids, sampling, adapter):
            yield {"text": "好"}
            raise RuntimeError("the memory is gone")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        app = guarded(application(Broken(), "x"), "key", port)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        with ollama.Client(
            f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer key"}, trust_env=False
        ) as broken:
            parts = broken.chat("x", ASK, stream=True)
            assert next(parts).message.content == "好"
            with pytest.raises(ollama.ResponseError, match="the memory is gone"):
                next(parts)
            with pytest.raises(ollama.ResponseError) as caught:
                broken.chat("x", ASK)
            assert caught.value.status_code == 500
        server.should_exit = True
        thread.join()
