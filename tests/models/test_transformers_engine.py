"""The engine against transformers' own generate, and against itself under cancel, threads and retraining."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from langchain_core.messages import HumanMessage

from rag_kit.errors import ModelError
from rag_kit.models.adapters import read_adapter
from rag_kit.models.base import Base
from rag_kit.models.device import choose_device
from rag_kit.models.engine import Generation
from rag_kit.models.options import GenerationOptions, generation_config
from rag_kit.models.render import render
from rag_kit.models.transformers_engine import TransformersEngine
from tests.models.texts import effect, says

GREEDY = GenerationOptions(max_new_tokens=10)
SAMPLED = GenerationOptions(max_new_tokens=10, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def engine(twin, twin_settings):
    """An engine of this module's own: adapters come and go."""
    return TransformersEngine(twin, choose_device(twin_settings))


@pytest.fixture(scope="module")
def red(make_adapter, tmp_path_factory):
    return read_adapter(make_adapter(tmp_path_factory.mktemp("adapters") / "red", seed=1))


@pytest.fixture(scope="module")
def blue(make_adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "蓝.v1.5"
    return read_adapter(make_adapter(folder, seed=2, target_modules="all-linear", use_dora=True))


@pytest.fixture(scope="module")
def ids(engine):
    return render(engine.tokenizer, [HumanMessage("How long? 保修多久？")]).ids


def tokens(engine, ids, adapter=None, options=GREEDY) -> list[int]:
    state = Generation()
    found = list(engine.generate(ids, adapter, options, state))
    assert state.output_tokens == len(found) + (state.finish_reason == "stop")
    assert state.first_token_s is not None and state.total_s >= state.first_token_s
    return found


def test_greedy_is_what_transformers_generates(engine, red, ids):
    import torch

    key = engine.load_adapter(red)
    for adapter in (None, key):
        with engine.using(adapter) as model:
            expected = model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                max_new_tokens=10, eos_token_id=list(engine.end_ids), pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
        assert tokens(engine, ids, adapter) == [i for i in expected if i not in engine.end_ids]
    assert tokens(engine, ids) != tokens(engine, ids, key)


def test_greedy_on_the_embedded_base_is_what_transformers_generates(smol_engine):
    import torch

    ids = render(smol_engine.tokenizer, [HumanMessage("What is the capital of France?")]).ids
    with smol_engine.using(None) as model:
        expected = model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=8, eos_token_id=list(smol_engine.end_ids), pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
    options = replace(GREEDY, max_new_tokens=8)
    assert tokens(smol_engine, ids, None, options) == [i for i in expected if i not in smol_engine.end_ids]


def test_a_seed_repeats_and_another_differs(engine, ids):
    first = tokens(engine, ids, options=SAMPLED)
    assert first == tokens(engine, ids, options=SAMPLED)
    assert first != tokens(engine, ids, options=replace(SAMPLED, seed=4))
    assert first != tokens(engine, ids)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.2}, {"top_p": 0.1}, {"top_k": 1}, {"min_p": 0.9}],
    ids=lambda changes: next(iter(changes)),
)
def test_each_option_has_an_effect(engine, ids, changes):
    options = replace(SAMPLED, temperature=5.0)
    assert tokens(engine, ids, options=options) != tokens(engine, ids, options=replace(options, **changes))


@pytest.mark.parametrize("option", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_narrowest_choice_is_greedy(engine, ids, option):
    assert tokens(engine, ids, options=replace(SAMPLED, **option)) == tokens(engine, ids)


def test_the_bases_own_sampling_is_known_and_not_applied(engine, ids):
    own = generation_config(engine.base.folder)
    assert own["repetition_penalty"] == 1.1 and own["top_k"] == 20 and own["top_p"] == 0.8
    explicit = replace(GREEDY, repetition_penalty=1.0, top_k=0)
    assert tokens(engine, ids) == tokens(engine, ids, options=explicit)
    assert tokens(engine, ids) != tokens(engine, ids, options=replace(GREEDY, repetition_penalty=1.1))


def test_an_answer_ends_by_length_and_by_the_end_mark(engine, ids):
    state = Generation()
    found = list(engine.generate(ids, None, GREEDY, state))
    assert state.finish_reason == "length" and len(found) == 10
    engine.end_ids, kept = (found[4],), engine.end_ids
    try:
        state = Generation()
        assert list(engine.generate(ids, None, GREEDY, state)) == found[: found.index(found[4])]
        assert state.finish_reason == "stop" and state.output_tokens == found.index(found[4]) + 1
    finally:
        engine.end_ids = kept


def test_closing_the_stream_stops_the_engine_at_once(engine, ids, count_steps):
    state = Generation()
    with count_steps(engine) as steps:
        stream = engine.generate(ids, None, GREEDY, state)
        next(stream)
        next(stream)
        stream.close()
    assert len(steps) == 2 and state.finish_reason == "cancelled" and state.total_s > 0


def test_another_thread_can_cancel(engine, ids):
    state = Generation()
    found = []
    for token in engine.generate(ids, None, replace(GREEDY, max_new_tokens=100), state):
        found.append(token)
        if len(found) == 3:
            threading.Thread(target=state.cancelled.set).run()
    assert len(found) == 3 and state.finish_reason == "cancelled"


def test_a_timeout_ends_an_answer(engine, ids):
    state = Generation(timeout=1e-9)
    assert list(engine.generate(ids, None, GREEDY, state)) == []
    assert state.finish_reason == "timeout"


def test_a_prompt_that_does_not_fit_is_refused(engine, ids):
    with pytest.raises(ModelError) as caught:
        next(engine.generate(ids, None, replace(GREEDY, max_new_tokens=2048), Generation()))
    says(caught.value, len(ids), 2048, "MAX_NEW_TOKENS", en="nothing is cut", zh="不会悄悄截断")
    with pytest.raises(ModelError) as caught:
        next(engine.generate(ids, None, replace(GREEDY, num_ctx=20), Generation()))
    says(caught.value, 20)


def test_concurrent_requests_give_what_each_gives_alone(engine, red, blue, ids):
    keys = [None, engine.load_adapter(red), engine.load_adapter(blue)]
    alone = {key: tokens(engine, ids, key) for key in keys}
    assert len({tuple(found) for found in alone.values()}) == 3
    wanted = keys * 4
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda key: tokens(engine, ids, key), wanted)) == [alone[key] for key in wanted]


def test_an_adapter_joins_while_others_stream(engine, red, make_adapter, tmp_path, ids):
    key = engine.load_adapter(red)
    base, alone = tokens(engine, ids), tokens(engine, ids, key)
    streams = [
        engine.generate(ids, None, GREEDY, Generation()),
        engine.generate(ids, key, GREEDY, Generation()),
    ]
    firsts = [[next(stream) for _ in range(3)] for stream in streams]
    third = engine.load_adapter(read_adapter(make_adapter(tmp_path / "green", seed=9)))
    assert tokens(engine, ids, third) not in (base, alone)
    assert [first + list(rest) for first, rest in zip(firsts, streams, strict=True)] == [base, alone]


def test_a_retrained_adapter_is_read_again_and_the_running_request_keeps_the_old(
    engine, make_adapter, tmp_path, ids
):
    folder = make_adapter(tmp_path / "again", seed=5)
    old = read_adapter(folder)
    with engine.holding(old) as key:
        before = tokens(engine, ids, key)
        stream = engine.generate(ids, key, GREEDY, Generation())
        first = next(stream)
        make_adapter(folder, seed=6)
        new = read_adapter(folder)
        assert new.key != old.key
        with engine.holding(new) as newer:
            assert tokens(engine, ids, newer) != before
        assert [first, *stream] == before
    assert old.key not in engine.adapters and new.key in engine.adapters
    with pytest.raises(ModelError) as caught:
        tokens(engine, ids, old.key)
    says(caught.value, old.key, en="no adapter called", zh="没有名为")


def test_an_adapter_without_effect_is_seen(engine, red, make_adapter, tmp_path):
    zero = engine.load_adapter(read_adapter(make_adapter(tmp_path / "zero", zero=True)))
    assert effect(engine, zero) == 0
    assert effect(engine, engine.load_adapter(red)) > 1


def test_an_adapter_that_does_not_fit_leaves_the_engine_as_it_was(
    twin, twin_settings, make_adapter, tmp_path, red, ids
):
    from safetensors.torch import load_file, save_file

    fresh = TransformersEngine(twin, choose_device(twin_settings))
    base = tokens(fresh, ids)
    folder = make_adapter(tmp_path / "misfit", r=8)
    file = folder / "adapter_model.safetensors"
    name, tensor = next(iter(load_file(file).items()))
    save_file(load_file(file) | {name: tensor[:, :-1].contiguous()}, file)
    for _ in range(2):  # as the first adapter, and after another
        with pytest.raises(ModelError) as caught:
            fresh.load_adapter(read_adapter(folder))
        says(caught.value, folder, "twin", name, en="does not fit", zh="不匹配")
        assert tokens(fresh, ids) == base
        key = fresh.load_adapter(red)
    assert list(fresh.adapters) == [key] and tokens(fresh, ids, key) != base


def test_modules_to_save_belong_to_their_adapter_alone(engine, make_adapter, tmp_path, red, ids):
    from safetensors.torch import load_file, save_file

    base, other = tokens(engine, ids), tokens(engine, ids, engine.load_adapter(red))
    folder = make_adapter(tmp_path / "head", modules_to_save=["lm_head"])
    file = folder / "adapter_model.safetensors"
    changed = {n: t * -1 if "lm_head" in n else t for n, t in load_file(file).items()}
    save_file(changed, file)
    key = engine.load_adapter(read_adapter(folder))
    assert tokens(engine, ids, key) not in (base, other)
    assert tokens(engine, ids) == base and tokens(engine, ids, red.key) == other


def test_a_damaged_base_is_told(twin, twin_settings, tmp_path):
    import shutil

    shutil.copytree(twin.folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ModelError) as caught:
        TransformersEngine(Base("cut", tmp_path / "cut"), choose_device(twin_settings))
    says(caught.value, tmp_path / "cut", en="cannot be loaded", zh="无法加载")


def test_a_pickled_base_is_never_opened(twin, twin_settings, tmp_path):
    import shutil

    shutil.copytree(twin.folder, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError) as caught:
        TransformersEngine(Base("old", tmp_path / "old"), choose_device(twin_settings))
    says(caught.value, tmp_path / "old", "safetensors")
