"""Calls of `sparse_attention` on Hopper, small enough for the interpreter, and their arrays."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import numpy_oracle
from jax.experimental.pallas import mosaic_gpu as plgpu
from op_cases import ascending_picks, compiled, segments_of

from pallas_kernels.mosaic_gpu import Target, traced_for
from pallas_kernels.sparse_attention import mosaic_gpu
from pallas_kernels.sparse_attention.backward import BackwardConfig
from pallas_kernels.sparse_attention.backward_mosaic_gpu import GradientConfig
from pallas_kernels.sparse_attention.combine_mosaic_gpu import CombineConfig
from pallas_kernels.sparse_attention.kv_outer import KVOuterConfig
from pallas_kernels.sparse_attention.kv_outer_mosaic_gpu import AttentionConfig
from pallas_kernels.sparse_attention.mosaic_gpu import SparseAttentionConfig
from pallas_kernels.sparse_attention.union_mosaic_gpu import UnionConfig

# The interpreter takes some 40 ms per tile: few queries and picks. Two thread blocks, short slices
# and few slots, so that every ring goes round.
SMALL = KVOuterConfig(
    attention=AttentionConfig(num_consumers=2, tiles_per_slice=2, num_thread_blocks=2),
    combine=CombineConfig(num_slots=2, num_thread_blocks=2),
)
UNION = UnionConfig(num_consumers=1, key_tile=64, ring=2)
SINGLE = KVOuterConfig(
    attention=AttentionConfig(num_consumers=1, num_kv_stages=1, num_thread_blocks=1),
    combine=CombineConfig(num_consumers=1, num_thread_blocks=1),
)
# Rows of 64 queries, as many per chunk as 2 heads of 64 dims in 3 slots leave.
CHUNKS = dataclasses.replace(SMALL, partial_bytes=64 * 3 * 16 * 64 * 2, queries_per_row=64)
BACKWARD = BackwardConfig(
    gradient=GradientConfig(num_query_slots=2, tiles_per_slice=2, num_thread_blocks=2),
    combine=CombineConfig(num_slots=2, num_thread_blocks=2),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and place of one call; without `slots` queries follow each other from the first on."""

    per_group: int = 16
    groups: int = 1
    batch: int = 1
    num_queries: int = 64
    num_keys: int = 192
    head_dim: int = 64
    block_size: int = 64
    top_k: int = 2
    density: float = 0.4
    query_offset: int | tuple[int, ...] = 128
    documents: tuple[tuple[int, int], ...] = ()
    dtype: str = "bfloat16"
    config: KVOuterConfig = SMALL
    scheme: str = "kv_outer"
    backward: BackwardConfig = BACKWARD

    def inputs(self):
        rng = np.random.default_rng(0)
        heads = self.per_group * self.groups
        for length, count in (
            (self.num_queries, heads),
            (self.num_keys, self.groups),
            (self.num_keys, self.groups),
        ):
            x = rng.normal(size=(self.batch, length, count, self.head_dim))
            yield jnp.asarray(x, self.dtype)

    def block_ids(self):
        """Ascending, then -1: any block, of the future and of other documents too."""
        shape = self.batch, self.groups, self.num_queries, self.top_k
        num_blocks = -(-self.num_keys // self.block_size)
        return ascending_picks(
            shape, num_blocks, lambda rng, most: rng.binomial(most, self.density)
        )

    def segment_ids(self):
        return segments_of(self.documents, self.batch, self.num_keys)

    def expected(self, q, k, v, block_ids):
        exact = (np.asarray(x, np.float64) for x in (q, k, v))
        return numpy_oracle.attention(*exact, self.mask(block_ids), 0.2)

    def mask(self, block_ids):
        return numpy_oracle.support(
            self.batch,
            self.groups,
            self.num_queries,
            self.num_keys,
            block_ids,
            self.block_size,
            segment_ids=self.segment_ids(),
            query_offset=self.query_offset,
        )

    def attend(self, q, k, v, block_ids):
        """To be traced for some target."""
        segments, offset = self.segment_ids(), self.query_offset
        return mosaic_gpu.sparse_attention(
            q,
            k,
            v,
            jnp.asarray(block_ids),
            None if segments is None else jnp.asarray(segments),
            offset if isinstance(offset, int) else jnp.asarray(offset, jnp.int32),
            block_size=self.block_size,
            scale=0.2,
            config=SparseAttentionConfig(self.scheme, UNION, self.config, backward=self.backward),
        )


def interpreted(races=False):
    """Shared and device memory that nobody wrote is NaN."""
    return traced_for(Target(interpret=plgpu.InterpretGPUParams(detect_races=races)))


def run(case, q, k, v, block_ids, races=False):
    with interpreted(races):
        return compiled(case.attend)(q, k, v, block_ids)
