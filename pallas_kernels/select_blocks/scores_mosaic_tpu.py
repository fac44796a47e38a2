"""Block scores on TPU: keys stream through the MXU against a tile of rows that stays.

Scores are transposed, S^T = K Q^T: rows, a query in one head each, lie on lanes and keys on
sublanes, so that the maximum over a block's keys is taken between registers first and between a
register's 8 sublanes once per block. Only those maxima are kept, in VMEM.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import SUBLANES

# Stands for the maximum of a block with a NaN; an overflow counts as the largest number.
SPOILT = jnp.inf


@dataclasses.dataclass(frozen=True)
class KeyCopies:
    """Copies of chunks of one batch row's keys from HBM into a ring of buffers.

    Chunk c holds the keys from `c * chunk` on. A past block is a whole one, so that of a last chunk
    that is cut short only whole blocks are copied, and none behind them is ever chosen.

    Attributes:
      keys: [B, S, Di] in HBM.
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

    def start(self, row, first_chunk, number, num_chunks) -> None:
        """Starts the copy of the chunk of this number, counted from the first one, if there is."""

        @pl.when(number < num_chunks)
        def _():
            self._each(row, first_chunk + number, number, lambda copy: copy.start())

    def start_first(self, row, first_chunk, num_chunks) -> None:
        """Starts all but one of the ring's slots, which must be free."""
        for number in range(self.slots - 1):
            self.start(row, first_chunk, number, num_chunks)

    def wait(self, row, first_chunk, number):
        """Waits for a chunk that was started; returns where it lies."""
        self._each(row, first_chunk + number, number, lambda copy: copy.wait())
        return self.buffers.at[lax.rem(number, self.slots)]

    def _each(self, row, chunk, number, act) -> None:
        """Acts on the copy of a chunk."""
        size, num_keys = self.buffers.shape[1], self.keys.shape[1]
        whole, rest = divmod(num_keys, size)
        rest -= rest % self.block_size
        slot = lax.rem(number, self.slots)

        def copy(length):
            start = pl.multiple_of(chunk * size, size)
            return pltpu.make_async_copy(
                self.keys.at[row, pl.ds(start, length)],
                self.buffers.at[slot, pl.ds(0, length)],
                self.semaphores.at[slot],
            )

        if whole:

            @pl.when(chunk < whole)
            def _():
                act(copy(size))

        if rest:

            @pl.when(chunk == whole)
            def _():
                act(copy(rest))


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
