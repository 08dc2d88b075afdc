"""What a training will take, told before it starts: a few real steps are timed, nothing is changed."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rag_kit.errors import message
from rag_kit.finetune.dataset import Example

TIMED = 3  # batches
SAMPLED = 50
ADAM_BYTES = 8  # two f32 moments a trainable parameter


@dataclass(frozen=True)
class Forecast:
    """Seconds and peak bytes of the process that a training of `steps` steps will take.

    On CUDA `memory_bytes` is of the GPU.
    """

    seconds: float
    memory_bytes: int
    steps: int
    examples: int
    tokens_per_epoch: int
    parameters: int
    trainable_parameters: int
    device: str
    dtype: str

    def text(self, lang: str | None = None) -> str:
        """Return the forecast as one line in the reader's language."""
        return message(
            "finetune_forecast",
            lang,
            minutes=f"{self.seconds / 60:.1f}",
            gigabytes=f"{self.memory_bytes / 1e9:.1f}",
            examples=self.examples,
            steps=self.steps,
            trainable=f"{self.trainable_parameters / 1e6:.1f}",
            parameters=f"{self.parameters / 1e6:.0f}",
            device=self.device,
            dtype=self.dtype,
        )


def make_forecast(
    model: Any,
    examples: Sequence[Example],
    collate: Callable[[Sequence[Example]], dict[str, Any]],
    *,
    batch_size: int,
    steps: int,
    epochs: float,
    device: str,
    dtype: str,
    seed: int = 0,
) -> Forecast:
    """Time forward and backward of a shuffled epoch's largest batch and of some others.

    Gradients are thrown away. Leaves the weights as they are; the state of torch's random numbers changes.
    """
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    batches = [[examples[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    collated = [collate(batch) for batch in batches[:SAMPLED]]
    mean_tokens = statistics.mean(batch["input_ids"].numel() for batch in collated)
    with PeakMemory(device) as memory:
        largest = max(collated, key=lambda batch: batch["input_ids"].numel())
        _timed_step(model, largest, device)  # the first step also warms up
    rates = [_timed_step(model, batch, device) / batch["input_ids"].numel() for batch in collated[:TIMED]]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Forecast(
        seconds=statistics.median(rates) * mean_tokens * len(batches) * epochs,
        memory_bytes=memory.peak + trainable * ADAM_BYTES,
        steps=steps,
        examples=len(examples),
        tokens_per_epoch=round(mean_tokens * len(batches)),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=trainable,
        device=device,
        dtype=dtype,
    )


def _timed_step(model: Any, batch: dict[str, Any], device: str) -> float:
    """Return the seconds of one forward and backward."""
    start = time.perf_counter()
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    loss.item()  # on CUDA: wait for it
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


class PeakMemory:
    """The largest memory in use within a `with` block, in bytes: of the process, on CUDA of the GPU."""

    def __init__(self, device: str, every: float = 0.01) -> None:
        self.peak, self._device, self._every = 0, device, every
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self._device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device == "cuda":
            import torch

            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._thread.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:  # at least one reading
            self.peak = max(self.peak, process.memory_info().rss)
            if self._done.wait(self._every):
                return
