"""Whether a difference between two arms is more than noise.

Knows paired numbers only. Each interval stands for itself: of many pairs looked at, about one in
twenty clears zero by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2, nan

CONFIDENCE = 0.95
# n pairs that all differ in one direction have the two-sided sign-test probability 2 / 2**n; below this
# many, no outcome at all reaches the level, however narrow a bootstrap interval looks.
FEWEST_DIFFERING = ceil(log2(2 / (1 - CONFIDENCE)))


@dataclass(frozen=True)
class Interval:
    """The mean of paired differences with its bootstrap interval; NaN where there are no pairs."""

    mean: float
    low: float
    high: float
    n: int  # pairs
    differing: int  # pairs whose difference is not zero

    @property
    def enough(self) -> bool:
        """Whether enough pairs differ for any claim at this level."""
        return self.differing >= FEWEST_DIFFERING

    @property
    def clears_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero, on enough pairs."""
        return self.enough and (self.low > 0 or self.high < 0)


def paired_interval(differences: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean difference and its 95 % percentile bootstrap interval (Efron, 1979).

    The pairs (questions) are drawn with replacement; the same seed gives the same interval.
    """
    import numpy as np

    values = np.round(np.asarray(differences, dtype=float), 12)  # float noise is no difference
    n = len(values)
    if n == 0:
        return Interval(nan, nan, nan, 0, 0)
    rng = np.random.default_rng(seed)
    batch = max(1, min(resamples, 2_000_000 // n))  # bounds memory at some 30 MB
    sizes = [min(batch, resamples - done) for done in range(0, resamples, batch)]
    means = np.concatenate([values[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high), n, int(np.count_nonzero(values)))
