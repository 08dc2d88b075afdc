"""The page without a browser: streaming, stop, errors, lists that change, two pages, a kernel that ends."""

# ruff: noqa: F401, F811  (fixtures of the models' tests)

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from rag_kit.answer import Answer
from rag_kit.errors import DataError, RagKitError, ServiceError
from rag_kit.faces.dashboard import dashboard
from rag_kit.faces.dashboard.render import cited, health_html, marked, run_html
from rag_kit.faces.dashboard.work import Run
from rag_kit.index.store import build_index
from rag_kit.models.options import GenerationOptions
from rag_kit.ollama import Line, list_models
from rag_kit.rag import LoRARAGHandler
from rag_kit.settings import Settings
from tests.faces.dashboard.shelf import EVIL, Shelf, WellEnough
from tests.models.conftest import (
    count_steps,
    quiet_environment,
    threads,
    twin,
    twin_engine,
    twin_settings,
)
from tests.models.texts import says
from tests.servers import ollama, scripted

ROOT = Path(__file__).parents[3]


def eventually(true, seconds=20.0):
    """Wait for what threads bring about; what takes longer has failed."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def wire():
    with ollama(context_length=4096) as running:
        yield running


@pytest.fixture(autouse=True)
def as_it_was(wire, monkeypatch):
    monkeypatch.setattr("rag_kit.ops.health.health", lambda settings: WellEnough())
    wire.reply, wire.mode, wire.gate = scripted("Two ", "years ", "[1]."), "", None
    wire.models, wire.tokens, wire.hung_up = ("tiny:latest", "tall:latest"), 0, 0
    wire.requests.clear()


@pytest.fixture
def settings(wire, tmp_path):
    return Settings.load(
        tmp_path, ollama_base_url=wire.url, ollama_model="tiny", lora_model_path=str(tmp_path)
    )


@pytest.fixture
def make(settings):
    """Make pages, and stop them at the end."""
    pages = []

    def make(*models, settings=settings, store=None, **how):
        handler = LoRARAGHandler(settings, store=store or Shelf())
        pages.append(dashboard(handler=handler, models=models, lang="en", **how))
        return pages[-1]

    yield make
    for page in pages:
        page.stop()
        assert page.wait(20)


def test_an_answer_with_its_sources_and_timings(make, wire):
    page = make("ollama:tiny", "ollama:tall+none")
    page.ask("How long is the warranty?", wait=True)
    first, second = page.columns
    assert (first.text, first.run.state, first.answer.citations) == ("Two years [1].", "done", (1,))
    shown = first.view.value
    assert 'Two years <span class="rk-cite">[1]</span>.' in shown and "first token" in shown
    assert "warranty.md · 10–65" in shown and shown.count("rk-cited") == 1 == shown.count(" open>")
    assert "lasts <mark>two years</mark>." in shown
    assert second.answer.sources == () and "Sources" not in second.view.value
    sent = [body["messages"][-1]["content"] for body in wire.sent("/api/chat")]
    assert sorted("kettle" in text for text in sent) == [False, True]


def test_pieces_show_while_the_next_is_held_and_stop_freezes_the_servers_counter(make, wire):
    wire.gate = threading.Semaphore(3)
    wire.reply = scripted("Two ", "years ", "[1].", " More")
    page = make("ollama:tiny")
    page.ask("How long?")
    column, buttons = page.columns[0], page._buttons
    eventually(lambda: "Two years [1]." in column.view.value)
    assert page.running and (buttons["ask"].disabled, buttons["stop"].disabled) == (True, False)
    assert column.model.disabled and page._count.disabled
    page.stop()
    assert page.wait(20) and column.run.state == "stopped" and "Stopped after" in column.view.value
    assert (buttons["ask"].disabled, buttons["stop"].disabled) == (False, True) and not column.model.disabled
    wire.gate.release(9)
    eventually(lambda: wire.hung_up)
    assert (wire.tokens, column.text) == (3, "Two years [1].")
    wire.gate = None
    page.ask(wait=True)
    assert column.run.state == "done" and column.text == "Two years [1]. More"


def test_stop_ends_the_wait_for_a_server_that_says_nothing(make, wire):
    page = make("ollama:tiny")
    page.refresh(wait=True)
    wire.requests.clear()
    wire.mode = "hang"
    page.ask("How long?")
    eventually(lambda: wire.requests)
    page.stop()
    assert page.wait(20) and page.columns[0].run.state == "stopped"


def test_a_request_without_any_reply_is_cut():
    line, ended = Line(), []

    def ask(url):
        with pytest.raises(ServiceError) as caught, line.watching():
            list_models(url)
        ended.append(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        waiting = threading.Thread(target=ask, args=(url,), daemon=True)
        waiting.start()
        connection, _ = silent.accept()
        assert connection.recv(1) and not ended
        line.cut()
        waiting.join(5)  # it would wait twice as long for bytes
        assert len(ended) == 1
        ask(url)  # and what is cut stays cut
        connection.close()
    says(ended[1], url)


def test_local_arms_answer_in_turn_and_stop_in_the_midst(make, twin_settings, twin_engine, count_steps):
    page = make("base+none", "base+none", settings=twin_settings)
    with count_steps(twin_engine) as steps:
        page.ask("你好吗，保修多久？", options=GenerationOptions(max_new_tokens=2000))
        first, second = page.columns
        eventually(lambda: len(steps) > 3)
        assert (first.run.state, second.run.state) == ("running", "waiting")
        page.stop()
        assert page.wait(20)
        eventually(lambda: not any(t.name == "rag-kit-page" for t in threading.enumerate()))
        assert [column.run.state for column in page.columns] == ["stopped", "stopped"]
        assert len(steps) < 1000
    page.ask("How long?", wait=True, options=GenerationOptions(max_new_tokens=4))
    assert [column.run.state for column in page.columns] == ["done", "done"]
    assert first.text == second.text and first.answer.usage["output_tokens"] == 4


@pytest.mark.parametrize("mode", ["error_line", "reset", "garbage"])
def test_an_error_in_the_midst_is_shown_with_its_remedy_beside_what_came(make, wire, mode):
    wire.mode = mode
    page = make("ollama:tiny", "ollama:gone")
    page.ask("How long?", wait=True)
    first, second = page.columns
    assert first.run.state == second.run.state == "failed" and first.text == "Two years"
    says(first.run.error, wire.url)
    says(second.run.error, "gone", "tall:latest")
    for column in page.columns:
        assert all(part in column.view.value for part in column.run.error.text("en"))
    assert not page._buttons["ask"].disabled
    wire.mode = ""
    page.ask(wait=True)
    assert (first.run.state, first.run.error, second.run.state) == ("done", None, "failed")


def test_what_nobody_foresaw_is_an_error_with_a_remedy_too(make, monkeypatch):
    page = make("ollama:tiny")
    monkeypatch.setattr(LoRARAGHandler, "stream", lambda *_, **__: 1 / 0)
    page.ask("How long?", wait=True)
    error = page.columns[0].run.error
    says(error, "ZeroDivisionError", "division by zero", en="Try again", zh="请重试")
    monkeypatch.setattr("rag_kit.faces.dashboard.page.known_references", lambda _: 1 / 0)
    page.refresh(wait=True)
    assert "ZeroDivisionError" in page._notice.value and not page._buttons["refresh"].disabled


def test_an_empty_question_asks_for_one(make, wire):
    page = make("ollama:tiny")
    page.ask("  ", wait=True)
    assert "Type a question" in page._notice.value and not page.running and not wire.sent("/api/chat")


def test_enter_sends_the_text_that_arrives_behind_it(make, wire):
    page = make("ollama:tiny")
    page.question._handle_msg(
        {"content": {"data": {"method": "custom", "content": {"event": "submit"}}}, "buffers": []}
    )
    page.question.value = "保修多久？"
    eventually(lambda: wire.sent("/api/chat"))
    assert "保修多久？" in wire.sent("/api/chat")[0]["messages"][-1]["content"]
    assert page.wait(20)
    page._keyed(None, {"event": "submit"}, None)  # the same again: nothing changes, and it is sent
    eventually(lambda: len(wire.sent("/api/chat")) == 2)


def test_the_lists_follow_what_is_there(make, wire, settings):
    page = make("ollama:tiny", "base")
    page.refresh(wait=True)
    chosen = page.columns[0].model
    assert list(dict(chosen.options).values()) == ["base", "ollama:tiny:latest", "ollama:tall:latest"]
    assert chosen.value == "ollama:tiny:latest" and page._default.options[-1][0] == "lora (not here now)"
    (settings.lora_model_path / "绿").mkdir()
    (settings.lora_model_path / "绿" / "adapter_config.json").write_text("{}", encoding="utf-8")
    wire.models = ("tall:latest", EVIL)
    page.refresh(wait=True)
    assert [label for label, _ in chosen.options] == [
        "base", "lora", "lora:绿", "ollama:tall:latest", f"ollama:{EVIL}",
        "ollama:tiny:latest (not here now)",
    ]  # fmt: skip
    assert chosen.value == "ollama:tiny:latest"


def test_the_default_model_is_switched_where_the_new_one_can_answer(make, wire):
    page = make("ollama:tiny")
    page.switch("ollama:tall", wait=True)
    assert page.handler.reference == "ollama:tall"
    assert "answers now: <code>ollama:tall</code>" in page._state.value and page._notice.value == ""
    page.switch("ollama:gone", wait=True)
    assert page.handler.reference == "ollama:tall" and "ollama:tall" in page._state.value
    assert "gone" in page._notice.value and "tall:latest" in page._notice.value
    assert not page._buttons["switch"].disabled


def test_columns_are_chosen_and_limited(make):
    page = make()
    assert [str(column.arm) for column in page.columns] == ["base+none", "base+retrieved"]
    page._count.value = 4
    assert len(page.columns) == 4 == len(page._grid.children)
    with pytest.raises(DataError) as caught:
        make(*["base"] * 5)
    says(caught.value, 5, 4)
    with pytest.raises(DataError):
        make("base+gold")


def test_an_interrupted_cell_stops_its_question(make, wire):
    wire.gate = threading.Semaphore(1)
    page = make("ollama:tiny")

    def interrupt():
        eventually(lambda: page.columns[0].text)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        page.ask("How long?", wait=True)
    assert page.wait(20) and page.columns[0].run.state == "stopped"


def test_two_pages_on_one_store(make, wire, settings, tmp_path):
    embeddings = DeterministicFakeEmbedding(size=8)
    documents = [Document(text, metadata={"source": "a.md", "start": 0, "end": len(text)}) for text in "甲乙"]
    build_index(documents, tmp_path / "store", embeddings)
    from rag_kit.index.store import FaissStore

    pages = [make("ollama:tiny", store=FaissStore.open(tmp_path / "store", embeddings)) for _ in range(2)]
    wire.gate = threading.Semaphore(0)
    for page in pages:
        page.ask("甲？")
    eventually(lambda: len(wire.sent("/api/chat")) == 2)  # both wait at once
    pages[0].stop()
    eventually(lambda: wire.hung_up)
    wire.gate.release(9)
    assert pages[1].wait(20) and pages[1].columns[0].run.state == "done"
    assert len(pages[1].columns[0].answer.sources) == 2 and pages[0].columns[0].run.state == "stopped"


ENDING = """
import sys, time
from rag_kit.faces.dashboard import dashboard
from rag_kit.rag import LoRARAGHandler
from rag_kit.settings import Settings
from tests.faces.dashboard.shelf import Shelf
settings = Settings.load(ollama_base_url=sys.argv[1], ollama_model="tiny")
page = dashboard(handler=LoRARAGHandler(settings, store=Shelf()), models=["ollama:tiny"])
page.ask("How long?")
while not page.columns[0].text:
    time.sleep(0.01)
"""


def test_a_kernel_that_ends_in_the_midst_leaves_nothing_behind(wire, tmp_path):
    wire.gate = threading.Semaphore(1)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTHONWARNDEFAULTENCODING": ""}
    command = [sys.executable, "-c", ENDING, wire.url]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, timeout=60, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    eventually(lambda: wire.hung_up)
    assert wire.tokens == 1


# --- HTML -----------------------------------------------------------------------------------------


def shown(text="", lang="en", **how):
    run = Run("done")
    run.answer = Answer(text, **{"model": "ollama:tiny", "sources": tuple(Shelf().search("", 2))} | how)
    run.text = text
    return run_html(run, lang)


def test_every_foreign_text_is_escaped(make, wire):
    how = {"reasoning": EVIL, "degraded": (EVIL,), "model": EVIL, "citations": (2,)}
    html = shown(f"{EVIL} [2]", **how)
    assert "<img" not in html and "<script" not in html and html.count("&lt;img") >= 5
    run = Run("failed")
    run.error = RagKitError("dashboard_unexpected", kind=EVIL, reason=EVIL)
    assert "<img" not in run_html(run, "zh") and "&lt;img" in run_html(run, "zh")
    assert "<img" not in health_html(WellEnough(), "en")
    wire.models = (f"{EVIL}:latest",)
    page = make(f"ollama:{EVIL}")
    page.switch(f"ollama:{EVIL}", wait=True)
    assert "&lt;img" in page._state.value
    assert "<img" not in page._state.value + page._notice.value + page._health.value


def test_citations_and_what_was_taken_from_a_source_are_marked():
    assert cited("a [1]，b【2、3】[4] [x] <b>", 3) == (
        'a <span class="rk-cite">[1]</span>，b<span class="rk-cite">【2、3】</span>[4] [x] &lt;b&gt;'
    )
    assert marked("a & b", "") == "a &amp; b" and marked("", "a") == ""
    assert marked("The box is made of copper & tin.", "Copper [1]") == (
        "The box is made of <mark>copper</mark> &amp; tin."
    )
    assert marked("It is made of copper.", "Is it made of gold?") == "It is made of copper."
    assert marked("It is made of copper.", "made of copper by hand") == "It is <mark>made of copper</mark>."
    assert marked("水壶的保修期为两年。", "保修期为两年【1】") == "水壶的<mark>保修期为两年</mark>。"
    assert marked("水壶的保修期为两年。", "壶有保修和茶杯") == "水壶的保修期为两年。"


def test_sources_open_where_they_are_cited_else_where_they_agree():
    assert shown("两年【2】", citations=(2,)).index(" open>") > shown("两年【2】", citations=(2,)).index(
        "10–65"
    )
    assert shown("nothing alike").count(" open>") == 0
    assert shown("of every Orrinvale kettle").count(" open>") == 1
    assert 'lang="zh-Hans">每台水壶' in shown("x") and 'lang="en">The warranty' in shown("x")


@pytest.mark.parametrize(
    ("lang", "texts"),
    [("en", ["stand-in", "It is not Ollama."]), ("zh", ["替身", "并非 Ollama。"])],
)
def test_the_stand_in_never_looks_like_an_ollama(make, lang, texts):
    html = shown("ok", lang, model="ollama:stand-in")
    assert all(text in html for text in texts) and all(text not in shown("ok", lang) for text in texts[1:])
    from rag_kit.faces.dashboard.column import choice, offer

    made = choice("x", "base")
    offer(made, ["base", "ollama:stand-in"], lang)
    assert made.options[1][0] != "ollama:stand-in" and made.options[1][1] == "ollama:stand-in"


def test_a_chinese_page(make, settings):
    page = dashboard(handler=LoRARAGHandler(settings, store=Shelf()), models=["ollama:tiny"], lang="zh")
    page.ask("保修多久？", wait=True)
    html = page.columns[0].view.value
    assert all(text in html for text in ("首个词元", "资料来源（2）", "已引用", "得分 0.90"))
    assert [button.description for button in page._buttons.values()] == ["提问", "停止", "刷新", "切换"]
    page.refresh(wait=True)
    assert "运行状况" in page._health.value and "当前" in page._state.value
