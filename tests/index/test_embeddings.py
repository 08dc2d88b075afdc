"""Embedders: LangChain's standard suite, instructions, limits, the contract, and servers that fail."""

import shutil
import socket
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests

from rag_kit.embedded import embedder_folder
from rag_kit.errors import DataError, ModelError, RagKitError, ServiceError, SettingsError
from rag_kit.index.contract import ContractEmbeddings, contract_of, instructions_for, matches
from rag_kit.index.embeddings import load_embeddings
from rag_kit.index.local import BATCH_TOKENS, LocalEmbeddings, _batches
from rag_kit.index.ollama import OllamaEmbeddings
from rag_kit.settings import Settings

from .conftest import FakeOllama

BGE_ZH = "为这个句子生成表示以用于检索相关文章："


class _Embedded(Embeddings):
    """The embedded embedder as the standard suite wants it: a class without arguments."""

    def __new__(cls) -> Embeddings:  # type: ignore[misc]
        return load_embeddings("embedded", Settings.load())


class TestStandard(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return _Embedded


@pytest.mark.parametrize(
    ("model", "query", "passage"),
    [
        ("intfloat/multilingual-e5-small", "query: ", "passage: "),
        ("jeffh/intfloat-multilingual-e5-large:f16", "query: ", "passage: "),
        ("/模型/multilingual-e5-base/", "query: ", "passage: "),
        ("quentinz/bge-large-zh-v1.5", BGE_ZH, ""),
        ("BAAI/bge-small-zh-v1.5:latest", BGE_ZH, ""),
        ("BAAI/bge-base-en-v1.5", "Represent this sentence for searching relevant passages: ", ""),
        ("bge-m3", "", ""),
        ("BAAI/bge-m3", "", ""),
        ("nomic-embed-text", "", ""),
        ("the5th-model", "", ""),
    ],
)
def test_instructions_by_family(model: str, query: str, passage: str) -> None:
    assert instructions_for(model) == (query, passage)


def test_a_folder_with_prompts_of_its_own_has_the_last_word() -> None:
    own = {"query": "Q: ", "document": "D: "}
    assert instructions_for("BAAI/bge-large-zh-v1.5", own) == ("Q: ", "D: ")
    assert instructions_for("BAAI/bge-large-zh-v1.5", {"query": "", "document": ""}) == (BGE_ZH, "")


class TestLocal:
    def test_vectors(self, embedder: LocalEmbeddings) -> None:
        vectors = embedder.passages(["保修期为两年。", "The warranty lasts two years.", ""])
        assert vectors.shape == (3, 384)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert embedder.passages([]).shape == (0, 384)

    def test_instructions_are_used(self, embedder: LocalEmbeddings) -> None:
        text = "How long is the warranty?"
        assert np.allclose(embedder.embed_query(text), embedder.encode(["query: " + text], ""), atol=1e-6)
        passage = embedder.embed_documents([text])
        assert np.allclose(passage, embedder.encode(["passage: " + text], ""), atol=1e-6)

    def test_order_and_batches_do_not_matter(self, embedder: LocalEmbeddings) -> None:
        texts = [f"第 {n} 条：" + "水泵的保修说明。" * (n % 9) for n in range(66)]
        together = embedder.passages(texts)
        assert (together == embedder.passages(texts)).all()
        for index in (0, 35, 65):
            assert together[index] @ embedder.passages([texts[index]])[0] > 0.9995

    def test_threads_share_one_model(self, embedder: LocalEmbeddings) -> None:
        texts = ["水泵", "a pump", "泵 pump"]
        alone = [embedder.embed_query(text) for text in texts]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(embedder.embed_query, texts * 2)) == alone * 2
        assert load_embeddings("embedded", Settings.load()) is embedder

    def test_bf16_is_near_f32(self, embedder: LocalEmbeddings) -> None:
        from sentence_transformers import SentenceTransformer

        texts = ["保修期为两年。", "The warranty lasts two years.", "型号 X200，2.5 mm"]
        exact = SentenceTransformer(str(embedder.folder), device="cpu").encode(texts, prompt_name="passage")
        assert np.sum(exact * embedder.passages(texts), axis=1).min() > 0.999

    def test_a_text_that_is_too_long_is_never_cut(self, embedder: LocalEmbeddings) -> None:
        long = "水泵的保修期。" * 200
        for embed in (embedder.embed_query, lambda text: embedder.embed_documents([text])):
            with pytest.raises(DataError) as caught:
                embed(long)
            assert "512" in caught.value.text("en")[0]
            assert "词元" in caught.value.text("zh")[0]

    @given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
    @settings(max_examples=60, deadline=None)
    def test_count_is_the_model_s_own(self, text: str) -> None:
        embedder = load_embeddings("embedded", Settings.load())
        assert isinstance(embedder, LocalEmbeddings)
        ids = embedder._model.tokenizer("passage: " + text)["input_ids"]
        assert embedder.limit - embedder.max_tokens + embedder.count_tokens(text) == len(ids)

    def test_what_counts_as_fitting_is_read_whole(self, embedder: LocalEmbeddings) -> None:
        text = "保修。"
        while embedder.count_tokens(text + "保修。") <= embedder.max_tokens:
            text += "保修。"
        assert embedder.embed_documents([text])
        with pytest.raises(DataError):
            embedder.embed_documents([text + "保修。保修。"])


@given(st.lists(st.integers(1, 512), max_size=80))
def test_batches_cover_every_text_once(lengths: list[int]) -> None:
    batches = list(_batches(lengths))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[index] for index in batch) <= BATCH_TOKENS or len(batch) == 1


class TestContract:
    def test_what_it_says(self, embedder: LocalEmbeddings) -> None:
        contract = embedder.contract()
        assert contract["model"] == "intfloat/multilingual-e5-small"
        assert contract["dimension"] == 384
        assert contract["pooling"] == "mean"
        assert (contract["query_instruction"], contract["passage_instruction"]) == ("query: ", "passage: ")
        assert len(contract["revision"]) == 64
        assert np.asarray(contract["probes"]).shape == (3, 384)

    def test_the_same_model_in_another_folder_is_the_same(
        self, embedder: LocalEmbeddings, tmp_path: Path
    ) -> None:
        moved = tmp_path / "我的模型" / "e5-copy"
        shutil.copytree(embedder_folder(), moved)
        copied = load_embeddings(str(moved), Settings.load())
        assert copied.instructions == embedder.instructions
        assert matches(embedder.contract(), copied.contract())
        assert copied.contract()["revision"] == embedder.contract()["revision"]

    def test_another_model_or_instruction_is_another(self, embedder: LocalEmbeddings) -> None:
        ours = embedder.contract()
        assert not matches(ours, contract_of(DeterministicFakeEmbedding(size=384)))
        assert not matches(ours, contract_of(DeterministicFakeEmbedding(size=6)))
        assert not matches(ours, {**ours, "query_instruction": ""})
        turned = [ours["probes"][0], ours["probes"][2], ours["probes"][1]]
        assert not matches(ours, {**ours, "probes": turned})

    def test_a_foreign_embedder_has_one_too(self) -> None:
        contract = contract_of(DeterministicFakeEmbedding(size=6))
        assert contract["model"].endswith("DeterministicFakeEmbedding")
        assert contract["reference"] is None
        assert matches(contract, contract_of(DeterministicFakeEmbedding(size=6)))


class TestReferences:
    def test_a_bare_name_is_an_ollama_model(self) -> None:
        found = load_embeddings("quentinz/bge-large-zh-v1.5", Settings.load())
        assert isinstance(found, OllamaEmbeddings)
        assert found.model == "quentinz/bge-large-zh-v1.5"
        assert found.instructions == (BGE_ZH, "")

    def test_the_setting_is_the_default(self) -> None:
        given = Settings.load(embedding_model="ollama:bge-m3", ollama_base_url="http://127.0.0.1:9")
        found = load_embeddings(settings=given)
        assert isinstance(found, OllamaEmbeddings)
        assert (found.model, found.base_url) == ("bge-m3", "http://127.0.0.1:9")

    @pytest.mark.parametrize("reference", ["lora:mine", "openai:gpt", "ollama:", "hf:"])
    def test_what_is_no_embedder(self, reference: str) -> None:
        with pytest.raises(SettingsError) as caught:
            load_embeddings(reference, Settings.load())
        assert reference in caught.value.text("en")[0]
        assert "embedded、ollama:模型" in caught.value.text("zh")[0]

    def test_a_folder_that_is_none(self, tmp_path: Path) -> None:
        for reference in (f"hf:{tmp_path}", f"hf:{tmp_path / 'none'}"):
            with pytest.raises(ModelError) as caught:
                load_embeddings(reference, Settings.load())
            assert str(tmp_path) in caught.value.text("en")[0]
            assert "modules.json" in caught.value.text("zh")[0]

    def test_a_folder_with_a_broken_model(self, tmp_path: Path) -> None:
        broken = tmp_path / "e5"
        shutil.copytree(embedder_folder(), broken)
        (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
        with pytest.raises(ModelError) as caught:
            load_embeddings(f"hf:{broken}", Settings.load())
        assert str(broken) in caught.value.text("en")[0]
        assert "下载" in caught.value.text("zh")[1]

    def test_a_hub_that_does_not_answer(self, tmp_path: Path) -> None:
        unreachable = Settings.load(hf_endpoint="http://127.0.0.1:9", cache_dir=tmp_path)
        started = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            load_embeddings("hf:BAAI/bge-small-zh-v1.5", unreachable)
        assert time.monotonic() - started < 10
        assert "HF_ENDPOINT" in caught.value.text("zh")[1]

    def test_cuda_without_cuda(self) -> None:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        with pytest.raises(ModelError) as caught:
            load_embeddings("embedded", Settings.load(device="cuda"))
        assert "DEVICE=auto" in caught.value.text("en")[1]


def _raised(embedder: ContractEmbeddings, text: str = "水泵") -> RagKitError:
    with pytest.raises(RagKitError) as caught:
        embedder.embed_documents([text])
    for lang in ("en", "zh"):
        assert all(caught.value.text(lang))
    return caught.value


class TestOllama:
    def test_vectors_instructions_and_options(self, ollama: FakeOllama) -> None:
        ollama.model = "quentinz/bge-large-zh-v1.5:latest"
        embedder = OllamaEmbeddings("quentinz/bge-large-zh-v1.5", ollama.url)
        vectors = np.asarray(embedder.embed_documents([f"文本 {n}" for n in range(40)]))
        assert vectors.shape == (40, 3)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        embedder.embed_query("保修期？")
        *passages, question = (r for r in ollama.requests if r["path"] == "/api/embed")
        assert [len(request["input"]) for request in passages] == [16, 16, 8]
        assert passages[0]["input"][0] == "文本 0"
        assert question["input"] == [BGE_ZH + "保修期？"]
        assert all(request["truncate"] is False for request in (*passages, question))

    def test_contract_and_limit(self, ollama: FakeOllama) -> None:
        contract = OllamaEmbeddings("bge-m3", ollama.url).contract()
        assert (contract["backend"], contract["dimension"], contract["revision"]) == ("ollama", 3, "d" * 64)
        ollama.context = 8192
        embedder = OllamaEmbeddings("bge-m3", ollama.url)
        assert 8180 < embedder.max_tokens <= 8190
        assert embedder.chunk_tokens == 448
        assert embedder.count_tokens("水泵") >= 4

    def test_no_proxy_stands_between(self, ollama: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert OllamaEmbeddings("bge-m3", ollama.url).embed_query("a")

    def test_no_such_model(self, ollama: FakeOllama) -> None:
        error = _raised(OllamaEmbeddings("bge-large", ollama.url))
        assert isinstance(error, ServiceError)
        assert "bge-m3:latest" in error.text("en")[0]
        assert "`ollama pull bge-large`" in error.text("zh")[1]

    def test_nothing_listens(self) -> None:
        error = _raised(OllamaEmbeddings("bge-m3", "http://127.0.0.1:9"))
        assert isinstance(error, ServiceError)
        assert "http://127.0.0.1:9" in error.text("en")[0]
        assert "ollama serve" in error.text("zh")[1]

    def test_it_hangs(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
            started = time.monotonic()
            error = _raised(OllamaEmbeddings("bge-m3", url, timeout=0.3))
        assert isinstance(error, ServiceError)
        assert "Timeout" in error.text("en")[0]
        assert time.monotonic() - started < 5

    def test_a_503(self, ollama: FakeOllama) -> None:
        ollama.embed = lambda _: (503, {"error": "upstream busy"})
        error = _raised(OllamaEmbeddings("bge-m3", ollama.url))
        assert isinstance(error, ServiceError)
        assert "503" in error.text("en")[0]
        assert "upstream busy" in error.text("zh")[0]

    def test_it_breaks_off(self, ollama: FakeOllama) -> None:
        def break_off(_: dict[str, Any]) -> tuple[int, Any]:
            raise ConnectionAbortedError

        ollama.embed = break_off
        assert isinstance(_raised(OllamaEmbeddings("bge-m3", ollama.url)), ServiceError)

    @pytest.mark.parametrize("embeddings", [[], [[1.0], [1.0]]])
    def test_another_number_of_vectors(self, ollama: FakeOllama, embeddings: list[list[float]]) -> None:
        ollama.embed = lambda _: (200, {"embeddings": embeddings})
        assert "embeddings" in _raised(OllamaEmbeddings("bge-m3", ollama.url)).text("en")[0]

    def test_a_text_that_is_too_long(self, ollama: FakeOllama) -> None:
        ollama.embed = lambda _: (400, {"error": "the input length exceeds the context length"})
        error = _raised(OllamaEmbeddings("bge-m3", ollama.url), "水泵" * 500)
        assert isinstance(error, DataError)
        assert "512" in error.text("en")[0]

    def test_a_count_over_the_bound_is_told_once(self, ollama: FakeOllama) -> None:
        embedder = OllamaEmbeddings("bge-m3", ollama.url)
        ollama.embed = lambda request: (200, ollama.unit_vectors(request)[1] | {"prompt_eval_count": 9999})
        with pytest.warns(UserWarning, match="9999"):
            embedder.embed_query("水泵")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            embedder.embed_query("水泵")

    def test_threads(self, ollama: FakeOllama) -> None:
        embedder = OllamaEmbeddings("bge-m3", ollama.url)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(embedder.embed_query, ["a", "bb", "ccc", "a"]))
        assert found[0] == found[3] != found[1]
        assert threading.active_count() < 50


def test_embedding_model_in_an_env_file_decides_what_embeds(tmp_path: Path, ollama: Any) -> None:
    dimensions = []
    for reference in ("embedded", f"ollama:{ollama.model}"):
        lines = f"EMBEDDING_MODEL={reference}\nOLLAMA_BASE_URL={ollama.url}\n"
        (tmp_path / ".env").write_text(lines, encoding="utf-8")
        embedder = load_embeddings(settings=Settings.load(tmp_path))
        dimensions.append(len(embedder.embed_query("保修期是多久？")))
    assert dimensions == [384, 3]
