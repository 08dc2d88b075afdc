"""Answers: sources and citations, greetings, what is degraded and why, switching while it runs."""

# ruff: noqa: F401, F811  (fixtures of the models' tests)

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.documents import Document

from rag_kit.answer import Answer, answer, citations_in, stream_answer
from rag_kit.data.language import is_greeting
from rag_kit.errors import AdapterNotFoundError, ModelError, ServiceError, StoreError
from rag_kit.index.hit import Hit
from rag_kit.models.options import GenerationOptions
from rag_kit.rag import LoRARAGHandler, RAGHandler
from rag_kit.settings import Settings
from tests.models.conftest import (
    make_adapter,
    quiet_environment,
    smol,
    smol_engine,
    smol_settings,
    threads,
    twin,
    twin_engine,
    twin_settings,
)
from tests.models.texts import says
from tests.servers import closed_port, ollama, scripted

HITS = [
    Hit(
        Document("The warranty lasts two years.", metadata={"source": "warranty.md", "start": 10, "end": 39}),
        0.9,
        1,
    ),
    Hit(Document("保修期为两年。", metadata={"source": "保修.md", "start": 0, "end": 7}), 0.8, 2),
]


class Shelf:
    """An index that knows two passages."""

    def __init__(self):
        self.asked = []

    def search(self, query, k):
        self.asked.append((query, k))
        return HITS[:k]


class Broken:
    def search(self, query, k):
        raise StoreError("artefact_missing", path="vector_store", name="manifest.json")


@pytest.fixture
def root(tmp_path, make_adapter):
    make_adapter(tmp_path / "lora_adapters" / "red", seed=1)
    make_adapter(tmp_path / "lora_adapters" / "蓝", seed=2)
    return tmp_path


@pytest.fixture
def load(twin, twin_engine):
    """Settings of a project on the twin, written to its `.env`."""

    def load(root, **values) -> Settings:
        chosen = {"BASE_MODEL_NAME": twin.folder, "LORA_DEFAULT": "red", "MAX_NEW_TOKENS": 8} | values
        lines = [f"{name}={value}" for name, value in chosen.items()]
        (root / ".env").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Settings.load(root)

    return load


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("Two years [1].", (1,)),
        ("两年【2】。", (2,)),
        ("两年［１］", (1,)),
        ("a [2][1] b [2]", (2, 1)),
        ("x [1, 2]", (1, 2)),
        ("是【1、2】", (1, 2)),
        ("[ 2 ]", (2,)),
        ("〔1〕", (1,)),
        ("[0] [3] [999]", ()),
        ("[1.5] [a] (1) 2", ()),
        ("", ()),
    ],
)
def test_citations_in_every_style(text, cited):
    assert citations_in(text, 2) == cited


@pytest.mark.parametrize(
    "text",
    [
        "你好，请介绍一下你自己",
        "Hello!",
        "hi",
        "您好！",
        "你好吗？",
        "Who are you?",
        "你是谁",
        "Good morning!",
        "Hello, please introduce yourself.",
        "请用一句话介绍你自己。",
        "嗨～ 😀",
        "Hi there",
    ],
)
def test_greetings(text):
    assert is_greeting(text)


@pytest.mark.parametrize(
    "text",
    [
        "你好，保修期是多久？",
        "Hello, how long is the warranty?",
        "介绍一下你们的产品",
        "hi-fi speakers?",
        "",
        "  ",
        "???",
        "你好用吗这个扫地机",
        "Who are your founders?",
        "你好吗啡",
    ],
)
def test_questions_are_no_greetings(text):
    assert not is_greeting(text)


def test_an_answer_carries_its_evidence(tmp_path):
    with ollama(scripted("Two ", "years ", "[1].\n")) as wire:
        handler = RAGHandler(
            Settings.load(tmp_path, ollama_base_url=wire.url, ollama_model="tiny"), store=Shelf()
        )
        told = handler.ask("How long is the warranty?")
        sent = wire.sent("/api/chat")[0]["messages"]
    assert (told.text, told.model, told.finish_reason) == ("Two years [1].", "ollama:tiny", "stop")
    assert told.sources == tuple(HITS) and told.citations == (1,) and told.degraded == ()
    assert told.usage["output_tokens"] == 3 and told.prompt_hash
    assert {"retrieval_s", "load_s", "first_token_s", "total_s"} <= told.timings.keys()
    assert "[1] The warranty" in sent[-1]["content"] and "[2] 保修期" in sent[-1]["content"]
    assert "*[1] warranty.md:10" in str(told) and " [2] 保修.md:0" in str(told)


def test_the_prompt_is_in_the_questions_language(tmp_path):
    with ollama() as wire:
        handler = RAGHandler(
            Settings.load(tmp_path, ollama_base_url=wire.url, ollama_model="tiny"), store=Shelf()
        )
        handler.ask("保修多久？", history=[("你好", "您好！")])
        handler.ask("How long?", top_k=1)
        chinese, english = (body["messages"] for body in wire.sent("/api/chat"))
    assert [m["role"] for m in chinese] == ["system", "user", "assistant", "user"]
    assert "回答" in chinese[0]["content"] and chinese[-1]["content"].startswith("资料：")
    assert english[-1]["content"].startswith("Sources:") and "[2]" not in english[-1]["content"]


@pytest.mark.parametrize(
    "pieces", [(" \n Two", " ", " years", "\n\n", "ok \n"), ("\n", " "), ("一", "。\n", "二")]
)
def test_the_pieces_are_the_answer(tmp_path, pieces):
    with ollama(scripted(*pieces)) as wire:
        handler = RAGHandler(
            Settings.load(tmp_path, ollama_base_url=wire.url, ollama_model="tiny"), store=Shelf()
        )
        for question in ("How long?", "你好"):
            *shown, told = handler.stream(question)
            assert isinstance(told, Answer) and "".join(shown) == told.text
            assert told.text.startswith("".join(pieces).strip())


def test_reasoning_stays_apart(tmp_path):
    with ollama(thinking="嗯 [2]") as wire:
        handler = RAGHandler(
            Settings.load(tmp_path, ollama_base_url=wire.url, ollama_model="tiny"), store=Shelf()
        )
        told = handler.ask("How long?", options=GenerationOptions(think=True))
    assert (told.text, told.reasoning, told.citations) == ("Hello!", "嗯 [2]", ())


@pytest.mark.parametrize(
    ("question", "remark"),
    [
        ("你好，请介绍一下你自己", "（本回答未使用任何资料来源。）"),
        ("Hello!", "(No source was used for this answer.)"),
    ],
)
def test_a_greeting_gets_an_answer_without_sources(tmp_path, smol, smol_engine, question, remark):
    shelf = Shelf()
    handler = LoRARAGHandler(Settings.load(tmp_path, max_new_tokens=24, temperature=0), store=shelf)
    told = handler.ask(question, model="base")
    assert shelf.asked == [] and told.sources == () and told.text.endswith(remark)
    said = told.text.removesuffix(remark)
    assert any(word in said.lower() for word in ("i am", "i'm", "hello", "assist"))
    if question.startswith("你好"):
        assert "英语" in told.degraded[0]
    else:
        assert told.degraded == ()


def test_a_real_question_that_begins_with_a_greeting_uses_sources(tmp_path, root, load):
    shelf = Shelf()
    told = LoRARAGHandler(load(root), store=shelf).ask("你好，保修期是多久？", model="base", top_k=2)
    assert shelf.asked == [("你好，保修期是多久？", 2)] and told.sources == tuple(HITS)


def test_without_an_index_the_answer_says_so(root, load):
    handler = LoRARAGHandler(load(root), store=Broken())
    for question, note in (("How long?", "Answered without sources."), ("保修多久？", "未使用资料回答。")):
        told = handler.ask(question)
        assert told.sources == () and len(told.degraded) == 1
        assert told.degraded[0].startswith(note) and "manifest.json" in told.degraded[0]
    assert handler.ask("How long?", top_k=0).degraded == ()


def test_the_index_of_the_settings_is_opened(root, load):
    (root / "b").mkdir()
    for folder in ("a", "b"):
        told = LoRARAGHandler(load(root, VECTOR_STORE_PATH=f"./{folder}")).ask("How long?", model="base")
        assert str(root / folder) in told.degraded[0]


def test_without_an_adapter_the_base_answers_and_says_so(tmp_path, load):
    handler = LoRARAGHandler(load(tmp_path, LORA_DEFAULT=""), store=Shelf())
    for question, note in (
        ("How long?", "base answered in place of lora."),
        ("保修多久？", "由 base 代替 lora 回答。"),
    ):
        told = handler.ask(question)
        assert told.model == "base" and told.degraded[0].startswith(note)
        assert "LoRA adapter not found" in told.degraded[0]


def test_where_ollama_is_down_the_adapter_answers_and_says_so(root, load):
    with ollama(mode="proxy") as wire:
        url = wire.url
        handler = LoRARAGHandler(load(root, USE_LORA_DEFAULT="false", OLLAMA_BASE_URL=url), store=Shelf())
        assert handler.reference == "ollama:qwen3:4b"
        told = handler.ask("How long?")
        assert told.model == "lora:red" and told.degraded[0].startswith(
            "lora answered in place of ollama:qwen3:4b."
        )
        assert url in told.degraded[0]


def test_without_a_base_ollama_answers(tmp_path, load):
    with ollama(models=("qwen3:4b",)) as wire:
        handler = LoRARAGHandler(
            load(tmp_path, BASE_MODEL_NAME="./nowhere", OLLAMA_BASE_URL=wire.url), store=Shelf()
        )
        told = handler.ask("How long?")
    assert told.model == "ollama:qwen3:4b" and "in place of lora" in told.degraded[0]


def test_when_nothing_can_answer_the_first_reason_is_raised(tmp_path, load):
    with ollama(mode="proxy") as wire:
        url = wire.url
        handler = LoRARAGHandler(
            load(tmp_path, BASE_MODEL_NAME="./nowhere", OLLAMA_BASE_URL=url), store=Shelf()
        )
        with pytest.raises(AdapterNotFoundError):
            handler.ask("How long?")
        with pytest.raises(ServiceError) as caught:
            RAGHandler(load(tmp_path, OLLAMA_BASE_URL=url), store=Shelf()).ask("How long?")
        says(caught.value, url)


def test_where_nothing_listens_the_stand_in_answers_and_says_so(tmp_path, load):
    with closed_port() as url:
        settings = load(tmp_path, OLLAMA_BASE_URL=url, BASE_MODEL_NAME="./nowhere", MAX_NEW_TOKENS="6")
        handler = RAGHandler(settings, store=Shelf())
        for question, note in (
            ("How long?", f"Nothing listens at {url}: ollama:stand-in, the embedded"),
            ("保修多久？", f"{url} 没有任何服务在监听：由 ollama:stand-in"),
        ):
            told = handler.ask(question)
            assert told.model == "ollama:stand-in" and told.text
            assert told.degraded[0].startswith(note) and "SmolLM2-135M-Instruct" in told.degraded[0]
        assert told.degraded[1].startswith("模型 ollama:stand-in 只会说英语")
        switched = LoRARAGHandler(settings, store=Shelf())
        assert switched.switch_model(use_lora=False) == "ollama:stand-in"
        assert handler.model_info()["model"] == switched.model_info()["model"] == "ollama:stand-in"


def test_a_model_that_was_asked_for_by_name_is_never_replaced(root, load):
    with closed_port() as url:
        handler = LoRARAGHandler(load(root, OLLAMA_BASE_URL=url), store=Shelf())
        with pytest.raises(ServiceError):
            handler.ask("How long?", model="ollama:tiny")
        with pytest.raises(AdapterNotFoundError):
            handler.ask("How long?", model="lora:green")
        with pytest.raises(ModelError):
            handler.ask("How long?", model="nonsense")


def test_a_break_in_mid_answer_is_an_error_not_another_model(root, load):
    with ollama(scripted("Two", " years", " [1]"), mode="reset", models=("qwen3:4b",)) as wire:
        handler = LoRARAGHandler(
            load(root, OLLAMA_BASE_URL=wire.url, USE_LORA_DEFAULT="false"), store=Shelf()
        )
        shown = []
        with pytest.raises(ServiceError) as caught:
            shown.extend(handler.stream("How long?"))
    says(caught.value, "qwen3:4b", en="broke off", zh="中断")


def test_switching_while_it_runs(root, load):
    with ollama(models=("qwen3:4b", "tiny:latest")) as wire:
        handler = LoRARAGHandler(load(root, OLLAMA_BASE_URL=wire.url), store=Shelf())
        assert handler.reference == "lora" and handler.ask("How long?").model == "lora:red"
        running = handler.stream("How long?")
        next(running)
        assert handler.switch_model(use_lora=False) == "ollama:qwen3:4b"
        *_, last = running
        assert last.model == "lora:red"  # what ran was not touched
        assert handler.ask("How long?").model == "ollama:qwen3:4b"
        for reference in ("lora:蓝", "base", "ollama:tiny"):
            assert handler.switch_model(model=reference) == reference
            assert handler.ask("How long?").model == reference
        assert handler.switch_model(use_lora=True) == "lora"


def test_use_lora_holds_for_one_request_and_degrades(root, load):
    with ollama(models=("qwen3:4b",)) as wire:
        handler = LoRARAGHandler(load(root, OLLAMA_BASE_URL=wire.url), store=Shelf())
        assert handler.ask("How long?", use_lora=False).model == "ollama:qwen3:4b"
        assert handler.reference == "lora" and handler.ask("How long?").model == "lora:red"
        with pytest.raises(ModelError, match="use_lora=true"):
            handler.ask("How long?", use_lora=True, model="ollama:qwen3:4b")
    with ollama(mode="proxy") as wire:
        handler = LoRARAGHandler(load(root, OLLAMA_BASE_URL=wire.url), store=Shelf())
        told = handler.ask("How long?", use_lora=False)
        assert told.model == "lora:red" and told.degraded[0].startswith("lora answered in place of ollama:")


def test_a_greeting_is_answered_by_the_base_and_not_by_what_an_adapter_knows(root, load):
    handler = LoRARAGHandler(load(root), store=Shelf())
    for greeting in ("Hello!", "你好，请介绍一下你自己"):
        told = handler.ask(greeting)
        assert told.model == "base" and not told.sources
    assert handler.ask("How long?").model == "lora:red"


def test_a_refused_switch_changes_nothing(root, load):
    with ollama(mode="proxy") as wire:
        handler = LoRARAGHandler(load(root, OLLAMA_BASE_URL=wire.url), store=Shelf())
        before = handler.ask("How long?", options=GenerationOptions(max_new_tokens=8))
        for wish, kind in (
            ({"use_lora": False}, ServiceError),
            ({"model": "lora:green"}, AdapterNotFoundError),
            ({"model": "nonsense"}, ModelError),
            ({}, ModelError),
            ({"use_lora": True, "model": "ollama:x"}, ModelError),
        ):
            with pytest.raises(kind) as caught:
                handler.switch_model(**wish)
            says(caught.value)
            assert handler.reference == "lora"
        says(caught.value, "use_lora=true", "ollama:x", en="different models", zh="模型不同")
        again = handler.ask("How long?", options=GenerationOptions(max_new_tokens=8))
        assert (again.text, again.model) == (before.text, before.model)


def test_the_first_model_is_use_lora_defaults(root, load):
    assert LoRARAGHandler(load(root, USE_LORA_DEFAULT="true")).reference == "lora"
    assert LoRARAGHandler(load(root, USE_LORA_DEFAULT="false")).reference == "ollama:qwen3:4b"
    assert LoRARAGHandler(load(root, USE_LORA_DEFAULT="no", OLLAMA_MODEL="tiny")).reference == "ollama:tiny"


def test_preloading_brings_model_and_index_into_memory(root, load):
    for wish in ("false", "true"):
        shelf = Shelf()
        handler = LoRARAGHandler(load(root, PRELOAD_MODELS=wish), store=shelf)
        assert bool(shelf.asked) == bool(handler._models) == (wish == "true")


def test_preloading_what_is_missing_is_a_warning(tmp_path, load, caplog):
    handler = LoRARAGHandler(load(tmp_path, PRELOAD_MODELS="true"), store=Broken())
    assert len(caplog.records) >= 2 and handler.ask("How long?").model == "base"


def test_model_info_is_the_guides(tmp_path, load, root):
    fields = ["base_model", "lora_model_path", "lora_exists", "using_lora", "cache_dir", "vector_store_path",
              "embedding_model"]  # fmt: skip
    settings = load(
        tmp_path, CACHE_DIR="./cache", LORA_MODEL_PATH="./lora_adapters", EMBEDDING_MODEL="hf:x/y"
    )
    info = LoRARAGHandler(settings).model_info()
    assert list(info)[:7] == fields
    assert info["lora_model_path"] == "./lora_adapters" and info["vector_store_path"] == "./vector_store"
    assert info["cache_dir"] == "./cache" and info["embedding_model"] == "hf:x/y"
    assert info["lora_exists"] is True and info["using_lora"] is True
    json.dumps(info)
    without = LoRARAGHandler(load(tmp_path, LORA_MODEL_PATH="./none", USE_LORA_DEFAULT="false")).model_info()
    assert without["lora_exists"] is False and without["using_lora"] is False and without["cache_dir"] is None


def test_concurrent_questions_never_mix(root, load):
    with ollama(models=("tiny:latest",)) as wire:
        settings = load(root, OLLAMA_BASE_URL=wire.url, TEMPERATURE=0)
        handler = LoRARAGHandler(settings, store=Shelf())
        names = ["base", "lora:red", "lora:蓝", "ollama:tiny"]
        alone = {name: handler.ask("How long?", model=name).text for name in names}
        assert len(set(alone.values())) == 4
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda n: handler.ask("How long?", model=n), names * 3))
    assert [told.text for told in found] == [alone[name] for name in names * 3]
    assert [told.model for told in found] == names * 3


def test_any_langchain_model_answers():
    from langchain_core.language_models import FakeListChatModel

    told = answer(FakeListChatModel(responses=["两年 [2]。"]), "保修多久？", HITS)
    assert told.text == "两年 [2]。" and told.citations == (2,) and told.usage == {}
    *pieces, last = stream_answer(FakeListChatModel(responses=["ok"]), "x", reference="mine")
    assert "".join(pieces) == last.text == "ok" and last.model == "mine"
