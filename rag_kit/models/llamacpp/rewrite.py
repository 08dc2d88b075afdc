"""A GGUF from another: matrices in another block type, adapters merged into them, all else byte by byte.

Knows tensors and the format, with the arithmetic of the `gguf` package; knows nothing of which block type
is good.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from rag_kit.errors import ModelError
from rag_kit.models.llamacpp.gguf import Gguf, read_gguf

if TYPE_CHECKING:
    from rag_kit.models.llamacpp.adapter_gguf import LoraPair

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # what the `gguf` package can write


def rewrite(source: Path, target: Path, kind: str, pairs: Mapping[str, LoraPair] | None = None) -> Path:
    """Write the GGUF `source` to `target` with its matrices in `kind`, one tensor in memory at a time.

    Where `pairs` names a tensor it becomes W + scale * B @ A, in float32 on the dequantised weights. Vectors,
    and matrices that a file of smaller types keeps in F32, stay; rows that no blocks fill become F16.
    Raises ModelError where `kind` cannot be written, `source` not read, or a pair has no tensor of its shape.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, dequantize, quantize

    if kind not in KINDS:
        raise ModelError("rewrite_kind", kind=kind, known=", ".join(KINDS))
    gguf, pairs = read_gguf(source), pairs or {}
    f32, f16, asked = (GGMLQuantizationType[name] for name in ("F32", "F16", kind))
    smaller = any(len(tensor.shape) > 1 and tensor.kind != f32 for tensor in gguf.tensors.values())
    for name, pair in pairs.items():
        wanted, has = (len(pair.b), pair.a.shape[1]), gguf.tensors.get(name)
        if has is None or has.shape != wanted:
            found = has.shape if has else "-"
            raise ModelError("rewrite_misfit", tensor=name, path=source, shape=wanted, found=found)
    types = {}
    for name, tensor in gguf.tensors.items():
        fits = tensor.shape[-1] % GGML_QUANT_SIZES[asked][0] == 0
        stays = len(tensor.shape) < 2 or "_norm" in name or (smaller and tensor.kind == f32)
        types[name] = tensor.kind if stays else asked if fits else f16

    alignment = int(gguf.metadata.get("general.alignment", 32))
    index, end = b"", 0
    for name, made in types.items():
        shape = gguf.tensors[name].shape
        index += _entry(name, shape, made, end)
        end += _padded(_length(shape, made), alignment)
    file_type = next(one for one in LlamaFileType if one.name.partition("_")[2] == kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(_head(gguf, file_type) + index)
            file.write(bytes(_padded(file.tell(), alignment) - file.tell()))
            for name, tensor in gguf.tensors.items():
                length = _length(tensor.shape, tensor.kind)
                data = np.fromfile(source, np.uint8, length, offset=tensor.offset)
                if name in pairs or types[name] != tensor.kind:
                    data = data.reshape(*tensor.shape[:-1], -1)
                    weights = dequantize(data, GGMLQuantizationType(tensor.kind))
                    if name in pairs:
                        pair = pairs[name]
                        weights = weights + pair.b @ (pair.scale * pair.a)
                    data = quantize(weights, GGMLQuantizationType(types[name]))
                file.write(data.tobytes())
                file.write(bytes(_padded(file.tell(), alignment) - file.tell()))
        temporary.replace(target)
    except (ValueError, NotImplementedError) as error:  # a block type that the package cannot read
        raise ModelError("gguf_unreadable", path=source, reason=error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """Return a tensor's line in the index."""
    text = name.encode()
    begin = struct.pack(f"<Q{len(text)}sI", len(text), text, len(shape))
    return begin + struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, offset)


def _length(shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(prod(shape) // block * size)


def _head(gguf: Gguf, file_type: int) -> bytes:
    """Return the file up to its index as it is, but for the block type that it tells."""
    begin = min(tensor.offset for tensor in gguf.tensors.values())
    with gguf.path.open("rb") as file:
        head = file.read(begin)
    entries = ((name, *tensor) for name, tensor in gguf.tensors.items())
    index = b"".join(_entry(name, shape, kind, offset - begin) for name, shape, kind, offset in entries)
    head = head[: head.rindex(index)]
    key = struct.pack("<Q17sI", 17, b"general.file_type", 4)  # 4: an unsigned integer of 32 bits
    value = struct.pack("<I", file_type)
    if (at := head.find(key)) >= 0:
        at += len(key)
        return head[:at] + value + head[at + 4 :]
    count = struct.pack("<Q", struct.unpack_from("<Q", head, 16)[0] + 1)
    return head[:16] + count + head[24:] + key + value


def _padded(length: int, alignment: int) -> int:
    return -(-length // alignment) * alignment
