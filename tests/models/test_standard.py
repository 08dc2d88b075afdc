"""LangChain's own standard suites for both chat models, on the embedded model and a real socket.

Neither model calls tools or takes pictures, so those tests are skipped by the suites themselves.
"""

from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_ollama import ChatOllama
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.ollama import OllamaLanguageModel
from rag_kit.models.standin import STAND_IN, find_ollama
from rag_kit.settings import Settings
from tests.servers import closed_port

SHORT = {"max_tokens": 4}  # the unit suites give their own


class _Local:
    """One project with the embedded base and one adapter of it, on one of the engines."""

    engine = "llama.cpp"

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _project(cls, tmp_path_factory, make_adapter, smol, smol_engine):
        root = tmp_path_factory.mktemp("standard")
        make_adapter(root / "lora_adapters" / "one", smol, size=0.02)
        cls.settings = Settings.load(root)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return LoRALanguageModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "base", "engine": self.engine, "settings": self.settings} | self.limits

    @property
    def model_override_value(self) -> str:
        return "lora"


class TestLoRAUnit(_Local, ChatModelUnitTests):
    limits: ClassVar[dict[str, Any]] = {}


class TestLoRAIntegration(_Local, ChatModelIntegrationTests):
    limits: ClassVar[dict[str, Any]] = SHORT


class TestLoRAOnTransformers(TestLoRAIntegration):
    engine = "transformers"


class _Served:
    """The embedded base behind our engine, which speaks Ollama's wire and asks for its key."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _server(cls, smol_settings):
        with closed_port() as url:
            cls.server = find_ollama(Settings.load(smol_settings.root, ollama_base_url=url))
        assert cls.server.state == STAND_IN

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return OllamaLanguageModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": STAND_IN,
            "base_url": self.server.url,
            "client_kwargs": {"headers": self.server.headers},
        } | self.limits

    @property
    def model_override_value(self) -> str:
        return f"{STAND_IN}:latest"

    @property
    def has_tool_calling(self) -> bool:
        return False  # the served model knows no tools

    @property
    def has_tool_choice(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


class TestOllamaUnit(_Served, ChatModelUnitTests):
    limits: ClassVar[dict[str, Any]] = {}


class TestOllamaIntegration(_Served, ChatModelIntegrationTests):
    limits: ClassVar[dict[str, Any]] = SHORT


class TestLangChainsOwnOllama(_Served, ChatModelIntegrationTests):
    """`langchain_ollama.ChatOllama` as it is, against our engine."""

    limits: ClassVar[dict[str, Any]] = {"num_predict": 4}

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOllama
