"""What a training will take, told before it starts: a few real steps are timed, nothing is changed."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rag_kit.errors import message
from rag_kit.finetune.dataset import Example, pack
from rag_kit.finetune.hyperparameters import Hyperparameters

TIMED = 3  # batches
SAMPLED = 50
ADAM_BYTES = 8  # two f32 moments a trainable parameter
READING_S = 0.01  # between two readings of the memory in use


@dataclass(frozen=True)
class Forecast:
    """Seconds and peak bytes of the process that a training of `steps` steps will take.

    On CUDA `memory_bytes` is of the GPU.
    """

    seconds: float
    memory_bytes: int
    steps: int
    examples: int
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
    chosen: Hyperparameters,
    *,
    batch_size: int,
    steps: int,
    device: str,
    dtype: str,
) -> Forecast:
    """Time forward and backward of a shuffled epoch's largest batch and of some others.

    Gradients are thrown away. Leaves the weights as they are; the state of torch's random numbers changes.
    """
    order = random.Random(chosen.seed).sample(range(len(examples)), len(examples))
    batches = [[examples[i] for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    collated = [pack(batch) for batch in batches[:SAMPLED]]
    mean_tokens = statistics.mean(batch["input_ids"].numel() for batch in collated)
    with _memory_readings(device) as readings:
        largest = max(collated, key=lambda batch: batch["input_ids"].numel())
        _timed_step(model, largest, device)  # the first step also warms up
    rates = [_timed_step(model, batch, device) / batch["input_ids"].numel() for batch in collated[:TIMED]]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Forecast(
        seconds=statistics.median(rates) * mean_tokens * len(batches) * (chosen.epochs or 0),
        memory_bytes=max(readings) + trainable * ADAM_BYTES,
        steps=steps,
        examples=len(examples),
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


@contextmanager
def _memory_readings(device: str) -> Iterator[list[int]]:
    """Yield a list for the bytes in use within the block: of the process, on CUDA its peak there."""
    import psutil
    import torch

    readings: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield readings
        readings.append(torch.cuda.max_memory_allocated())
        return
    done, process = threading.Event(), psutil.Process()

    def watch() -> None:
        readings.append(process.memory_info().rss)
        while not done.wait(READING_S):
            readings.append(process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        done.set()
        thread.join()
