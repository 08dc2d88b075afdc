"""One object of options: what a maker suggests, and the same answer from both engines, option by option."""

import copy
from dataclasses import asdict, fields, replace
from functools import partial

import numpy as np
import pytest
from langchain_core.messages import HumanMessage

from rag_kit.errors import ModelError
from rag_kit.models.base import Base
from rag_kit.models.engine import Generation
from rag_kit.models.llamacpp.engine import LlamaCppEngine
from rag_kit.models.llamacpp.serving import Serving
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.options import GenerationOptions, generation_config
from rag_kit.models.render import render

GREEDY = GenerationOptions(max_new_tokens=24)
SAMPLED = replace(GREEDY, temperature=2.0, seed=3)
CLEAR = 0.05  # between the two best: F16 moves a logit of the twin by less
PROMPTS = ("What does a repair cost?", "修理需要多久？请说明。", "知识库里的第三条规则是什么？", "hello")
QWEN3 = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


# --- the object


def test_a_local_model_takes_every_option(twin_settings):
    given = asdict(SAMPLED) | {"num_ctx": 512, "think": True, "stop": ["停"]}
    model = LoRALanguageModel(settings=twin_settings, max_tokens=given.pop("max_new_tokens"), **given)
    told = asdict(model.options())
    assert told == given | {"max_new_tokens": 24, "stop": ("停",)}
    assert {field.name for field in fields(GenerationOptions)} == told.keys()


def test_what_the_maker_suggests_is_read_and_counts_where_it_is_asked_for(twin, tmp_path):
    own = generation_config(twin.folder)
    assert own == {
        "do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1,
    }  # fmt: skip
    sampled = SAMPLED.with_generation_config(own)
    assert sampled == replace(SAMPLED, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    assert GREEDY.with_generation_config(own) == replace(GREEDY, repetition_penalty=1.1)
    never = own | {"do_sample": False}
    assert SAMPLED.with_generation_config(never) == replace(SAMPLED, repetition_penalty=1.1)
    assert SAMPLED.with_generation_config({}) == SAMPLED
    for text in ("[]", "{", '{"top_k": null}'):
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
        assert generation_config(tmp_path) == {}
    assert generation_config(tmp_path / "nowhere") == {}


# --- both engines


@pytest.fixture(scope="module")
def llama(twin, twin_gguf):
    """The twin in F16, whatever would be fastest here."""
    with pytest.MonkeyPatch.context() as patch:
        served = Serving(twin_gguf, "F16", "", [])
        patch.setattr("rag_kit.models.llamacpp.engine.serving_file", lambda *_: served)
        engine = LlamaCppEngine(Base("twin", twin.folder, twin_gguf), None)
    yield engine
    engine.process.stop()


@pytest.fixture(params=["transformers", "llama.cpp"])
def engine(request, twin_engine):
    return twin_engine if request.param == "transformers" else request.getfixturevalue("llama")


@pytest.fixture(scope="module")
def ids(twin_engine):
    return {text: render(twin_engine.tokenizer, [HumanMessage(text)]).ids for text in PROMPTS}


def said(engine, ids, options) -> str:
    return "".join(engine.stream(ids, None, options, Generation()))


def margins(engine, ids, answer, penalty: float) -> list[float]:
    """By how much each token of a greedy `answer` led, with the penalty worked out by its formula."""
    leads = []
    for at, row in enumerate(engine.logits([*ids, *answer], None)[len(ids) - 1 : -1].numpy()):
        seen = list({*ids, *answer[:at]})
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        second, first = np.sort(row)[-2:]
        assert row.argmax() == answer[at]
        leads.append(first - second)
    return leads


def test_greedy_answers_agree_with_and_without_a_penalty(twin_engine, llama, ids):
    """Token by token behind the same text, so that one near-tie does not hide what comes after it."""
    agreed: dict[float, int] = {}
    for penalty in (1.0, 1.1, 1.3):
        options = replace(GREEDY, repetition_penalty=penalty)
        for text in PROMPTS[:2]:
            answer = list(twin_engine.generate(ids[text], None, options, Generation()))
            leads = margins(twin_engine, ids[text], answer, penalty)
            if min(leads) > CLEAR:
                assert said(llama, ids[text], options) == said(twin_engine, ids[text], options)
            for at, lead in enumerate(leads):
                if lead > CLEAR:
                    asked, one = [*ids[text], *answer[:at]], replace(options, max_new_tokens=1)
                    assert said(llama, asked, one) == said(twin_engine, asked, one), (penalty, text, at)
                    agreed[penalty] = agreed.get(penalty, 0) + 1
    assert min(agreed.values()) > 20 and len(agreed) == 3


def test_a_prompts_own_tokens_are_penalised_on_both(twin_engine, llama, ids):
    """The penalty holds from the first token on, where nothing but the prompt can be penalised."""
    first = replace(GREEDY, max_new_tokens=1)
    again = said(llama, ids[PROMPTS[0]], first)  # which it goes on to say
    asked = [*ids[PROMPTS[0]], *twin_engine.tokenizer.encode(again, add_special_tokens=False)]
    for penalty, same in ((1.0, True), (1.3, False)):
        texts = {said(engine, asked, replace(first, repetition_penalty=penalty))
                 for engine in (twin_engine, llama)}  # fmt: skip
        assert len(texts) == 1 and (again in texts) is same


def test_the_same_few_tokens_can_be_drawn_from_both(twin_engine, llama, ids):
    """top_k, then top_p, then the temperature: in another order there would be fewer tokens."""
    asked = [*ids[PROMPTS[2]], *twin_engine.tokenizer.encode("月港", add_special_tokens=False)]
    row = twin_engine.next_logprobs(asked, None)
    best = np.argsort(-row)[:5]
    assert row[best[2]] - row[best[3]] > CLEAR, np.round(row[best], 3)
    shares, cold = (np.exp(row[best] / by) for by in (1.0, 0.3))
    shares, cold = ((share / share.sum()).cumsum() for share in (shares, cold))
    top_p = float(shares[1] + shares[2]) / 2  # three tokens, by their shares before the temperature
    assert np.searchsorted(cold, top_p) < 2
    options = replace(SAMPLED, max_new_tokens=1, temperature=0.3, top_k=5, top_p=top_p)
    expected = {twin_engine.tokenizer.decode([int(token)]) for token in best[:3]}
    for engine in (twin_engine, llama):
        assert {said(engine, asked, replace(options, seed=seed)) for seed in range(40)} == expected


def test_every_option_reaches_the_engine(engine, ids):
    asked = ids["hello"]
    say = partial(said, engine, asked)
    greedy, sampled = say(GREEDY), say(SAMPLED)
    assert sampled == say(SAMPLED) != greedy and sampled != say(replace(SAMPLED, seed=4))
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 0.0}):
        assert say(replace(SAMPLED, **narrow)) == greedy
    assert say(replace(GREEDY, repetition_penalty=1.3)) != greedy
    state = Generation()
    list(engine.stream(asked, None, replace(GREEDY, max_new_tokens=5), state))
    assert (state.output_tokens, state.finish_reason) == (5, "length")
    with pytest.raises(ModelError, match="the context holds 32"):
        say(replace(GREEDY, num_ctx=32))


# --- thinking


@pytest.mark.parametrize(
    ("think", "ends"), [(None, "</think>\n\n"), (False, "</think>\n\n"), (True, "ant\n")]
)
def test_a_base_that_can_think_does_so_only_where_it_is_told_to(twin_settings, monkeypatch, think, ends):
    model = LoRALanguageModel(model="base", settings=twin_settings, think=think, temperature=0, max_tokens=2)
    other = copy.deepcopy(model.backend.tokenizer)
    other.chat_template = other.chat_template.replace("{%- if add_generation_prompt %}", "{%- if false %}")
    other.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n" + QWEN3 + "{% endif %}"
    monkeypatch.setattr(model.backend, "tokenizer", other)
    prompt = model.render([HumanMessage("你好")], think)
    assert prompt.text.endswith(ends) and other.decode(list(prompt.ids)) == prompt.text
    assert model.invoke("你好").usage_metadata["input_tokens"] == len(prompt.ids)


def test_a_prompt_that_begins_to_think_makes_the_answer_go_on(twin_settings, monkeypatch):
    model = LoRALanguageModel(model="base", settings=twin_settings, temperature=0, max_tokens=4)
    plain = model.invoke("你好")
    other = copy.deepcopy(model.backend.tokenizer)
    other.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    monkeypatch.setattr(model.backend, "tokenizer", other)
    answer = model.invoke("你好")
    assert plain.text and "reasoning_content" not in plain.additional_kwargs
    assert answer.text == "" and answer.additional_kwargs["reasoning_content"]
