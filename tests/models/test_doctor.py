"""The adapter doctor: what is sound passes, every fault is found and told, and what is forced says so."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from rag_kit.errors import AdapterNotFoundError, ModelError, use_language
from rag_kit.models.adapters import CONFIG, RECIPE, WEIGHTS, named_adapter
from rag_kit.models.base import Base
from rag_kit.models.doctor import CHECKS, admit, checked, examine, probe
from rag_kit.models.llamacpp.serving import Serving
from rag_kit.models.lora import LoRALanguageModel
from rag_kit.models.registry import REGISTRY, entries
from rag_kit.settings import Settings
from tests.models.texts import says

A, B = "lora_A", "lora_B"


@pytest.fixture(autouse=True)
def english():
    use_language("en")
    yield
    use_language("auto")


@pytest.fixture
def settings(tmp_path, twin):
    return Settings.load(tmp_path, base_model_name=str(twin.folder))


@pytest.fixture
def model(settings, twin_engine):
    return LoRALanguageModel(settings=settings, engine="transformers")


@pytest.fixture(scope="module")
def sound(make_adapter, twin, tmp_path_factory):
    """An adapter with the recipe that a training leaves."""
    from rag_kit.manifest import write_manifest

    folder = make_adapter(tmp_path_factory.mktemp("made") / "客服")
    shutil.copyfile(twin.folder / "tokenizer.json", folder / "tokenizer.json")
    shutil.copyfile(twin.folder / "chat_template.jinja", folder / "chat_template.jinja")
    found = twin.fingerprint()
    hashes = {key: found[key] for key in ("chat_template_hash", "tokenizer_hash")}
    write_manifest(folder, {"base": {"name": "twin", "fingerprint": found}, **hashes}, name=RECIPE)
    return folder


@pytest.fixture
def put(sound, settings):
    """A copy of the sound adapter, without the recipe's file list unless `hashes`."""

    def put(name="客服", *, hashes=False, recipe=None):
        folder = shutil.copytree(sound, settings.lora_model_path / name)
        if not hashes:
            kept = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
            (folder / RECIPE).write_text(json.dumps(kept | {"files": {}} | (recipe or {})), encoding="utf-8")
        return folder

    return put


def change(folder, how):
    """Rewrite the weights: `how` gets all tensors and returns those to keep."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(how(tensors), folder / WEIGHTS)


def faults(findings):
    return {one.check: one for one in findings if one.level != "ok"}


def zeroed(part, count=None):
    def how(tensors):
        names = sorted(name for name in tensors if part in name)[:count]
        return tensors | {name: tensors[name] * 0 for name in names}

    return how


def one_value(value):
    def how(tensors):
        next(iter(tensors.values()))[0, 0] = value
        return tensors

    return how


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_sound_adapter_passes_every_check(put, settings, model, lang):
    use_language(lang)
    put(hashes=True)
    findings = examine("lora:客服", settings, model=model)
    assert [one.check for one in findings] == list(CHECKS)
    assert {one.level for one in findings} == {"ok"}, findings
    assert not (settings.lora_model_path / REGISTRY).exists()  # looking writes nothing
    text = findings[-1].text
    assert "float32" in text and ("noise alone comes to" if lang == "en" else "噪声本身为") in text


def test_the_effect_is_held_against_measured_noise(put, settings, model):
    put()
    effect, noise = probe(model, named_adapter("客服", settings))
    assert 0.01 < effect < 50 and 0 < noise < 1e-6
    tiny = put("微")
    change(tiny, lambda tensors: {name: t * (1e-8 if B in name else 1) for name, t in tensors.items()})
    with pytest.raises(ModelError) as caught:
        probe(model, named_adapter("微", settings))
    says(caught.value, "微", en="no usable effect", zh="没有可用的作用")


@pytest.mark.parametrize(("table", "noise"), [([{"kind": "float32", "kl": 3.0}], 3.0), ([], 0.02)])
def test_the_rounding_of_the_served_file_is_noise(
    put, settings, model, twin_engine, monkeypatch, table, noise
):
    """Whatever changes its input a little changes what quantised weights answer, as much as this."""
    served = Serving(settings.root, "float32", "", table)
    monkeypatch.setattr(twin_engine, "serving", served, raising=False)
    put()
    if noise < 1:
        assert probe(model, named_adapter("客服", settings))[1] == noise
        return
    with pytest.raises(ModelError) as caught:
        probe(model, named_adapter("客服", settings))
    says(caught.value, "客服", noise, "ENGINE=transformers")


def drop(count):
    return lambda tensors: dict(sorted(tensors.items())[count:])


def extra(tensors):
    return tensors | {f"base_model.model.model.layers.9.{i}.lora_A.weight": tensors[next(iter(tensors))] + 1
                      for i in range(5)}  # fmt: skip


def resized(tensors):
    import torch

    return tensors | {"base_model.model.model.embed_tokens.weight": torch.ones(151_940, 32)}


WEIGHT_FAULTS = {
    "missing": (drop(2), "keys", "2 tensors that the configuration"),
    "unexpected": (extra, "keys", "5 tensors of 客服 have no place"),
    "another width": (
        lambda tensors: {k: v[:, :-1].contiguous() if A in k else v for k, v in tensors.items()},
        "keys",
        "4 tensors of 客服 have another shape",
    ),
    "all zero": (zeroed(B), "values", "All 4 B matrices"),
    "NaN": (one_value(float("nan")), "values", "1 tensors of 客服 hold NaN"),
    "infinity": (one_value(float("inf")), "values", "1 tensors of 客服 hold NaN or infinity"),
    "without effect": (zeroed(A), "probe", "has no usable effect"),
}


@pytest.mark.parametrize("kind", WEIGHT_FAULTS)
def test_weights_that_are_not_fit_are_errors(put, settings, model, kind):
    how, check, text = WEIGHT_FAULTS[kind]
    change(put(), how)
    found = faults(examine("lora:客服", settings, model=model))
    assert found[check].level == "error" and text in found[check].text, found
    assert found[check].hint and (kind != "another width" or "(4, 31) ≠ (4, 32), …" in found[check].text)
    others = {} if check == "probe" else {"probe": "warning"}  # which then is left out, and says so
    assert {name: one.level for name, one in found.items() if name != check} == others


def test_a_module_that_was_not_trained_is_a_warning(put, settings, model):
    change(put(), zeroed(B, 1))
    (found,) = faults(examine("lora:客服", settings, model=model)).values()
    assert (found.check, found.level) == ("values", "warning") and "1 of 4 B matrices" in found.text


def test_a_vocabulary_that_grew_is_an_error(put, settings, model):
    folder = put()
    change(folder, resized)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"content": "<|合同|>", "id": 151_700})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    findings = examine("lora:客服", settings, model=model)
    tokens, rows = (one for one in findings if one.check == "vocabulary")
    assert tokens.level == rows.level == "error"
    assert "1 tokens" in tokens.text and "<|合同|>" in tokens.text and "151940 rows" in rows.text
    assert "embed_tokens.weight" in faults(findings)["keys"].text


@pytest.mark.parametrize(
    ("part", "value", "check", "text"),
    [
        ("chat_template_hash", "c0ffee" * 8, "template", "the chat template c0ffeec0…"),
        ("tokenizer_hash", "c0ffee" * 8, "tokenizer", "the tokenizer c0ffeec0…"),
        ("architecture", "LlamaForCausalLM", "base", "they differ in architecture."),
        ("sizes", {"hidden_size": 64}, "base", "they differ in sizes."),
        ("tensor_probe", {"model.norm.weight": [9.0] * 8}, "base", "they differ in tensor_probe."),
    ],
)
def test_what_it_was_trained_on_is_held_against_the_base_now(
    put, settings, model, twin, part, value, check, text
):
    known = twin.fingerprint()
    changed = {"base": {"name": "theirs", "fingerprint": known | {part: value}}} if check == "base" else {}
    put(recipe=changed or {part: value})
    (found,) = faults(examine("lora:客服", settings, model=model)).values()
    assert (found.check, found.level) == (check, "error") and text in found.text


def test_a_base_that_changed_since_the_training_is_told(put, settings, twin, tmp_path):
    other = shutil.copytree(twin.folder, tmp_path / "retrained")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    put()
    with pytest.raises(ModelError) as caught:
        named_adapter("客服", settings).check_base(Base("mine", other))
    says(caught.value, "twin", "mine", "tensor_probe")


def test_files_are_held_against_their_hashes(put, settings, model):
    folder = put(hashes=True)
    for name, old, new in ((CONFIG, b"0.0", b"0.1"), ("chat_template.jinja", b"tools", b"TOOLS")):
        (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))
    found = [one for one in examine("lora:客服", settings, model=model) if one.check == "files"]
    assert [(one.level, one.text.split(" is not")[0]) for one in found] == [
        ("error", str(folder / CONFIG)),
        ("warning", str(folder / "chat_template.jinja")),
    ]


def test_an_adapter_made_elsewhere_is_told_to_be_so(put, settings, model):
    folder = put()
    (folder / RECIPE).unlink()
    (folder / "chat_template.jinja").write_text("{{ 另一个模板 }}", encoding="utf-8")
    found = faults(examine("lora:客服", settings, model=model))
    assert {name: one.level for name, one in found.items()} == {"base": "warning", "template": "warning"}
    assert "rag-kit adapters add" in found["base"].hint


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"base": "x"}', '{"files": {"../../x": {}}}', '{"files": [1]}']
)
def test_what_cannot_be_read_is_one_finding(put, settings, model, content):
    (put() / RECIPE).write_text(content, encoding="utf-8")
    (found,) = examine("lora:客服", settings, model=model)
    assert (found.check, found.level) == ("files", "error") and RECIPE in found.text
    (absent,) = examine("lora:无", settings, model=model)
    assert absent.level == "error" and "客服" in absent.text


def test_a_check_that_breaks_hides_no_other(put, settings, tmp_path):
    put()
    model = LoRALanguageModel(base=str(tmp_path / "gone"), settings=settings)
    found = examine("lora:客服", settings, model=model)
    assert {one.check: one.level for one in found}["values"] == "ok"
    assert "does not exist" in faults(found)["base"].text


# --- admission ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["base", "ollama:qwen3:4b", "openai:lora"])
def test_what_is_no_adapter_is_let_in(settings, reference):
    assert admit(reference, settings) == ()


def test_a_sound_adapter_is_looked_at_once(put, settings, model, twin_engine, count_steps):
    folder = put()
    with count_steps(twin_engine) as steps:
        assert admit("lora:客服", settings, model=model) == () and steps
        steps.clear()
        assert admit("lora", settings, model=model) == () and not steps
        use_language("zh")  # findings are texts, and are kept in one language
        assert admit("lora:客服", settings, model=model) == () and steps
        change(folder, zeroed(B, 1))
        steps.clear()
        assert admit("lora:客服", settings, model=model) == () and steps
    kept = entries(settings)["客服"]["checked"]
    assert kept["engine"] == "transformers" and "1 个为零" in kept["findings"][6]["text"]


def test_an_adapter_that_fails_is_refused_or_forced_and_told(put, settings, model):
    change(put(recipe={"tokenizer_hash": "c0ffee" * 8}), zeroed(B))
    for _ in range(2):  # seen, and read in the registry
        with pytest.raises(ModelError) as caught:
            admit("lora:客服", settings, model=model)
        says(
            caught.value,
            "rag-kit adapters check 客服",
            en="may not be compared or served",
            zh="不能用于比较或服务",
        )
        assert "the tokenizer c0ffeec0…" in str(caught.value) and "All 4 B matrices" in str(caught.value)
        notes = admit("lora:客服", settings, model=model, forced=True)
        assert [note.split("`")[1] for note in notes] == ["tokenizer", "values"]
        assert all(note.startswith("客服 was let in by force") for note in notes)


def test_force_makes_nothing_out_of_nothing(settings, model):
    with pytest.raises(AdapterNotFoundError) as caught:
        admit("lora:无", settings, forced=True, model=model)
    says(caught.value, "无")


def test_what_failed_for_another_reason_is_not_kept(put, settings, model, twin_engine, monkeypatch):
    put()

    def lost(*_):
        raise OSError("no memory")

    monkeypatch.setattr(twin_engine, "next_logprobs", lost)
    (found,) = faults(checked("lora:客服", settings, model=model)).values()
    assert (found.check, found.level) == ("probe", "error") and "OSError: no memory" in found.text
    monkeypatch.undo()
    assert faults(checked("lora:客服", settings, model=model)) == {}


def test_a_checkpoint_is_examined_as_an_adapter_of_its_own(put, settings, model, sound):
    folder = put()
    for step in (2, 10):
        target = folder / f"checkpoint-{step}"
        target.mkdir()
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(sound / file, target / file)
    change(folder / "checkpoint-2", zeroed(B))
    assert faults(examine("lora:客服", settings, model=model)) == {}
    assert faults(examine("lora:客服/checkpoint-10", settings, model=model)) == {}
    assert "All 4 B matrices" in examine("lora:客服/checkpoint-2", settings, model=model)[-2].text
