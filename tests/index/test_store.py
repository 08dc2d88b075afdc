"""The index: LangChain's standard suite, real retrieval, and every way in which files can fail."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from rag_kit.errors import StoreError
from rag_kit.index import artefact
from rag_kit.index.contract import ContractEmbeddings
from rag_kit.index.store import (
    FaissStore,
    build_index,
    ensure_index,
    find_index,
    list_indexes,
    open_store,
    verify,
)
from rag_kit.settings import Settings

FACTS = {
    "en/warranty.md": "The A-12 pump has a warranty of 24 months. It covers the motor, but not the seals.",
    "en/returns.md": "Goods may be returned within 30 days. The buyer pays for shipping.",
    "en/office.md": "Our office in Ghent is open from nine to five. It closes in the first week of August.",
    "zh/保修.md": "X200 型水泵的保修期为三年。密封圈不在保修范围内。",
    "zh/退货.md": "商品可在十五天内退货，运费由卖家承担。",
    "zh/营业.md": "我们在成都的门店早上九点开门，周一休息。",
}
QUESTIONS = {
    "How long is the A-12 guaranteed?": "en/warranty.md",
    "When can I send something back?": "en/returns.md",
    "What are your opening hours in Belgium?": "en/office.md",
    "X200 水泵保修多久？": "zh/保修.md",
    "买了以后多少天内可以退？": "zh/退货.md",
    "成都门店星期几不营业？": "zh/营业.md",
}
FAKE = DeterministicFakeEmbedding(size=16)


@pytest.fixture
def documents() -> list[Document]:
    return [Document(text, metadata={"source": source}) for source, text in FACTS.items()]


@pytest.fixture
def folder(tmp_path: Path, documents: list[Document]) -> Path:
    """An index of quick vectors, in a folder with a Chinese name."""
    build_index(documents, tmp_path / "我的 索引", FAKE)
    return tmp_path / "我的 索引"


class TestStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> Iterator[VectorStore]:
        yield FaissStore(self.get_embeddings())


class TestSearch:
    def test_the_right_document_comes_first(
        self, documents: list[Document], embedder: ContractEmbeddings, tmp_path: Path
    ) -> None:
        build_index(documents, tmp_path / "facts", embedder)
        store = FaissStore.open(tmp_path / "facts", embedder)
        for question, source in QUESTIONS.items():
            hits = store.search(question, 3)
            assert hits[0].document.metadata["source"] == source
            assert [hit.rank for hit in hits] == [1, 2, 3] == [hit.ranks["dense"] for hit in hits]
            assert 1 >= hits[0].score >= hits[1].score >= hits[2].score

    def test_scores_are_cosines(self) -> None:
        store = FaissStore.from_texts(["a", "b", "c"], FAKE)
        query, *passages = (np.asarray(FAKE.embed_query(text)) for text in "qabc")
        expected = {
            text: float(query @ vector / np.linalg.norm(query) / np.linalg.norm(vector))
            for text, vector in zip("abc", passages, strict=True)
        }
        found = {hit.document.page_content: hit.score for hit in store.search("q", 9)}
        assert found == pytest.approx(expected, abs=1e-6)

    def test_an_empty_store(self) -> None:
        store = FaissStore(FAKE)
        assert store.search("x") == store.similarity_search_by_vector([1.0] * 16) == []
        assert store.max_marginal_relevance_search("x") == []
        assert store.delete(["none"])
        assert bool(store)

    def test_langchain_s_own_ways(self) -> None:
        store = FaissStore.from_texts(["水泵", "阀门", "pump"], FAKE, [{"n": n} for n in range(3)])
        best = store.similarity_search("水泵", 2)
        assert store.search("水泵", "similarity", k=2) == best
        assert store.search("水泵", k=2)[0].document == best[0]
        assert store.similarity_search_by_vector(FAKE.embed_query("水泵"), 2) == best
        assert store.as_retriever(search_kwargs={"k": 2}).invoke("水泵") == best
        assert store.similarity_search_with_score("水泵", 1)[0][1] == pytest.approx(1, abs=1e-5)
        diverse = store.max_marginal_relevance_search("水泵", k=3)
        assert diverse[0].page_content == "水泵"
        assert {document.metadata["n"] for document in diverse} == {0, 1, 2}
        threshold = {"score_threshold": 0.99}
        strict = store.as_retriever(search_type="similarity_score_threshold", search_kwargs=threshold)
        assert [document.page_content for document in strict.invoke("水泵")] == ["水泵"]

    def test_what_is_found_can_be_changed_without_harm(self) -> None:
        store = FaissStore.from_texts(["水泵"], FAKE, [{"source": "a"}], ids=["1"])
        store.search("水泵")[0].document.metadata["source"] = "changed"
        store.get_by_ids(["1"])[0].page_content = "changed"
        assert store.chunks() == [Document("水泵", metadata={"source": "a"}, id="1")]

    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("add"), st.lists(st.sampled_from("abcdef"), max_size=4)),
                st.tuples(st.just("delete"), st.lists(st.sampled_from("abcdef"), max_size=3)),
            ),
            max_size=8,
        )
    )
    @settings(max_examples=40, deadline=None)
    def test_any_changes_leave_what_a_dict_would_hold(self, changes: list[tuple[str, list[str]]]) -> None:
        store, model = FaissStore(FAKE), dict[str, str]()
        for step, (change, ids) in enumerate(changes):
            if change == "add":
                texts = [f"{id} {step} {place}" for place, id in enumerate(ids)]
                store.add_texts(texts, ids=ids)
                model |= dict(zip(ids, texts, strict=True))
            else:
                store.delete(ids)
                model = {id: text for id, text in model.items() if id not in ids}
        assert {str(document.id): document.page_content for document in store.chunks()} == model
        for id, text in model.items():
            assert store.search(text, 1)[0].document.id == id
        assert len(store.search("x", 99)) == len(model)

    def test_searches_while_it_changes(self) -> None:
        store = FaissStore.from_texts([f"text {n}" for n in range(50)], FAKE, ids=[str(n) for n in range(50)])
        done = threading.Event()

        def change() -> None:
            for round in range(30):
                store.delete([str(n) for n in range(10, 50)])
                store.add_texts(
                    [f"text {n} {round}" for n in range(10, 50)], ids=[str(n) for n in range(10, 50)]
                )
            done.set()

        def search(n: int) -> None:
            while not done.is_set():
                hits = store.search(f"text {n}", 60)
                assert hits[0].document.id == str(n)
                assert len(hits) in (10, 50)

        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(change), *(pool.submit(search, n) for n in range(3))]:
                future.result(60)


class TestBuild:
    def test_chunks_keep_their_place(self, tmp_path: Path) -> None:
        text = "水泵的保修期为三年。 The pump is covered for 2.5 years. " * 30
        source = Document(text, metadata={"source": "说明.md"})
        store = build_index([source], tmp_path / "i", FAKE, max_tokens=60)
        assert len(store) > 5
        for chunk in store.chunks():
            assert text[chunk.metadata["start"] : chunk.metadata["end"]] == chunk.page_content
        assert store.facts["chunker"] == {"max_tokens": 60, "overlap": 0}

    def test_no_chunk_is_too_long_for_the_embedder(
        self, tmp_path: Path, embedder: ContractEmbeddings
    ) -> None:
        document = Document("水泵的保修期为三年。" * 300, metadata={"source": "长.md"})
        store = build_index([document], tmp_path / "i", embedder, max_tokens=embedder.max_tokens)
        counts = [embedder.count_tokens(chunk.page_content) for chunk in store.chunks()]
        assert max(counts) <= embedder.max_tokens
        with pytest.raises(StoreError) as caught:
            build_index([document], tmp_path / "i", embedder, max_tokens=513)
        assert "513" in caught.value.text("zh")[0]
        assert str(embedder.max_tokens) in caught.value.text("en")[0]

    def test_nothing_to_index(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError) as caught:
            build_index([Document(" ")], tmp_path / "i", FAKE)
        assert "rag-kit index build" in caught.value.text("zh")[1]
        assert not (tmp_path / "i").exists()

    def test_manifest(self, folder: Path, documents: list[Document]) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["name"] == "我的 索引"
        assert manifest["files"].keys() == {"index.faiss", "chunks.jsonl"}
        assert manifest["documents"].keys() == FACTS.keys()
        assert manifest["embedding"]["dimension"] == 16
        first, _, _ = (folder / "chunks.jsonl").read_text(encoding="utf-8").partition("\n")
        assert json.loads(first)["metadata"] == {"source": "en/warranty.md", "start": 0, "end": 82}

    def test_rebuilding_gives_the_same_bytes(self, folder: Path, documents: list[Document]) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        build_index(documents, folder, FAKE)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_ensure_builds_only_what_changed(self, folder: Path, documents: list[Document]) -> None:
        stamp = (folder / "manifest.json").stat().st_mtime_ns
        assert len(ensure_index(documents, folder, FAKE)) == len(FACTS)
        assert (folder / "manifest.json").stat().st_mtime_ns == stamp
        assert len(ensure_index(documents[:3], folder, FAKE)) == 3
        build_index(documents[:3], folder, FAKE, max_tokens=12)
        assert len(ensure_index(documents[:3], folder, FAKE)) == 3
        other = DeterministicFakeEmbedding(size=8)
        assert ensure_index(documents[:3], folder, other).facts["embedding"]["dimension"] == 8
        (folder / "index.faiss").write_bytes(b"cut")
        assert len(ensure_index(documents, folder, FAKE)) == len(FACTS)

    def test_a_changed_store_is_saved(self, folder: Path) -> None:
        store = FaissStore.open(folder, FAKE)
        gone = [str(c.id) for c in store.chunks() if c.metadata["source"].startswith("en/")]
        store.delete(gone)
        store.add_texts(["新的一条"], [{"source": "new"}], ids=["n"])
        store.save(folder)
        again = FaissStore.open(folder, FAKE)
        assert again.chunks() == store.chunks()
        assert again.search("新的一条", 1)[0].document.id == "n"
        assert again.facts["documents"].keys() == {s for s in FACTS if s.startswith("zh/")}


class TestFinding:
    def test_by_name_by_default_and_alone(self, tmp_path: Path, documents: list[Document]) -> None:
        given = Settings.load(vector_store_path=tmp_path)
        with pytest.raises(StoreError) as caught:
            open_store(given, embeddings=FAKE)
        assert "rag-kit index build" in caught.value.text("en")[1]
        build_index(documents, tmp_path / "甲", FAKE)
        assert find_index(given) == tmp_path / "甲"
        build_index(documents, tmp_path / "乙", FAKE)
        with pytest.raises(StoreError) as caught:
            find_index(given)
        assert "乙, 甲" in caught.value.text("zh")[0]
        assert find_index(given, "乙") == tmp_path / "乙"
        build_index(documents, tmp_path / "default", FAKE)
        assert find_index(given) == tmp_path / "default"
        assert len(list_indexes(tmp_path)) == 3
        build_index(documents, tmp_path, FAKE)
        assert find_index(given) == tmp_path
        assert len(open_store(given, "甲", FAKE)) == len(FACTS)

    def test_none_there(self, folder: Path) -> None:
        with pytest.raises(StoreError) as caught:
            FaissStore.open(folder.parent / "none", FAKE)
        assert "我的 索引" in caught.value.text("en")[0]


class TestDamage:
    def test_another_embedder(self, folder: Path) -> None:
        with pytest.raises(StoreError) as caught:
            FaissStore.open(folder, DeterministicFakeEmbedding(size=8))
        what, remedy = caught.value.text("en")
        assert "16" in what
        assert "8)" in what
        assert "EMBEDDING_MODEL" in remedy
        assert "重建索引" in caught.value.text("zh")[1]

    @pytest.mark.parametrize("name", ["index.faiss", "chunks.jsonl", "manifest.json"])
    def test_one_byte_flipped_is_found_by_verify(self, folder: Path, name: str) -> None:
        whole = (folder / name).read_bytes()
        assert verify(folder)["index"]["count"] == len(FACTS)
        for place in range(0, len(whole), max(len(whole) // 40, 1)):
            flipped = bytearray(whole)
            flipped[place] ^= 0x01
            (folder / name).write_bytes(flipped)
            with pytest.raises(StoreError) as caught:
                verify(folder)
            assert str(folder) in str(caught.value)
            if name != "manifest.json":
                assert name in caught.value.text("zh")[0]
        (folder / name).write_bytes(whole)
        assert verify(folder)

    @pytest.mark.parametrize("name", ["index.faiss", "chunks.jsonl", "manifest.json"])
    @pytest.mark.parametrize("kept", [0, 7, -2])
    def test_a_file_cut_short_is_found_when_opening(self, folder: Path, name: str, kept: int) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:kept])
        with pytest.raises(StoreError) as caught:
            FaissStore.open(folder, FAKE)
        assert name in caught.value.text("en")[0] or name == "manifest.json"

    @pytest.mark.parametrize("place", [*range(40), 44, 52, 60])
    def test_a_broken_header_is_an_error_or_harmless(self, folder: Path, place: int) -> None:
        """The size is right, so only FAISS can tell; what it accepts still answers as it should."""
        data = bytearray((folder / "index.faiss").read_bytes())
        data[place] ^= 0xFF
        (folder / "index.faiss").write_bytes(data)
        try:
            store = FaissStore.open(folder, FAKE)
        except StoreError as error:
            assert "index.faiss" in str(error)
        else:
            assert len(store.search("x", 9)) == len(FACTS)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "chunks.jsonl").unlink()
        with pytest.raises(StoreError, match=r"chunks\.jsonl"):
            FaissStore.open(folder, FAKE)

    def test_a_newer_format(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(artefact, "FORMAT", 2)
        with pytest.raises(StoreError) as caught:
            FaissStore.open(folder, FAKE)
        assert "2" in caught.value.text("zh")[0]


_WRITER = """
import sys, time
from pathlib import Path
from langchain_core.embeddings import DeterministicFakeEmbedding
from rag_kit.index import artefact
from rag_kit.index.store import FaissStore

store = FaissStore.open(Path(sys.argv[1]), DeterministicFakeEmbedding(size=16))
store.add_texts(["another"], ids=["another"])
def wait(*_):
    print("here", flush=True)
    time.sleep(60)
artefact.{point} = wait
store.save(Path(sys.argv[1]))
"""


class TestInterrupted:
    @pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
    @pytest.mark.parametrize("point", ["_line", "write_manifest"])
    def test_killed_while_writing(self, folder: Path, point: str) -> None:
        before = FaissStore.open(folder, FAKE).chunks()
        command = [sys.executable, "-c", _WRITER.replace("{point}", point), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "here\n"
            writer.send_signal(signal.SIGKILL)
        assert list(folder.parent.glob(".*.building-*"))
        assert FaissStore.open(folder, FAKE).chunks() == before
        assert verify(folder)
        assert not list(folder.parent.glob(".*.building-*"))

    @pytest.mark.parametrize("point", ["_line", "write_manifest"])
    def test_a_full_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
        store = FaissStore.open(folder, FAKE)
        before = store.chunks()
        store.add_texts(["another"])

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(artefact, point, full)
        with pytest.raises(StoreError) as caught:
            store.save(folder)
        assert "No space left on device" in caught.value.text("en")[0]
        assert "VECTOR_STORE_PATH" in caught.value.text("zh")[1]
        monkeypatch.undo()
        assert FaissStore.open(folder, FAKE).chunks() == before
        assert verify(folder)
        assert not list(folder.parent.glob(".*.building-*"))

    def test_a_place_that_cannot_be_written(self, tmp_path: Path, documents: list[Document]) -> None:
        (tmp_path / "file").write_text("", encoding="utf-8")
        with pytest.raises(StoreError) as caught:
            build_index(documents, tmp_path / "file" / "index", FAKE)
        assert str(tmp_path / "file" / "index") in caught.value.text("en")[0]
