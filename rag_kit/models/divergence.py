"""How far two language models are apart, from their log-probabilities at the same positions.

Knows arrays; knows nothing of engines, files and adapters, nor of what difference is too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.floating] | Mapping[int, float]
TOP = 20
LEAST = 1e-9  # of all that a row does not name, so that its logarithm is a number


@dataclass(frozen=True)
class Divergence:
    """Means over `positions`: `kl` in nats, `argmax` a share; `top20` is the largest difference in nats."""

    kl: float
    argmax: float
    top20: float
    positions: int


def divergence(reference: Sequence[Row], other: Sequence[Row]) -> Divergence:
    """Compare the natural log-probabilities of two models at the same positions.

    A row is the whole vocabulary, shape (vocabulary,), or the most probable tokens, {id: log-probability}.
    KL(p‖q) = Σ p (ln p - ln q), p the reference. Of rows that name only the most probable tokens, it is over
    those that p names and all others as one; one that q does not name counts as the least that q names.
    `argmax` is the share of equal most probable tokens, `top20` the largest |ln p - ln q| among the 20 most
    probable of p. Raises ValueError where the rows are not as many, or as long, or none.
    """
    if len(reference) != len(other) or not reference:
        raise ValueError(f"{len(reference)} and {len(other)} positions")
    pairs = [_aligned(p, q) for p, q in zip(reference, other, strict=True)]
    kl = [_kl(p, q) for p, q in pairs]
    equal = [_best(p) == _best(q) for p, q in zip(reference, other, strict=True)]
    apart = [np.abs(p - q)[np.argsort(-p)[:TOP]].max() for p, q in pairs]
    return Divergence(float(np.mean(kl)), float(np.mean(equal)), float(np.max(apart)), len(kl))


def _aligned(p: Row, q: Row) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the log-probabilities of the tokens that `p` names, in both."""
    if isinstance(p, Mapping) and isinstance(q, Mapping):
        least = min(q.values())
        return np.array([*p.values()], dtype=float), np.array([q.get(token, least) for token in p])
    ours, theirs = np.asarray(p, dtype=float), np.asarray(q, dtype=float)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"rows of {ours.shape} and {theirs.shape}")
    return ours, theirs


def _kl(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    both = []
    for row in (p, q):
        shares = np.exp(row)
        shares = np.append(shares, max(1 - shares.sum(), LEAST))
        both.append(shares / shares.sum())
    ours, theirs = both
    with np.errstate(divide="ignore"):
        terms = np.log(ours) - np.log(theirs)
    return max(float(np.sum(ours * terms, where=ours > 0)), 0.0)


def _best(row: Row) -> int:
    return max(row, key=lambda token: row[token]) if isinstance(row, Mapping) else int(np.argmax(row))
