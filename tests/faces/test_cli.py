"""The command line as a user types it: real processes, output and exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rag_kit.faces.cli import build_parser, main
from tests.twin import qwen_twin

ROOT = Path(__file__).parents[2]


def rag_kit(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder of its own, with a `.env` so that it is the root."""
    (folder / ".env").touch()
    variables = {
        k: v for k, v in os.environ.items() if not k.startswith(("RAG_KIT", "LORA", "OLLAMA", "VECTOR"))
    }
    variables |= {"RAG_KIT_LANG": "en", "OLLAMA_BASE_URL": "http://127.0.0.1:9"} | environment
    command = [sys.executable, "-m", "rag_kit.faces.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, encoding="utf-8", check=False
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "张三 的项目"
    folder.mkdir()
    return folder


def test_help_lists_every_command_and_loads_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for command in (
        "setup",
        "run",
        "test",
        "config",
        "index",
        "adapters",
        "finetune",
        "ask",
        "compare",
        "health",
        "bench",
        "runs",
    ):
        assert command in text
    heavy = "{'torch', 'transformers', 'pandas'} & {*sys.modules}"
    code = f"import sys, rag_kit.faces.cli as c; c.build_parser(); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_config_shows_values_origins_and_no_secret(project: Path) -> None:
    (project / ".env").write_text("TEMPERATURE=0.2\nHTTP_PROXY=http://me:secret@proxy:1\n", encoding="utf-8")
    done = rag_kit(project, "config", TOP_P="0.5")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}
    assert lines["TEMPERATURE"][:4] == ["0.2", ".env", "line", "1"]
    assert lines["TOP_P"][:2] == ["0.5", "environment"]
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_mistake_is_two_sentences_and_status_2(project: Path, lang: str) -> None:
    done = rag_kit(project, "ask", "hi", "--model", "nope", RAG_KIT_LANG=lang)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    expected = {
        "en": "rag-kit: nope is not a model reference (known: base, ollama:stand-in).",
        "zh": "nope 不是模型引用",
    }[lang]
    assert expected in done.stderr


def test_an_index_is_built_listed_searched_and_verified(project: Path) -> None:
    documents = project / "资料"
    documents.mkdir()
    (documents / "水壶.md").write_text("# 水壶\n\n奥林谷水壶的保修期是 42 个月。", encoding="utf-8")
    (documents / "lamp.md").write_text("# Lamp\n\nThe lamp's shade costs 29 crowns.", encoding="utf-8")
    built = rag_kit(project, "index", "build", str(documents))
    assert built.returncode == 0, built.stderr
    assert "2 documents, 2 chunks" in built.stdout
    assert rag_kit(project, "index", "list").stdout.split() == ["资料"]
    found = rag_kit(project, "index", "search", "水壶保修多久？", "--top-k", "1")
    assert "水壶.md:0" in found.stdout
    assert "42 个月" in found.stdout
    assert rag_kit(project, "index", "verify").returncode == 0
    chunks = project / "vector_store" / "资料" / "chunks.jsonl"
    chunks.write_text(chunks.read_text(encoding="utf-8").replace("29", "28"), encoding="utf-8")
    broken = rag_kit(project, "index", "verify")
    assert broken.returncode == 2
    assert "chunks.jsonl is damaged" in broken.stderr


def test_without_index_and_adapter_an_answer_says_so(project: Path) -> None:
    done = rag_kit(project, "ask", "What is the capital of France?", TEMPERATURE="0", MAX_NEW_TOKENS="12")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "Answered without sources." in done.stdout
    assert "base answered in place of lora" in done.stdout


def test_a_comparison_runs_and_resumes(project: Path) -> None:
    text = "compare --arms base+none ollama:qwen3:4b+none --split paraphrase --limit 2 --max-new-tokens 4"
    arguments = [*text.split(), "--run", "mine"]
    first = rag_kit(project, *arguments)
    assert first.returncode == 0, first.stderr
    assert "base+none" in first.stdout
    assert (project / "runs" / "mine" / "rows.parquet").is_file()
    other = rag_kit(project, *arguments, "--limit", "3")
    assert other.returncode == 2
    assert "Traceback" not in other.stderr


def test_the_guides_flags_are_understood() -> None:
    text = (
        "finetune --model_name Qwen/Qwen2.5-1.5B-Instruct --cache_dir X --output_dir ./lora_adapters "
        "--num_train_epochs 3 --fp16 False --gradient_checkpointing False"
    )
    given = text.split()
    dashed = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in given]
    first, second = build_parser().parse_args(given), build_parser().parse_args(dashed)
    assert vars(first) == vars(second)
    assert (first.num_train_epochs, first.fp16) == (3, False)


def test_questions_without_a_place_are_counted(project: Path) -> None:
    sheet = project / "问题.csv"
    sheet.write_text(
        "问题,答案\n法国的首都是哪里？,巴黎\nWhat is the capital of France?,Paris\n", encoding="utf-8"
    )
    arguments = ("--arms", "base+none", "--questions", str(sheet), "--split", "all", "--max-new-tokens", "2")
    done = rag_kit(project, "compare", *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 questions do not say where their answer stands" in done.stdout


def test_setup_prepares_what_the_profile_names(project: Path) -> None:
    assert rag_kit(project, "setup").stdout.count("Ready: ") == 3
    (project / ".env").write_text("RAG_KIT_PROFILE=guide\n", encoding="utf-8")
    assert rag_kit(project, "setup").stdout.count("Ready: ") == 0


def adapter(project: Path, name: str, scale: float) -> None:
    """Write a LoRA adapter of the twin by hand: one module, rank 2."""
    import numpy as np
    from safetensors.numpy import save_file

    folder, random = project / "lora_adapters" / name, np.random.default_rng(0)
    folder.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{module}.lora_A.weight": random.normal(size=(2, 32)).astype("float32"),
            f"{module}.lora_B.weight": scale * random.normal(size=(32, 2)).astype("float32"),
        },
        folder / "adapter_model.safetensors",
    )
    config = '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, '
    layers = '"layers_to_transform": [0], "target_modules": ["q_proj"]}'
    (folder / "adapter_config.json").write_text(config + layers, encoding="utf-8")


def test_adapters_are_listed_checked_and_removed(project: Path) -> None:
    assert "No adapters in" in rag_kit(project, "adapters", "list").stdout
    adapter(project, "客服", 1.0)
    adapter(project, "空", 0.0)
    (project / ".env").write_text(f"BASE_MODEL_NAME={qwen_twin()}\n", encoding="utf-8")
    checked = rag_kit(project, "adapters", "check")
    assert checked.returncode == 1 and "Traceback" not in checked.stderr, checked.stderr
    assert "lora:客服" in checked.stdout and "KL divergence from the base" in checked.stdout
    assert "All 1 B matrices of 空 are zero" in checked.stdout and "→ Train it again" in checked.stdout
    assert rag_kit(project, "adapters", "list").stdout.count("transformers") == 2
    removed = rag_kit(project, "adapters", "remove", "空")
    assert "Adapter 空 was removed" in removed.stdout and removed.returncode == 0
    listed = rag_kit(project, "adapters", "list").stdout
    assert "客服" in listed and "空" not in listed and "WARNING base" in listed
    again = rag_kit(project, "adapters", "remove", "../客服")
    assert again.returncode == 2 and "There is no adapter called ../客服" in again.stderr
