"""What a cycle of a TPU core can do, so far as a schedule's time depends on it.

A bundle is issued per cycle, except where the MXU is behind: a product of one register of rows
occupies an MXU for several cycles, which the schedule does not always leave room for. How many
follows from the chip's peak. A v5 MXU of 128 x 128 takes one row of bf16 per cycle, and the
compiler spaces its 8-bit products, whose registers hold 32 rows at twice the rate, by 16 bundles as
it must, but those of bf16 by 11 in place of 16. The MXUs of v6e and v7x, 256 x 256, are scheduled
at 8 bundles per 16 rows of bf16. That is two rows per cycle, from which their clocks follow.
"""

import dataclasses
import functools
import re

from pallas_kernels.mosaic_tpu import CHIPS, Chip

# Bytes of a row's element, by what the compiler writes into a product's name.
_ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "f8": 1}
GRANULE_BYTES = 32  # in which copies are counted


@dataclasses.dataclass(frozen=True)
class Machine:
    """One core of a chip.

    Attributes:
      chip: its published figures.
      num_mxus: of the core.
      rows_per_cycle: of bf16, that an MXU multiplies.
      branch_delay: bundles behind a branch that still run before it is taken.
    """

    chip: Chip
    num_mxus: int
    rows_per_cycle: int
    branch_delay: int

    @functools.cached_property
    def clock_hz(self) -> float:
        """Cycles per second, derived from the published peak: 1.5, 1.75, 1.75 and 2.19 GHz."""
        chip = self.chip
        per_cycle = 2 * chip.mxu_size**2 * self.rows_per_cycle * self.num_mxus * chip.num_cores
        return chip.bf16_flops / per_cycle

    def product_cycles(self, mnemonic: str) -> int:
        """Cycles for which a matrix product occupies its MXU.

        Args:
          mnemonic: as in "vmatmul.bf16.gmra.mxu0": one register of rows, packed for its type.

        Raises:
          ValueError: a type of elements that is not known.
        """
        found = re.search(r"\.(f32|bf16|f16|s8|u8|f8)", mnemonic)
        if found is None:
            raise ValueError(f"{mnemonic!r} is a product of no known type of elements")
        element = _ELEMENT_BYTES[found[1]]
        rows = 8 * 4 // element
        # float32 goes through in one pass of bf16; 8-bit products run at twice the rate.
        return rows // (self.rows_per_cycle * (2 if element == 1 else 1))


MACHINES = {
    name: Machine(CHIPS[name], *figures)
    for name, figures in {
        "v5e": (4, 1, 4),
        "v5p": (4, 1, 4),
        "v6e": (2, 2, 4),
        "v7x": (2, 2, 1),
    }.items()
}
