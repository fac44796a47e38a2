"""`sparse_attention` forward on NVIDIA Hopper by union tiles: for selections that overlap.

A thread block owns R neighbouring queries of one group. Its producer loads every block that any of
them selected, once; each consumer warpgroup holds 64 rows, a few queries times the group's heads,
skips the blocks that none of its queries selected and leaves out the other rows of those it
attends. One online softmax per row, one write per output: no partial results, the same bits in
every run.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.mosaic_gpu import (
    MATRIX,
    ROWS,
    SHARED_MEMORY_BYTES,
    Target,
    by_rows,
    current_target,
    full_rows,
    matmul,
    matmul_add,
    run_roles,
    swizzled,
)
from pallas_kernels.sparse_attention.union_tiles import (
    LIST_ALIGNMENT,
    UnionTiles,
    union_tiles,
)

# Rows of one matrix product, and the group sizes that fill them with whole queries. Fewer than 8
# heads are padded: a tile in shared memory has 8 rows.
WARPGROUP_ROWS = 64
GROUP_SIZES = (8, 16, 32, 64)

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class UnionConfig:
    """How the union kernel uses a core.

    Attributes:
      num_consumers: warpgroups that compute, 64 rows each.
      key_tile: keys per step of the online softmax, 64 or 128, a divisor of the block size.
      ring: tiles of `key_tile` keys or values in flight, at least 2.
    """

    num_consumers: int = 3
    key_tile: int = 128
    ring: int = 5

    def __post_init__(self):
        if not 1 <= self.num_consumers <= 3:
            raise ValueError(
                f"num_consumers={self.num_consumers} must be 1 to 3: registers end there"
            )
        if self.key_tile not in (64, 128):
            raise ValueError(f"key_tile={self.key_tile} must be 64 or 128")
        if self.ring < 2:
            raise ValueError(f"ring={self.ring} must hold a key tile and a value tile: at least 2")

    @classmethod
    def for_block(cls, block_size: int, head_dim: int) -> "UnionConfig":
        """The form for a shape without tuned values: whole blocks, as many as fit in flight."""
        ring = min(10, 160 * 1024 // (block_size * head_dim * 2))
        return cls(num_consumers=3, key_tile=block_size, ring=ring)

    def queries(self, group_size: int) -> int:
        """R: queries per tile, for `group_size` query heads per KV head."""
        return self.num_consumers * (WARPGROUP_ROWS // padded_group(group_size))


def padded_group(group_size: int) -> int:
    """Heads per query in the kernel's rows."""
    for size in GROUP_SIZES:
        if group_size <= size:
            return size
    raise NotImplementedError(
        f"union tiles serve at most {GROUP_SIZES[-1]} query heads per KV head, not {group_size}"
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Everything static of one call."""

    batch: int
    num_queries: int
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    list_length: int
    dtype: jnp.dtype
    scale: float
    config: UnionConfig

    @property
    def per_warpgroup(self) -> int:
        """Queries per consumer warpgroup."""
        return WARPGROUP_ROWS // self.group

    @property
    def per_tile(self) -> int:
        """Queries per thread block."""
        return self.per_warpgroup * self.config.num_consumers

    @property
    def num_tiles(self) -> int:
        return -(-self.num_queries // self.per_tile)

    @property
    def parts(self) -> int:
        """Steps of the online softmax per block."""
        return self.block_size // self.config.key_tile

    @property
    def shared_memory_bytes(self) -> int:
        """What the buffers and barriers of `_kernel` take."""
        item = self.dtype.itemsize
        rows = self.config.num_consumers * WARPGROUP_ROWS
        ring = self.config.ring * self.config.key_tile
        buffers = rows * self.head_dim * item, ring * self.head_dim * item, rows * 4
        barriers = self.config.num_consumers + 1 + 2 * self.config.ring
        aligned = sum(-(-size // 1024) * 1024 for size in (*buffers, 8 * self.list_length))
        return aligned + 8 * barriers


def union(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    block_ids: Int[Array, "B Hkv T K"],
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    scale: float,
    config: UnionConfig,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """Attention over the selected blocks, tile by tile of neighbouring queries.

    Args:
      q: queries, bfloat16 or float16, D 64 or 128.
      k: keys.
      v: values.
      block_ids: for each query only blocks of which it sees a token, each once; -1 anywhere.
      query_offset: the key slot of the first query.
      block_size: tokens per block, a multiple of `config.key_tile`.
      scale: of the scores, positive.
      config: the form of the kernel.

    Returns:
      The output in q's dtype and the natural log-sum-exp of the scaled scores in float32; 0 and
      -inf for a query without blocks.

    Raises:
      NotImplementedError: a shape or dtype that the kernel does not serve.
    """
    queries = config.queries(q.shape[2] // k.shape[2])
    tiles = union_tiles(block_ids, queries, -(-k.shape[1] // block_size))
    return attend_tiles(
        q, k, v, tiles, query_offset, block_size=block_size, scale=scale, config=config
    )


def attend_tiles(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    tiles: UnionTiles,
    query_offset: Int[Array, "B"] | int,
    *,
    block_size: int,
    scale: float,
    config: UnionConfig,
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B Hq T"]]:
    """`union` of tiles that are already made, of `config.queries(G)` queries each."""
    target = current_target()
    problem = _problem(q, k, tiles, block_size, scale, config)
    batch, num_queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    offsets = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
    q = q.reshape(batch, num_queries, kv_heads, group, head_dim)
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, problem.group - group), (0, 0)))
    # Whole blocks, so that no copy reads past the end; the causal mask hides what is added.
    pad = ((0, 0), (0, -k.shape[1] % block_size), (0, 0), (0, 0))
    k, v = jnp.pad(k, pad), jnp.pad(v, pad)
    # A copy takes at most 256 entries along an axis, a list may have more: it is cut into rows.
    lists = tiles.lists.reshape(*tiles.counts.shape, -1, LIST_ALIGNMENT)
    o, lse = _kernel(problem, target)(q, k, v, lists, tiles.counts, offsets)
    lse = lse.reshape(batch, kv_heads, -1, problem.group)[:, :, :num_queries, :group]
    lse = lse.swapaxes(2, 3).reshape(batch, heads, num_queries)
    return o[:, :, :, :group].reshape(batch, num_queries, heads, head_dim), lse


def _problem(q, k, tiles: UnionTiles, block_size: int, scale: float, config: UnionConfig):
    """The call's static facts, or NotImplementedError."""
    batch, num_queries, heads, head_dim = q.shape
    problem = _Problem(
        batch=batch,
        num_queries=num_queries,
        kv_heads=k.shape[2],
        group=padded_group(heads // k.shape[2]),
        head_dim=head_dim,
        block_size=block_size,
        list_length=tiles.lists.shape[-1],
        dtype=jnp.dtype(q.dtype),
        scale=scale,
        config=config,
    )
    reason = None
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        reason = f"bfloat16 or float16 inputs of one dtype, not q {q.dtype} and k {k.dtype}"
    elif head_dim not in (64, 128):
        reason = f"head_dim 64 or 128, not {head_dim}"
    elif block_size % config.key_tile:
        reason = f"block_size={block_size} to be a multiple of key_tile={config.key_tile}"
    elif scale <= 0:
        reason = f"a positive scale, not {scale}"
    elif problem.shared_memory_bytes > SHARED_MEMORY_BYTES:
        reason = (
            f"{problem.shared_memory_bytes} bytes of shared memory, a core has "
            f"{SHARED_MEMORY_BYTES}; choose a smaller ring"
        )
    if reason:
        raise NotImplementedError(f"union tiles need {reason}")
    if tiles.counts.shape[-1] != problem.num_tiles:
        raise ValueError(
            f"{tiles.counts.shape[-1]} tiles do not hold {num_queries} queries; make them with "
            f"queries={problem.per_tile}"
        )
    return problem


def _kernel(problem: _Problem, target: Target):
    """The kernel as a function (q, k, v, lists, counts, offsets) -> (o, lse), padded shapes."""
    config, group, head_dim = problem.config, problem.group, problem.head_dim
    transforms = swizzled(problem.dtype)
    shape = problem.batch, problem.num_queries, problem.kv_heads, group, head_dim
    rows = problem.batch, problem.kv_heads, problem.num_tiles, config.num_consumers, WARPGROUP_ROWS
    ring = config.ring, config.key_tile, head_dim
    scratch = [
        plgpu.SMEM(
            (config.num_consumers, WARPGROUP_ROWS, head_dim), problem.dtype, transforms=transforms
        ),
        plgpu.SMEM(ring, problem.dtype, transforms=transforms),
        plgpu.SMEM((config.num_consumers, WARPGROUP_ROWS), jnp.float32),
        plgpu.SMEM((2 * problem.list_length // LIST_ALIGNMENT, LIST_ALIGNMENT), jnp.int32),
        plgpu.Barrier(num_arrivals=problem.per_warpgroup, num_barriers=config.num_consumers),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=config.ring),
        plgpu.Barrier(num_arrivals=config.num_consumers, num_barriers=config.ring),
    ]
    if target.interpret is not None:
        staging = config.num_consumers, WARPGROUP_ROWS, config.key_tile
        scratch.append(plgpu.SMEM(staging, problem.dtype, transforms=transforms))

    def body(*refs):
        block = _ThreadBlock(problem, target, *refs)
        run_roles(config.num_consumers, block.consume, block.produce)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(shape, problem.dtype),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ),
        scratch_types=scratch,
        # The last axis runs fastest: neighbouring tiles of one group run together and share its
        # keys and values in the L2 cache.
        grid=(problem.batch, problem.kv_heads, problem.num_tiles),
        grid_names=("batch", "group", "tile"),
        num_threads=config.num_consumers + 1,
        thread_name="warpgroup",
        # Row sums and maxima stay within a warp.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        interpret=target.interpret,
        kernel_name="union",
    )


class _ThreadBlock:
    """One tile's work, split over the warpgroups.

    Key and value tiles go through one ring in the order they are used: keys, values, keys, ...
    """

    def __init__(self, problem: _Problem, target: Target, *refs):
        self.problem, self.target = problem, target
        self.q, self.k, self.v, self.lists, self.counts, self.offsets, self.o, self.lse = refs[:8]
        self.q_tile, self.ring, self.lse_tile, self.blocks = refs[8:12]
        self.q_loaded, self.list_loaded, self.loaded, self.consumed = refs[12:16]
        self.staging = refs[16] if len(refs) > 16 else None
        self.batch, self.group = lax.axis_index("batch"), lax.axis_index("group")
        self.tile = lax.axis_index("tile")

    def produce(self):
        """Loads the list of blocks, then their keys and values as the ring has room."""
        problem, config = self.problem, self.problem.config
        here = self.batch, self.group, self.tile
        plgpu.copy_gmem_to_smem(self.lists.at[here], self.blocks, self.list_loaded)
        count = self.counts[here]
        plgpu.barrier_wait(self.list_loaded)

        @pl.loop(0, count)
        def _(step):
            start = self._entry(0, step) * problem.block_size
            for part in range(problem.parts):
                keys = pl.ds(start + part * config.key_tile, config.key_tile)
                for i, source in enumerate((self.k, self.v)):
                    self._load(source.at[self.batch, keys, self.group], self._index(step, part, i))

        # The interpreter wants every barrier awaited to the end.
        total = self._index(count, 0, 0)

        @pl.loop(jnp.maximum(total - config.ring, 0), total)
        def _(index):
            plgpu.barrier_wait(self.consumed.at[self._slot(index)])

    def _entry(self, which: int, step):
        """Of the tile's list: the id of its `step`-th block (0), or who selected it (1)."""
        place = which * self.problem.list_length + step
        return self.blocks[place // LIST_ALIGNMENT, place % LIST_ALIGNMENT]

    def _load(self, source, index):
        slot = self._slot(index)

        @pl.when(index >= self.problem.config.ring)
        def _():
            plgpu.barrier_wait(self.consumed.at[slot])

        plgpu.copy_gmem_to_smem(source, self.ring.at[slot], self.loaded.at[slot])

    def _index(self, step, part: int, values: int):
        """Number of a key tile (values 0) or value tile (1) in the order of the ring."""
        return (step * self.problem.parts + part) * 2 + values

    def _slot(self, index):
        return lax.rem(index, jnp.int32(self.problem.config.ring))

    def consume(self, warpgroup):
        """Attends the tile's blocks for 64 rows and writes their outputs."""
        problem = self.problem
        first = self.tile * problem.per_tile + warpgroup * problem.per_warpgroup

        @pl.loop(0, problem.per_warpgroup)
        def _(i):
            query = jnp.minimum(first + i, problem.num_queries - 1)
            plgpu.copy_gmem_to_smem(
                self.q.at[self.batch, query, self.group],
                self.q_tile.at[warpgroup, self._rows(i)],
                self.q_loaded.at[warpgroup],
            )

        count = self.counts[self.batch, self.group, self.tile]
        slot = self.offsets[self.batch] + first
        plgpu.barrier_wait(self.list_loaded)
        plgpu.barrier_wait(self.q_loaded.at[warpgroup])
        zeros = jnp.zeros((WARPGROUP_ROWS, problem.head_dim), jnp.float32)
        state = (
            plgpu.layout_cast(zeros, MATRIX),
            full_rows(WARPGROUP_ROWS, -jnp.inf),
            full_rows(WARPGROUP_ROWS, 0.0),
        )

        def step(step, state):
            members = self._entry(1, step) >> (warpgroup * problem.per_warpgroup)
            members &= (1 << problem.per_warpgroup) - 1
            start = self._entry(0, step) * problem.block_size - slot
            attend = functools.partial(self._attend, step, start, members, warpgroup)
            return lax.cond(members != 0, attend, functools.partial(self._skip, step), state)

        self._write(warpgroup, first, *lax.fori_loop(0, count, step, state))

    def _rows(self, query):
        """Where a query of the warpgroup lies in its 64 rows."""
        return pl.ds(query * self.problem.group, self.problem.group)

    def _skip(self, step, state):
        for i in range(2 * self.problem.parts):
            slot = self._slot(self._index(step, 0, 0) + i)
            plgpu.barrier_wait(self.loaded.at[slot])
            plgpu.barrier_arrive(self.consumed.at[slot])
        return state

    def _attend(self, step, start, members, warpgroup, state):
        """One block, that begins `start` slots after the warpgroup's first query."""
        key_tile = self.problem.config.key_tile
        for part in range(self.problem.parts):
            slot = self._slot(self._index(step, part, 0))
            plgpu.barrier_wait(self.loaded.at[slot])
            keys = self.ring.at[slot].transpose((1, 0))
            s = matmul(self.q_tile.at[warpgroup], keys, (WARPGROUP_ROWS, key_tile))
            plgpu.barrier_arrive(self.consumed.at[slot])
            first = start + part * key_tile
            causal = functools.partial(self._causal, first)
            s = lax.cond(first + key_tile - 1 > 0, causal, lambda s: s, s)
            state = self._accumulate(s, self._index(step, part, 1), members, warpgroup, state)
        return state

    def _causal(self, first, s):
        """-inf where the key is after the query: `first` is where keys begin against queries."""
        row = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=MATRIX)
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=MATRIX)
        query = row >> int(math.log2(self.problem.group))
        return jnp.where(key + first <= query, s, -jnp.inf)

    def _accumulate(self, s, value_index, members, warpgroup, state):
        """A step of the online softmax, in units of log2, over scores [64, key_tile]."""
        problem = self.problem
        o, top, total = state
        factor = problem.scale * _LOG2_E
        row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROWS)
        query = row >> int(math.log2(problem.group))
        member = ((jnp.broadcast_to(members, row.shape) >> query) & 1) == 1
        new_top = jnp.where(member, jnp.maximum(top, s.max(axis=1) * factor), top)
        seen = new_top > -jnp.inf
        # A row that leaves this block out, or has seen nothing, gets weights exp2(-inf).
        shift = jnp.where(member & seen, new_top, jnp.inf)
        p = jnp.exp2(s * factor - by_rows(shift, s.shape))
        decay = jnp.exp2(top - jnp.where(seen, new_top, 0.0))
        total = total * decay + p.sum(axis=1)
        o = o * by_rows(decay, o.shape)
        slot = self._slot(value_index)
        plgpu.barrier_wait(self.loaded.at[slot])
        staging = None if self.staging is None else self.staging.at[warpgroup]
        o = matmul_add(o, p.astype(problem.dtype), self.ring.at[slot], staging, self.target)
        plgpu.barrier_arrive(self.consumed.at[slot])
        return o, new_top, total

    def _write(self, warpgroup, first, o, top, total):
        problem = self.problem
        empty = total == 0
        share = jnp.where(empty, 0.0, 1 / total)
        o = o * by_rows(share, o.shape)
        # The queries have been read for the last time: their place holds the outputs.
        self.q_tile[warpgroup] = o.astype(problem.dtype)
        self.lse_tile[warpgroup] = jnp.where(empty, -jnp.inf, top * _LN_2 + jnp.log(total))
        plgpu.commit_smem()

        @pl.loop(0, jnp.clip(problem.num_queries - first, 0, problem.per_warpgroup))
        def _(i):
            plgpu.copy_smem_to_gmem(
                self.q_tile.at[warpgroup, self._rows(i)],
                self.o.at[self.batch, first + i, self.group],
            )

        here = self.batch, self.group, self.tile, warpgroup
        plgpu.copy_smem_to_gmem(self.lse_tile.at[warpgroup], self.lse.at[here])
        plgpu.wait_smem_to_gmem(0)
