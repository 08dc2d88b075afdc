"""Which engine runs a base, and why."""

from pathlib import Path

import pytest

from rag_kit.errors import ModelError
from rag_kit.models import engine
from rag_kit.models.base import Base
from rag_kit.models.engine import choose_engine
from rag_kit.settings import Settings
from tests.models.texts import says

WITH = Base("基础", Path("folder"), Path("base.Q8_0.gguf"))
WITHOUT = Base("基础", Path("folder"))


@pytest.mark.parametrize(
    ("base", "values", "name", "why"),
    [
        (WITH, {}, "llama.cpp", "base.Q8_0.gguf is at hand"),
        (WITHOUT, {}, "transformers", "No GGUF of this base is at hand"),
        (WITH, {"engine": "transformers"}, "transformers", "was asked for"),
        (WITHOUT, {"engine": "Transformers"}, "transformers", "was asked for"),
        (WITH, {"engine": "llama.cpp"}, "llama.cpp", "was asked for"),
        (WITH, {"enable_quantization": True}, "transformers", "ENABLE_QUANTIZATION"),
        (WITH, {"enable_fp16": True}, "transformers", "ENABLE_FP16"),
    ],
)
def test_the_engine_and_why(tmp_path, base, values, name, why):
    found, reason = choose_engine(base, Settings.load(tmp_path, device="cpu", **values))
    assert found == name and why in reason


def test_the_argument_goes_before_the_setting(tmp_path):
    settings = Settings.load(tmp_path, engine="llama.cpp", device="cpu")
    assert choose_engine(WITH, settings, "transformers")[0] == "transformers"


def test_a_gpu_is_for_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "may_have_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_engine(WITH, Settings.load(tmp_path))[0] == "transformers"
    assert choose_engine(WITH, Settings.load(tmp_path, device="cuda"))[0] == "transformers"
    assert choose_engine(WITH, Settings.load(tmp_path, device="cpu"))[0] == "llama.cpp"


def test_without_the_library_auto_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    found, reason = choose_engine(WITH, Settings.load(tmp_path, device="cpu"))
    assert found == "transformers" and "xllamacpp" in reason


def test_llama_cpp_needs_a_gguf(tmp_path):
    with pytest.raises(ModelError) as caught:
        choose_engine(WITHOUT, Settings.load(tmp_path, engine="llama.cpp"))
    says(caught.value, "基础", "ENGINE=transformers", en="needs a GGUF", zh="需要 GGUF")
