"""Adapters on disk: found, chosen, taken in from elsewhere, refused."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from rag_kit.errors import AdapterNotFoundError, ModelError
from rag_kit.models.adapters import (
    CONFIG,
    RECIPE,
    WEIGHTS,
    check_fit,
    default_adapter,
    find_adapters,
    named_adapter,
    read_adapter,
)
from rag_kit.models.device import choose_device
from rag_kit.models.registry import add_adapter
from rag_kit.models.transformers_engine import TransformersEngine
from rag_kit.settings import Settings
from tests.models.texts import effect, says


@pytest.fixture(scope="module")
def plain(make_adapter, tmp_path_factory):
    """An adapter as PEFT leaves it."""
    return make_adapter(tmp_path_factory.mktemp("made") / "plain")


@pytest.fixture
def settings(tmp_path):
    return Settings.load(tmp_path)


@pytest.fixture
def put(plain, settings):
    def put(*places: str):
        for place in places:
            shutil.copytree(plain, settings.lora_model_path / place, dirs_exist_ok=True)

    return put


def edit(folder, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | changes), encoding="utf-8")


def test_a_flat_one_a_folder_of_them_and_both(put, settings):
    assert find_adapters(settings.lora_model_path) == {}
    put("red", "蓝.v1")
    assert list(find_adapters(settings.lora_model_path)) == ["red", "蓝.v1"]
    put(".")
    found = find_adapters(settings.lora_model_path)
    assert list(found) == ["default", "red", "蓝.v1"] and found["default"].folder == settings.lora_model_path


def test_hidden_folders_and_other_things_are_no_adapters(put, settings):
    put("red", ".previous-20260101")
    (settings.lora_model_path / "notes").mkdir()
    (settings.lora_model_path / "README.md").write_text("x", encoding="utf-8")
    assert list(find_adapters(settings.lora_model_path)) == ["red"]


def test_the_default_is_the_flat_one_else_lora_default_else_the_only_one(put, settings):
    put("red")
    assert default_adapter(settings).name == "red"
    put("blue")
    with pytest.raises(ModelError) as caught:
        default_adapter(settings)
    says(caught.value, "blue, red", "LORA_DEFAULT", en="none is the default", zh="没有默认的")
    chosen = Settings.load(settings.root, lora_default="blue")
    assert default_adapter(chosen).name == "blue"
    put(".")
    assert default_adapter(chosen).name == "default"


def test_a_default_that_is_not_there_is_told(put, settings):
    put("red", "blue")
    with pytest.raises(AdapterNotFoundError) as caught:
        default_adapter(Settings.load(settings.root, lora_default="green"))
    says(caught.value, "green", "blue, red")


def test_no_adapter_at_all_is_told(settings):
    with pytest.raises(AdapterNotFoundError) as caught:
        default_adapter(settings)
    says(caught.value, settings.lora_model_path, en="LoRA adapter not found", zh="找不到 LoRA 适配器")
    assert isinstance(caught.value, FileNotFoundError)


def test_a_name_never_climbs_out_of_the_folder(put, settings, plain):
    put("red")
    shutil.copytree(plain, settings.root / "outside")
    shutil.copytree(plain, settings.root / "checkpoint-1")
    inside = ("red/../../outside", "red/../checkpoint-1", "../checkpoint-1", "red/.", "red/")
    for name in ("../outside", "..", ".", "red/../red", str(settings.root / "outside"), *inside):
        with pytest.raises(AdapterNotFoundError) as caught:
            named_adapter(name, settings)
        says(caught.value, name, "red")


def test_checkpoints_stand_behind_their_adapter_and_are_no_default(put, settings):
    put("red", "red/checkpoint-10", "red/checkpoint-9", "red/notes", "red/checkpoint-x")
    (settings.lora_model_path / "red" / RECIPE).write_text(
        '{"data": {"name": "手册"}, "metrics": {"loss": 1}, "files": {}}', encoding="utf-8"
    )
    assert list(find_adapters(settings.lora_model_path)) == ["red", "red/checkpoint-9", "red/checkpoint-10"]
    assert default_adapter(settings).name == "red"
    checkpoint = named_adapter("red/checkpoint-9", settings)
    assert checkpoint.recipe == {"data": {"name": "手册"}, "metrics": {"steps": 9}, "files": {}}
    chosen = Settings.load(settings.root, lora_default="red/checkpoint-10")
    assert default_adapter(chosen).name == "red/checkpoint-10"


def test_checkpoints_of_the_flat_one_are_the_defaults_own(put, settings):
    put("checkpoint-3", "red")
    assert list(find_adapters(settings.lora_model_path)) == ["checkpoint-3", "red"]
    put(".")
    assert list(find_adapters(settings.lora_model_path)) == ["default", "default/checkpoint-3", "red"]


@pytest.mark.parametrize("folders", [(".", "default"), ("caf\u00e9", "cafe\u0301")])
def test_two_of_one_name_are_an_error_that_names_both(put, settings, folders):
    put(*folders, "red")
    name = "default" if "default" in folders else folders[0]
    for ask in (named_adapter, lambda name, settings: default_adapter(settings)):
        if ask is named_adapter or name == "default":
            with pytest.raises(ModelError) as caught:
                ask(name, settings)
            paths = [settings.lora_model_path / folder for folder in folders]
            says(caught.value, name, *paths, en="Two adapters are called", zh="有两个名为")
    assert list(find_adapters(settings.lora_model_path)) == ["red"]


def test_a_broken_adapter_hides_no_other(put, settings):
    put("red", "blue")
    (settings.lora_model_path / "blue" / CONFIG).write_text("{", encoding="utf-8")
    assert list(find_adapters(settings.lora_model_path)) == ["red"]
    assert named_adapter("red", settings).name == "red"
    with pytest.raises(ModelError) as caught:
        named_adapter("blue", settings)
    says(
        caught.value,
        settings.lora_model_path / "blue" / CONFIG,
        en="not readable as JSON",
        zh="不是可读的 JSON",
    )


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_a_configuration_that_is_none_is_told(plain, tmp_path, content):
    shutil.copytree(plain, tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path / "a")
    says(caught.value, tmp_path / "a" / CONFIG)


def test_weights_that_are_missing_or_pickled_are_told(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).unlink()
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path / "a")
    says(caught.value, WEIGHTS, en="holds no", zh="中没有")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path / "a")
    says(caught.value, "pickle", "safe_serialization=True", en="never opened", zh="不会被打开")


def test_another_kind_of_adapter_is_told(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "a")
    edit(tmp_path / "a", peft_type="PREFIX_TUNING")
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path / "a")
    says(caught.value, "PREFIX_TUNING", en="not LORA", zh="不是 LORA")


def elsewhere(plain, folder, kind: str):
    """An adapter's folder as another program leaves it."""
    shutil.copytree(plain, folder)
    base = {"llama-factory": "/data/somebody/Qwen2.5-1.5B-Instruct", "ms-swift": "/mnt/nas/Qwen",
            "unsloth": "unsloth/qwen2.5-1.5b-instruct-bnb-4bit", "peft": ""}[kind]  # fmt: skip
    extra = {"llama-factory": ["all_results.json", "trainer_log.jsonl", "training_loss.png", "Modelfile"],
             "ms-swift": ["args.json", "additional_config.json", "logging.jsonl"],
             "unsloth": ["README.md"], "peft": []}[kind]  # fmt: skip
    edit(folder, base_model_name_or_path=base or None, revision=None)
    for name in extra:
        (folder / name).write_text("{}", encoding="utf-8")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    (folder / "checkpoint-10").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder, base


@pytest.mark.parametrize("kind", ["llama-factory", "ms-swift", "unsloth", "peft"])
def test_an_adapter_made_elsewhere_is_taken_in(plain, settings, twin, tmp_path, kind, monkeypatch):
    folder, base_path = elsewhere(plain, tmp_path / f"my-{kind}", kind)
    opened = []
    monkeypatch.setattr("pickle.load", lambda *a, **k: opened.append(a))
    adapter = add_adapter(folder, twin, settings)
    assert adapter.name == f"my-{kind}" and not opened
    held = sorted(path.name for path in adapter.folder.iterdir())
    assert held == sorted(
        [CONFIG, WEIGHTS, RECIPE, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    )
    recipe = adapter.recipe
    assert recipe["base"] == {"name": "twin", "fingerprint": twin.fingerprint(), "declared_by": "user"}
    assert recipe["base_model_name_or_path"] == (base_path or None)
    unknown = ("data", "chat_template_hash", "tokenizer_hash", "metrics")
    assert [recipe[key] for key in unknown] == [None] * 4
    assert recipe["hyperparameters"]["r"] == 4
    named_adapter(f"my-{kind}", settings).check_base(twin)


def test_a_recipe_that_is_there_is_kept(plain, settings, twin, tmp_path):
    first = add_adapter(plain, twin, settings, "first")
    other = Settings.load(tmp_path / "other")
    again = add_adapter(first.folder, twin, other, "again")
    assert again.recipe == first.recipe


def test_a_changed_file_is_noticed_by_its_size(plain, settings, twin):
    adapter = add_adapter(plain, twin, settings)
    weights = adapter.folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError) as caught:
        read_adapter(adapter.folder)
    size = weights.stat().st_size
    says(caught.value, weights, size, size + 1, en="is damaged", zh="已损坏")


@pytest.mark.parametrize("name", ["..", "../up", "a/b", ".hidden", "a b", "C:x"])
def test_a_name_is_one_plain_word(plain, settings, twin, name):
    with pytest.raises(ModelError) as caught:
        add_adapter(plain, twin, settings, name)
    says(caught.value, name, en="cannot be called", zh="不能命名为")
    assert not settings.lora_model_path.exists()


def test_a_name_is_given_once(plain, settings, twin):
    add_adapter(plain, twin, settings, "微调-1")
    with pytest.raises(ModelError) as caught:
        add_adapter(plain, twin, settings, "微调-1")
    says(caught.value, "微调-1", settings.lora_model_path, "--name", en="already", zh="已有")


def test_an_adapter_for_another_base_is_refused_and_leaves_nothing(plain, settings, twin, smol):
    with pytest.raises(ModelError) as caught:
        add_adapter(plain, smol, settings)
    says(caught.value, plain, "embedded", en="does not fit", zh="不匹配")
    assert not (settings.lora_model_path / "plain").exists()
    ours = add_adapter(plain, twin, settings)
    with pytest.raises(ModelError) as caught:
        ours.check_base(smol)
    says(caught.value, "twin", "embedded", "architecture", en="was trained on twin", zh="在 twin 上训练")


def test_only_what_both_know_is_compared(plain, settings, twin, smol):
    ours = add_adapter(plain, twin, settings)
    for recipe in (None, {}, {"base": None}, {"base": {"name": "x", "fingerprint": None}}):
        replace(ours, recipe=recipe).check_base(smol)


@pytest.mark.parametrize("cut", [4, 200, -10])
def test_truncated_weights_are_told(plain, twin, settings, tmp_path, cut):
    shutil.copytree(plain, tmp_path / "a")
    file = tmp_path / "a" / WEIGHTS
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError) as caught:
        add_adapter(tmp_path / "a", twin, settings)
    says(caught.value, file, en="cannot be read", zh="无法读取")
    assert not (settings.lora_model_path / "a").exists()


FITTING = {
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*layers\.0\..*_proj"},
    "one layer": {"layers_to_transform": [1], "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tied head": {"target_modules": ["lm_head", "q_proj"]},
    "modules to save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.fixture
def engine(twin, settings):
    return TransformersEngine(twin, choose_device(settings))


@pytest.mark.parametrize("kind", FITTING)
def test_every_kind_of_lora_fits_and_has_an_effect(make_adapter, twin, engine, tmp_path, kind):
    adapter = read_adapter(make_adapter(tmp_path / "a", seed=3, **FITTING[kind]))
    check_fit(adapter, twin)
    before = engine.logits(range(30), None)
    assert effect(engine, engine.load_adapter(adapter)) > 0.1
    assert (engine.logits(range(30), None) == before).all()


def test_adapters_that_peft_cannot_hold_together_are_told(make_adapter, engine, tmp_path):
    first = engine.load_adapter(read_adapter(make_adapter(tmp_path / "a", **FITTING["embedding"])))
    base, before = engine.logits(range(30), None), effect(engine, first)
    with pytest.raises(ModelError) as caught:
        engine.load_adapter(read_adapter(make_adapter(tmp_path / "b", **FITTING["tokens"])))
    says(
        caught.value,
        tmp_path / "b",
        "Embedding",
        en="beside those already loaded",
        zh="无法与已加载的适配器共存",
    )
    assert (engine.logits(range(30), None) == base).all() and effect(engine, first) == before
    assert list(engine.adapters) == [first]


def test_a_configuration_of_all_linear_as_other_programs_write_it(make_adapter, engine, tmp_path):
    folder = make_adapter(tmp_path / "a", target_modules="all-linear")
    edit(folder, target_modules="all-linear", some_key_of_a_later_peft=1)
    assert effect(engine, engine.load_adapter(read_adapter(folder))) > 0.1


MISFITS = {
    "a tensor more": lambda t: t | {"base_model.model.model.layers.9.q.lora_A": next(iter(t.values())) + 1},
    "a tensor less": lambda t: dict(list(t.items())[1:]),
    "another width": lambda t: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in t.items()},
    "another rank": lambda t: {k: v[:-1].contiguous() if "lora_A" in k else v for k, v in t.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_tensors_that_do_not_fit_are_named(plain, twin, tmp_path, kind):
    shutil.copytree(plain, tmp_path / "a")
    save_file(MISFITS[kind](load_file(plain / WEIGHTS)), tmp_path / "a" / WEIGHTS)
    with pytest.raises(ModelError) as caught:
        check_fit(read_adapter(tmp_path / "a"), twin)
    says(caught.value, "twin", "lora_A", en="does not fit", zh="不匹配")


def test_an_embedding_that_is_not_the_bases_own_is_refused(make_adapter, twin, tmp_path):
    folder = make_adapter(tmp_path / "a", target_modules=["embed_tokens"])
    file = folder / WEIGHTS
    save_file({k: v + 1 if "base_layer" in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(ModelError) as caught:
        check_fit(read_adapter(folder), twin)
    says(caught.value, "base_layer")


def test_trained_biases_of_the_base_are_refused(make_adapter, twin, tmp_path):
    with pytest.raises(ModelError) as caught:
        check_fit(read_adapter(make_adapter(tmp_path / "a", bias="lora_only")), twin)
    says(caught.value, "bias=lora_only")


def test_an_adapter_that_is_not_there_is_told_with_those_that_are(put, settings):
    put("red")
    with pytest.raises(AdapterNotFoundError) as caught:
        read_adapter(settings.lora_model_path)
    says(caught.value, settings.lora_model_path, "red")
