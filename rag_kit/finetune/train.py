"""Training an adapter: data in, a LoRA adapter with its recipe out, by transformers' Trainer and PEFT.

The weights in the output folder change only when a training has ended well; until then, and after a
failure, a Ctrl-C or a kill, the former adapter stays as it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rag_kit.errors import ModelError, RagKitError, StoreError
from rag_kit.finetune.callbacks import OnLog, Progress
from rag_kit.finetune.conversations import TrainingData, load_training_data
from rag_kit.finetune.dataset import Example, encode_conversations, pack
from rag_kit.finetune.forecast import Forecast, make_forecast
from rag_kit.finetune.hyperparameters import Hyperparameters
from rag_kit.finetune.trainable import load_trainable, packing_holds
from rag_kit.manifest import replacing, write_atomic, write_manifest
from rag_kit.models.adapters import CONFIG, FLAT, RECIPE, WEIGHTS, Adapter, checkpoints, read_adapter
from rag_kit.models.base import Base, resolve_base
from rag_kit.models.device import Device, choose_device
from rag_kit.models.render import end_ids
from rag_kit.settings import Settings, get_settings

LOG = "training_log.jsonl"
VERSIONS = ("rag-kit", "torch", "transformers", "peft", "accelerate", "tokenizers")
BESIDE_WEIGHTS = 64 * 2**20  # bytes for tokenizer files, log and recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """A finished training: the adapter, its recipe, each step's log row, and what was forecast.

    `kept` is the folder that now holds the adapter that was there before, None where there was none.
    """

    adapter: Adapter
    recipe: dict[str, Any]
    log: list[dict[str, float]]
    seconds: float
    forecast: Forecast
    kept: Path | None

    @property
    def folder(self) -> Path:
        """The adapter's folder."""
        return self.adapter.folder

    @property
    def losses(self) -> list[float]:
        """The loss of each step (mean over the tokens of answers, natural logarithm)."""
        return [row["loss"] for row in self.log]


def finetune(
    *,
    base: str | None = None,
    data: Path | None = None,
    output_dir: Path | None = None,
    hyperparameters: Hyperparameters | None = None,
    split: str = "train",
    settings: Settings | None = None,
    on_log: OnLog | None = None,
    progress: bool = True,
) -> FinetuneResult:
    """Train a LoRA adapter of `base` on `data` and put it, with its recipe, into `output_dir`.

    Left out, they are BASE_MODEL_NAME, the sample handbook's facts, and LORA_MODEL_PATH itself. `on_log`
    gets a row for each step. An adapter that is there already is kept in `.previous-<time>` inside the
    folder; adapters in other subfolders are not touched. Raises DataError, ModelError, StoreError; the folder
    is then as it was. Notebook 01 shows it.
    """
    settings = settings or get_settings()
    chosen = (hyperparameters or Hyperparameters()).decided(settings, handbook=data is None)
    folder = (settings.lora_model_path if output_dir is None else settings.path(output_dir)).absolute()
    check_output(folder, BESIDE_WEIGHTS)
    device = choose_device(settings)
    training = load_training_data(data, split=split)
    found = resolve_base(base or settings.base_model_name, settings)

    with ExitStack() as stack, _told_out_of_memory(device):
        model, tokenizer, dtype = load_trainable(found, device, chosen)
        examples = encode_conversations(
            tokenizer, training.conversations, end_ids(tokenizer, model.generation_config), chosen.max_length
        )
        check_output(folder, BESIDE_WEIGHTS + sum(p.nbytes for p in model.parameters() if p.requires_grad))
        packed = packing_holds(model, examples, device)
        steps = _steps(len(examples), chosen)
        forecast = make_forecast(
            model, examples, chosen, batch_size=chosen.batch_size or 1 if packed else 1, steps=steps,
            device=device.name, dtype=dtype,
        )  # fmt: skip
        _log.info("%s", forecast.text())
        start = time.perf_counter()
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="rag-kit-finetune-"))
        with closing(Progress(steps, show=progress, on_log=on_log)) as watch:
            _train(model, tokenizer, examples, chosen, device, packed, steps, watch, scratch)
        rows, seconds = watch.history, time.perf_counter() - start
        how = {**asdict(chosen), "device": device.name, "base_dtype": dtype, "packed": packed}
        recipe = _recipe(found, training, len(examples), how, rows)
        recipe["metrics"] |= {"seconds": round(seconds, 1), "forecast_seconds": round(forecast.seconds, 1)}
        kept = _save(folder, model, tokenizer, found, recipe, rows)
        _save_checkpoints(folder, Path(scratch))
    name = FLAT if folder == settings.lora_model_path.absolute() else folder.name
    adapter = read_adapter(folder, name)
    return FinetuneResult(adapter, adapter.recipe or recipe, rows, seconds, forecast, kept)


def check_output(folder: Path, needed: int) -> None:
    """Raise StoreError where `folder` cannot be written or its disk has fewer than `needed` bytes free."""
    with _told_unwritable(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(None, "a file of that name is in the way")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.check-"):
            free = shutil.disk_usage(folder.parent).free
    if free < needed:
        told = {"free": free // 2**20, "needed": math.ceil(needed / 2**20)}
        raise StoreError("finetune_no_space", path=folder, **told)


def _train(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    chosen: Hyperparameters,
    device: Device,
    packed: bool,
    steps: int,
    watch: Progress,
    scratch: str,
) -> None:
    """Run the Trainer; `watch` keeps the log, `scratch` the checkpoints."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    batch = chosen.batch_size or 1
    arguments = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=chosen.epochs,
        per_device_train_batch_size=batch if packed else 1,
        gradient_accumulation_steps=chosen.gradient_accumulation_steps * (1 if packed else batch),
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.lr_scheduler_type,
        warmup_steps=round(chosen.warmup_ratio * steps),
        weight_decay=chosen.weight_decay,
        seed=chosen.seed,
        fp16=bool(chosen.fp16) and device.name != "cpu",
        activation_checkpointing=chosen.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device.name == "cpu",
        dataloader_pin_memory=device.name != "cpu",
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if chosen.save_steps else "no",
        save_steps=chosen.save_steps or steps,
        save_only_model=True,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a packed batch is one sequence and cannot be split
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=pack,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    set_seed(chosen.seed)  # the forecast drew random numbers
    trainer.train()


def _save(
    folder: Path, model: Any, tokenizer: Any, base: Base, recipe: dict[str, Any], rows: list[dict[str, float]]
) -> Path | None:
    """Swap the adapter's files in and return where the former ones were put."""
    kept = folder / f".previous-{datetime.now():%Y%m%d-%H%M%S}" if (folder / CONFIG).is_file() else None
    config = model.peft_config["default"]
    config.base_model_name_or_path = base.name  # not where it lies on this machine
    config.target_modules = sorted(config.target_modules)
    with _told_unwritable(folder), replacing(folder, keep_as=kept) as building:
        model.save_pretrained(building, save_embedding_layers=False)
        (building / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        tokenizer.save_pretrained(building)
        write_atomic(building / LOG, "".join(json.dumps(row) + "\n" for row in rows))
        write_manifest(building, recipe, name=RECIPE)
    return kept


def _save_checkpoints(folder: Path, scratch: Path) -> None:
    """Put this training's checkpoints below its adapter, and take an earlier training's away."""
    for old in checkpoints(folder):
        shutil.rmtree(old)
    for made in checkpoints(scratch):
        with _told_unwritable(folder), replacing(folder / made.name) as building:
            shutil.copyfile(folder / CONFIG, building / CONFIG)
            shutil.copyfile(made / WEIGHTS, building / WEIGHTS)


def _recipe(
    base: Base,
    training: TrainingData,
    examples: int,
    how: dict[str, Any],
    rows: list[dict[str, float]],
) -> dict[str, Any]:
    """Return what the adapter was made of, and how."""
    last = [row for row in rows if row["epoch"] > rows[-1]["epoch"] - 1]  # the last epoch
    fingerprint = base.fingerprint()
    return {
        "base": {"name": base.name, "fingerprint": fingerprint},
        "chat_template_hash": fingerprint["chat_template_hash"],
        "tokenizer_hash": fingerprint["tokenizer_hash"],
        "data": {
            "name": training.name,
            "sha256": training.sha256,
            "examples": examples,
            "left_out": training.left_out,
        },
        "hyperparameters": how,
        "metrics": {
            "train_loss": sum(row["loss"] for row in last) / len(last),
            "first_loss": rows[0]["loss"],
            "steps": len(rows),
        },
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": "rag-kit",
    }


def _steps(examples: int, chosen: Hyperparameters) -> int:
    """Return the optimiser steps of a training, counted as the Trainer does."""
    batches = math.ceil(examples / (chosen.batch_size or 1))
    return math.ceil((chosen.epochs or 0) * math.ceil(batches / chosen.gradient_accumulation_steps))


@contextmanager
def _told_unwritable(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RagKitError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise StoreError("finetune_unwritable", path=folder, reason=reason) from error


@contextmanager
def _told_out_of_memory(device: Device) -> Iterator[None]:
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if exhausted or "can't allocate memory" in str(error):
            raise ModelError("finetune_out_of_memory", device=device.name) from error
        raise
