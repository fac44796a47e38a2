"""Devices that can be compiled for on a machine without them, by the names that flags have."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.experimental import topologies

from msa_jax.config import ConfigError
from pallas_kernels import mosaic_gpu, mosaic_tpu
from pallas_kernels.ahead_of_time import H100
from pallas_kernels.ahead_of_time_tpu import tpu_devices
from pallas_kernels.mosaic_tpu import CHIPS

TPUS = {f"tpu-{name}": name for name in CHIPS}
NAMES = (*TPUS, "h100")
_H100_BYTES = 84_942_979_072


@dataclasses.dataclass(frozen=True)
class Place:
    """What is compiled for.

    Attributes:
      name: of `NAMES`, with ":2x2x2" behind it for a topology.
      chip: key of `CHIPS`; "" for an H100.
      topology: as jax names it; "" for a single device.
    """

    name: str
    chip: str
    topology: str

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return CHIPS[self.chip].hbm_bytes if self.chip else _H100_BYTES

    def devices(self) -> list[Any]:
        """All of the topology's, or the single one."""
        if not self.chip:
            name = {"topology": "1x1x1", "target_config": H100}
            return topologies.get_topology_desc(platform="cuda", **name).devices
        devices = tpu_devices(self.topology or CHIPS[self.chip].topology)
        return devices if self.topology else devices[:1]

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """Kernels traced inside are for this device."""
        if self.chip:
            with mosaic_tpu.traced_for(mosaic_tpu.Target(CHIPS[self.chip])):
                yield
        else:
            with mosaic_gpu.traced_for(mosaic_gpu.Target()):
                yield


def parse_target(text: str) -> Place:
    """The place that "tpu-v5p", "tpu-v5p:2x2x2" or "h100" names.

    Raises:
      ConfigError: none of them.
    """
    name, _, slices = text.partition(":")
    if name not in NAMES or (slices and name not in TPUS):
        raise ConfigError(
            f"--target={text}: choose from {', '.join(NAMES)}; a topology is written tpu-v5p:2x2x2"
        )
    chip = TPUS.get(name, "")
    family = CHIPS[chip].topology.partition(":")[0] if chip else ""
    return Place(text, chip, f"{family}:{slices}" if slices else "")
