"""Where a model runs: the device and its number type, each with the reason for the choice."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_kit.errors import ModelError, message

if TYPE_CHECKING:
    from rag_kit.settings import Settings


@dataclass(frozen=True)
class Device:
    """A torch device (`cpu`, `cuda`), a dtype name, an optional weight format, and why."""

    name: str
    dtype: str
    quantization: str | None
    reason: str

    @property
    def torch_dtype(self) -> Any:
        """The `torch.dtype` named by `dtype`."""
        import torch

        return getattr(torch, self.dtype)


def may_have_cuda() -> bool:
    """Whether a driver is there, without which torch (seconds to import) finds no CUDA device."""
    return bool(shutil.which("nvidia-smi")) or Path("/dev/nvidiactl").exists()


def choose_device(settings: Settings) -> Device:
    """Decide from DEVICE, ENABLE_FP16, ENABLE_QUANTIZATION and CUDA_MEMORY_FRACTION.

    Raises ModelError for `cuda` where torch sees no CUDA device.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        build = message("device_cpu_build" if torch.version.cuda is None else "device_no_gpu")
        raise ModelError("cuda_missing", reason=build)
    name = "cuda" if has_cuda and settings.device != "cpu" else "cpu"
    if settings.device == "cpu":
        reason = message("device_asked", device="cpu")
    elif settings.device == "cuda":
        reason = message("device_asked", device="cuda")
    else:
        reason = message("device_cuda_found" if has_cuda else "device_no_cuda")
    if name == "cuda" and settings.cuda_memory_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(settings.cuda_memory_fraction)
        reason += " " + message("device_fraction", fraction=settings.cuda_memory_fraction)
    elif settings.cuda_memory_fraction < 1:
        reason += " " + message("device_fraction_unused", fraction=settings.cuda_memory_fraction)
    if name == "cpu":
        # fp16 arithmetic is slow on CPUs; bfloat16 is the half type they have
        dtype = "bfloat16" if settings.enable_fp16 else "float32"
    else:
        dtype = (
            "float16" if settings.enable_fp16 else "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        )
    quantization = settings.quantization_type if settings.enable_quantization else None
    return Device(name, dtype, quantization, reason)
