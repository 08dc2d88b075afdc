"""Arms, frozen passages, rows that survive a kill, failures as rows, and what the table may claim."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from tabulate import tabulate
from wcwidth import wcswidth

from rag_kit.compare import Arm, Comparison, compare
from rag_kit.compare.rows import COLUMNS
from rag_kit.data.questions import Question
from rag_kit.errors import DataError, ServiceError, StoreError, use_language
from rag_kit.models.options import GenerationOptions
from rag_kit.settings import Settings
from tests.compare.planted import DOCUMENTS, Shelf, ask, load
from tests.twin import qwen_twin

GRID = ["base+none", "base+retrieved", "lora+none", "lora+retrieved"]
CLOCKS = ["retrieval_s", "load_s"]  # real ones; the others stand still
GREEDY = GenerationOptions(max_new_tokens=16)


def run(arms, questions, store=None, **changes):
    return compare(arms, questions, **{"store": store or Shelf(), "options": GREEDY, "progress": False,
                                       "load": load, "ask": ask, **changes})  # fmt: skip


def scores(result: Comparison, arm: str, column: str) -> list:
    return result.rows[result.rows["arm"] == arm][column].tolist()


def text_of(error, lang: str) -> str:
    return " ".join(error.value.text(lang))


# ---- arms


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("base", Arm("base", "none")),
        ("lora+retrieved", Arm("lora", "retrieved")),
        ("ollama:qwen3:4b+none", Arm("ollama:qwen3:4b", "none")),
        ("ollama:a+b+retrieved", Arm("ollama:a+b", "retrieved")),
        (" lora:客服+retrieved ", Arm("lora:客服", "retrieved")),
    ],
)
def test_arm_reads_what_it_writes(text, arm):
    assert Arm.parse(text) == arm
    assert Arm.parse(str(arm)) == arm


@pytest.mark.parametrize("text", ["base+retrievd", "+none", "", "a+b"])
def test_arm_unknown(text):
    with pytest.raises(DataError) as error:
        Arm.parse(text)
    assert "contexts none, retrieved. Write it as MODEL+CONTEXT, for example lora+retrieved." in str(
        error.value
    )
    assert "请写成 模型+上下文，例如 lora+retrieved。" in text_of(error, "zh")


# ---- the grid


def test_grid(questions, tmp_path):
    store = Shelf()
    result = run(GRID, questions, store, run_folder=tmp_path / "run")
    assert list(result.rows.columns) == list(COLUMNS)
    assert result.rows[["arm", "question_id"]].to_numpy().tolist() == [
        [a, q.id] for a in GRID for q in questions
    ]
    assert scores(result, "lora+none", "exact_match")[:4] == [1.0] * 4
    assert scores(result, "lora+retrieved", "exact_match")[:4] == [1.0] * 4  # 【1】 is not scored
    assert scores(result, "base+none", "contains")[:4] == [0.0] * 4
    assert scores(result, "base+retrieved", "contains")[:4] == [1.0] * 4
    assert scores(result, "base+none", "f1")[:4] == [0.0] * 4  # reasoning holds the answer; never scored
    assert set(result.rows["reasoning"]) == {"48 months, Harbour Lane 12"}
    assert scores(result, "lora+retrieved", "recall_at_5")[:4] == [1.0] * 4
    assert scores(result, "base+none", "tokens_per_s") == [4.0] * 5  # 4 more tokens in 1 second
    assert result.rows["context"].tolist() == [arm.split("+")[1] for arm in GRID for _ in questions]
    assert [list(refs) for refs in scores(result, "base+none", "references")][3:] == [["海港路 12 号"], []]


def test_unanswerable_is_missing_not_zero(questions):
    result = run(["base+retrieved"], questions)
    last = result.rows[result.rows["question_id"] == "zh-3"].iloc[0]
    for column in ("exact_match", "f1", "contains", "recall_at_1", "recall_at_5"):
        assert pd.isna(last[column])
    assert not last["answerable"] and last["answer"]
    line = result.summary().iloc[0]
    assert (line["n"], line["scored"], line["coverage"], line["contains"]) == (5, 4, 1.0, 1.0)


def test_recall_belongs_to_retrieved_arms_and_needs_gold_spans(questions):
    bare = [replace(question, spans=()) for question in questions]
    assert run(["base+none"], questions).rows["recall_at_5"].isna().all()
    assert run(["base+retrieved"], bare).rows["recall_at_5"].isna().all()


def test_contexts_are_retrieved_once_and_shared(questions, tmp_path):
    store = Shelf()
    result = run(GRID, questions, store, top_k=2, run_folder=tmp_path / "run")
    assert store.searched == [question.text for question in questions]
    for _, rows in result.rows[result.rows["context"] == "retrieved"].groupby("question_id"):
        assert rows["context_hash"].nunique() == 1 and len(rows) == 2
    assert result.rows[result.rows["context"] == "none"]["context_hash"].nunique() == 1
    frozen = [json.loads(line) for line in (tmp_path / "run/contexts.jsonl").open(encoding="utf-8")]
    assert [len(record["hits"]) for record in frozen] == [4] * 5  # all there is, for recall@5; 2 are shown
    assert max(scores(result, "base+none", "input_tokens")) < min(
        scores(result, "base+retrieved", "input_tokens")
    )
    assert {hit["text"] for record in frozen for hit in record["hits"]} <= set(DOCUMENTS.values())


def test_a_model_is_loaded_once(questions):
    loaded = []
    run(["lora+none", "base+none", "lora+retrieved"], questions, load=lambda r: loaded.append(r) or load(r))
    assert loaded == ["lora", "base"]


def test_without_retrieval_no_index_is_needed(questions):
    store = Shelf()
    assert len(run(["base+none"], questions, store).rows) == 5 and not store.searched
    with pytest.raises(DataError) as error:
        compare(["base", "lora+retrieved"], questions, options=GREEDY, load=load, ask=ask)
    assert str(error.value).startswith(
        "No index was given for lora+retrieved. Build one with `rag-kit index`"
    )
    assert "没有为 lora+retrieved 提供索引。" in text_of(error, "zh")


def test_arguments_that_do_not_fit(questions):
    for arms, asked, changes, text in [
        ([], questions, {}, "0 arms, 5 questions"),
        (["base"], [], {}, "1 arms, 0 questions"),
        (["base"], [questions[0], questions[0]], {}, "Two questions have the id 'en-1'."),
        (["base"], questions, {"top_k": 0}, "top_k is 0"),
    ]:
        with pytest.raises(DataError, match=text):
            run(arms, asked, **changes)


# ---- failures are rows


def test_a_failing_arm_is_rows_with_a_reason(questions):
    result = run(["missing+none", "down+none", "base+none"], questions)
    assert all("'missing' is no arm" in reason for reason in scores(result, "missing+none", "error"))
    assert all("Wait until it has finished" in reason for reason in scores(result, "down+none", "error"))
    assert result.rows[result.rows["model"] != "base"][["f1", "total_s"]].isna().all(axis=None)
    assert result.rows[result.rows["model"] == "base"]["error"].isna().all()
    summary = result.summary().set_index("arm")
    assert summary["errors"].to_dict() == {"missing+none": 5, "down+none": 5, "base+none": 0}
    assert summary["coverage"].to_dict() == {"missing+none": 0.0, "down+none": 0.0, "base+none": 1.0}
    assert pd.isna(summary.loc["down+none", "f1"])
    assert "n = 0" in result.differences()["verdict"][0]


def test_a_service_that_is_down_is_not_waited_for(questions):
    calls = []

    def hanging(*args, **values):
        calls.append(args)
        raise ServiceError("compare_in_use", folder="x")

    assert run(["base+none", "base+retrieved"], questions, ask=hanging).rows["error"].notna().all()
    assert len(calls) == 3


def test_one_question_that_fails_stops_nothing(questions):
    def ask_or_fail(model, question, passages, **values):
        if question == questions[1].text:
            raise ValueError("坏字节")
        return ask(model, question, passages, **values)

    result = run(["lora+none"], questions, ask=ask_or_fail)
    assert result.rows["error"].dropna().tolist() == ["ValueError: 坏字节"]
    assert result.summary().iloc[0]["exact_match"] == 1.0  # over the three that have one
    assert result.summary().iloc[0]["scored"] == 3


def test_an_index_that_fails_spares_the_other_arms(questions, tmp_path):
    store = Shelf(fails=StoreError("artefact_missing", path="vector_store/default", name="manifest.json"))
    result = run(["base+none", "base+retrieved"], questions, store, run_folder=tmp_path / "run")
    assert result.rows.groupby("arm")["error"].count().to_dict() == {"base+none": 0, "base+retrieved": 5}
    assert "vector_store/default is not complete" in scores(result, "base+retrieved", "error")[0]
    assert len(store.searched) == 5
    again = run(["base+none", "base+retrieved"], questions, Shelf(), run_folder=tmp_path / "run")
    assert again.rows["error"].isna().all()


# ---- resuming

SLOW = """
    import sys, time
    sys.path.insert(0, {tests!r})
    from planted import ask, planted_questions
    from test_compare import GRID, run
    def slow(*args, **values):
        time.sleep(0.05)
        return ask(*args, **values)
    run(GRID, planted_questions(), ask=slow, run_folder={folder!r})
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_killed_run_goes_on_where_it_stopped(questions, tmp_path):
    folder = tmp_path / "张三 的项目"
    code = textwrap.dedent(SLOW).format(tests=str(Path(__file__).parent), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    rows, deadline = folder / "rows.jsonl", time.monotonic() + 60
    while (not rows.exists() or rows.read_bytes().count(b"\n") < 7) and time.monotonic() < deadline:
        assert child.poll() is None, child.stderr.read().decode()
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = rows.read_bytes().count(b"\n")
    assert 7 <= done < 20
    with pytest.raises(DataError, match="holds no finished comparison"):
        Comparison.load(folder)
    with rows.open("ab") as file:
        file.write(b'{"question_id": "zh-2", "ans')  # torn in the middle of a line
    asked, store = [], Shelf()
    result = run(
        GRID, questions, store, run_folder=folder, ask=lambda *a, **v: asked.append(a[1]) or ask(*a, **v)
    )
    assert len(asked) == 20 - done
    assert not store.searched  # the frozen passages are the ones used
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 20
    pd.testing.assert_frame_equal(result.rows.drop(columns=CLOCKS),
                                  run(GRID, questions).rows.drop(columns=CLOCKS))  # fmt: skip
    pd.testing.assert_frame_equal(Comparison.load(folder).rows, result.rows)


def test_every_cut_of_the_last_line_is_survived(questions, tmp_path):
    folder = tmp_path / "run"
    whole = run(["lora+none"], questions, run_folder=folder)
    path = folder / "rows.jsonl"
    data = path.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for end in range(last, len(data), 37):
        path.write_bytes(data[:end])
        (folder / "manifest.json").unlink()
        again = run(["lora+none"], questions, run_folder=folder)
        pd.testing.assert_frame_equal(again.rows.drop(columns=CLOCKS), whole.rows.drop(columns=CLOCKS))
        assert path.read_bytes()[:last] == data[:last] and path.read_bytes().count(b"\n") == 5


def test_finished_runs_are_only_read(questions, tmp_path):
    first = run(GRID, questions, run_folder=tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}

    def never(*args, **values):
        raise AssertionError("asked again")

    again = run(GRID, questions, run_folder=tmp_path / "run", load=never, ask=never)
    pd.testing.assert_frame_equal(first.rows, again.rows)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert sorted(before) == ["contexts.jsonl", "manifest.json", "rows.jsonl", "rows.parquet", "run.json"]


def test_failed_rows_are_tried_again(questions, tmp_path):
    folder, up, asked = tmp_path / "run", [], []

    def once_up(model, question, passages, **values):
        asked.append(question)
        if not up and question != questions[0].text:
            raise ServiceError("compare_in_use", folder="x")
        return ask(model, question, passages, **values)

    assert run(["lora+none"], questions, ask=once_up, run_folder=folder).rows["error"].count() == 4
    up.append(True)
    asked.clear()
    result = run(["lora+none"], questions, ask=once_up, run_folder=folder)
    assert asked == [question.text for question in questions[1:]]
    assert result.rows["error"].count() == 0 and len(result.rows) == 5


def test_ctrl_c_keeps_the_rows(questions, tmp_path):
    def stopped(model, question, passages, **values):
        if question == questions[2].text:
            raise KeyboardInterrupt
        return ask(model, question, passages, **values)

    with pytest.raises(KeyboardInterrupt):
        run(["lora+none"], questions, ask=stopped, run_folder=tmp_path / "run")
    assert len((tmp_path / "run/rows.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert len(run(["lora+none"], questions, run_folder=tmp_path / "run").rows) == 5


@pytest.mark.parametrize(
    ("arms", "changed", "options", "top_k", "named"),
    [
        (["base+none"], {}, {}, 4, "arms: lora+none → base+none"),
        (["lora+none"], {"text": "别的问题？"}, {}, 4, "questions: 5 → 5 (first: en-1)"),
        (["lora+none"], {}, {"max_new_tokens": 32}, 4, "max_new_tokens: 16 → 32"),
        (["lora+none"], {}, {"temperature": 0.7}, 4, "temperature: 0.0 → 0.7"),
        (["lora+none"], {}, {}, 2, "top_k: 4 → 2"),
    ],
)
def test_another_comparison_is_refused_and_the_difference_named(
    questions, tmp_path, arms, changed, options, top_k, named
):
    folder = tmp_path / "run"
    run(["lora+none"], questions, run_folder=folder)
    other = [replace(questions[0], **changed), *questions[1:]]
    before = (folder / "rows.jsonl").read_bytes()
    with pytest.raises(DataError) as error:
        run(arms, other, options=replace(GREEDY, **options), top_k=top_k, run_folder=folder)
    assert f"holds another comparison ({named}). Choose a new run folder" in str(error.value)
    assert f"是另一次对比（{named}）。" in text_of(error, "zh")
    assert (folder / "rows.jsonl").read_bytes() == before


def test_folders_that_are_not_ours_or_taken(questions, tmp_path):
    (tmp_path / "论文.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"is no run folder; it holds 论文.txt. Choose a new or an empty folder."
    ):
        run(["base+none"], questions, run_folder=tmp_path)

    def nested(*args, **values):
        with pytest.raises(DataError, match="Another process is writing to"):
            run(["base+none"], questions, run_folder=tmp_path / "run")
        return ask(*args, **values)

    assert run(["base+none"], questions, run_folder=tmp_path / "run", ask=nested).rows["error"].isna().all()


def test_damage_is_named(questions, tmp_path):
    folder = tmp_path / "run"
    run(["base+retrieved"], questions, run_folder=folder)
    rows, contexts, parquet = folder / "rows.jsonl", folder / "contexts.jsonl", folder / "rows.parquet"
    good, frozen = rows.read_bytes(), contexts.read_bytes()
    rows.write_bytes(good.replace(b'{"', b"{", 1))
    with pytest.raises(DataError, match=r"rows.jsonl is damaged at line 1. Restore the file"):
        run(["base+retrieved"], questions, run_folder=folder)
    rows.write_bytes(good)
    contexts.write_bytes(frozen.replace(b"48 months", b"99 months"))
    with pytest.raises(DataError, match="frozen passages of question 'en-1'"):
        run(["base+retrieved"], questions, run_folder=folder)
    contexts.write_bytes(frozen)
    data = bytearray(parquet.read_bytes())
    data[40] ^= 1
    parquet.write_bytes(data)
    with pytest.raises(StoreError, match=r"rows.parquet is damaged"):
        Comparison.load(folder)


# ---- what is said


def many(f1_by_arm: dict[str, list[float | None]]) -> Comparison:
    return Comparison.from_rows(
        [
            {"question_id": str(i), "answerable": True, "arm": arm, "answer": "x",
             "f1": f1, "total_s": 2.0 - (f1 or 0), "error": None if f1 is not None else "x"}
            for arm, values in f1_by_arm.items()
            for i, f1 in enumerate(values)
        ]
    )  # fmt: skip


def test_better_is_said_only_where_the_interval_clears_zero():
    result = many(
        {
            "base": [0.1] * 20,
            "lora": [0.9] * 19 + [0.0],
            "noise": [0.0, 0.2] * 10,
            "few": [1.0] * 5 + [None] * 15,
        }
    )
    lines = result.differences().set_index(["a", "b"])
    assert lines.loc[("base", "lora"), "verdict"].startswith(
        "lora is better than base: f1 of lora less base is +0.755"
    )
    assert lines.loc[("lora", "noise"), "verdict"].startswith(
        "lora is better than noise: f1 of noise less lora is -0."
    )
    assert lines.loc[("base", "noise"), "verdict"].startswith(
        "No difference shown between base and noise: f1"
    )
    assert "n = 20" in lines.loc[("base", "noise"), "verdict"]
    few = lines.loc[("base", "few")]
    assert few["n"] == 5 and few["difference"] == pytest.approx(0.9) and "better" not in few["verdict"]
    assert (
        "of n = 5 questions with f1 on both sides 5 differ, and fewer than 6 can show nothing"
        in few["verdict"]
    )
    for (_, _), line in lines.iterrows():
        assert ("better" in line["verdict"]) == (line["n"] >= 6 and (line["low"] > 0 or line["high"] < 0))
    faster = result.differences("total_s").set_index(["a", "b"])  # less is better
    assert faster.loc[("base", "lora"), "verdict"].startswith(
        "lora is better than base: total_s of lora less base is -"
    )


def test_verdicts_in_chinese():
    use_language("zh")
    result = many({"基座": [0.0] * 8, "微调": [1.0] * 8})
    assert result.differences()["verdict"][0] == (
        "微调 优于 基座：微调 与 基座 的 f1 之差为 +1.000（95% 区间 +1.000 至 +1.000，n = 8）。"
    )
    assert "未显示" in many({"甲": [0.0], "乙": [1.0]}).differences()["verdict"][0]


def test_summary_by_language(questions):
    summary = run(["base+retrieved", "lora+none"], questions).summary(by="language")
    assert summary[["arm", "language", "n", "scored"]].to_numpy().tolist() == [
        ["base+retrieved", "en", 2, 2],
        ["base+retrieved", "zh", 3, 2],
        ["lora+none", "en", 2, 2],
        ["lora+none", "zh", 3, 2],
    ]


def test_unknown_names_list_the_known(questions):
    result = run(["base+none"], questions)
    with pytest.raises(
        DataError, match="'lang' is no column of a comparison; there are question_id, question, lang"
    ):
        result.summary(by="lang")
    with pytest.raises(
        DataError, match="'bleu' is no metric of a comparison; there are exact_match, f1"
    ) as error:
        result.differences("bleu")
    assert "没有指标“bleu”" in text_of(error, "zh")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_table_lines_up(questions, lang):
    use_language(lang)
    result = run(["lora:客服一号+none", "base+retrieved"], questions)
    lines = str(result).splitlines()[:4]
    assert len({wcswidth(line) for line in lines}) == 1
    assert ("召回率@1" if lang == "zh" else "recall@1") in lines[0]
    assert "–" in lines[2] and "100%" in lines[2]  # no recall without retrieval
    assert "–" not in lines[3] and "1.000" in lines[3]
    assert tabulate([["客服"]]).splitlines()[0] == "----"  # wcwidth is there


def test_html_is_escaped(questions):
    html = run(["<script>alert(1)</script>+none", "base+none"], questions)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "<table" in html


def test_a_result_in_memory_equals_one_on_disk(questions, tmp_path):
    on_disk = run(GRID, questions, run_folder=tmp_path / "run")
    in_memory = run(GRID, questions)
    assert in_memory.path is None and on_disk.path == tmp_path / "run"
    pd.testing.assert_frame_equal(in_memory.rows.drop(columns=CLOCKS), on_disk.rows.drop(columns=CLOCKS))
    manifest = json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))
    assert manifest["arms"] == GRID and manifest["options"]["temperature"] == 0.0 and manifest["errors"] == 0
    assert manifest["rows"] == 20 and manifest["top_k"] == 4


def test_an_adapter_that_was_trained_again_is_another_model(questions, tmp_path):
    adapter, folder = tmp_path / "adapters/mine", tmp_path / "run"
    settings = Settings.load(
        tmp_path, base_model_name=str(qwen_twin()), device="cpu", lora_model_path="adapters"
    )
    values = {"settings": settings, "load": None, "run_folder": folder}
    first = run(["lora+none"], questions, **values)  # no adapter yet
    assert first.rows["error"].notna().all()
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    second = run(["lora+none"], questions, **values)  # an adapter, which nobody can read
    assert second.rows["error"].notna().all() and second.rows["error"][0] != first.rows["error"][0]
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(DataError, match=r"holds another comparison \(lora: 7692c3ad3540.* → 3fc4ccfe7458"):
        run(["lora+none"], questions, **values)


def test_half_a_character_spoils_nothing(questions, tmp_path):
    def broken(*args, **values):
        return replace(ask(*args, **values), text="蓝鹭\ud83d")

    result = run(["base+none"], questions, ask=broken, run_folder=tmp_path / "run")
    assert set(result.rows["answer"]) == {"蓝鹭?"}


def test_a_reply_in_one_piece_shows_no_speed(questions):
    def at_once(*args, **values):
        return replace(ask(*args, **values), timings={"first_token_s": 1.0, "total_s": 1.00001})

    assert run(["base+none"], questions, ask=at_once).rows["tokens_per_s"].isna().all()
    silent = replace(ask(load("base"), "?", (), language="en"), timings=None, usage=None)
    assert run(["base+none"], questions, ask=lambda *a, **v: silent).rows["total_s"].isna().all()


def test_options_default_to_greedy_from_the_settings(questions, tmp_path):
    seen, settings = [], Settings.load(tmp_path, max_new_tokens=7, temperature=0.9)
    run(["base+none"], questions[:1], options=None, settings=settings,
        ask=lambda *a, **v: seen.append(v["options"]) or ask(*a, **v))  # fmt: skip
    assert (seen[0].temperature, seen[0].max_new_tokens) == (0.0, 7)


def test_a_question_without_answer_text_is_missing():
    question = Question(
        id="q", text="晨曦水壶？", answers=(), spans=(), answerable=True, language="zh", split="test"
    )
    assert run(["base+none"], [question]).rows["f1"].isna().all()
