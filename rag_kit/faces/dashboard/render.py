"""Answers, sources, errors and health as HTML; every text that is not ours is escaped.

Knows what an answer holds; knows nothing of widgets and threads.
"""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.answer import Answer, citations_in
from rag_kit.data.language import detect_language
from rag_kit.errors import RagKitError, message
from rag_kit.models.standin import STAND_IN

if TYPE_CHECKING:
    from rag_kit.faces.dashboard.work import Run

SAME = {"en": 3, "zh": 4}  # words (Chinese: characters) in a row that both have: fewer are chance
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")
_BRACKETS = re.compile(r"([\[【［〔][^\[\]【】［］〔〕]{1,40}[\]】］〕])")
_SIGNS = {"warning": "!", "error": "✕"}


@cache
def style() -> str:
    """Return the page's style sheet as an HTML element."""
    return f"<style>{(Path(__file__).parent / 'page.css').read_text(encoding='utf-8')}</style>"


def run_html(run: "Run", lang: str) -> str:
    """Return one arm's answer as far as it is there: its state or timings, text, remarks and sources."""
    answer = run.answer
    state = escape(message(f"dashboard_state_{run.state}", lang, seconds=int(run.seconds)))
    parts = [_block(f"state rk-{run.state}", timings(answer, lang) if answer else state)]
    if answer and answer.model == f"ollama:{STAND_IN}":
        parts.append(_block("note", escape(message("dashboard_standin", lang))))
    if answer and answer.reasoning:
        heading = f"<summary>{escape(message('dashboard_reasoning', lang))}</summary>"
        parts.append(f"<details>{heading}{_text(answer.reasoning)}</details>")
    if run.text:
        parts.append(_text(run.text, cited(run.text, len(answer.sources)) if answer else None))
    if run.error:
        parts.append(error_html(run.error, lang))
    if answer:
        parts += [*(_block("note", escape(note)) for note in answer.degraded), *sources(answer, lang)]
    return _block("answer", "".join(parts))


def cited(text: str, sources: int) -> str:
    """Return the escaped text of an answer with its citations of `sources` marked."""
    return "".join(
        f'<span class="rk-cite">{escape(part)}</span>' if citations_in(part, sources) else escape(part)
        for part in _BRACKETS.split(text)
    )


def sources(answer: Answer, lang: str) -> Iterator[str]:
    """Yield the sources; open are the cited ones, or where none is cited the first with a mark."""
    if answer.sources:
        yield _block("heading", escape(message("dashboard_sources", lang, count=len(answer.sources))))
    passages = [marked(hit.document.page_content, answer.text) for hit in answer.sources]
    opened = answer.citations or [n for n, passage in enumerate(passages, 1) if "<mark>" in passage][:1]
    for number, (hit, passage) in enumerate(zip(answer.sources, passages, strict=True), 1):
        is_cited, about = number in answer.citations, hit.document.metadata
        place = escape(f"{about.get('source')} · {about.get('start')}–{about.get('end')}")
        mark = f'<span class="rk-badge">{escape(message("dashboard_cited", lang))}</span>' if is_cited else ""
        score = escape(message("dashboard_score", lang, score=hit.score))
        head = f'<span class="rk-cite">[{number}]</span> <b>{place}</b> {mark} <i>{score}</i>'
        how = f'class="rk-source{" rk-cited" * is_cited}"{" open" * (number in opened)}'
        yield f"<details {how}><summary>{head}</summary>{_text(hit.document.page_content, passage)}</details>"


def marked(passage: str, text: str) -> str:
    """Return the escaped passage with every stretch of words marked that stands in `text` too."""
    words, claim = list(_WORD.finditer(passage)), _WORD.findall(_BRACKETS.sub(" ", text).lower())
    matcher = SequenceMatcher(None, [word[0].lower() for word in words], claim, autojunk=False)
    least, parts, done = min(SAME[detect_language(passage)], len(claim)), [], 0
    for first, _, length in matcher.get_matching_blocks():
        if length >= max(least, 1):
            start, end = words[first].start(), words[first + length - 1].end()
            parts.append(f"{escape(passage[done:start])}<mark>{escape(passage[start:end])}</mark>")
            done = end
    return "".join([*parts, escape(passage[done:])])


def timings(answer: Answer, lang: str) -> str:
    """Return who answered, seconds to the first token and to the last, tokens a second, and of loading."""
    seconds = answer.timings or {}
    first, total, load = (seconds.get(f"{name}_s", 0.0) for name in ("first_token", "total", "load"))
    shown = {"first": f"{first:.1f} s", "total": f"{total:.1f} s"}
    if answer.tokens_per_s:
        shown["speed"] = f"{answer.tokens_per_s:.1f}"
    if load >= 0.05:
        shown["load"] = f"{load:.1f} s"
    named = {escape(message(f"dashboard_time_{name}", lang)): value for name, value in shown.items()}
    parts = (f"<span>{name} <b>{value}</b></span>" for name, value in named.items())
    return "".join([f"<span>{reference_html(answer.model, lang)}</span>", *parts])


def error_html(error: RagKitError, lang: str) -> str:
    """Return an error and its remedy."""
    what, remedy = (escape(text) for text in error.text(lang))
    return f'<div class="rk-error" role="alert"><b>{what}</b><br>{remedy}</div>'


def health_html(health: Any, lang: str) -> str:
    """Return a `rag_kit.ops.health.Health` as one line, which opens on all findings and remedies."""
    wrong = [(check.level, check.name) for check in health.checks if check.level in _SIGNS]
    pills = [("ok", str(sum(check.level == "ok" for check in health.checks))), *wrong]
    line = " ".join(
        f'<b class="rk-{level}">{_SIGNS.get(level, "✓")} {escape(name)}</b>' for level, name in pills
    )
    heading = escape(message("dashboard_health", lang))
    return f'<details class="rk-health"><summary>{heading} {line}</summary>{health._repr_html_()}</details>'


def reference_html(reference: str, lang: str) -> str:
    """Return a model reference, with a mark where it is no real Ollama."""
    shown = f"<code>{escape(reference)}</code>"
    if reference == f"ollama:{STAND_IN}":
        told, short = (escape(message(f"dashboard_standin{name}", lang)) for name in ("", "_short"))
        shown += f' <span class="rk-badge" title="{told}">{short}</span>'
    return shown


def _block(kind: str, html: str) -> str:
    return f'<div class="rk-{kind}">{html}</div>'


def _text(text: str, html: str | None = None) -> str:
    """Return a text's block in its own language: Chinese characters have shapes of their own."""
    lang = "zh-Hans" if detect_language(text) == "zh" else "en"
    return f'<div class="rk-text" lang="{lang}">{escape(text) if html is None else html}</div>'
