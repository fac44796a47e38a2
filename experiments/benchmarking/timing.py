"""Device time by chained calls: many calls queued on one stream, one wait at their end.

The time of n queued calls over n has the host's share hidden behind the device's work. Calls of a
tenth of a second and more are timed one by one. CUDA events around the calls (the PyTorch
baselines) and the host's clock up to the end of the last call (jax) then read the same.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

METHOD = (
    "device time per call of chained calls: one wait at the end of calls queued for 0.1 s (jax, "
    "host clock) or CUDA events around them (PyTorch); medians over repeated chains"
)
CHAIN_SECONDS = 0.1
# What repeating one measurement may take: long calls are repeated less, and the record says so.
REPEAT_SECONDS = 4.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call over repeated chains.

    Attributes:
      median_ms: of the chains' means.
      min_ms: the fastest chain.
      max_ms: the slowest.
      iqr_ms: between the quartiles, 0 below 4 repeats.
      calls: calls per chain.
      repeats: chains.
    """

    median_ms: float
    min_ms: float
    max_ms: float
    iqr_ms: float
    calls: int
    repeats: int

    def asdict(self) -> dict[str, float]:
        """The record's form."""
        return dataclasses.asdict(self)


def summarise(seconds: Sequence[float], calls: int) -> Timing:
    """The timing of chains that took `seconds` per call."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) >= 4 else [0, 0, 0]
    return Timing(
        median_ms=statistics.median(seconds) * 1e3,
        min_ms=min(seconds) * 1e3,
        max_ms=max(seconds) * 1e3,
        iqr_ms=(quartiles[2] - quartiles[0]) * 1e3,
        calls=calls,
        repeats=len(seconds),
    )


def repeat(chain: Callable[[int], float], repeats: int) -> Timing:
    """Times chains of as many calls as fill `CHAIN_SECONDS`.

    Args:
      chain: makes n calls and returns the seconds they took; compiled already.
      repeats: chains; fewer where they would take longer than `REPEAT_SECONDS`, at least one.
    """
    first = chain(1)
    if first >= CHAIN_SECONDS:
        affordable = int(REPEAT_SECONDS / first) - 1
        seconds = [chain(1) for _ in range(min(repeats, affordable))]
        return summarise(seconds or [first], 1)
    calls = math.ceil(CHAIN_SECONDS / (chain(3) / 3))
    return summarise([chain(calls) / calls for _ in range(repeats)], calls)


def jax_chain(call: Callable[[], Any]) -> Callable[[int], float]:
    """Chains of a jitted call on the host's clock, from the first launch to the last result."""

    def chain(calls: int) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = None  # the memory of the result before this one is free to be used again
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    return chain
