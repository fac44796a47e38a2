"""Useful work, and the floors that follow from it.

The floor of a part is the larger of its useful FLOPs over the matmul rate and its bytes over the
copy bandwidth, both measured in the same run; an 8-bit product runs at twice the bf16 rate on
NVIDIA's tensor cores. Useful work is what the definition needs: every causal pair scored once,
every visible token of a selected block attended once, every array read or written once. Of a
gradient it is one product for each of the two arguments of a product of the forward pass: what a
backward pass or the KL multiplies again because it was not kept does not count, as in
`msa_jax.cost`.
"""

import dataclasses

from experiments.benchmarking.cases import DENSE, TRAINING, Case
from msa_jax.cost import attention_flops, causal_pairs, visible_pairs

_FIELDS_BYTES = 2, 4  # bf16, and int32 or float32


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call must do at the least."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the device: FLOP/s of a large bf16 matmul, bytes/s of a large copy."""

    matmul_flops: float
    copy_bytes: float

    def floor_ms(self, work: Work, *, eight_bit: bool = False) -> float:
        """The shortest time for this work, in milliseconds."""
        rate = self.matmul_flops * (2 if eight_bit else 1)
        return 1e3 * max(work.flops / rate, work.bytes / self.copy_bytes)


def work(case: Case, part: str) -> Work:
    """What a part of a case must compute and move; of a dense baseline there is but one part."""
    half, word = _FIELDS_BYTES
    tokens = case.batch * case.length
    queries = tokens * case.num_heads * case.head_dim * half
    keys = tokens * case.num_kv_heads * case.head_dim * half
    if case.subject in DENSE:
        pairs = case.batch * causal_pairs(case.length)
        forward = Work(4 * case.num_heads * case.head_dim * pairs, 2 * (queries + keys))
        backward = Work(2 * forward.flops, 4 * (queries + keys))
        return forward + backward if case.passes == TRAINING else forward
    flops = attention_flops(case.attention, case.length)
    ids = tokens * case.num_kv_heads * case.top_k * word
    index = tokens * (case.num_kv_heads + 1) * case.index_dim * half
    lse = tokens * case.num_heads * word
    selection = Work(case.batch * flops.index, index + ids)
    main = Work(case.batch * flops.main, 2 * (queries + keys) + lse + ids)
    backward = Work(2 * main.flops, 4 * (queries + keys) + lse + ids)
    support = case.batch * visible_pairs(case.attention, case.length)
    kl = Work(
        4 * case.num_kv_heads * case.index_dim * support,
        queries + keys + 2 * index + lse + 2 * tokens * case.num_kv_heads * word + ids,
    )
    both = selection + main
    parts = {"selection": selection, "main": main, "both": both, "backward": backward, "kl": kl}
    return (parts | {"training": both + backward + kl})[part]
