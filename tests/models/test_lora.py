"""`LoRALanguageModel`: which adapter answers, what an answer carries, one base in memory."""

import asyncio
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from langchain_core.messages import HumanMessage

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.models import lora
from rag_kit.models.lora import LoRALanguageModel, engine_for
from rag_kit.models.options import GenerationOptions
from rag_kit.settings import Settings
from tests.models.texts import says


@pytest.fixture(scope="module")
def project(make_adapter, tmp_path_factory):
    """A project with two adapters of the twin."""
    root = tmp_path_factory.mktemp("项目")
    make_adapter(root / "lora_adapters" / "red", seed=1)
    make_adapter(root / "lora_adapters" / "蓝.v1.5", seed=2)
    return root


@pytest.fixture(scope="module")
def model(project, twin):
    settings = Settings.load(project, base_model_name=str(twin.folder), lora_default="red", max_new_tokens=8)
    return LoRALanguageModel(settings=settings, temperature=0)


def test_each_request_names_its_adapter(model):
    answers = {
        name: model.invoke("你好", model=name) for name in ("base", "lora", "lora:red", "lora:蓝.v1.5")
    }
    texts = {name: answer.text for name, answer in answers.items()}
    assert texts["lora"] == texts["lora:red"]
    assert len(set(texts.values())) == 3
    told = [answer.response_metadata["model_name"] for answer in answers.values()]
    assert told == ["base", "lora:red", "lora:red", "lora:蓝.v1.5"]


def test_requests_on_many_threads_never_mix(model):
    names = ["base", "lora:red", "lora:蓝.v1.5"] * 4
    alone = {name: model.invoke("你好", model=name).text for name in names[:3]}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: model.invoke("你好", model=name).text, names))
    assert found == [alone[name] for name in names]


def test_the_pieces_are_the_answer_and_usage_stands_once(model):
    chunks = list(model.stream("修理要多久？"))
    whole = model.invoke("修理要多久？")
    assert "".join(str(chunk.text) for chunk in chunks) == whole.text
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(used) == 1 and used[0]["output_tokens"] == 8
    assert used[0]["input_tokens"] == len(model.render([HumanMessage("修理要多久？")]).ids)
    assert chunks[-1].chunk_position == "last"
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.response_metadata["prompt_hash"]


def test_a_stop_string_ends_the_answer_before_it(model, count_steps):
    whole = model.invoke("Hello", model="base").text
    stop = whole[3:6]
    with count_steps(model.backend) as steps:
        answer = model.invoke("Hello", model="base", stop=[stop])
    assert answer.text == whole[: whole.index(stop)]
    assert answer.response_metadata["finish_reason"] == "stop" and len(steps) < 8


def test_closing_a_stream_stops_the_engine(model, count_steps):
    with count_steps(model.backend) as steps:
        stream = model.stream("Hello", model="base", options=GenerationOptions(max_new_tokens=200))
        next(stream)
        stream.close()
        made = len(steps)
    assert made < 20
    assert model.invoke("Hello", model="base").text  # the lock is free again


async def test_cancelling_an_asynchronous_stream_stops_the_engine(model, count_steps):
    options = GenerationOptions(max_new_tokens=200)
    with count_steps(model.backend) as steps:
        async for _ in model.astream("Hello", model="base", options=options):
            break
        made = len(steps)
        await asyncio.sleep(0.3)
        assert len(steps) == made < 20


def test_a_timeout_is_told(model):
    answer = model.model_copy(update={"timeout": 1e-9}).invoke("Hello")
    assert answer.text == "" and answer.response_metadata["finish_reason"] == "timeout"


def test_options_of_the_settings_of_the_model_and_of_the_request(tmp_path, twin):
    (tmp_path / ".env").write_text("MAX_NEW_TOKENS=5\nTEMPERATURE=0\nTOP_P=0.5\n", encoding="utf-8")
    settings = Settings.load(tmp_path, base_model_name=str(twin.folder))
    model = LoRALanguageModel(model="base", settings=settings)
    assert model.invoke("x").usage_metadata["output_tokens"] == 5
    assert LoRALanguageModel(model="base", settings=settings, max_tokens=3).options().max_new_tokens == 3
    more = GenerationOptions(max_new_tokens=2)
    assert model.invoke("x", options=more).usage_metadata["output_tokens"] == 2


@pytest.mark.parametrize(("name", "values"), [("TEMPERATURE", (0, 3)), ("TOP_P", (0.0001, 1))])
def test_sampling_settings_have_an_effect_from_the_env_file_alone(tmp_path, twin, name, values):
    texts = set()
    for value in values:
        lines = f"MAX_NEW_TOKENS=6\nBASE_MODEL_NAME={twin.folder}\n{name}={value}\n"
        extra = "" if name == "TEMPERATURE" else "TEMPERATURE=3\n"
        (tmp_path / ".env").write_text(lines + extra, encoding="utf-8")
        texts.add(LoRALanguageModel(model="base", settings=Settings.load(tmp_path)).invoke("Hello").text)
    assert len(texts) == 2


def test_lora_settings_have_an_effect_from_the_env_file_alone(tmp_path, project, twin, make_adapter):
    make_adapter(tmp_path / "elsewhere", seed=7)
    texts = []
    for path, default in ((project / "lora_adapters", "red"), (project / "lora_adapters", "蓝.v1.5"),
                          (tmp_path / "elsewhere", "red")):  # fmt: skip
        lines = f"BASE_MODEL_NAME={twin.folder}\nTEMPERATURE=0\nMAX_NEW_TOKENS=8\n"
        lines += f"LORA_MODEL_PATH={path}\nLORA_DEFAULT={default}\n"
        (tmp_path / ".env").write_text(lines, encoding="utf-8")
        texts.append(LoRALanguageModel(settings=Settings.load(tmp_path)).invoke("你好").text)
    assert len(set(texts)) == 3


def test_the_base_setting_has_an_effect_from_the_env_file_alone(tmp_path, twin, smol):
    names = []
    for value in (twin.folder, "embedded"):
        (tmp_path / ".env").write_text(f"BASE_MODEL_NAME={value}\n", encoding="utf-8")
        names.append(LoRALanguageModel(settings=Settings.load(tmp_path)).base_model.folder)
    assert names == [twin.folder, smol.folder]


def test_a_retrained_adapter_answers_at_once(tmp_path, twin, make_adapter):
    settings = Settings.load(tmp_path, base_model_name=str(twin.folder), max_new_tokens=8)
    model = LoRALanguageModel(settings=settings, temperature=0)
    make_adapter(settings.lora_model_path, seed=1)
    before = model.invoke("你好").text
    make_adapter(settings.lora_model_path, seed=2)
    assert model.invoke("你好").text != before
    make_adapter(settings.lora_model_path, seed=1)
    assert model.invoke("你好").text == before


def test_unknown_names_are_told(model, project):
    with pytest.raises(AdapterNotFoundError) as caught:
        model.invoke("x", model="lora:green")
    says(caught.value, "green", "red, 蓝.v1.5", en="no adapter called green", zh="没有名为 green 的适配器")
    with pytest.raises(ModelError) as caught:
        model.invoke("x", model="ollama:qwen3")
    says(caught.value, "ollama:qwen3", en="not a local model", zh="不是本地模型")


def test_without_an_adapter_the_guides_words_are_used(tmp_path, twin):
    model = LoRALanguageModel(settings=Settings.load(tmp_path, base_model_name=str(twin.folder)))
    with pytest.raises(FileNotFoundError, match=r"LoRA adapter not found|找不到 LoRA 适配器") as caught:
        model.invoke("x")
    says(
        caught.value,
        tmp_path / "lora_adapters",
        "finetune",
        en="LoRA adapter not found",
        zh="LoRA adapter not found",
    )


def test_an_adapter_of_another_base_is_told(tmp_path, twin, smol, make_adapter, project):
    from rag_kit.models.registry import add_adapter

    elsewhere = Settings.load(tmp_path, base_model_name="embedded")
    make_adapter(tmp_path / "mine", smol, size=0.02)
    add_adapter(tmp_path / "mine", smol, elsewhere)
    wrong = Settings.load(tmp_path, base_model_name=str(twin.folder))
    with pytest.raises(ModelError) as caught:
        LoRALanguageModel(settings=wrong).invoke("x")
    says(caught.value, "mine", "embedded", twin.folder, en="trained on embedded", zh="在 embedded 上训练")


def test_one_base_stays_in_memory_and_another_goes_with_its_last_model(tmp_path, monkeypatch):
    class Loaded:
        def __init__(self, base, device, reason):
            self.base, self.reason = base, reason

    monkeypatch.setattr(lora, "TransformersEngine", Loaded)
    monkeypatch.setattr(lora, "_latest", [])
    settings = Settings.load(tmp_path, device="cpu")

    def engine(name):
        return engine_for(lora.Base(name, tmp_path / name), settings)

    first = engine("one")
    assert "No GGUF" in first.reason
    gone = weakref.ref(first)
    assert engine("one") is first
    held = engine("two")
    assert engine("one") is first  # still held by this test
    del first
    engine("two")
    gc.collect()
    assert gone() is None
    assert engine("two") is held


def test_models_share_the_base(model, twin_engine):
    assert model.backend is twin_engine
