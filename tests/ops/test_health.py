"""Each finding of `health`, provoked: its level, its text, its remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rag_kit import embedded
from rag_kit.errors import use_language
from rag_kit.index.contract import ContractEmbeddings, Instructions, Vectors
from rag_kit.manifest import write_manifest
from rag_kit.ops import checks
from rag_kit.ops.checks import Check
from rag_kit.ops.health import Health, health
from rag_kit.settings import Settings
from tests.servers import closed_port, ollama

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    loaded(monkeypatch)


def loaded(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let it look as if no other modules were loaded: other tests may have."""
    like = SimpleNamespace(modules=modules, version=sys.version, executable=sys.executable)
    monkeypatch.setattr(checks, "sys", like)


def look(root: Path, **given: Any) -> Health:
    """Look at a project in which nothing listens at Ollama's address, unless one is given."""
    with closed_port() as url:
        return health(Settings.load(root, **{"ollama_base_url": url} | given))


def found(told: Health, name: str) -> Check:
    return next(check for check in told.checks if check.name == name)


def levels(told: Health) -> dict[str, str]:
    return {check.name: check.level for check in told.checks if check.level in ("warning", "error")}


def adapter(folder: Path, hidden_size: int = 576, **recipe: Any) -> Path:
    """Lay down an adapter's files; nobody reads its weights."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}', encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    fingerprint = {"architecture": "LlamaForCausalLM", "sizes": {"hidden_size": hidden_size}} | recipe
    base = {"name": "某个基础模型", "fingerprint": fingerprint}
    write_manifest(folder, {"base": base}, name="recipe.json")
    return folder


class Fake(ContractEmbeddings):
    """An embedder that says what it is, and computes nothing."""

    reference, max_tokens, chunk_tokens, instructions = "fake", 100, 50, Instructions()

    def __init__(self, model: str) -> None:
        self.model = model

    def encode(self, texts: Any, instruction: str) -> Vectors:
        import numpy as np

        return np.eye(4, dtype=np.float32)[: len(texts)]

    def count_tokens(self, text: str) -> int:
        return len(text)

    def describe(self) -> dict[str, Any]:
        return {"backend": "fake", "model": self.model}


def index(folder: Path, model: str = "intfloat/multilingual-e5-small") -> Path:
    from langchain_core.documents import Document

    from rag_kit.index.store import build_index

    build_index([Document("水壶的保修期是 42 个月。", metadata={"source": "a.md"})], folder, Fake(model))
    return folder


# --- the whole


def test_in_order(tmp_path: Path) -> None:
    adapter(tmp_path / "lora_adapters" / "客服")
    index(tmp_path / "vector_store" / "手册")
    before = psutil.Process().children()
    told = look(tmp_path)
    assert levels(told) == {}
    assert (told.status, told.ok) == ("healthy", True)
    assert told.components == {
        "rag_handler": True,
        "vector_store": True,
        "lora_model": True,
        "ollama_service": False,  # the stand-in is not Ollama
    }
    assert found(told, "lora:客服").finding.startswith(
        "the default; fits the base; trained on 某个基础模型, rank 16"
    )
    assert (
        "1 documents, 1 chunks; built with intfloat/multilingual-e5-small"
        in found(told, "index:手册").finding
    )
    assert "speaks: English" in found(told, "base").finding
    assert found(told, "stand-in").level == "info"
    assert psutil.Process().children() == before  # nothing was started


def test_the_guides_health(tmp_path: Path) -> None:
    told = look(tmp_path).as_dict()
    assert list(told) == ["status", "components", "details", "checks"]
    assert list(told["components"]) == ["rag_handler", "vector_store", "lora_model", "ollama_service"]
    assert {type(value) for value in told["components"].values()} == {bool}
    assert told["details"]["model_info"] == {"base_model": "embedded", "using_lora": True}
    assert set(told["checks"][0]) == {"level", "name", "finding", "remedy"}
    json.dumps(told)


def test_a_fresh_project_is_degraded_not_unhealthy(tmp_path: Path) -> None:
    told = look(tmp_path)
    assert levels(told) == {"adapters": "warning", "indexes": "warning"}
    assert (told.status, told.ok) == ("degraded", True)
    assert found(told, "adapters").finding.startswith("LoRA adapter not found")
    assert "rag-kit finetune" in found(told, "adapters").remedy
    assert "rag-kit index build" in found(told, "indexes").remedy
    assert levels(look(tmp_path, use_lora_default=False)) == {"indexes": "warning"}


def test_a_check_that_breaks_is_a_finding_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(seen: checks.Seen) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setitem(checks.LOOKS, "disk", breaks)
    told = look(tmp_path)
    assert (
        found(told, "disk").finding == "The check of disk itself failed: ZeroDivisionError: division by zero"
    )
    assert "report" in found(told, "disk").remedy
    assert found(told, "indexes")
    assert told.status == "unhealthy"


def test_both_languages_and_no_script_in_html(tmp_path: Path) -> None:
    with ollama(models=("<script>:latest",)) as wire:
        use_language("zh")
        try:
            told = look(tmp_path, ollama_base_url=wire.url)
            text, html = str(told), told._repr_html_()
        finally:
            use_language("auto")
    assert "警告" in text and "→ 请用" in text and "降级" in text
    assert "<script>" in text and "<script>" not in html and "&lt;script&gt;" in html


# --- settings, disk, memory, device


def test_a_broken_env_is_the_first_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("DEVICE=显卡\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rag_kit.settings._process", None)
    told = health()
    assert [check.name for check in told.checks] == ["python", "settings"]
    assert "DEVICE=显卡 (.env line 1) → auto | cpu | cuda" in found(told, "settings").finding
    assert (told.status, told.components["rag_handler"]) == ("unhealthy", False)
    assert told.model_info == {"base_model": "", "using_lora": False}


def test_a_misspelt_variable_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LORA_MODEL_PTH=x\n", encoding="utf-8")
    warned = [check.finding for check in look(tmp_path).checks if check.name == "settings"][1:]
    assert len(warned) == 1 and "LORA_MODEL_PTH" in warned[0] and "LORA_MODEL_PATH" in warned[0]


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    told = look(tmp_path, vector_store_path=str(tmp_path / "file" / "索引"))
    assert found(told, "disk").finding == f"VECTOR_STORE_PATH cannot be written: {tmp_path}/file/索引."
    for free, level in ((1.5e9, "warning"), (0.1e9, "error")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        disk = found(look(tmp_path), "disk")
        assert (disk.level, disk.finding[:8]) == (level, f"Only {free / 1e9:.1f}")
        assert "CACHE_DIR" in disk.remedy
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)  # a file system mounted read-only
    read_only = [check for check in look(tmp_path).checks if check.name == "disk"]
    assert [check.level for check in read_only] == ["error"] * 4
    assert "right to write" in read_only[0].remedy


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0.4e9))
    memory = found(look(tmp_path), "memory")
    assert memory.finding == "0.4 GB are free, and the base's weights take about 0.5 GB."
    assert memory.level == "warning" and "ENABLE_FP16" in memory.remedy
    assert found(look(tmp_path, enable_fp16=True), "memory").level == "ok"


def test_device(tmp_path: Path) -> None:
    assert found(look(tmp_path, device="cpu"), "device").finding == "cpu: DEVICE=cpu was asked for."
    asked = found(look(tmp_path, device="cuda"), "device")
    assert asked.level in ("ok", "error")  # by the machine
    assert asked.level == "ok" or ("DEVICE=cuda" in asked.finding and "DEVICE=auto" in asked.remedy)


# --- base and adapters


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    missing = found(look(tmp_path, base_model_name="./模型{x}"), "base")
    assert missing.level == "error" and missing.finding.startswith("The base model ./模型{x} is not there")
    assert "config.json" in missing.remedy
    (tmp_path / "空").mkdir()
    assert "no config.json" in found(look(tmp_path, base_model_name="./空"), "base").finding


def test_a_base_that_comes_at_first_use(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for name in ("Some/Model-That-Nobody-Fetched", "a.gguf"):
        told = look(tmp_path, base_model_name=name)
        assert found(told, "base").level == "warning" and not told.components["rag_handler"]
        assert found(told, "base").finding.startswith(f"{name} is not set up yet")
    told = look(tmp_path, cache_dir=str(tmp_path / "缓存"))
    assert levels(told).items() >= {"base": "warning", "embedder": "warning"}.items()
    assert "rag-kit setup" in found(told, "base").remedy
    assert not (tmp_path / "缓存").exists()


def test_a_base_in_the_hubs_cache_is_found(tmp_path: Path) -> None:
    plain = tmp_path / "c" / "models--Qwen--Qwen2.5-1.5B-Instruct"
    plain.mkdir(parents=True)
    (plain / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}', encoding="utf-8")
    adapter(tmp_path / "lora_adapters" / "a")
    told = look(tmp_path, cache_dir=str(tmp_path / "c"), base_model_name="Qwen/Qwen2.5-1.5B-Instruct")
    assert found(told, "base").level == "ok" and str(plain) in found(told, "base").finding
    assert found(told, "lora:a").level == "error"


def test_an_embedded_model_that_was_cut_short(tmp_path: Path) -> None:
    folder = embedded.cache_root(tmp_path) / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"whole")
    write_manifest(folder, {})
    (folder / "model.safetensors").write_bytes(b"cut")
    told = found(look(tmp_path, cache_dir=str(tmp_path)), "base")
    assert told.level == "error" and "model.safetensors" in told.finding


def test_adapters_of_another_base_and_damaged_ones(tmp_path: Path) -> None:
    adapters = tmp_path / "lora_adapters"
    adapter(adapters / "大")
    adapter(adapters / "小", hidden_size=1536)
    told = look(tmp_path, lora_default="小")
    assert levels(told) == {"lora:小": "error", "indexes": "warning"}
    assert "某个基础模型" in found(told, "lora:小").finding and "sizes" in found(told, "lora:小").finding
    assert found(told, "lora:小").remedy
    assert not told.components["lora_model"]
    told = look(tmp_path, lora_default="大")  # the one of another base is not meant now
    assert levels(told) == {"lora:小": "warning", "indexes": "warning"}
    assert told.components["lora_model"]
    (adapters / "大" / "adapter_model.safetensors").write_bytes(b"cut")
    told = look(tmp_path, lora_default="大")
    assert levels(told)["lora:大"] == "error" and "damaged" in found(told, "lora:大").finding


def test_no_adapter_is_the_default(tmp_path: Path) -> None:
    for name in ("a", "b"):
        adapter(tmp_path / "lora_adapters" / name)
    undecided = found(look(tmp_path), "adapters")
    assert undecided.level == "warning" and "LORA_DEFAULT" in undecided.remedy
    unknown = found(look(tmp_path, lora_default="c"), "adapters")
    assert unknown.finding == "There is no adapter called c (adapters at hand: a, b)."


def test_where_transformers_is_loaded_the_weights_are_compared_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = {"model.norm.weight": [9.0] * 8}
    adapter(tmp_path / "lora_adapters" / "a", tensor_probe=probe, sizes={})
    assert found(look(tmp_path), "lora:a").level == "ok"
    loaded(monkeypatch, "transformers")
    assert "tensor_probe" in found(look(tmp_path), "lora:a").finding


# --- Ollama, the stand-in, the embedder


def test_ollama_and_its_models(tmp_path: Path) -> None:
    names = ("tiny:latest", "张三/合同-lora:latest")
    with ollama(models=names, adapters=names[1:], loaded=["tiny:latest"]) as wire:
        told = look(tmp_path, ollama_base_url=wire.url, ollama_model="tiny")
        assert found(told, "ollama").finding == f"Ollama 0.13.0 at {wire.url}, 2 models"
        missing = [
            check for check in look(tmp_path, ollama_base_url=wire.url).checks if check.name == "ollama"
        ]
    assert told.components["ollama_service"] is True
    assert found(told, "ollama:tiny:latest").finding == (
        "0.0 GB, 1B parameters, Q4_K_M, context 2048; has a template: yes; made with ADAPTER: no; "
        "can: completion; in memory: yes"
    )
    assert "made with ADAPTER: yes" in found(told, "ollama:张三/合同-lora:latest").finding
    assert missing[1].level == "warning" and missing[1].remedy.startswith(
        "Fetch it with `ollama pull qwen3:4b`"
    )


def test_ollama_absent(tmp_path: Path) -> None:
    told = look(tmp_path)
    assert found(told, "ollama").level == "info" and "the stand-in answers" in found(told, "ollama").finding
    guide = look(tmp_path, rag_kit_profile="guide", embedding_model="embedded", base_model_name="embedded")
    assert found(guide, "ollama").level == "warning" and "ollama serve" in found(guide, "ollama").remedy
    assert not any(check.name == "stand-in" for check in guide.checks)


def test_ollama_down_is_no_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rag_kit.ollama.PROBE_S", 0.2)
    for mode, reason in (("proxy", "HTTP 503"), ("hang", "timed out")):
        with ollama(mode=mode) as wire:
            told = look(tmp_path, ollama_base_url=wire.url)
            needed = look(tmp_path, ollama_base_url=wire.url, use_lora_default=False)
        down = found(told, "ollama")
        assert down.finding == f"Ollama is down: what listens at {wire.url} fails ({reason})."
        assert "OLLAMA_BASE_URL" in down.remedy and down.level == "warning"
        assert found(needed, "ollama").level == "error"  # it was to answer
        assert not any(check.name == "stand-in" for check in told.checks)


def test_a_stand_in_without_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    told = found(look(tmp_path), "stand-in")
    assert told.level == "warning" and "xllamacpp is not installed" in told.finding
    assert "make setup" in told.remedy


def test_an_embedder_from_ollama(tmp_path: Path) -> None:
    told = found(look(tmp_path, embedding_model="quentinz/bge-large-zh-v1.5"), "embedder")
    assert told.level == "error" and "ollama pull quentinz/bge-large-zh-v1.5" in told.remedy
    with ollama(models=("bge-m3:latest",)) as wire:
        assert (
            found(look(tmp_path, embedding_model="ollama:bge-m3", ollama_base_url=wire.url), "embedder").level
            == "ok"
        )


# --- indexes


def test_an_index_of_another_embedder_and_damaged_ones(tmp_path: Path) -> None:
    store = tmp_path / "vector_store"
    index(store / "default", "quentinz/bge-large-zh-v1.5")
    index(store / "旧", "bge-m3")
    told = look(tmp_path)
    assert {name: level for name, level in levels(told).items() if "index" in name} == {
        "index:default": "error",  # the one that is meant
        "index:旧": "warning",
    }
    assert "quentinz/bge-large-zh-v1.5" in found(told, "index:default").finding
    assert "EMBEDDING_MODEL" in found(told, "index:default").remedy
    assert not told.components["vector_store"]
    index(store / "default", "my/multilingual-e5-small")  # the same model in another place
    assert look(tmp_path).components["vector_store"]
    (store / "default" / "chunks.jsonl").write_bytes(b"cut")
    cut = found(look(tmp_path), "index:default")
    assert cut.level == "error" and "chunks.jsonl is damaged" in cut.finding


def test_several_indexes_and_none_is_meant(tmp_path: Path) -> None:
    for name in ("a", "b"):
        index(tmp_path / "vector_store" / name)
    told = look(tmp_path)
    assert found(told, "indexes").finding.endswith("(there are: a, b).")
    assert not told.components["vector_store"]


# --- the command


def test_the_command_ends_with_a_status_and_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / ".env").touch()
    heavy = "{'torch', 'transformers', 'pandas', 'faiss', 'xllamacpp'} & {*sys.modules}"
    call = "import sys; from rag_kit.faces.cli import main; status = main(['health', '--json'])"
    code = f"{call}; print({heavy}, status)"
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    kept |= {"PYTHONPATH": str(ROOT), "OLLAMA_BASE_URL": "http://127.0.0.1:9", "RAG_KIT_LANG": "zh"}

    def run(**more: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=kept | more, capture_output=True, encoding="utf-8")
        assert "Traceback" not in done.stderr
        told, _, last = done.stdout.rstrip().rpartition("\n")
        return json.loads(told), last

    told, last = run()
    assert last == "set() 0"
    assert (told["status"], told["components"]["ollama_service"]) == ("degraded", False)
    told, last = run(DEVICE="gpu")
    assert last == "set() 1"
    assert (told["status"], told["checks"][-1]["name"]) == ("unhealthy", "settings")
