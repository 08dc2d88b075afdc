"""Ollama as an arm over real sockets: the stand-in under its own name, servers that come, go and change."""

from pathlib import Path
from typing import Any

import pytest

from rag_kit.compare import Comparison, compare
from rag_kit.data.questions import Question
from rag_kit.errors import DataError
from rag_kit.models.options import GenerationOptions
from rag_kit.settings import Settings
from tests.compare.planted import Shelf
from tests.servers import Wire, closed_port, ollama, scripted

SHORT = GenerationOptions(max_new_tokens=4)


def settings_of(folder: Path, url: str, **more: Any) -> Settings:
    return Settings.load(folder, ollama_base_url=url, **more)


def run(questions: list[Question], settings: Settings, folder: Path, *arms: str) -> Comparison:
    chosen = arms or ("ollama:tiny+none",)
    how: dict[str, Any] = {"options": SHORT, "settings": settings, "progress": False, "store": Shelf()}
    return compare(chosen, questions, run_folder=folder, **how)


def test_the_stand_in_is_called_so_in_every_row(tmp_path: Path, questions: list[Question]) -> None:
    with closed_port() as url:
        settings = settings_of(tmp_path, url)
        arms = (
            "ollama:qwen3:4b+none",
            "ollama:qwen3:4b+retrieved",
            "ollama:stand-in+none",
            "ollama:llama3+none",
        )
        found = run(questions[:2], settings, tmp_path / "run", *arms)
    rows = Comparison.load(tmp_path / "run").rows  # as Parquet has them
    own = rows[rows.model != "ollama:llama3"]
    assert own.arm.unique().tolist() == ["ollama:stand-in+none", "ollama:stand-in+retrieved"]
    assert set(own.model) == set(own.model_label) == {"ollama:stand-in"} and own.error.isna().all()
    assert (
        (own.answer.str.len() > 0).all() and (own.output_tokens <= 4).all() and (own.tokens_per_s > 0).all()
    )
    absent = rows[rows.model == "ollama:llama3"]
    assert (
        absent.error.str.contains("so Ollama's model llama3 cannot answer").all() and absent.f1.isna().all()
    )
    assert "ollama:stand-in+none" in str(found) and "qwen3" not in str(found)


def test_a_server_that_dies_in_the_midst_and_comes_back(tmp_path: Path, questions: list[Question]) -> None:
    served = 0

    def reply(messages: Any, body: Any) -> Any:
        nonlocal served
        served += 1
        if served > 2:
            wire.mode = "proxy"
        yield from ("48 ", "months")

    with ollama(reply) as wire:
        settings = settings_of(tmp_path, wire.url)
        first = run(questions, settings, tmp_path / "run").rows
        assert first.error.notna().sum() == 2 and first[first.error.notna()].f1.isna().all()
        wire.mode, served = "", -100
        second = run(questions, settings, tmp_path / "run").rows
    assert second.error.isna().all() and second.answer[:2].tolist() == first.answer[:2].tolist()
    assert (
        len(wire.sent("/api/chat")) == 3 + 2 + 2
    )  # two failed and are asked again; what was answered is not


def test_where_ollama_went_away_the_stand_in_never_fills_its_rows(
    tmp_path: Path, questions: list[Question]
) -> None:
    with ollama(models=("qwen3:4b",)) as wire:
        arms = ("ollama:qwen3:4b+none",)
        before = run(questions, settings_of(tmp_path, wire.url), tmp_path / "run", *arms).rows
    changed = r"arms: ollama:qwen3:4b\+none → ollama:stand-in\+none"
    with closed_port() as url, pytest.raises(DataError, match=changed):
        run(questions, settings_of(tmp_path, url), tmp_path / "run", *arms)
    assert Comparison.load(tmp_path / "run").rows.answer.tolist() == before.answer.tolist()


def test_a_model_that_is_removed_or_replaced_meanwhile(tmp_path: Path, questions: list[Question]) -> None:
    def reply(messages: Any, body: Any) -> Any:
        wire.models = ()
        yield "48 months"

    with ollama(reply) as wire:
        settings = settings_of(tmp_path, wire.url)
        rows = run(questions, settings, tmp_path / "run").rows
        assert rows.error.isna().tolist() == [True, False, False, False, False]
        assert rows.error[1].startswith(f"Ollama at {wire.url} has no model tiny")
        wire.models, wire.digest = ("tiny:latest",), "sha256:pulled-again"
        with pytest.raises(DataError, match="ollama:tiny: sha256:tiny:latest → sha256:pulled-again"):
            run(questions, settings, tmp_path / "run")


def test_a_model_made_with_an_adapter_is_an_arm(tmp_path: Path, questions: list[Question]) -> None:
    names = ("base:latest", "合同-lora:latest")

    def reply(messages: Any, body: Any) -> Any:
        yield "48 个月" if body["model"].startswith("合同") else "不知道"

    wire: Wire
    with ollama(reply, models=names, adapters=names[1:]) as wire:
        found = run(
            questions[:1],
            settings_of(tmp_path, wire.url),
            tmp_path / "run",
            "ollama:base",
            "ollama:合同-lora",
        )
    assert found.rows.answer.tolist() == ["不知道", "48 个月"]


def test_what_began_with_the_stand_in_ends_with_it(tmp_path: Path, questions: list[Question]) -> None:
    with closed_port() as url:
        first = run(questions[:1], settings_of(tmp_path, url), tmp_path / "one", "ollama:stand-in").rows
    with ollama(scripted("the real one")) as wire:
        settings = settings_of(tmp_path, wire.url)
        again = run(questions[:1], settings, tmp_path / "two", "ollama:stand-in").rows
        assert again.answer.tolist() == first.answer.tolist() and not wire.sent("/api/chat")
        with pytest.raises(DataError, match="arms: ollama:stand-in"):
            run(questions[:1], settings, tmp_path / "one", "ollama:tiny")
