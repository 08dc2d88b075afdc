"""Fine-tuning (notebook 01): training data, loss mask, forecast, training, and the adapter's recipe."""

from rag_kit.finetune.forecast import Forecast
from rag_kit.finetune.hyperparameters import Hyperparameters
from rag_kit.finetune.train import FinetuneResult, finetune

__all__ = ["FinetuneResult", "Forecast", "Hyperparameters", "finetune"]
