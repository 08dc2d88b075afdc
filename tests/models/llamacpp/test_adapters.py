"""Adapters per request: each its own and never another's, the caches they keep, how they join and leave."""

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import ollama
import psutil
import pytest

from rag_kit.embedded import base_gguf
from rag_kit.errors import ModelError
from rag_kit.models.llamacpp.parameters import SLOTS
from rag_kit.models.llamacpp.process import EngineProcess
from tests.models.llamacpp.conftest import GREEDY, plain
from tests.models.llamacpp.test_process import wait
from tests.models.llamacpp.test_routes import generate, state, tokens
from tests.models.texts import says

NAMES = ("one", "two", "three", "four", "第五")
PROMPT = "The capital of France is"
LONG = {"model": "m", "prompt": "Once upon a time", "raw": True, "options": {**GREEDY, "num_predict": 150}}


@pytest.fixture(scope="module")
def adapted(lora) -> Iterator[EngineProcess]:
    adapters = {name: lora(number) for number, name in enumerate(NAMES)}
    with EngineProcess(base_gguf(), name="m", context=512, adapters=adapters) as running:
        yield running


@pytest.fixture(scope="module")
def web(adapted) -> Iterator[httpx.Client]:
    with plain(adapted) as made:
        yield made


@pytest.fixture
def joining(lora) -> Iterator[EngineProcess]:
    with EngineProcess(base_gguf(), name="m", context=512, adapters={"one": lora(0)}) as running:
        yield running


def following(http: httpx.Client, ids: list[int], adapter: str | None = None, **more: object) -> np.ndarray:
    reply = http.post("/engine/next", json={"ids": ids, "adapter": adapter, **more})
    assert reply.status_code == 200, reply.text
    return np.frombuffer(base64.b64decode(reply.json()["logprobs"]), "<f4")


def score(http: httpx.Client, ids: list[int], answer: list[int], adapter: str | None = None) -> list[float]:
    reply = http.post("/engine/score", json={"ids": ids, "answer": answer, "adapter": adapter})
    assert reply.status_code == 200, reply.text
    return reply.json()["logprobs"]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b)[np.argsort(a)[-20:]].max())


def test_every_adapter_is_itself_in_any_order_and_the_base_is_the_base(web, http):
    ids = tokens(web, PROMPT)
    alone = {name: following(web, ids, name) for name in (None, *NAMES)}
    for name, logs in alone.items():
        assert logs.shape == (49152,) and abs(np.exp(logs.astype(float)).sum() - 1) < 1e-3
        assert all(distance(logs, other) > 0.3 for key, other in alone.items() if key != name)
    assert distance(alone[None], following(http, ids)) < 1e-4  # of an engine that has no adapters
    mixed = (NAMES[3], None, NAMES[0], NAMES[4], NAMES[1])
    assert all((following(web, ids, name) == alone[name]).all() for name in mixed)


def test_four_clients_at_the_same_time_get_their_own_adapters(web, adapted):
    ids = tokens(web, "水的沸点是")
    alone = {name: generate(web, ids, 6, adapter=name, logprobs=3) for name in NAMES[:4]}
    assert len({json.dumps(lines[:-1]) for lines in alone.values()}) == 4

    def ask(name: str) -> list[list[dict]]:
        with plain(adapted) as mine:
            return [generate(mine, ids, 6, adapter=name, logprobs=3)[:-1] for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        for name, answers in zip(NAMES, pool.map(ask, NAMES[:4]), strict=False):
            assert answers == [alone[name][:-1]] * 3


@pytest.mark.parametrize("route", ["generate", "next", "score"])
def test_an_unknown_adapter_is_told_the_known_ones(web, route):
    for name in ("nobody", "", "0", "m", "One"):
        reply = web.post(f"/engine/{route}", json={"ids": [504], "answer": [504], "adapter": name})
        assert reply.status_code == 404 and f"'{name}' not found" in reply.json()["error"]
        assert ", ".join(NAMES) in reply.json()["error"]


def test_the_score_of_an_answer_is_what_its_tokens_had_when_they_were_made(web):
    """Also of tokens that end amid characters, which llama.cpp does not tell, and of the end."""
    ids = tokens(web, "𠮷𠮷𠮷𠮷𠮷")
    *lines, _ = generate(web, ids, 5, adapter="one", logprobs=1)
    answer, logs = [line["id"] for line in lines], [line["top"][0][1] for line in lines]
    assert score(web, ids, answer, "one") == pytest.approx(logs, abs=1e-3)
    assert score(web, ids, answer, "one") != pytest.approx(score(web, ids, answer), abs=0.1)
    end = tokens(web, "<|im_end|>", special=True)
    mixed = tokens(web, " 巴黎") + end + tokens(web, "\n好") + end
    scored, before = score(web, ids, mixed), following(web, ids)
    assert len(scored) == len(mixed) and scored[0] == pytest.approx(before[mixed[0]], abs=0.01)
    for at in (3, len(mixed) - 1):  # the first token of 黎, and the end: read as a prompt, or token by token
        assert scored[at] == pytest.approx(following(web, ids + mixed[:at])[mixed[at]], abs=0.5)
    assert score(web, ids, []) == [] and score(web, ids, mixed) == scored


@pytest.mark.parametrize(
    "body", [{"ids": []}, {"ids": [10**8]}, {"answer": [10**8]}, {"answer": [504] * 600}]
)
def test_what_cannot_be_scored_is_refused(web, body):
    reply = web.post("/engine/score", json={"ids": [504], "answer": [504], **body})
    assert reply.status_code == 400 and reply.json()["error"]


def test_each_adapter_keeps_its_own_cache_while_there_are_slots(web):
    seen = state(web)
    assert (seen["slots"], seen["cache_bytes"]) == (SLOTS, SLOTS * 512 * 23040)
    assert seen["adapters"] == list(NAMES)
    ids = tokens(web, "The library of Eastport is closed on Mondays. " * 4)
    first, new = NAMES[0], NAMES[SLOTS]
    logs = {name: following(web, ids, name) for name in (first, new)}

    def cached(name: str, **how: object) -> int:
        return generate(web, ids, 2, adapter=name, **how)[-1]["cached"]

    assert [cached(name, cache=True) for name in NAMES[:SLOTS]][1:] == [0] * (SLOTS - 1)
    assert [cached(name, cache=True) for name in NAMES[:SLOTS]] == [len(ids) - 1] * SLOTS
    assert cached(NAMES[1]) == 0  # computed anew unless asked for
    assert cached(new, cache=True) == 0  # the least recently used one has made room
    assert cached(new, cache=True) == len(ids) - 1 and cached(first, cache=True) == 0
    again = following(web, ids, new, cache=True)
    assert distance(logs[new], again) < 0.8 < distance(logs[first], again)
    assert (following(web, ids, first) == logs[first]).all()


def test_every_adapter_is_a_model_to_ollamas_own_client(adapted, web, lora):
    with ollama.Client(adapted.url, headers=adapted.headers, trust_env=False, timeout=60) as client:
        models = client.list().models
        assert [one.model for one in models] == ["m:latest", *(f"m+{name}:latest" for name in NAMES)]
        assert len({one.digest for one in models}) == len(models) == len(client.ps().models)
        assert models[1].size == models[0].size + lora(0).stat().st_size
        shown = client.show("m+第五")
        assert shown.details.parent_model == "m:latest" and "ADAPTER 适配器4.gguf" in shown.modelfile
        assert shown.capabilities == ["completion"] and "embedding" in client.show("m").capabilities

        ask, how = [{"role": "user", "content": "给我讲一个故事。"}], {**GREEDY, "num_predict": 12}
        said = {one: client.chat(one, ask, options=how).message.content for one in ("m", "m+one", "m+第五")}
        assert len(set(said.values())) == 3
        streamed = client.chat("m+one:latest", ask, stream=True, options=how)
        assert "".join(part.message.content for part in streamed) == said["m+one"]
        raw = client.generate("m+one", PROMPT, raw=True, options=how)
        own = generate(web, tokens(web, PROMPT), 12, adapter="one")
        assert raw.response == "".join(line.get("text", "") for line in own) and raw.model == "m+one"
        assert (
            client.generate("m+one", PROMPT, raw=True, options=how | {"stop": [raw.response[:3]]}).response
            == ""
        )
        for call, error in ((client.chat, "not found"), (client.show, "not found")):
            with pytest.raises(ollama.ResponseError, match=error):
                call("m+nobody")
        with pytest.raises(ollama.ResponseError, match="does not support embeddings"):
            client.embed("m+one", "x")


def test_adapters_join_under_fire_and_no_request_fails(joining, lora, tmp_path):
    """Clients that ask all the time, a long answer that runs on, and what is asked after each join."""
    stop, done, failures = threading.Event(), [], []

    def hammer(keep: bool) -> None:
        client = plain(joining)
        try:
            while not stop.is_set():
                if not keep:
                    client = plain(joining)
                reply = client.post("/engine/tokenize", json={"text": "好"})
                (done if reply.is_success else failures).append(reply.status_code)
        except httpx.HTTPError as error:
            failures.append(repr(error))

    with plain(joining) as http:
        ids, first = tokens(http, PROMPT), joining.pid
        alone = following(http, ids, "one")
        gone = tmp_path / "gone.gguf"
        gone.write_bytes(lora(0).read_bytes())
        joining.set_adapters({"gone": gone})
        asked = LONG | {"model": "m+gone"}
        expected = http.post("/api/generate", json=asked | {"stream": False}).json()["response"]
        threads = [threading.Thread(target=hammer, args=(keep,)) for keep in (True, False)]
        with plain(joining) as patient, patient.stream("POST", "/api/generate", json=asked) as long:
            lines = long.iter_lines()
            text = [json.loads(next(lines))["response"]]
            gone.unlink()  # while it is in use
            for thread in threads:
                thread.start()
            for number in (1, 2, 3):
                before = len(done)
                joining.set_adapters({f"n{number}": lora(number), "one": lora(0)})
                assert list(joining.adapters) == [f"n{number}", "one"]
                for _ in range(3):
                    assert state(http)["adapters"] == [f"n{number}", "one"]
                if number == 1:
                    assert (following(http, ids, "one") == alone).all()
                    assert distance(following(http, ids, "n1"), alone) > 0.3
                wait(lambda before=before: len(done) > before or failures)
            assert joining.pid != first
            text += [json.loads(line)["response"] for line in lines]
        stop.set()
        for thread in threads:
            thread.join()
        assert "".join(text) == expected and failures == [] and len(done) > 3
        wait(lambda: not joining._draining)
        assert not psutil.pid_exists(first) and joining.restarts == 0 and joining.alive
        assert http.post("/engine/next", json={"ids": ids, "adapter": "n1"}).status_code == 404


def test_what_cannot_join_changes_nothing(joining, lora, tmp_path, monkeypatch, write_gguf):
    pid, adapters = joining.pid, joining.adapters
    for path in (tmp_path / "没有.gguf", base_gguf(), write_gguf("qwen2", general__type="adapter")):
        with pytest.raises(ModelError) as caught:
            joining.set_adapters({"one": lora(0), "bad": path})
        assert str(path) in str(caught.value)
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('no such wheel')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        joining.set_adapters({"two": lora(1)})
    says(caught.value, "no such wheel", en="pip install", zh="pip install")
    assert (joining.pid, joining.adapters, joining.alive, joining.restarts) == (pid, adapters, True, 0)
    with plain(joining) as http:
        assert state(http)["adapters"] == ["one"]


def test_a_crash_is_replaced_with_the_newest_adapters_and_a_draining_child_is_not(joining, lora, tmp_path):
    path = tmp_path / "gone.gguf"
    path.write_bytes(lora(1).read_bytes())
    with plain(joining) as http, plain(joining) as others:
        joining.set_adapters({"two": path})
        asked = LONG | {"model": "m+two"}
        with http.stream("POST", "/api/generate", json=asked) as reply:
            lines = reply.iter_lines()
            next(lines)
            path.unlink()  # the file of an adapter that is in use
            first = joining.pid
            joining.set_adapters({"three": lora(2)})
            os.kill(first, signal.SIGKILL)
            with pytest.raises(httpx.HTTPError) as broken:
                list(lines)
        says(joining.lost(broken.value), "SIGKILL", en="ran out of memory", zh="内存不足")
        wait(lambda: not joining._draining)
        assert joining.alive and joining.restarts == 0 and state(others)["adapters"] == ["three"]
        newest = joining.pid
        os.kill(newest, signal.SIGKILL)
        assert state(others)["adapters"] == ["three"]
        wait(lambda: joining.restarts == 1)
        assert joining.pid not in (first, newest)

        with http.stream("POST", "/api/generate", json=LONG) as reply:
            lines = reply.iter_lines()
            next(lines)
            old = joining.pid
            joining.set_adapters({})
            last = joining.pid
            joining.stop()
            wait(lambda: not psutil.pid_exists(old) and not psutil.pid_exists(last))


def test_out_of_memory_is_an_error_and_the_engine_lives_on(joining):
    """Whichever allocation fails: llama.cpp's, the answer's, or that of the socket's buffer."""
    child, body = psutil.Process(joining.pid), {"ids": [504, 3575, 282, 4649, 314]}
    child.rlimit(psutil.RLIMIT_AS, (2**20, psutil.RLIM_INFINITY))
    with plain(joining) as http:
        try:
            reply = http.post("/engine/next", json=body)
            text = reply.json()["error"]
            assert reply.status_code == 500
        except httpx.HTTPError as error:
            text = str(joining.lost(error))
        assert "ran out of memory" in text
        assert "num_ctx" in text and "smaller file" in text and "fewer adapters" in text
        if joining.pid == child.pid:
            child.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        assert http.post("/engine/next", json=body).is_success and joining.alive


def test_others_are_let_in_without_a_key_where_that_is_meant():
    with EngineProcess(base_gguf(), name="m", context=512, public=("127.0.0.1", 0)) as engine:
        with ollama.Client(engine.url, trust_env=False) as client:
            assert client.generate("m", "Hi", options={"num_predict": 2}).eval_count == 2
        with httpx.Client(base_url=engine.url, trust_env=False) as http:
            for name in ("localhost", "localhost:99", "127.0.0.1"):
                assert http.get("/api/tags", headers={"Host": name}).is_success
            for name in ("evil.example", "192.168.1.9", "", "[", "a:b"):
                assert http.get("/api/tags", headers={"Host": name}).status_code == 403
            assert http.get("/api/tags", headers={"Origin": "https://evil.example"}).status_code == 403
            assert http.get("/engine/state").status_code == 401
            assert http.get("/engine/state", headers=engine.headers).is_success
        taken = EngineProcess(base_gguf(), name="m", public=("127.0.0.1", int(engine.url.rpartition(":")[2])))
        with pytest.raises(ModelError) as caught:
            taken.start()
        says(caught.value, engine.url.removeprefix("http://"), en="cannot listen", zh="无法在")


def test_beyond_loopback_any_address_will_do_and_no_other_name():
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    from rag_kit.models.llamacpp.server import guarded

    client = TestClient(
        guarded(PlainTextResponse("fine"), "key", 80, "0.0.0.0"), base_url="http://192.168.1.9"
    )
    assert (
        client.get("/").text == "fine"
        and client.get("/", headers={"Host": "evil.example"}).status_code == 403
    )


def test_the_path_of_a_gguf_may_be_relative(monkeypatch, lora):
    monkeypatch.chdir(lora(0).parent)
    adapters = {"one": Path(lora(0).name)}
    with (
        EngineProcess(base_gguf(), name="m", context=512, adapters=adapters) as engine,
        plain(engine) as http,
    ):
        assert state(http)["adapters"] == ["one"]
