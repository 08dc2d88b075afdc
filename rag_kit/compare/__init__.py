"""Arms side by side: the same questions and the same passages for each, scored, timed, compared."""

from rag_kit.compare.compare import Arm, compare
from rag_kit.compare.comparison import Comparison

__all__ = ["Arm", "Comparison", "compare"]
