"""A PEFT LoRA adapter as llama.cpp takes it: the same matrices in a GGUF, under the names of the base's GGUF.

Knows PEFT's files, and how each architecture's converter names a weight and orders its rows. What a GGUF
adapter cannot hold is refused by name and never left out; llama.cpp skips or dies of some of it, and loads
values that are no numbers. Knows nothing of serving.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from rag_kit.embedded import cache_root
from rag_kit.errors import ModelError, StoreError
from rag_kit.manifest import fingerprint, sha256
from rag_kit.models.adapters import CONFIG, WEIGHTS, Adapter
from rag_kit.models.llamacpp.gguf import Gguf, read_gguf

FORMAT = 1  # raised when the conversion changes, so that older files are made again
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")  # each shown by numbers in the tests
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# What changes the arithmetic and has no place in a GGUF adapter.
VARIANTS = (
    "use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "use_qalora", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Beginnings that leave the base as it is: PiSSA and its like train over a base that they have changed.
USUAL = {"bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica")}
COPIED = 0.3  # relative; 4 bits move a weight by 0.1, another model's are 1 away
_LAYER = re.compile(r"(base_model\.model\.)?(.+)\.(lora_(embedding_)?([AB])(\.weight)?|base_layer\.weight)")
_HALF = re.compile(r"(.+)\.lora_([ab])")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoraPair:
    """`a` (rank, in) and `b` (out, rank) in float32, rows as in the GGUF: the weight gains scale * b @ a."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def lora_pairs(adapter: Adapter, gguf: Path) -> dict[str, LoraPair]:
    """Return what `adapter` adds to each weight of the base `gguf`, by the weight's name there.

    Raises ModelError for an architecture that is not in ARCHITECTURES, for what a GGUF adapter cannot hold,
    and for tensors that the base has not, or has in another shape, or that hold NaN.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    base, config, path = read_gguf(gguf), adapter.config, adapter.folder / WEIGHTS
    told = {"adapter": adapter.folder}
    if (found := base.architecture) not in ARCHITECTURES:
        raise ModelError("adapter_gguf_architecture", base=gguf, found=found, known=", ".join(ARCHITECTURES))
    odd = [key for key in VARIANTS if config.get(key)]
    odd += [key for key, values in USUAL.items() if config.get(key, values[0]) not in values]
    if odd:
        what = ", ".join(f"{key}={config[key]}" for key in odd)
        raise ModelError("adapter_gguf_inexpressible", **told, what=what)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == base.architecture)
    names = get_tensor_name_map(arch, base.sized("block_count", 0))
    halves: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, values in _tensors(path):
        match = _LAYER.fullmatch(key)
        module = match[2] if match else ""
        # a model that also sees keeps its language model one level deeper
        name = f"{names.get_name(module.replace('language_model.', '')) or module}.weight"
        if match and match[5]:
            array = values[:].float().numpy()
            embedded = match[4] is not None  # a row of it is a column of A
            half = "ab"[(match[5] == "B") ^ embedded]
            halves.setdefault((name, module), {})[half] = array.T if embedded else array
        elif not match or not _copied(values, base, name):
            raise ModelError("adapter_gguf_inexpressible", **told, what=key)
    if not halves:
        raise ModelError("adapter_gguf_none", path=path, kinds="LORA", tensors=0)
    pairs: dict[str, LoraPair] = {}
    for (name, module), ab in sorted(halves.items()):
        try:
            rank, scale = _scale(config, module)
        except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise ModelError("adapter_weights", path=adapter.folder / CONFIG, reason=error) from error
        a, b = (ab[half].shape if half in ab else () for half in "ab")
        _fit(base, name, a, b, rank, tensor=module, path=path)
        if name in pairs:
            raise ModelError("adapter_gguf_inexpressible", **told, what=f"{name} twice")
        for half in "ab":
            _numbers(ab[half], path, f"{module}.lora_{half.upper()}")
        pairs[name] = LoraPair(ab["a"], _reordered(ab["b"], base, name), scale)
    return pairs


def adapter_gguf(adapter: Adapter, gguf: Path, cache_dir: Path | None) -> Path:
    """Return `adapter` as a GGUF for the base `gguf`: a file of the cache, written once, the same bytes.

    Raises ModelError as `lora_pairs` does, StoreError where the cache cannot be written.
    """
    base, weights = read_gguf(gguf), adapter.folder / WEIGHTS
    content = sha256(weights) if weights.is_file() else None  # removed meanwhile: `lora_pairs` says so
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    key = fingerprint([FORMAT, base.architecture, _heads(base), shapes, adapter.config, content])[:24]
    target = cache_root(cache_dir) / "adapters" / f"{key}.gguf"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            with suppress(ModelError):  # not there, or half of it after a power cut
                return read_gguf(target).path
            part = target.with_suffix(".part")
            try:
                _write(lora_pairs(adapter, gguf), base.architecture, part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError("cache_unwritable", path=target, reason=error) from error
    return target


def check_adapter_gguf(path: Path, base: Path) -> Gguf:
    """Return what the GGUF at `path` says of itself, if llama.cpp can serve all of it over `base`.

    Raises ModelError where it is cut short or no LoRA adapter, of another architecture, holds NaN, or has a
    tensor that llama.cpp would skip, or that the base has not, or has in another shape.
    """
    found, under = read_gguf(path), read_gguf(base)
    kinds = [str(found.metadata.get(key, "-")) for key in ("general.type", "adapter.type")]
    if kinds != ["adapter", "lora"] or not found.tensors:
        raise ModelError("adapter_gguf_none", path=path, kinds="/".join(kinds), tensors=len(found.tensors))
    if (ours := found.architecture) != (theirs := under.architecture):
        raise ModelError("adapter_gguf_other", path=path, base=base, found=ours, expected=theirs)
    shapes: dict[str, dict[str, Shape]] = {}
    for key, tensor in found.tensors.items():
        if not (match := _HALF.fullmatch(key)):
            raise ModelError("adapter_gguf_inexpressible", adapter=path, what=key)
        shapes.setdefault(match[1], {})[match[2]] = tensor.shape
    for name, halves in shapes.items():
        a, b = halves.get("a", ()), halves.get("b", ())
        if name == EMBEDDING:  # its rows are looked up in `a`: both lie the other way round
            a, b = b[::-1], a
        _fit(under, name, a, b, tensor=name, path=path)
    for key in found.tensors:
        _numbers(_rows(found, key), path, key)
    return found


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name of each tensor of a safetensors file, and a slice of it that is read when it is cut."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as tensors:
            yield from ((key, tensors.get_slice(key)) for key in sorted(tensors.keys()))
    except (SafetensorError, OSError) as error:
        raise ModelError("adapter_weights", path=path, reason=error) from error


def _scale(config: dict[str, Any], module: str) -> tuple[int, float]:
    """Return (rank, scale) of one module, by PEFT's rules; to linear layers `fan_in_fan_out` is nothing."""

    def own(patterns: dict[str, Any] | None, default: Any) -> Any:
        fitting = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(fitting, default)

    rank = own(config.get("rank_pattern"), config.get("r", 8))
    alpha = own(config.get("alpha_pattern"), config.get("lora_alpha", 8))
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    if not isfinite(scale):
        raise ValueError(f"lora_alpha={alpha}")
    return rank, scale


def _heads(base: Gguf) -> tuple[Any, Any]:
    heads = base.sized("attention.head_count", 1)  # a number, or a list of one a layer
    return heads, base.sized("attention.head_count_kv", heads)


def _reordered(b: np.ndarray, base: Gguf, name: str) -> np.ndarray:
    """Return `b` with its rows as the base's converter orders them: llama's rotary halves are interleaved."""
    attended = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.weight", name)
    if base.architecture != "llama" or not attended:
        return b
    heads = _heads(base)[attended[2] == "k"]
    heads = heads[int(attended[1])] if isinstance(heads, list) else heads
    return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _fit(base: Gguf, name: str, a: Shape, b: Shape, rank: int | None = None, **told: object) -> None:
    """Raise ModelError unless matrices of the shapes `a` and `b` adapt the weight `name` of the base."""
    told["base"] = base.path
    if name in (EMBEDDING, HEAD) and HEAD not in base.tensors:
        raise ModelError("adapter_gguf_tied", **told)
    if name not in base.tensors:
        raise ModelError("adapter_gguf_foreign", **told)
    rank = rank or (a[0] if a else 0)
    rows, *columns = base.tensors[name].shape
    if not rank or (a, b) != ((rank, *columns), (rows, rank)):
        expected = f"A ({rank or 'r'}, {', '.join(map(str, columns))}), B ({rows}, {rank or 'r'})"
        raise ModelError("adapter_gguf_shape", **told, found=f"A {a}, B {b}", expected=expected)


def _copied(values: Any, base: Gguf, name: str) -> bool:
    """Whether `values` are the base's own: PEFT writes the embedding of the base beside a LoRA on it."""
    name = name if name in base.tensors else EMBEDDING  # which is a tied head too
    if name not in base.tensors or base.tensors[name].shape != tuple(values.get_shape()):
        return False
    ours, theirs = values[:64].float().numpy(), _rows(base, name, 64)
    return bool(np.linalg.norm(ours - theirs) <= COPIED * np.linalg.norm(theirs))


def _rows(gguf: Gguf, name: str, limit: int | None = None) -> np.ndarray:
    """Return the first rows of a tensor in float32; raises ModelError for a block type that is not known."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    tensor = gguf.tensors[name]
    try:
        kind = GGMLQuantizationType(tensor.kind)
        block, size = GGML_QUANT_SIZES[kind]
        width = tensor.shape[-1] // block * size
        rows = prod(tensor.shape[:-1]) if limit is None else min(limit, tensor.shape[0])
        data = np.fromfile(gguf.path, np.uint8, rows * width, offset=tensor.offset)
        values: np.ndarray = dequantize(data.reshape(rows, width), kind)
    except (ValueError, NotImplementedError) as error:
        raise ModelError("adapter_gguf_inexpressible", adapter=gguf.path, what=f"{name}: {error}") from error
    return values


def _numbers(values: np.ndarray, path: Path, key: str) -> None:
    if not np.isfinite(values).all():
        raise ModelError("adapter_gguf_nan", tensor=key, path=path)


def _write(pairs: dict[str, LoraPair], architecture: str, target: Path) -> None:
    """Write the pairs under one alpha: llama.cpp scales by alpha / rank, so the rest goes into B."""
    from gguf import GGUFWriter

    alphas = {name: pair.scale * len(pair.a) for name, pair in pairs.items()}
    alpha = next(filter(None, alphas.values()), 1.0)  # 0 would mean: no scale at all
    writer = GGUFWriter(target, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, pair in pairs.items():
        a, b = pair.a, pair.b * np.float32(alphas[name] / alpha)
        if name == EMBEDDING:  # see check_adapter_gguf
            a, b = b, a.T
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
