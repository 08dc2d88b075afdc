"""The page in a real Chromium, through Voilà, with a model whose tokens the test releases one by one.

Voilà, the browser and the page are started once; every test leaves the page as it found it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from rag_kit.errors import catalogue
from tests.faces.dashboard.shelf import EVIL
from tests.faces.dashboard.test_page import eventually
from tests.servers import ollama, scripted

ROOT = Path(__file__).parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CELL = """
import os
os.environ["RAG_KIT_LANG"] = {lang!r}
from pathlib import Path
from rag_kit import LoRARAGHandler, start
from rag_kit.faces.dashboard import dashboard
from tests.faces.dashboard.shelf import Shelf
handler = LoRARAGHandler(start(Path.cwd()), store=Shelf())
dashboard(handler=handler, models=["ollama:tiny", "ollama:tall+none"][:{arms}])
"""
WATCH = """for (const name of ["keydown", "keypress", "compositionstart", "compositionend"])
  document.addEventListener(name, e => (window.seen ??= []).push([name, e.keyCode, e.isComposing]), true)"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt install chromium")


@pytest.fixture(scope="module")
def wire():
    names = ("tiny:latest", "tall:latest", f"{EVIL}:latest")
    with ollama(context_length=4096, models=names, gate=threading.Semaphore(0)) as running:
        yield running


@pytest.fixture(scope="module")
def voila(wire, tmp_path_factory):
    """The address of a Voilà that serves the page in both languages."""
    folder = tmp_path_factory.mktemp("voila")
    for lang, arms in (("en", 1), ("zh", 2)):
        cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
        cell["source"] = CELL.format(lang=lang, arms=arms)
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (folder / f"{lang}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OLLAMA_BASE_URL": wire.url, "OLLAMA_MODEL": "tiny", "PYTHONUTF8": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder), "JUPYTER_CONFIG_DIR": str(folder)}
    command = [sys.executable, "-m", "voila", str(folder), "--no-browser", f"--port={port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--Voila.ip=127.0.0.1"], cwd=folder, env=environment, stdout=log, stderr=log
        )
        try:
            eventually(lambda: _answers(f"http://127.0.0.1:{port}/"), 60)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait(30)


def _answers(url):
    try:
        return urlopen(url, timeout=5).status == 200
    except (URLError, OSError):
        return False


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def outside():
    """Every address asked for that is not Voilà's."""
    return []


@pytest.fixture(scope="module")
def open_page(browser, voila, outside):
    def open_page(lang):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)

        def route(asked):
            if asked.request.url.startswith((voila, "data:", "blob:")):
                asked.continue_()
            else:
                outside.append(asked.request.url)
                asked.abort()

        page.route("**/*", route)
        page.goto(f"{voila}voila/render/{lang}.ipynb")
        page.locator(".rk-health").wait_for()  # the page has looked around
        page.evaluate(WATCH)
        return page

    return open_page


@pytest.fixture(scope="module")
def english(open_page):
    return open_page("en")


@pytest.fixture
def page(english, wire):
    wire.gate, wire.mode, wire.tokens, wire.hung_up = threading.Semaphore(0), "", 0, 0
    wire.requests.clear()
    english.evaluate("window.seen = []")
    yield english
    wire.gate = None
    if english.get_by_role("button", name="Stop").is_enabled():
        english.get_by_role("button", name="Stop").click()
    english.locator("button.rk-ask:enabled").wait_for()


def ask(page, question):
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")


def see(page, text, where=".rk-answer:has(.rk-done)"):
    """Wait for a text, by default in an answer that is complete."""
    page.locator(where, has_text=text).first.wait_for()


def test_three_tokens_show_while_the_fourth_is_held_and_stop_freezes_the_counter(page, wire):
    wire.reply = scripted("Two ", "years ", "[1].", " More", " and more")
    ask(page, "How long is the warranty?")
    page.locator(".rk-running").wait_for()
    for number, so_far in enumerate(("Two", "Two years", "Two years [1]."), 1):
        wire.gate.release()
        page.locator(".rk-answer > .rk-text", has_text=so_far).wait_for()
        assert page.locator(".rk-answer > .rk-text").inner_text() == so_far
        eventually(lambda sent=number: wire.tokens == sent)
    assert page.locator("button.rk-ask").is_disabled() and page.locator(".rk-column select").is_disabled()
    page.get_by_role("button", name="Stop").click()
    see(page, "Stopped after", ".rk-stopped")
    page.locator("button.rk-ask:enabled").wait_for()
    wire.gate.release(9)
    eventually(lambda: wire.hung_up)
    assert wire.tokens == 3 and page.locator(".rk-answer > .rk-text").inner_text() == "Two years [1]."
    assert page.locator("button.rk-stop").is_disabled() and page.locator(".rk-column select").is_enabled()


def test_an_answer_shows_its_sources_and_times(page, wire):
    wire.reply, wire.gate = scripted("Two ", "years ", "[1]."), None
    ask(page, "How long?")
    see(page, "Two years [1].")
    assert "first token" in page.locator(".rk-state").inner_text()
    assert page.locator(".rk-text .rk-cite").inner_text() == "[1]"
    assert page.locator("details[open]").count() == 1 == page.locator(".rk-cited").count()
    assert page.locator(".rk-cited mark").inner_text() == "two years"
    page.locator("summary", has_text="保修").click()
    page.get_by_text("每台水壶的保修期为两年").wait_for()
    wire.reply = scripted("Once more.")
    page.get_by_role("button", name="Ask").click()
    see(page, "Once more.")


def test_html_in_answers_sources_and_names_is_text(page, wire):
    wire.reply, wire.gate = scripted("Well: ", EVIL, "**b**"), None
    page.get_by_label("Model", exact=True).select_option(index=3)
    chosen = page.get_by_label("Model", exact=True).locator("option:checked").inner_text()
    assert EVIL in chosen.replace("\xa0", " ")
    ask(page, f"{EVIL}?")
    see(page, "Well: ")
    assert f"Well: {EVIL}**b**" in page.locator(".rk-answer > .rk-text").inner_text()
    page.locator(".rk-answer").get_by_text(f"ollama:{EVIL}").wait_for()
    page.locator("summary", has_text=f"保修{EVIL}.md").wait_for()
    assert page.locator(".rk-page img, .rk-page script").count() == 0
    assert page.evaluate("window.hit") is None
    page.get_by_label("Model", exact=True).select_option(index=1)


def test_an_error_shows_its_remedy_and_the_page_goes_on(page, wire):
    wire.reply, wire.mode, wire.gate = scripted("Two ", "years ", "[1]."), "error_line", None
    ask(page, "How long?")
    page.get_by_role("alert").wait_for()
    remedy = catalogue()["ollama_failed"]["en"][1]
    shown = page.get_by_role("alert").inner_text()
    assert "exit status 2" in shown and remedy.split("{")[0] in shown
    page.locator("button.rk-ask:enabled").wait_for()
    wire.mode, wire.reply = "", scripted("All is well.")
    page.keyboard.press("Enter")  # the same question again: the box still has the focus
    see(page, "All is well.")
    assert page.get_by_role("alert").count() == 0


def test_enter_that_confirms_a_candidate_does_not_send(page, wire):
    """As Chromium tells it: key 229 while composing, then the candidate as text, and no keypress."""
    wire.reply, wire.gate = scripted("好。"), None
    box, keyboard = page.get_by_label("Question"), page.context.new_cdp_session(page)
    box.fill("")
    box.focus()
    held = {"key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229}
    for candidate, chosen in (("bao'xiu", "保修"), ("duo'jiu", "多久")):
        keyboard.send("Input.imeSetComposition", {"text": candidate, "selectionStart": 7, "selectionEnd": 7})
        keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **held})
        keyboard.send("Input.insertText", {"text": chosen})
        keyboard.send("Input.dispatchKeyEvent", {"type": "keyUp", **held, "windowsVirtualKeyCode": 13})
    assert box.input_value() == "保修多久"
    seen = page.evaluate("window.seen")
    assert seen.count(["keydown", 229, True]) == 2 == sum(name == "compositionend" for name, *_ in seen)
    assert not any(name == "keypress" for name, *_ in seen)
    page.keyboard.type("?")
    page.keyboard.press("Enter")
    see(page, "好。")
    asked = [body["messages"][-1]["content"] for body in wire.sent("/api/chat")]
    assert len(asked) == 1 and "保修多久?" in asked[0]


def test_the_default_model_is_switched(page, wire):
    page.get_by_label("Default model").select_option("ollama:tall:latest")
    page.get_by_role("button", name="Switch").click()
    see(page, "answers now: ollama:tall:latest", ".rk-default")
    wire.models = tuple(name for name in wire.models if name != "tall:latest")
    page.get_by_label("Default model").select_option("ollama:tiny:latest")
    page.get_by_role("button", name="Refresh").click()
    page.locator("option", has_text="ollama:tall:latest").first.wait_for(state="detached")
    wire.models = ("tall:latest", *wire.models)
    page.get_by_role("button", name="Refresh").click()
    page.locator("option", has_text="ollama:tall:latest").first.wait_for(state="attached")
    page.locator("button.rk-refresh:enabled").wait_for()


def test_the_health_opens_on_findings_and_remedies(page):
    summary = page.locator(".rk-health summary")
    assert "✓" in summary.inner_text() and "! indexes" in summary.inner_text()  # nothing was indexed here
    summary.click()
    page.locator(".rk-health table").get_by_text("rag-kit index build").wait_for()
    summary.click()


def test_every_control_has_its_label_and_columns_stand_in_one_row(page):
    page.get_by_label("Columns").select_option("4")
    page.locator(".rk-column").nth(3).wait_for()
    boxes = [column.bounding_box() for column in page.locator(".rk-column").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({round(box["width"]) for box in boxes}) == 1
    assert page.get_by_label("Model", exact=True).count() == 4 == page.get_by_label("with retrieval").count()
    named = "e => [...e.querySelectorAll('select, input')].every(one => one.labels.length)"
    assert page.locator(".rk-page").evaluate(named)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.get_by_label("Columns").select_option("1")
    page.locator(".rk-column").nth(1).wait_for(state="detached")


def test_a_chinese_page_with_two_arms(open_page, wire):
    page = open_page("zh")
    wire.reply, wire.gate = scripted("两年", "【2】。"), None
    page.get_by_label("问题").fill("保修多久？")
    page.get_by_role("button", name="提问").click()
    page.locator(".rk-state", has_text="首个词元").nth(1).wait_for()
    assert page.locator(".rk-cited").count() == 1  # the second arm has no passages
    assert "已引用" in page.locator(".rk-cited summary").inner_text()
    assert page.locator(".rk-answer > .rk-text").first.get_attribute("lang") == "zh-Hans"
    assert page.get_by_label("使用检索").nth(1).is_checked() is False
    page.close()


def test_nothing_outside_this_machine_was_needed(page, outside):
    """Voilà's own template names an icon font on the net, which the page does without."""
    assert [url for url in outside if "fontawesome" not in url] == []
