"""Our own reading of a GGUF: what the file says of itself, and why it cannot be served.

llama.cpp has one sentence for every failure at start; here each has its own. Knows the header of the format
(versions 2 and 3); knows nothing of what llama.cpp does with the tensors.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from rag_kit.errors import ModelError

CONTEXT = 8192  # tokens, where neither the caller nor the model asks for fewer: the cache costs memory
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q").unpack_from


class Tensor(NamedTuple):
    """Where a tensor lies: rows first in `shape`, the block type's number, the byte where it begins."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF's account of itself; `parameters` are counted, `size` is in bytes."""

    path: Path
    size: int
    metadata: dict[str, Any]
    parameters: int
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """The model's kind, such as `llama` or `qwen2`."""
        return str(self.metadata.get("general.architecture", "?"))

    def sized(self, key: str, default: Any = None) -> Any:
        """Return one of the architecture's own values, such as `block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def quantization(self) -> str:
        """The block type of the weights as Ollama writes it: `F16`, `Q4_1`, …"""
        from gguf.constants import LlamaFileType

        try:
            name = LlamaFileType(self.metadata["general.file_type"]).name
        except (KeyError, ValueError):
            return "unknown"
        return str(name).removeprefix("MOSTLY_").removeprefix("ALL_")

    @property
    def template(self) -> str | None:
        """The chat template (jinja), None where the file has none."""
        return self.metadata.get("tokenizer.chat_template") or None

    def context(self, asked: int | None = None) -> int:
        """Return the tokens that a context shall hold: `asked`, or CONTEXT; never beyond the model's own."""
        return min(asked or CONTEXT, int(self.sized("context_length", asked or CONTEXT)))

    def cache_bytes(self, context: int) -> int:
        """Return the bytes that the keys and values of `context` tokens take in 16 bits."""
        heads = self.sized("attention.head_count", 1)
        kept = self.sized("attention.head_count_kv", heads)
        kept = sum(kept) if isinstance(kept, list) else kept * self.sized("block_count", 0)
        width = self.sized("embedding_length", 0) // (max(heads) if isinstance(heads, list) else heads or 1)
        both = self.sized("attention.key_length", width) + self.sized("attention.value_length", width)
        return int(2 * kept * both * context)


def explain(path: Path, context: int | None = None) -> Gguf:
    """Return what the file says of itself, or raise the ModelError that tells why it cannot be served."""
    import psutil

    gguf = read_gguf(path)
    kind, architecture = gguf.metadata.get("general.type"), gguf.architecture
    if kind == "adapter" or "adapter.type" in gguf.metadata:
        raise ModelError("gguf_adapter", path=path)
    if kind == "mmproj" or architecture in ("clip", "mmproj"):
        raise ModelError("gguf_projector", path=path)
    if gguf.metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        raise ModelError("gguf_no_tokenizer", path=path)
    tokens = gguf.context(context)
    needed, free = gguf.size + gguf.cache_bytes(tokens), psutil.virtual_memory().available
    if needed > free:
        raise ModelError("gguf_memory", path=path, needed=needed / 1e9, free=free / 1e9, context=tokens)
    return gguf


def read_gguf(path: Path) -> Gguf:
    """Read a GGUF's header; raises ModelError where it is missing, another kind of file, or cut short."""
    try:
        with path.open("rb") as file:
            size, begin = path.stat().st_size, file.read(8)
            if begin[:4] != b"GGUF" or int.from_bytes(begin[4:], "little") not in (2, 3):
                raise ModelError("gguf_not", path=path, found=repr(begin)[2:-1])
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors, end = _header(data)
    except OSError as error:
        raise ModelError("gguf_missing", path=path, reason=error.strerror) from error
    except (struct.error, KeyError) as error:
        raise ModelError("gguf_cut", path=path, size=size, needed=size + 1) from error
    if end > size:
        raise ModelError("gguf_cut", path=path, size=size, needed=end)
    return Gguf(path, size, metadata, sum(prod(tensor.shape) for tensor in tensors.values()), tensors)


def _header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Return (metadata, tensors, the byte behind the last of them); struct.error where the file ends."""
    from gguf.constants import GGML_QUANT_SIZES

    at = 8

    def take(kinds: str) -> tuple[Any, ...]:
        nonlocal at
        start, at = at, at + struct.calcsize(f"<{kinds}")
        return struct.unpack_from(f"<{kinds}", data, start)

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:  # there are hundreds of thousands, so this is what takes the time
            start = at + 8
            at = start + _LENGTH(data, at)[0]
            if at > len(data):
                raise struct.error
            return str(data[start:at], "utf-8", "replace")
        if kind == _ARRAY:
            of, length = take("IQ")
            plain = of in _SCALARS
            return list(take(f"{length}{_SCALARS[of]}")) if plain else [value(of) for _ in range(length)]
        return take(_SCALARS[kind])[0]

    count, pairs = take("QQ")
    metadata = {value(_STRING): value(*take("I")) for _ in range(pairs)}
    index = {value(_STRING): Tensor(take(f"{take('I')[0]}Q")[::-1], *take("IQ")) for _ in range(count)}
    alignment, end = metadata.get("general.alignment", 32), 0
    begin = -(-at // alignment) * alignment
    for tensor in index.values():
        block, size = GGML_QUANT_SIZES.get(tensor.kind, (1, 0))  # of a newer type that we do not know
        end = max(end, tensor.offset + prod(tensor.shape) // block * size)
    placed = {name: one._replace(offset=begin + one.offset) for name, one in index.items()}
    return metadata, placed, begin + end
