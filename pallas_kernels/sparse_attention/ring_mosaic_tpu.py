"""A ring of buffers through which the key blocks of one tile after another arrive from HBM.

The blocks that a tile needs are known from its list, so that copies run ahead of the computation,
across the border to the next tile: a tile is short (some microseconds), and a copy takes about one
until its first byte is there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.sparse_attention.reverse_tiles import ReverseTiles
from pallas_kernels.sparse_attention.tile_lists import COUNT, PAGE, SCALARS

# What the ring remembers from one tile to the next: the slot of the tile's first step, and how many
# of its steps were started already.
FIRST_SLOT, STARTED = range(2)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Steps of `blocks_per_step` blocks each; in the body of a kernel.

    Attributes:
      now: [1, NUM_ROWS, L], the list of this tile, in scalar memory.
      after: the list of the tile that comes next on this core.
      has_next: whether there is one.
      sources: arrays in HBM, [pages, rows, lanes]; first the keys, [pages, Bk, D].
      buffers: for each source [depth, blocks_per_step * rows, lanes]; depth is a power of two.
      semaphores: [sources, depth].
      state: [2] in scalar memory.
    """

    now: Any
    after: Any
    has_next: jax.Array
    sources: tuple[Any, ...]
    buffers: tuple[Any, ...]
    semaphores: Any
    state: Any

    @property
    def depth(self) -> int:
        """Steps that the buffers hold."""
        return self.buffers[0].shape[0]

    @property
    def block_size(self) -> int:
        """Rows of a block."""
        return self.sources[0].shape[1]

    @property
    def blocks_per_step(self) -> int:
        """Blocks that arrive together."""
        return self.buffers[0].shape[1] // self.block_size

    @property
    def count(self) -> jax.Array:
        """Blocks of this tile."""
        return self.now[0, SCALARS, COUNT]

    def blocks(self, first: int, count: int, source: int = 0) -> Any:
        """Where some of a step's blocks lie in the buffer of a source."""
        rows = self.sources[source].shape[1]
        return pl.ds(first * rows, count * rows)

    def num_steps(self, tile: Any) -> jax.Array:
        """Steps of a tile's list."""
        count = tile[0, SCALARS, COUNT] + self.blocks_per_step - 1
        return jax.lax.div(count, self.blocks_per_step)

    def slot(self, step: jax.Array | int) -> jax.Array:
        """The buffer that a step of this tile arrives in."""
        return jax.lax.rem(self.state[FIRST_SLOT] + step, self.depth)

    def reset(self) -> None:
        """Before the first tile of a core."""
        self.state[FIRST_SLOT] = 0
        self.state[STARTED] = 0

    def run(self, per_part: int, compute: Callable[[jax.Array, jax.Array, int], None]) -> None:
        """Goes through the tile: calls `compute(step, slot, count)` for each step.

        Args:
          per_part: `count` is a multiple of it. The last parts of a step are left out where none of
            their blocks is the tile's; those that are left in are scheduled together, so that one's
            products run under another's exponentials.
          compute: works on the first `count` blocks in the buffers' `slot`.
        """

        def body(step, _):
            self._advance(step)
            self._wait(step)
            left = jnp.minimum(self.count - step * self.blocks_per_step, self.blocks_per_step)
            sizes = range(per_part, self.blocks_per_step + 1, per_part)
            branches = [functools.partial(compute, step, self.slot(step), size) for size in sizes]
            jax.lax.switch(jax.lax.div(left - 1, per_part), branches)

        self._fill()
        jax.lax.fori_loop(0, self.num_steps(self.now), body, None)
        self._finish()

    def _fill(self) -> None:
        """Starts a tile's first copies, those that the tile before it did not."""
        stop = jnp.minimum(self.depth - 1, self._num_known())
        jax.lax.fori_loop(self.state[STARTED], stop, lambda step, _: self._start(step), None)

    def _advance(self, step: jax.Array | int) -> None:
        """Starts the copies furthest ahead, into the buffer that the step before this one left."""
        ahead = step + self.depth - 1
        pl.when(ahead < self._num_known())(lambda: self._start(ahead))

    def _finish(self) -> None:
        """Hands over to the next tile."""
        steps = self.num_steps(self.now)
        started = jnp.minimum(steps + self.depth - 1, self._num_known()) - steps
        self.state[FIRST_SLOT] = self.slot(steps)
        self.state[STARTED] = started

    def _wait(self, step: jax.Array | int) -> None:
        """Until a step's blocks are there; nothing is scheduled across it."""
        slot = self.slot(step)
        # A wait takes as long as dozens of products: one for all copies of a source.
        for source, buffer in enumerate(self.buffers):
            everything = buffer.at[slot]
            pltpu.make_async_copy(everything, everything, self.semaphores.at[source, slot]).wait()

    def _num_known(self) -> jax.Array:
        """Steps of this tile and the next."""
        after = jnp.where(self.has_next, self.num_steps(self.after), 0)
        return self.num_steps(self.now) + after

    def _start(self, step: jax.Array | int) -> None:
        """Starts the copies of a step, counted from this tile's first one on into the next tile."""
        steps = self.num_steps(self.now)
        mine = step < steps
        first = jnp.where(mine, step, step - steps) * self.blocks_per_step
        count = jnp.where(mine, self.count, self.after[0, SCALARS, COUNT])
        slot = self.slot(step)
        for place in range(self.blocks_per_step):
            # Where a step has no block, the last one comes again: a branch per block would take
            # longer, and what is multiplied by a weight of 0 must be finite.
            entry = jnp.minimum(first + place, count - 1)
            page = jnp.where(mine, self.now[0, PAGE, entry], self.after[0, PAGE, entry])
            for source in range(len(self.sources)):
                self._copy(source, slot, place, page).start()

    def _copy(self, source: int, slot: jax.Array, place: int, page: Any):
        part = self.buffers[source].at[slot, self.blocks(place, 1, source)]
        return pltpu.make_async_copy(
            self.sources[source].at[page], part, self.semaphores.at[source, slot]
        )


class InTurn(NamedTuple):
    """How a grid goes through lists, those of a core one after the other.

    Attributes:
      grid: cores, and lists of a core.
      number: of a grid step's list, from the step's indices and the scalars fetched before; behind
        a core's last list, that list.
      lists: where the lists of this step and the next one are read, in scalar memory.
    """

    grid: tuple[int, Any]
    number: Callable[..., Any]
    lists: tuple[pl.BlockSpec, pl.BlockSpec]


def tiles_in_turn(lists: Int[Array, "tiles 4 L"], cores: int) -> InTurn:
    """Equal parts of the tiles for each core, whose number divides theirs."""
    per_core = lists.shape[0] // cores

    def number(core, i):
        return core * per_core + jnp.minimum(i, per_core - 1)

    return InTurn((cores, per_core), number, _now_and_after(lists, number))


def slices_in_turn(slices: ReverseTiles) -> InTurn:
    """Each core's slices; `slices.owners` and `slices.first_slices` are fetched before."""
    first_slices = slices.first_slices
    longest = (first_slices[1:] - first_slices[:-1]).max()

    def number(core, i, owners, first):
        return jnp.minimum(first[core] + i, first[core + 1] - 1)

    grid = first_slices.shape[0] - 1, longest
    return InTurn(grid, number, _now_and_after(slices.lists, number))


def _now_and_after(lists: Array, number: Callable) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    def spec(ahead: int) -> pl.BlockSpec:
        def index(core, i, *scalars):
            return number(core, i + ahead, *scalars), 0, 0

        return pl.BlockSpec((1, *lists.shape[1:]), index, memory_space=pltpu.SMEM)

    return spec(0), spec(1)
