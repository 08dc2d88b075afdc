"""Which file is served: the choice on a tiny model, what goes wrong, and the embedded model's own table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rag_kit.embedded import base_gguf
from rag_kit.errors import ModelError, StoreError, use_language
from rag_kit.models.adapters import Adapter, read_adapter
from rag_kit.models.base import Base
from rag_kit.models.llamacpp import probes, serving
from rag_kit.models.llamacpp.gguf import read_gguf
from rag_kit.models.llamacpp.rewrite import rewrite
from rag_kit.models.llamacpp.serving import Serving, pinned_file, serving_file
from tests.gguf_bases import tiny_base, write_base_gguf
from tests.models.conftest import MakeAdapter


@pytest.fixture(autouse=True)
def english() -> Iterator[None]:
    use_language("en")
    yield
    use_language("auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def tiny(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of 4 bits, of which what Q4_0 rounds once more is no longer the same model."""
    half = write_base_gguf(folder, tmp_path_factory.mktemp("gguf") / "half.gguf")
    return rewrite(half, half.with_name("tiny.gguf"), "Q4_1")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few positions, and times that no noise decides."""
    monkeypatch.setattr(probes, "POSITIONS", 12)
    real = serving.timed

    def timed(engine: Any, prompt: list[int]) -> dict[str, float]:
        found = real(engine, prompt)
        assert min(found["prefill"], found["decode"], found["answer_s"]) > 0
        return found | {"cpu_s": next(seconds)}

    seconds = iter([3.0, 2.0, 1.0, 2.5])  # of F16, Q8_0, Q4_0 and the source, in the one turn
    monkeypatch.setattr(serving, "TURNS", 1)
    monkeypatch.setattr(serving, "timed", timed)


def never(*_: Any) -> dict[str, Any]:
    raise AssertionError("measured again")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class TestChoice:
    """In this order: one choice is measured, and the others look at what it left."""

    def test_the_fastest_faithful_file_wins(self, tiny: Path, cache: Path, quick: None) -> None:
        said: list[str] = []
        found = serving_file(tiny, cache, said.append)
        assert said == ["Finding the fastest file of tiny.gguf that is still faithful "
                        "(once, about a minute for a small model)…"]  # fmt: skip
        table = {row["kind"]: row for row in found.table}
        assert list(table) == ["F16", "Q8_0", "Q4_0", "Q4_1"]
        assert (table["F16"]["kl"], table["F16"]["argmax"], table["F16"]["top20"]) == (0.0, 1.0, 0.0)
        assert not table["Q4_0"]["faithful"] and table["Q4_0"]["kl"] > serving.KL
        assert [kind for kind, row in table.items() if row["shipped"]] == ["Q4_1"]
        assert {row["positions"] for row in found.table} == {11 + 11 + 12}
        assert table["Q8_0"]["faithful"] and table["Q8_0"]["cpu_s"] == 2.0
        assert (found.kind, read_gguf(found.path).quantization) == ("Q8_0", "Q8_0")
        assert "Q8_0 is the fastest faithful file on this machine: 2.0 s of processor time" in found.reason
        assert "as shipped, Q4_1: 2.5 s" in found.reason

    def test_it_is_remembered_with_all_that_was_measured(
        self, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "_choice", never)
        found = serving_file(tiny, cache)
        assert found.kind == "Q8_0"
        names = {path.name for path in found.path.parent.iterdir()}
        assert names == {"Q8_0.gguf", "serving.json", "manifest.json", "rag_kit_origin.json"}  # no loser
        record = json.loads((found.path.parent / serving.RECORD).read_text(encoding="utf-8"))
        assert record["machine"]["cpu"] == serving.processor() and record["machine"]["threads"] >= 1
        assert record["versions"].keys() == {"rag-kit", "xllamacpp", "gguf"}
        use_language("zh")
        assert "Q8_0 是本机上最快且忠实的文件" in serving_file(tiny, cache).reason

    def test_a_source_that_changed_is_measured_anew(
        self, tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "_choice", shipped)
        copy = Path(shutil.copy(tiny, tmp_path / "copy.gguf"))
        first = serving_file(copy, cache)
        rewrite(copy, copy, "Q4_0")
        second = serving_file(copy, cache)
        assert (first.kind, second.kind) == ("Q4_1", "Q4_0")
        assert len(list((cache / "rag-kit" / "serving").glob("copy-*"))) == 2

    def test_what_is_damaged_in_the_cache_is_made_again(
        self, tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = serving_file(tiny, cache).path
        path.write_bytes(path.read_bytes()[:100])
        monkeypatch.setattr(serving, "_choice", shipped)
        assert serving_file(tiny, cache).path == tiny


def shipped(gguf: Any, folder: Path) -> dict[str, Any]:
    """The record of a source that is faster than all that was made of it."""
    row = {"kind": gguf.quantization, "shipped": True, "kl": 0.001, "argmax": 1.0, "cpu_s": 1.0}
    return {"kind": gguf.quantization, "file": None, "table": [row]}


def test_of_two_at_once_one_measures_and_the_other_waits(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(gguf: Any, folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return shipped(gguf, folder)

    monkeypatch.setattr(serving, "_choice", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: serving_file(tiny, tmp_path), range(4)))
    assert len(calls) == 1
    assert found == [found[0]] * 4
    assert (found[0].path, found[0].kind) == (tiny, "Q4_1")


def unmeasured(found: Serving, source: Path, why: str) -> None:
    assert (found.path, found.kind, found.table) == (source, "Q4_1", [])
    assert found.reason.startswith("Q4_1 as it is, nothing was measured: ") and why in found.reason


def test_a_large_model_is_served_as_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LARGEST", 1000)
    unmeasured(serving_file(tiny, tmp_path), tiny, "parameters, more than the 1,000 up to which files are")


def test_without_room_the_source_is_served_as_it_is(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    unmeasured(serving_file(tiny, tmp_path), tiny, "has 0.0 GB free of the 0.0 GB that comparing files needs")
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "rag-kit").write_text("in the way", encoding="utf-8")
    unmeasured(serving_file(tiny, tmp_path), tiny, "rag-kit")


def test_an_engine_that_fails_leaves_nothing_and_is_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ModelError("engine_said", reason="no memory")

    monkeypatch.setattr(serving, "rows", fail)
    unmeasured(serving_file(tiny, tmp_path), tiny, "no memory")
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no GGUF"):
        serving_file(Path(shutil.copy(__file__, tmp_path / "text.gguf")), tmp_path)


class TestPinned:
    @pytest.fixture
    def adapter(self, folder: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Adapter:
        made = make_adapter(tmp_path / "客服", Base("tiny", folder), target_modules="all-linear")
        return read_adapter(made)

    def test_it_is_merged_faithful_and_kept(
        self, tiny: Path, adapter: Adapter, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "_choice", shipped)  # Q4_1, in which a merge is rounded once more
        found = pinned_file(tiny, adapter, tmp_path)
        assert [row["kind"] for row in found.table] == ["Q4_1", "Q8_0"]
        assert [row["faithful"] for row in found.table] == [False, True]
        assert found.kind == read_gguf(found.path).quantization == "Q8_0"
        assert found.reason.startswith("Q8_0, merged: KL 0.0")
        record = json.loads((found.path.parent / serving.RECORD).read_text(encoding="utf-8"))
        assert record["beside"]["kl"] <= serving.MERGED_KL and record["beside"]["argmax"] >= 0.9
        assert [path.name for path in found.path.parent.glob("*.gguf")] == ["Q8_0.gguf"]
        monkeypatch.setattr(serving, "_merged", never)
        assert pinned_file(tiny, adapter, tmp_path) == found

    def test_a_merge_that_is_not_the_adapter_is_refused(
        self, tiny: Path, adapter: Adapter, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(serving, "_choice", shipped)
        monkeypatch.setattr(serving, "lora_pairs", lambda *_: {})
        with pytest.raises(ModelError, match="merged into its base is not what it is beside it") as error:
            pinned_file(tiny, adapter, tmp_path)
        assert "rag-kit adapters check 客服" in error.value.text("zh")[1]
        assert not list((tmp_path / "rag-kit" / "serving").rglob("*.gguf"))

    def test_without_room_it_is_an_error(
        self, tiny: Path, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(StoreError, match="GB free of the"):
            pinned_file(tiny, adapter, tmp_path)


def test_the_embedded_model_is_served_faithfully() -> None:
    """Measured once a machine, and kept in the user's cache like the download itself."""
    found = serving_file(base_gguf())
    table = {row["kind"]: row for row in found.table}
    assert found.table and table[found.kind]["faithful"]
    assert table[found.kind]["cpu_s"] == min(row["cpu_s"] for row in found.table if row["faithful"])
    assert table["Q8_0"]["faithful"] and table["Q4_1"]["faithful"]
    assert table["Q4_0"]["kl"] > 10 * serving.KL and table["Q4_0"]["argmax"] < serving.ARGMAX
    assert all(row["positions"] > 150 for row in found.table)
