"""Errors are two sentences in the reader's language."""

import pytest

from rag_kit import errors
from rag_kit.errors import AdapterNotFoundError, ModelError, RagKitError, language, message, use_language


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_process_language", None)


def test_an_error_says_what_is_wrong_and_what_to_do_in_both_languages() -> None:
    error = AdapterNotFoundError("adapter_not_found", path="x", known="a, b")
    assert error.text("en") == (
        "LoRA adapter not found: x holds no adapter_config.json (adapters at hand: a, b).",
        "Train one with `rag-kit finetune --output_dir x`, or set LORA_MODEL_PATH.",
    )
    assert "找不到 LoRA 适配器" in error.text("zh")[0]
    assert isinstance(error, FileNotFoundError)  # what the guide's users catch
    assert isinstance(error, ModelError)


def test_the_language_is_chosen_when_the_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RagKitError("switch_nothing")
    monkeypatch.setenv("RAG_KIT_LANG", "zh")
    assert str(error) == " ".join(error.text("zh"))
    use_language("en")
    assert str(error) == f"{error.message} {error.hint}" == " ".join(error.text("en"))


def test_auto_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAG_KIT_LANG", raising=False)
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    for locale, expected in (("zh_CN.UTF-8", "zh"), ("zh_TW", "zh"), ("en_GB.UTF-8", "en"), ("C", "en")):
        monkeypatch.setenv("LANG", locale)
        assert language() == expected


def test_every_error_is_a_pair_of_sentences() -> None:
    for key, entry in errors.catalogue().items():
        for lang, text in entry.items():
            if isinstance(text, list):
                assert len(text) == 2, key
                assert all(part and part == part.strip() for part in text), (key, lang)


def test_a_pair_can_be_read_as_one_text() -> None:
    assert message("switch_nothing", lang="en").startswith("Nothing was named to switch to. Give use_lora")
