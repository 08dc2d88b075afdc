"""Benchmarks: the arithmetic by hand, the frame with toys in real processes, the arms of `engines`."""

# ruff: noqa: F401, F811  (fixtures of the models' tests)

import json
import statistics
from pathlib import Path

import psutil
import pytest

from rag_kit.errors import DataError
from rag_kit.faces.cli import main
from rag_kit.models.base import Base
from rag_kit.ops import bench as room
from rag_kit.ops import bench_engines
from rag_kit.ops.bench import BenchResult, bench
from rag_kit.ops.measure import Side, SideFailed, Worker, more_ms, p95, ratio, samples, take_turns
from rag_kit.settings import Settings
from tests.models.conftest import MakeAdapter, make_adapter, smol, twin
from tests.ops import sides
from tests.servers import closed_port, ollama, scripted
from tests.twin import qwen_twin


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of the sides' processes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(room, "BENCHES", {"toy": sides.HERE})


def toy(root: Path, **how) -> BenchResult:
    return bench("toy", settings=Settings.load(root), **how)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchResult, list[str], list[str]]:
    """The toys once: the result, what was said before, the order of the replies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setattr(room, "BENCHES", {"toy": sides.HERE})
        root, said = tmp_path_factory.mktemp("toys"), []
        result = toy(root, quick=True, say=said.append)
        return result, said, (root / "log.txt").read_text(encoding="utf-8").splitlines()


def test_the_arithmetic() -> None:
    assert p95([7.0]) == 7
    assert p95([float(n) for n in range(20, 0, -1)]) == 19  # 19 of 20 are 95 %
    assert p95([float(n) for n in range(1, 22)]) == 20  # 20 of 21: 19 would be 90.5 %
    assert ratio(ours=[1, 2, 9], other=[6, 2, 100]) == 3  # medians 2 and 6


def test_sides_take_turns_and_the_first_answer_warms_up(quick) -> None:
    result, said, log = quick
    assert said == ["玩具 about"]
    assert log == [f"{turn} {name}" for turn in range(4) for name in ("ours", "other")]
    phases = [(row["side"], row["phase"]) for row in result.rows if row["side"] != "broken"]
    assert phases == [("ours", "cold"), ("other", "cold")] + [("ours", "warm"), ("other", "warm")] * 3


def test_the_other_side_may_go_first_and_each_cold_answer_has_a_process_of_its_own(tmp_path: Path) -> None:
    result = toy(tmp_path, order="other-first")
    log = (tmp_path / "log.txt").read_text(encoding="utf-8").split("\n")
    assert log[:6] == ["0 other", "0 ours", "0 other", "0 ours", "1 other", "1 ours"]
    cold = [row for row in result.rows if row["phase"] == "cold" and row["side"] == "ours"]
    assert len(cold) == 2 and all(0 < row["load_s"] < row["cold_s"] for row in cold)


def test_values_are_made_of_the_samples_and_what_is_missing_has_its_reason(quick) -> None:
    result, _, _ = quick
    assert result.values == {"speed": 3, "share": 1, "lost": None, "unmeasured": None, "later": None}
    assert result.samples["speed"] == {"ours": [1, 2, 6], "other": [2, 8, 6]}
    assert result.samples["share"] == {"ours": [1, 2, 6], "other": [1, 3]}
    assert result.reasons == {
        "lost": "模型 坏了",
        "unmeasured": "nobody was not measured",
        "later": "尚未测量",
    }
    assert len([row for row in result.rows if row["side"] == "broken"]) == 1  # it was asked no more


def test_the_table_has_median_p95_and_n(quick) -> None:
    table = quick[0].table().set_index(["side", "phase", "metric"])
    assert tuple(table.loc["other", "warm", "answer_s"]) == (6, 8, 3)
    assert tuple(table.loc["ours", "cold", "answer_s"]) == (9, 9, 1)
    assert room._slow("tokens_per_s", [5.0, 9.0, 7.0]) == 5  # of a rate the slow tail
    text = str(quick[0])
    assert "a note" in text and "broken failed: 模型 坏了" in text and "later: null (尚未测量)" in text


def test_the_last_line_is_one_json_object_from_which_all_can_be_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("BASE_MODEL_NAME=x/y\nEMBEDDING_MODEL=hf:x/y\n", encoding="utf-8")
    assert main(["bench", "toy", "--quick", "--order", "other-first"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "玩具 about"
    told = json.loads(lines[-1])
    assert list(told) == ["bench", "values", "reasons", "samples", "machine", "package"]
    for key, value in told["values"].items():
        if value is None:
            assert told["reasons"][key] and key not in told["samples"]
        else:
            assert ratio(**told["samples"][key]) == value
    assert told["machine"]["threads"] == 1 and told["machine"]["cpu"] is not None


def test_an_unknown_bench_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError) as told:
        bench("engine")
    assert told.value.text("en") == (
        "There is no bench engine (there are: toy).",
        "Name one of these: `rag-kit bench NAME`.",
    )
    assert told.value.text("zh")[0] == "没有名为 engine 的基准测试（现有：toy）。"


def test_every_side_has_as_many_threads(quick) -> None:
    threads = {row["threads"] for row in quick[0].rows if "threads" in row}
    assert threads == {quick[0].machine["threads"]}


def test_a_side_that_dies_or_hangs_is_a_reason_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    toys = [Side(name, f"{sides.HERE}:{name}") for name in ("dies", "missing", "hangs")]
    before = psutil.Process().children()
    rows = take_turns(toys[:2], [{}, {}], cold=1, threads=1)
    assert [row["side"] for row in rows] == ["dies", "missing"]  # each was asked once
    assert rows[0]["error"] == "exit status 3: GGML_ASSERT failed"
    assert "has no attribute 'missing'" in rows[1]["error"]
    monkeypatch.setattr("rag_kit.ops.measure.LIMIT_S", 1.0)
    (hung,) = take_turns(toys[2:], [{}, {}], cold=1, threads=1)
    assert hung["error"] == "exit status -9: -"
    assert psutil.Process().children() == before
    with pytest.raises(SideFailed, match="GGML_ASSERT"):
        samples(rows, "dies", "answer_s", "warm")


def test_memory_is_that_of_a_process_and_its_children() -> None:
    worker = Worker(Side("heavy", f"{sides.HERE}:heavy", {"megabytes": 60}), 1)
    try:
        child = worker.ask({})["child"]
        assert 120 < worker.peak_mb() < 500
    finally:
        worker.close()
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(child).wait(10)
        psutil.Process(child)


# --- engines


def test_without_base_adapter_and_ollama_their_arms_are_left_out_and_it_says_so(tmp_path: Path) -> None:
    with closed_port() as url:
        settings = Settings.load(tmp_path, base_model_name="没有", ollama_base_url=url)
        plan = bench_engines.plan(settings, True, None, 1)
    assert [side.name for side in plan.sides] == ["base transformers", "retrieval"]
    assert "没有" in plan.notes[0]
    assert plan.notes[1].startswith("No arm with an adapter: LoRA adapter not found")
    assert plan.notes[2] == f"No arm of Ollama: what is at {url} cannot be asked (connection refused)."
    assert "GB/s (threads: 1)" in plan.about and "serves" not in plan.about
    assert len({json.dumps(request) for request in plan.requests}) == len(plan.requests) == 4
    assert plan.sides[0].arguments["given"] == {"base_model_name": "没有", "ollama_base_url": url}


def test_with_a_gguf_and_an_adapter_both_engines_are_measured(
    tmp_path: Path, make_adapter: MakeAdapter, smol: Base
) -> None:
    make_adapter(tmp_path / "lora_adapters" / "红", smol)
    with closed_port() as url:
        settings = Settings.load(tmp_path, ollama_base_url=url)
        plan = bench_engines.plan(settings, False, 2, 1)
    names = {side.name for side in plan.sides}
    measured = {
        side for pair in plan.ratios.values() for side, *_ in (one for one in pair if isinstance(one, tuple))
    }
    assert measured == names - {"retrieval"}
    assert plan.ratios["decode_vs_peft"] == (
        ("lora llama.cpp", "token_s", "warm"),
        ("lora transformers", "token_s", "warm"),
    )
    ours, floor = plan.ratios["roofline_share"]
    assert ours == ("base llama.cpp", "token_s", "warm") and isinstance(floor, list)
    assert f"at most {1 / statistics.median(floor):.0f} tokens/s" in plan.about
    designed = {"decode_vs_peft", "decode_pinned_vs_peft", "adapter_vs_base_decode", "answer_cold_vs_peft"}
    designed |= {"answer_pinned_cold_vs_peft", "answer_warm_vs_peft", "switch_ms", "adapters_memory_ratio"}
    assert designed | {"roofline_share"} <= plan.ratios.keys()
    assert (len(plan.requests), plan.cold) == (3, 3)


def test_a_difference_is_told_in_milliseconds() -> None:
    assert more_ms(ours=[0.003, 0.004, 9], other=[0.001, 0.002, 9]) == pytest.approx(2)


def test_arms_answer_in_processes_of_their_own(tmp_path: Path) -> None:
    """The twin in transformers makes exactly as many tokens as asked for; a server's counts are its own."""
    request = {"question": "这款水泵的保修期有多长？", "passages": ["保修期为 24 个月。"], "tokens": 5}
    with ollama(scripted("It", " is", " 24 months")) as wire:
        given = {"base_model_name": str(qwen_twin()), "ollama_base_url": wire.url, "ollama_model": "tiny"}
        place = {"root": str(tmp_path), "given": given}
        names = ("base", "ollama:tiny")
        how = {"engine": "transformers"}
        arms = [
            Side(name, f"{bench_engines.HERE}:arm", {"reference": name, "how": how} | place) for name in names
        ]
        rows = take_turns(arms, [request, request], cold=1, threads=1)
        (sent, _) = wire.sent("/api/chat")
    local, served = rows[2:]
    assert local["output_tokens"] == 5 and local["input_tokens"] > 20
    assert served["output_tokens"] == 3
    for row in (local, served):
        assert 0 < row["first_token_s"] <= row["answer_s"]
        assert row["tokens_per_s"] == pytest.approx(1 / row["token_s"])
    assert sent["options"]["temperature"] == 0 and sent["options"]["num_predict"] == 5
    assert "24 个月" in sent["messages"][-1]["content"]


def test_memory_is_read() -> None:
    assert 0 < bench_engines.memory()({})["byte_s"] < 1e-6
