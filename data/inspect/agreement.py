"""Measure how well the motion in the picture and the turns of the car agree, at every lag.

A crash, a skid or a wrong picture must not decide. So the largest values are clipped, and evidence
counts only if it comes from several separate moments.

To choose these rules, they were measured on 160 drives whose lag and sign are known, on pieces of
them, and on drives with the actions of others. Clipping at the 95th percentile found the true lag
most often; leaving out the pairs that fit worst made other drives' actions fit as well.

Legend: P pairs of frames, L lags, B blocks of about a second.
"""

from dataclasses import dataclass, replace

import numpy as np

from driving_sim.data.arrays import Floats, Ints, Mask

_BLOCK_S = 1.0
# Clip the largest values: 5 % of them, but not more than 1.5 s, because in a long drive with few
# turns the largest values are the turns.
_CLIPPED_SHARE, _CLIPPED_S = 0.05, 1.5
# A car that reverses or skids may contradict in this share of the blocks.
_CONTRADICTING_SHARE = 0.1
_MIN_PAIRS = 30
_TINY = 1e-6


def clipped(values: Floats, usable: Mask, period: float) -> Floats:
    """Return values [P] with mean 0, the largest ones clipped, and 0 where they are not usable."""
    share = min(_CLIPPED_SHARE, _CLIPPED_S / (period * np.count_nonzero(usable)))
    middle = np.median(values[usable])
    limit = np.quantile(np.abs(values[usable] - middle), 1 - share)
    inside = np.clip(values, middle - limit, middle + limit)
    centred: Floats = np.where(usable, inside - inside[usable].mean(), 0.0)
    return centred


def moments(evidence: Floats) -> float:
    """Return from how many blocks [B] the sum of their evidence comes.

    It is B if all blocks contribute alike, and 1 if one block contributes everything. It is 0 if
    the sum is not positive.
    """
    total, squares = float(evidence.sum()), float(np.square(evidence).sum())
    return total * total / squares if total > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Agreement:
    """Sums over each block, for all lags, of products of image motion and predicted turns.

    At lag k, motion[t] is compared with turns[t + k].
    """

    products: Floats
    """[L, B] Sums of motion times turns."""
    turned: Floats
    """[L, B] Sums of the squared turns."""
    moved: Floats
    """[L, B] Sums of the squared motion."""
    counts: Ints
    """[L, B] Numbers of pairs of frames."""
    max_lag: int
    """Row k + `max_lag` has the sums of lag k."""
    block_of: Ints
    """[P] Block of each pair of frames."""

    @classmethod
    def measure(
        cls, motion: Floats, turns: Floats, usable: Mask, period: float, max_lag: int
    ) -> "Agreement":
        """Compare motion [P] with turns [P], both in any unit, where both are usable [P]."""
        motion, turns = clipped(motion, usable, period), clipped(turns, usable, period)
        count = len(motion)
        length = max(2, round(_BLOCK_S / period))
        all_turns, all_usable = np.pad(turns, max_lag), np.pad(usable, max_lag)
        sums: list[list[Floats]] = []
        for start in range(2 * max_lag + 1):
            later = all_turns[start : start + count]
            both = usable & all_usable[start : start + count]
            series = motion * later, later * later, motion * motion, 1.0
            sums.append(
                [
                    np.add.reduceat(np.where(both, values, 0.0), np.arange(0, count, length))
                    for values in series
                ]
            )
        products, turned, moved, counts = np.moveaxis(np.array(sums), 1, 0)
        return cls(
            products=products,
            turned=turned,
            moved=moved,
            counts=counts.astype(np.int64),
            max_lag=max_lag,
            block_of=np.arange(count) // length,
        )

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.products.shape[1])

    def steady(self, lag: int) -> Ints:
        """Return the same lag for each block [B]."""
        return np.full(self.blocks, lag, np.int64)

    def along(self, first: int, last: int) -> Ints:
        """Return lags that change evenly from the first block to the last [B]."""
        return np.round(np.linspace(first, last, self.blocks)).astype(np.int64)

    def correlation(self, lags: Ints) -> Floats:
        """Return the correlations of motion and turns, given a lag for each block [..., B].

        It is NaN if there are too few pairs, or if motion or turns do not vary.
        """
        rows, columns = lags + self.max_lag, np.arange(self.blocks)
        product, turned, moved, count = (
            sums[rows, columns].sum(axis=-1)
            for sums in (self.products, self.turned, self.moved, self.counts)
        )
        varies = np.minimum(turned, moved) > _TINY**2 * count
        scale = np.sqrt(np.where(varies, turned * moved, 1.0))
        correlation: Floats = np.where(varies & (count >= _MIN_PAIRS), product / scale, np.nan)
        return correlation

    def evidence(self, lags: Ints) -> Floats:
        """Return how much each block [B] adds to the correlation at these lags [B]."""
        columns = np.arange(self.blocks)
        products = self.products[lags + self.max_lag, columns]
        evidence: Floats = products * np.sign(products.sum())
        return evidence

    def unexplained(self, lags: Ints) -> Floats:
        """Return the squared motion of each block [B] that the turns at these lags do not explain.

        The blocks share the factor that explains most.
        """
        rows, columns = lags + self.max_lag, np.arange(self.blocks)
        product, turned, moved = (
            sums[rows, columns] for sums in (self.products, self.turned, self.moved)
        )
        factor = product.sum() / turned.sum() if turned.any() else 0.0
        rest: Floats = moved - 2 * factor * product + factor * factor * turned
        return rest

    def without_contradictions(self, lags: Ints) -> "Agreement":
        """Leave out the blocks that contradict the others most at these lags [B], up to a tenth."""
        evidence = self.evidence(lags)
        most = np.argsort(evidence)[: int(_CONTRADICTING_SHARE * self.blocks)]
        keep = np.ones(self.blocks)
        keep[most[evidence[most] < 0]] = 0
        return replace(
            self,
            products=self.products * keep,
            turned=self.turned * keep,
            moved=self.moved * keep,
        )

    def factor(self, lags: Ints) -> float:
        """Return the ratio of the motion's standard deviation to that of the turns."""
        rows, columns = lags + self.max_lag, np.arange(self.blocks)
        turned, moved = (sums[rows, columns].sum() for sums in (self.turned, self.moved))
        return float(np.sqrt(moved / turned))
