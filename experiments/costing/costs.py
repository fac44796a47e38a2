"""The numbers: what a model and its dense twin cost at each context length, and where MSA pays."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.benchmarking.cases import FORWARD, TRAINING
from experiments.costing import measurements
from experiments.costing.measurements import Measurements
from msa_jax import cost, economics
from msa_jax.config import ArchitectureConfig, ConfigError, dense_twin
from msa_jax.eval.figures import short_length

MEASURED = "rates measured at this length"
BETWEEN = "between measured lengths"
BEYOND = "beyond what was measured"
ESTIMATED = "estimated"
FROM_BYTES = "bytes over bandwidth"
COUNTED = "counted"

LONGEST = 2**20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the numbers depend on beside the model.

    Attributes:
      measured: the benchmark's rates.
      machine: the GPU at those rates, or at the same share of its own peak.
      own: whether the rates were measured on this kind of GPU.
      batch: sequences that decode together.
    """

    measured: Measurements
    machine: economics.Machine
    own: bool
    batch: int


def setting(
    benchmark: pathlib.Path,
    gpu: str,
    *,
    price: float | None,
    selection: str,
    dense: str,
    matmul_fraction: float,
    batch: int,
) -> Setting:
    """Reads the measured rates and puts them on a GPU.

    Args:
      benchmark: results of `experiments.benchmark`.
      gpu: a key of `msa_jax.economics.GPUS`.
      price: US dollars per GPU hour; None takes the table's.
      selection: of the benchmark.
      dense: the dense kernel, see `measurements.read`.
      matmul_fraction: of the peak, for all products but attention's.
      batch: sequences that decode together.

    Raises:
      ResultError: the results lack what is needed.
    """
    sheet = economics.GPUS[gpu]
    measured = measurements.read(benchmark, selection=selection, dense=dense)
    machine, own = measurements.machine(
        measured,
        sheet,
        price=sheet.price if price is None else price,
        matmul_fraction=matmul_fraction,
    )
    return Setting(measured, machine, own, batch)


class Pair(NamedTuple):
    """A quantity of the dense twin and of the MSA model."""

    dense: float
    msa: float

    @property
    def saved(self) -> float:
        """The share of the dense twin's that MSA saves; negative where MSA takes more."""
        return 1 - self.msa / self.dense


@dataclasses.dataclass(frozen=True)
class CostRow:
    """One context length.

    Attributes:
      length: tokens.
      flops_share: attention's share of the forward FLOPs.
      flops: forward FLOPs of the whole model per token.
      time_share: attention's share of the prefill time.
      prefill: US dollars per million tokens of a document of this length.
      training: the same for a training pass, the sparse phase.
      decode: the same for tokens decoded at this length.
      kv_cache_gb: keys and values of one sequence, bf16, 1e9 bytes; both models have them.
      index_cache_gb: index keys on top, MSA alone.
      decode_gpus: fewest GPUs whose memory holds the weights and the batch's caches.
      prefill_basis: where the rates come from.
      training_basis: the same for training.
      decode_basis: where the bandwidth comes from.
    """

    length: int
    flops_share: Pair
    flops: Pair
    time_share: Pair
    prefill: Pair
    training: Pair
    decode: Pair
    kv_cache_gb: float
    index_cache_gb: float
    decode_gpus: Pair
    prefill_basis: str
    training_basis: str
    decode_basis: str

    def flat(self) -> dict[str, Any]:
        """Plain values by name, pairs as two; dollars are marked as such."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if isinstance(value, Pair):
                dollars = "_dollars" if name in ("prefill", "training", "decode") else ""
                values[f"{name}_dense{dollars}"] = value.dense
                values[f"{name}_msa{dollars}"] = value.msa
            else:
                values[name] = value
        return values


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """From which context length on MSA is cheaper.

    Attributes:
      what: "prefill", "training", "decode" or "forward FLOPs".
      length: tokens; None if it is not, up to `LONGEST`.
      basis: where the rates come from.
    """

    what: str
    length: int | None
    basis: str

    @property
    def text(self) -> str:
        """The length; two digits where kernels' rates decide, * beyond what was measured."""
        if self.length is None:
            return f"not up to {short_length(LONGEST)}"
        if FROM_BYTES in self.basis or self.basis == COUNTED:
            return f"{self.length:,}"
        return f"{float(f'{self.length:.1e}'):,.0f}{'*' if BEYOND in self.basis else ''}"

    @property
    def sentence(self) -> str:
        """In words."""
        if self.length is None:
            return f"{self.what}: MSA is not cheaper at any length up to {short_length(LONGEST)}"
        return f"{self.what}: MSA is cheaper from {self.text} tokens on ({self.basis})"


def require_msa(config: ArchitectureConfig) -> None:
    """Raises ConfigError unless MSA with a learned index is what the config describes."""
    mixer = config.attention
    if not mixer.learns_selection:
        raise ConfigError(
            f"attention.kind={mixer.kind!r}, attention.selector={mixer.selector!r}: the comparison "
            'is of MSA with its dense twin; pass a config with attention.kind="msa" and '
            'attention.selector="learned"'
        )


def cost_rows(
    config: ArchitectureConfig, lengths: Sequence[int], setting: Setting
) -> list[CostRow]:
    """One row per context length of an MSA model and its dense twin."""
    require_msa(config)
    return [_row(config, length, setting) for length in lengths]


def _row(config: ArchitectureConfig, length: int, setting: Setting) -> CostRow:
    machine, batch = setting.machine, setting.batch
    pair = (dense_twin(config), config)
    flops = [cost.model_flops(c, length) for c in pair]
    prefill = [economics.prefill_time(c, length, machine) for c in pair]

    def dollars(seconds: Callable[[ArchitectureConfig], economics.Time]) -> Pair:
        return Pair(*(machine.dollars(1e6 * seconds(c).total) for c in pair))

    memory = [economics.decode_memory_bytes(c, length, batch) for c in pair]
    return CostRow(
        length=length,
        flops_share=Pair(*(f.attention_share for f in flops)),
        flops=Pair(*(f.total / length for f in flops)),
        time_share=Pair(*(time.attention_share for time in prefill)),
        prefill=dollars(lambda c: economics.prefill_time(c, length, machine)),
        training=dollars(lambda c: economics.training_time(c, length, machine)),
        decode=dollars(lambda c: economics.decode_time(c, length, machine, batch)),
        kv_cache_gb=cost.kv_cache_bytes(config, length) / 1e9,
        index_cache_gb=cost.index_cache_bytes(config, length) / 1e9,
        decode_gpus=Pair(*(math.ceil(m / machine.gpu.memory_bytes) for m in memory)),
        prefill_basis=basis(setting, FORWARD, length),
        training_basis=basis(setting, TRAINING, length),
        decode_basis=_estimated(setting) + FROM_BYTES,
    )


def basis(setting: Setting, passes: str, length: int) -> str:
    """Where the rates of a pass of this length come from."""
    rates = setting.measured.rates
    covers = rates.covers_prefill if passes == FORWARD else rates.covers_training
    inside = MEASURED if length in setting.measured.lengths[passes] else BETWEEN
    return _estimated(setting) + (inside if covers(length) else BEYOND)


def break_evens(config: ArchitectureConfig, setting: Setting) -> list[BreakEven]:
    """From which length on the whole MSA model is cheaper than its dense twin."""
    require_msa(config)
    machine, twin = setting.machine, dense_twin(config)

    def find(time: Callable[[ArchitectureConfig, int], economics.Time]) -> int | None:
        return _crossing(config, twin, lambda c, length: time(c, length).total)

    found = []
    for what, passes, time in (
        ("prefill", FORWARD, economics.prefill_time),
        ("training", TRAINING, economics.training_time),
    ):
        length = find(lambda c, n, time=time: time(c, n, machine))
        found.append(BreakEven(what, length, _break_even_basis(setting, passes, length)))
    decode = find(lambda c, n: economics.decode_time(c, n, machine, setting.batch))
    return [
        *found,
        BreakEven("decode", decode, _estimated(setting) + FROM_BYTES),
        BreakEven("forward FLOPs", _flops_crossing(config, twin), COUNTED),
    ]


@functools.cache
def _flops_crossing(config: ArchitectureConfig, twin: ArchitectureConfig) -> int | None:
    return _crossing(config, twin, lambda c, length: cost.model_flops(c, length).total / length)


def _crossing(
    config: ArchitectureConfig,
    twin: ArchitectureConfig,
    price: Callable[[ArchitectureConfig, int], float],
) -> int | None:
    return economics.break_even(
        lambda length: price(config, length),
        lambda length: price(twin, length),
        longest=LONGEST,
    )


def _break_even_basis(setting: Setting, passes: str, length: int | None) -> str:
    where = "" if length is None else basis(setting, passes, length)
    if BEYOND not in where:
        return where
    shortest = short_length(setting.measured.lengths[passes][0])
    return f"{where}: at the rates of {shortest}, the shortest length measured"


def _estimated(setting: Setting) -> str:
    """What stands before the basis of every number of a GPU that nothing was measured on."""
    return "" if setting.own else f"{ESTIMATED}, "
