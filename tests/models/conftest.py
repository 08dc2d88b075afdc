"""The embedded base and the twin, one engine each, and adapters made with PEFT on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rag_kit.models.base import Base
from rag_kit.settings import Settings
from tests.twin import qwen_twin

MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """One thread: the models are small, and a second costs more waiting than it saves."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of the one who runs the tests must not decide them."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def twin() -> Base:
    return Base("twin", qwen_twin())


@pytest.fixture(scope="session")
def smol() -> Base:
    from rag_kit.embedded import base_folder

    return Base("embedded", base_folder())


@pytest.fixture(scope="session")
def twin_gguf(twin: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin as a GGUF in F16."""
    from tests.gguf_bases import write_base_gguf

    return write_base_gguf(twin.folder, tmp_path_factory.mktemp("孪生") / "twin.gguf")


@pytest.fixture(scope="session")
def twin_settings(twin: Base, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A project whose base is the twin."""
    root = tmp_path_factory.mktemp("twin-project")
    return Settings.load(root, base_model_name=str(twin.folder), max_new_tokens=12)


@pytest.fixture(scope="session")
def smol_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A project whose base is the embedded model."""
    return Settings.load(tmp_path_factory.mktemp("smol-project"), max_new_tokens=12)


@pytest.fixture(scope="session")
def twin_engine(twin: Base, twin_settings: Settings) -> Iterator[Any]:
    from rag_kit.models.lora import engine_for

    yield engine_for(twin, twin_settings, "transformers")


@pytest.fixture(scope="session")
def smol_engine(smol: Base, smol_settings: Settings) -> Iterator[Any]:
    from rag_kit.models.lora import engine_for

    yield engine_for(smol, smol_settings, "transformers")


@pytest.fixture(scope="session")
def make_adapter(twin: Base) -> MakeAdapter:
    """Write a LoRA adapter with random weights, as PEFT saves it; `zero` leaves B at zero."""

    def make(
        folder: Path,
        base: Base = twin,
        *,
        seed: int = 1,
        zero: bool = False,
        size: float = 0.3,
        **config: Any,
    ) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base.folder)
        chosen = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
        peft_model = get_peft_model(model, LoraConfig(**chosen))
        if not zero:
            for name, parameter in peft_model.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    torch.nn.init.normal_(parameter.data, std=size)
        peft_model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def count_steps() -> Any:
    """Count the engine's steps in a block."""

    @contextmanager
    def counting(engine: Any) -> Iterator[list[str | None]]:
        steps: list[str | None] = []
        using = engine.using

        def counted(adapter: str | None) -> Any:
            steps.append(adapter)
            return using(adapter)

        engine.using = counted
        try:
            yield steps
        finally:
            del engine.using

    return counting
