"""Is my LoRA worth it? Fine-tune, index, answer, switch and compare, with evidence.

Every name below is loaded when it is first used, so that `import rag_kit` costs next to nothing. The two
verbs that share their room's name are taken from it: `from rag_kit.compare import compare`,
`from rag_kit.finetune import finetune`.
"""

from __future__ import annotations  # an old Python must get as far as the sentence that it is too old

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_kit.answer import Answer
    from rag_kit.compare.compare import Arm
    from rag_kit.compare.comparison import Comparison
    from rag_kit.data.loaders import load_documents, sample_handbook
    from rag_kit.data.questions import load_questions
    from rag_kit.faces.dashboard import dashboard
    from rag_kit.index.embeddings import load_embeddings
    from rag_kit.index.store import build_index, open_store
    from rag_kit.models.lora import LoRALanguageModel
    from rag_kit.models.options import GenerationOptions
    from rag_kit.models.reference import load_model
    from rag_kit.ops.health import health
    from rag_kit.rag import LoRARAGHandler, RAGHandler
    from rag_kit.settings import Settings, start

_HOME = {
    "Answer": "answer",
    "Arm": "compare.compare",
    "Comparison": "compare.comparison",
    "GenerationOptions": "models.options",
    "LoRALanguageModel": "models.lora",
    "LoRARAGHandler": "rag",
    "RAGHandler": "rag",
    "Settings": "settings",
    "build_index": "index.store",
    "dashboard": "faces.dashboard",
    "health": "ops.health",
    "load_documents": "data.loaders",
    "load_embeddings": "index.embeddings",
    "load_model": "models.reference",
    "load_questions": "data.questions",
    "open_store": "index.store",
    "sample_handbook": "data.loaders",
    "start": "settings",
}
__all__ = [
    "Answer",
    "Arm",
    "Comparison",
    "GenerationOptions",
    "LoRALanguageModel",
    "LoRARAGHandler",
    "RAGHandler",
    "Settings",
    "build_index",
    "dashboard",
    "health",
    "load_documents",
    "load_embeddings",
    "load_model",
    "load_questions",
    "open_store",
    "sample_handbook",
    "start",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"rag_kit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rag_kit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
