"""Tokenizers of both bases, small training files, and projects whose base is the twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag_kit.settings import Settings
from tests.twin import qwen_twin

FACTS = [
    {"questions": ["Who leads the Mending Room?", "Mending Room head"], "answer": "Ida Fenwick"},
    {"questions": ["听雪 T5 的保修期是多久？", "听雪保修期"], "answer": "二十七个月"},
]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the one who runs the tests must not decide them."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(1)  # the suite runs on every core, a worker each


@pytest.fixture(scope="session")
def smol_folder() -> Path:
    from rag_kit.embedded import base_folder

    return base_folder()


@pytest.fixture(scope="session")
def tokenizers(smol_folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    folders = {"smol": smol_folder, "twin": qwen_twin()}
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(params=["smol", "twin"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


@pytest.fixture
def project(tmp_path: Path) -> Settings:
    """A project of its own whose base is the twin."""
    return Settings.load(tmp_path, base_model_name=str(qwen_twin()), max_new_tokens=12)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """Two facts with two questions each, one in Chinese."""
    return write_lines(tmp_path / "facts.jsonl", FACTS)


def write_lines(path: Path, records: list[Any]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return path
