"""What a model costs in time and money on a GPU, from measured kernel rates and counted work.

Attention takes its counted FLOPs (`msa_jax.cost`) over the rate that a kernel was measured at: of
the same length, or, between two measured lengths, of the power law through both. Work grows with
heads and dims, so a layer of another shape is taken to run at the same rate. All other products
run at a stated fraction of the GPU's peak, and decoding moves bytes at a stated bandwidth. What a
network between GPUs costs, and what a server leaves idle, is not in it.

Dollars are US dollars, costs are per million tokens.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from msa_jax import cost, utilisation
from msa_jax.config import ArchitectureConfig, AttentionConfig, ConfigError, require
from msa_jax.kernel_rates import KernelRates

# What `model.remat` makes the backward pass compute again of a layer: the products outside of
# attention, attention, selection. See `msa_jax.model.remat_policy`.
_RECOMPUTED = {
    "none": (False, False, False),
    "dots": (False, False, False),
    "attention": (True, False, False),
    "save_selection": (True, True, False),
    "full": (True, True, True),
}
_STEPS_PER_DOUBLING = 4


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU, from its vendor's data sheet; its matmul peak is `msa_jax.utilisation.peak_flops`.

    Attributes:
      name: as people say it.
      device_kind: a part of `jax.devices()[0].device_kind`.
      bytes_per_second: memory bandwidth.
      memory_bytes: of one GPU.
      price: US dollars per hour. An assumption: a round figure of on-demand offers, not a quote.
    """

    name: str
    device_kind: str
    bytes_per_second: float
    memory_bytes: int
    price: float

    @property
    def peak_flops(self) -> float:
        """Dense bf16 matmul peak, FLOP/s."""
        peak = utilisation.peak_flops(self.device_kind)
        if peak is None:
            raise ConfigError(f"device_kind={self.device_kind!r}: msa_jax.cost knows no peak of it")
        return peak


# NVIDIA's data sheets of the H100 SXM5, the H200 SXM and the A100 SXM4 80GB.
GPUS = {
    "h100": Gpu("H100", "H100", 3.35e12, 80 * 10**9, 2.5),
    "h200": Gpu("H200", "H200", 4.8e12, 141 * 10**9, 3.5),
    "a100": Gpu("A100", "A100", 2.039e12, 80 * 10**9, 1.5),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU, what it reaches and what it costs.

    Attributes:
      gpu: its data sheet.
      kernels: rates of attention.
      matmul_fraction: of the matmul peak, that all products outside of attention reach.
      bytes_per_second: that reading memory reaches.
      price: US dollars per GPU hour.
    """

    gpu: Gpu
    kernels: KernelRates
    matmul_fraction: float
    bytes_per_second: float
    price: float

    def __post_init__(self):
        share = self.matmul_fraction
        require(0 < share <= 1, "matmul_fraction", share, "must lie above 0 and up to 1")
        for name in ("bytes_per_second", "price"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be > 0")

    @property
    def matmul_flops(self) -> float:
        """FLOP/s of the products outside of attention."""
        return self.matmul_fraction * self.gpu.peak_flops

    def dollars(self, seconds: float) -> float:
        """US dollars for that much time of one GPU."""
        return self.price * seconds / 3600


class Time(NamedTuple):
    """GPU seconds per token: attention proper (selection, KL included), and everything else."""

    attention: float
    rest: float

    @property
    def total(self) -> float:
        """Both."""
        return self.attention + self.rest

    @property
    def attention_share(self) -> float:
        """Attention's share of the whole."""
        return self.attention / self.total


def prefill_time(config: ArchitectureConfig, length: int, machine: Machine) -> Time:
    """Mean GPU seconds per token of one forward pass over a document of `length` tokens.

    Raises:
      ConfigError: a mixer whose kernels were not measured.
    """
    kernels, seconds = machine.kernels, 0.0
    for mixer, work in _layers(config, length):
        if mixer.kind == "gqa":
            seconds += work.main / kernels.dense_forward.at(length)
        else:
            seconds += work.main / kernels.main.at(length)
            seconds += work.index / kernels.selection.at(length)
    return Time(seconds / length, _flops_outside(config).forward / machine.matmul_flops)


def training_time(config: ArchitectureConfig, length: int, machine: Machine) -> Time:
    """Mean GPU seconds per token of one training pass (sparse phase) over a document.

    What `model.remat` makes the backward pass compute again is counted.

    Raises:
      ConfigError: a mixer whose kernels were not measured.
    """
    _, attend_again, select_again = _RECOMPUTED[config.model.remat]
    kernels, seconds = machine.kernels, 0.0
    for mixer, work in _layers(config, length):
        if mixer.kind == "gqa":
            seconds += 3 * work.main / kernels.dense_training.at(length)
            seconds += attend_again * work.main / kernels.dense_forward.at(length)
            continue
        seconds += (1 + attend_again) * work.main / kernels.training_main.at(length)
        seconds += (1 + select_again) * work.index / kernels.training_selection.at(length)
        seconds += 2 * work.main / kernels.backward.at(length)
        if work.index:  # a layer that reuses a selection has no index branch to teach
            seconds += work.main / kernels.kl.at(length)
    return Time(seconds / length, _flops_outside(config).training / machine.matmul_flops)


class _FlopsOutside(NamedTuple):
    """FLOPs per token outside of attention, which are the same at every length."""

    forward: int
    training: int


@functools.cache
def _flops_outside(config: ArchitectureConfig) -> _FlopsOutside:
    """With what `model.remat` computes again."""
    forward, training = cost.model_flops(config, 1), cost.training_flops(config, 1)
    again = forward.projections + forward.index_projections + forward.feed_forward
    outside = [f.total - f.attention - f.index_scores for f in (forward, training)]
    return _FlopsOutside(outside[0], outside[1] + again * _RECOMPUTED[config.model.remat][0])


@functools.cache
def _kinds(config: ArchitectureConfig) -> tuple[tuple[tuple[AttentionConfig, bool], int], ...]:
    """Each distinct mixer, whether it computes a selection, and how many layers have it."""
    layers = range(config.model.num_layers)
    kinds = ((config.attention_of(layer), config.computes_selection(layer)) for layer in layers)
    return tuple(collections.Counter(kinds).items())


def _layers(
    config: ArchitectureConfig, length: int
) -> Iterator[tuple[AttentionConfig, cost.AttentionFlops]]:
    """Each distinct mixer, and the forward FLOPs of all layers that have it."""
    for (mixer, selects), count in _kinds(config):
        if not mixer.learns_selection and (mixer.kind != "gqa" or mixer.window):
            raise ConfigError(
                f"attention.kind={mixer.kind!r}, attention.selector={mixer.selector!r}, "
                f"attention.window={mixer.window}: rates are of learned MSA and of dense GQA; "
                "pass one of these"
            )
        work = cost.attention_flops(mixer, length, computes_selection=selects)
        yield mixer, cost.AttentionFlops(count * work.main, count * work.index)


def decode_time(config: ArchitectureConfig, length: int, machine: Machine, batch: int) -> Time:
    """GPU seconds to decode the last of `length` tokens, `batch` sequences sharing the weights.

    Attention reads its caches. The rest reads the weights once for all sequences, or multiplies
    with them, whichever is longer.
    """
    read = sum(
        count * cost.decode_bytes(mixer, length, computes_selection=selects)
        for (mixer, selects), count in _kinds(config)
    )
    multiplied = _flops_outside(config).forward / machine.matmul_flops
    weights = decode_weight_bytes(config, batch) / batch / machine.bytes_per_second
    return Time(read / machine.bytes_per_second, max(weights, multiplied))


def decode_weight_bytes(config: ArchitectureConfig, batch: int, *, dtype_bytes: int = 2) -> float:
    """Bytes of weights that one decoding step of `batch` sequences reads.

    Of the routed experts it is those that some sequence visits, in the mean: each sequence is taken
    to choose `moe.top_k` of them evenly and on its own.
    """
    count = cost.parameter_count(config)
    visited = 1 - (1 - config.moe.top_k / config.moe.num_experts) ** batch if count.router else 0
    head = config.model.vocab_size * config.model.d_model
    resident = count.active_non_embedding - count.active_routed_experts + head
    return float(dtype_bytes * (resident + visited * count.routed_experts))


def decode_memory_bytes(config: ArchitectureConfig, length: int, batch: int) -> int:
    """Bytes that bf16 weights and the caches of `batch` sequences of `length` tokens take."""
    caches = cost.kv_cache_bytes(config, length) + cost.index_cache_bytes(config, length)
    return 2 * cost.parameter_count(config).total + batch * caches


def break_even(
    sparse: Callable[[int], float],
    dense: Callable[[int], float],
    *,
    shortest: int = 128,
    longest: int = 2**20,
) -> int | None:
    """The context length from which on `sparse` costs less than `dense`.

    Lengths are tried from the longest down, four to a doubling, and then one by one between two of
    them: what happens within such a step is taken to be one crossing.

    Args:
      sparse: cost by length.
      dense: cost by length.
      shortest: the first length tried.
      longest: the last length tried.

    Returns:
      The first length behind the longest one where `sparse` is no cheaper; `shortest` where it is
      cheaper throughout; None where it is no cheaper at `longest`.
    """

    def cheaper(length: int) -> bool:
        return sparse(length) < dense(length)

    if not cheaper(longest):
        return None
    steps = math.ceil(_STEPS_PER_DOUBLING * math.log2(longest / shortest))
    tried = [round(longest / 2 ** (n / _STEPS_PER_DOUBLING)) for n in range(1, steps)] + [shortest]
    wins, loses = longest, 0
    for length in tried:
        if not cheaper(length):
            loses = length
            break
        wins = length
    if not loses:
        return shortest
    while wins - loses > 1:
        middle = (loses + wins) // 2
        loses, wins = (loses, middle) if cheaper(middle) else (middle, wins)
    return wins
