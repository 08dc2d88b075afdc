"""The files of models that Ollama has pulled: found by name, and never outside its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag_kit.errors import ModelError
from rag_kit.models.blobs import MODEL, blob_of
from tests.models.texts import says

DIGEST = "sha256:" + "ab" * 32


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's Ollama keeps its models; empty."""
    folder = tmp_path / "模型"
    (folder / "blobs").mkdir(parents=True)
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))
    return folder


def pulled(models: Path, place: str, digest: Any = DIGEST, text: str | None = None) -> Path:
    """Write a manifest as Ollama does, and the file that it names; returns the file."""
    manifest = models / "manifests" / place
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": MODEL, "digest": digest},
    ]
    manifest.write_text(json.dumps({"layers": layers}) if text is None else text, encoding="utf-8")
    file = models / "blobs" / str(DIGEST).replace(":", "-")
    file.write_bytes(b"GGUF")
    return file


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("qwen2.5", "registry.ollama.ai/library/qwen2.5/latest"),
        ("qwen2.5:1.5b-instruct", "registry.ollama.ai/library/qwen2.5/1.5b-instruct"),
        ("quentinz/bge-large-zh-v1.5", "registry.ollama.ai/quentinz/bge-large-zh-v1.5/latest"),
        ("hf.co/maker/tiny-GGUF:Q8_0", "hf.co/maker/tiny-GGUF/Q8_0"),
        ("localhost:5000/me/m:1", "localhost:5000/me/m/1"),
    ],
)
def test_every_form_of_a_name_is_found(models: Path, name: str, place: str) -> None:
    assert blob_of(name) is None
    assert pulled(models, place) == blob_of(name)


def test_without_the_variable_the_home_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / ".ollama/models/blobs").mkdir(parents=True)
    file = pulled(tmp_path / ".ollama/models", "registry.ollama.ai/library/m/latest")
    assert blob_of("m") == file


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../b", "..", "a:..", "a/b/c/d", "模型", "a b", "/etc/passwd", "a:b:c"]
)
def test_a_name_that_could_lead_elsewhere_is_refused(models: Path, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        blob_of(name)
    says(caught.value, name, en="no name of an Ollama model", zh="不是 Ollama 的模型名")


@pytest.mark.parametrize(
    "digest", ["sha256:../../../secret", "sha256:" + "zz" * 32, "md5:" + "ab" * 16, "", 7]
)
def test_a_digest_that_is_none_is_refused(models: Path, digest: Any) -> None:
    pulled(models, "registry.ollama.ai/library/m/latest", digest)
    with pytest.raises(ModelError) as caught:
        blob_of("m")
    says(caught.value, "m", digest, en="nothing outside is opened", zh="不会打开")


def test_a_file_that_is_a_link_to_elsewhere_is_refused(models: Path, tmp_path: Path) -> None:
    file = pulled(models, "registry.ollama.ai/library/m/latest")
    secret = tmp_path / "secret"
    secret.write_bytes(b"GGUF")
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(ModelError) as caught:
        blob_of("m")
    says(caught.value, "m", secret, models / "blobs")


def test_the_whole_folder_may_be_a_link(models: Path, tmp_path: Path) -> None:
    (models / "blobs").rmdir()
    (tmp_path / "big disk").mkdir()
    (models / "blobs").symlink_to(tmp_path / "big disk", target_is_directory=True)
    pulled(models, "registry.ollama.ai/library/m/latest")
    found = blob_of("m")
    assert found is not None and found.parent == tmp_path / "big disk"


@pytest.mark.parametrize("text", ["", "[]", '{"layers": []}', '{"layers": null}', "{}", "\x00"])
def test_a_manifest_that_says_nothing_is_told(models: Path, text: str) -> None:
    pulled(models, "registry.ollama.ai/library/m/latest", text=text)
    with pytest.raises(ModelError) as caught:
        blob_of("m")
    says(caught.value, "m", "ollama pull m", en="cannot be used", zh="无法使用")


def test_a_file_that_is_gone_is_told(models: Path) -> None:
    pulled(models, "registry.ollama.ai/library/m/latest").unlink()
    with pytest.raises(ModelError) as caught:
        blob_of("m")
    says(caught.value, "m", "ollama pull m")
