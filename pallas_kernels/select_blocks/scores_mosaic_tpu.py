"""Block scores on TPU: keys stream through the MXU against a tile of rows that stays.

Scores are transposed, S^T = K Q^T: rows, a query in one head each, lie on lanes and keys on
sublanes, so that the maximum over a block's keys is taken between registers first and between a
register's 8 sublanes once per block. Only those maxima are kept, in VMEM.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import SUBLANES

# Stands for the maximum of a block with a NaN; an overflow counts as the largest number.
SPOILT = jnp.inf


class KeyRange(NamedTuple):
    """The keys that a tile of rows sees.

    Attributes:
      row: of the batch.
      first_chunk: chunk c holds the keys from `c * chunk` on.
      num_chunks: may be 0.
      end_block: blocks from there on are not needed.
      pages_ref: the page that holds each block; None where keys lie in their order.
    """

    row: Any
    first_chunk: Any
    num_chunks: Any
    end_block: Any
    pages_ref: Any


@dataclasses.dataclass(frozen=True)
class KeyCopies:
    """Copies of chunks of keys from HBM into a ring of buffers.

    Past blocks are whole ones: of keys that end within a chunk only whole blocks are copied, and
    what is behind them in the buffer is never chosen.

    Attributes:
      keys: [B, S, Di] in HBM, or pages of a block each, [P, Bk, Di].
      buffers: [slots, chunk, Di] in VMEM.
      semaphores: one per slot.
      block_size: Bk.
    """

    keys: Any
    buffers: Any
    semaphores: Any
    block_size: int

    @property
    def slots(self) -> int:
        """Length of the ring."""
        return self.buffers.shape[0]

    @property
    def blocks_per_chunk(self) -> int:
        """A multiple of 8."""
        return self.buffers.shape[1] // self.block_size

    def start(self, of: KeyRange, number) -> None:
        """Starts the copy of the chunk of this number, counted from the first one, if there is."""

        @pl.when(number < of.num_chunks)
        def _():
            self._each_copy(of, number, lambda copy: copy.start())

    def start_first(self, of: KeyRange) -> None:
        """Starts all but one of the ring's slots, which must be free."""
        for number in range(self.slots - 1):
            self.start(of, number)

    def wait(self, of: KeyRange, number):
        """Waits for a chunk that was started; returns where it lies, [chunk, Di]."""
        self._each_copy(of, number, lambda copy: copy.wait())
        return self.buffers.at[lax.rem(number, self.slots)]

    def _each_copy(self, of: KeyRange, number, act) -> None:
        """Acts on the copies that fill a chunk's buffer."""
        if of.pages_ref is not None:
            self._each_page(of, number, act)
            return
        chunk, size = of.first_chunk + number, self.buffers.shape[1]
        whole, rest = divmod(self.keys.shape[1], size)
        rest -= rest % self.block_size

        def act_on(length):
            start = pl.multiple_of(chunk * size, size)
            act(self._copy(self.keys.at[of.row, pl.ds(start, length)], number, 0))

        if whole:
            pl.when(chunk < whole)(lambda: act_on(size))
        if rest:
            pl.when(chunk == whole)(lambda: act_on(rest))

    def _each_page(self, of: KeyRange, number, act) -> None:
        first_block = (of.first_chunk + number) * self.blocks_per_chunk

        def act_on(i, _):
            page = of.pages_ref[0, 0, first_block + i]
            act(self._copy(self.keys.at[page], number, i * self.block_size))

        count = jnp.minimum(of.end_block - first_block, self.blocks_per_chunk)
        lax.fori_loop(0, count, act_on, None)

    def _copy(self, source, number, start):
        """The copy of [keys, Di] to where they begin in a chunk's buffer."""
        slot = lax.rem(number, self.slots)
        if not isinstance(start, int):
            start = pl.multiple_of(start, self.block_size)
        target = self.buffers.at[slot, pl.ds(start, source.shape[0])]
        return pltpu.make_async_copy(source, target, self.semaphores.at[slot])


def score_chunk(keys_ref, queries_ref, scores_ref, first_block, *, block_size: int) -> None:
    """Writes the maxima over the blocks of one chunk of keys, `SPOILT` for those with a NaN.

    Args:
      keys_ref: [chunk, Di].
      queries_ref: [Di, rows].
      scores_ref: [N, rows] float32, N a multiple of 8.
      first_block: the chunk's first, a multiple of 8.
      block_size: Bk; a chunk is a multiple of 8 blocks.
    """
    group = SUBLANES * block_size
    for number in range(keys_ref.shape[0] // group):
        start = pl.multiple_of(first_block + number * SUBLANES, SUBLANES)
        keys = keys_ref[pl.ds(number * group, group), :]
        scores_ref[pl.ds(start, SUBLANES), :] = _block_maxima(keys, queries_ref[...])


def _block_maxima(keys, queries):
    """[8, rows]: the maxima of keys @ queries over 8 blocks, `SPOILT` with a NaN among them."""
    if keys.dtype == jnp.int8:
        products = lax.dot(keys, queries, preferred_element_type=jnp.int32)
    else:
        exact = lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
        products = lax.dot(keys, queries, precision=exact, preferred_element_type=jnp.float32)
    # Registers first, the sublanes of one at last.
    products = products.reshape(SUBLANES, -1, SUBLANES, products.shape[1])
    maxima = functools.reduce(jnp.maximum, [products[:, i] for i in range(products.shape[1])])
    if keys.dtype != jnp.int8:
        # A maximum of two keeps a NaN everywhere, a reduction as the platform likes.
        maxima = jnp.minimum(maxima, jnp.finfo(jnp.float32).max)
        maxima = jnp.where(jnp.isnan(maxima), SPOILT, maxima)
    return maxima.max(1).astype(jnp.float32)
