"""Rates that attention kernels were measured at, over the context length."""

import dataclasses
import math

import numpy as np

from msa_jax.config import require


@dataclasses.dataclass(frozen=True)
class RateCurve:
    """FLOP/s of one kernel over the context length.

    Attributes:
      lengths: tokens, ascending, where it was measured.
      rates: FLOP/s there.
    """

    lengths: tuple[int, ...]
    rates: tuple[float, ...]

    def __post_init__(self):
        require(len(self.lengths) > 0, "lengths", self.lengths, "must hold a measured length")
        ascending = sorted(set(self.lengths)) == list(self.lengths)
        require(ascending, "lengths", self.lengths, "must ascend without repetition")
        same = len(self.rates) == len(self.lengths) and min(self.rates, default=0) > 0
        require(same, "rates", self.rates, "must hold a positive rate for every length")

    def at(self, length: int) -> float:
        """FLOP/s at `length`: measured, or of the power law between the measured neighbours.

        Beyond the measured lengths it is the rate of the nearest one; ask `covers`.
        """
        x, y = np.log(self.lengths), np.log(self.rates)
        return float(np.exp(np.interp(math.log(length), x, y)))

    def covers(self, length: int) -> bool:
        """Whether `length` is no shorter and no longer than what was measured."""
        return self.lengths[0] <= length <= self.lengths[-1]

    def scaled(self, factor: float) -> "RateCurve":
        """The same kernel on a machine that is `factor` times as fast."""
        return RateCurve(self.lengths, tuple(factor * rate for rate in self.rates))


@dataclasses.dataclass(frozen=True)
class KernelRates:
    """The rates of attention, each over the FLOPs that its field names.

    Attributes:
      dense_forward: main-branch FLOPs of dense attention, forward.
      dense_training: three times those, forward and backward together.
      selection: index-branch FLOPs of selection, forward pass.
      main: main-branch FLOPs of sparse attention, forward pass.
      training_selection: as `selection`, in training.
      training_main: as `main`, in training, where it keeps what the backward pass needs.
      backward: two times the main-branch FLOPs.
      kl: main-branch FLOPs, for the KL's value and gradients: they form the teacher's scores of
        all query heads again, beside which the index branch's own are few.
    """

    dense_forward: RateCurve
    dense_training: RateCurve
    selection: RateCurve
    main: RateCurve
    training_selection: RateCurve
    training_main: RateCurve
    backward: RateCurve
    kl: RateCurve

    def scaled(self, factor: float) -> "KernelRates":
        """All kernels on a machine that is `factor` times as fast."""
        fields = dataclasses.fields(self)
        return KernelRates(**{f.name: getattr(self, f.name).scaled(factor) for f in fields})

    def covers_prefill(self, length: int) -> bool:
        """Whether a forward pass of this length lies within what was measured."""
        return all(c.covers(length) for c in (self.dense_forward, self.selection, self.main))

    def covers_training(self, length: int) -> bool:
        """Whether a training pass of this length lies within what was measured."""
        curves = (self.dense_training, self.training_selection, self.training_main)
        return all(curve.covers(length) for curve in (*curves, self.backward, self.kl))
