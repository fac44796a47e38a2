"""Compiles for a TPU on a machine without one.

Needs libtpu (extra `aot`), which is the TPU's whole compiler: memory that does not fit, layouts
that cannot be had and operations that a chip lacks are errors here as they are there.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from pallas_kernels.mosaic_tpu import CHIPS, Target, traced_for

# Read by libtpu when it loads: it is not to look for a TPU, nor for the machine that would hold
# one, and other processes may load it too, since none of them takes a TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def tpu_devices(topology: str) -> list[Any]:
    """Devices of a topology such as "v5p:2x2x2": to shard over and compile for, not to run on."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def lower_for_tpu(fn: Callable, *args: Any, chip: str) -> jax.stages.Lowered:
    """Lowers `fn`, with the kernels it calls, for one device of a chip.

    Args:
      fn: function of arrays.
      *args: pytrees of shapes and dtypes.
      chip: a key of `CHIPS`.
    """
    device = tpu_devices(CHIPS[chip].topology)[0]
    sharding = SingleDeviceSharding(device)
    # Some operations are lowered by what the chip has: jax asks the mesh in place of a device.
    kind = AbstractDevice(device.device_kind, CHIPS[chip].num_cores, device.platform)
    anywhere = AbstractMesh((), (), abstract_device=kind)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    with traced_for(Target(CHIPS[chip])), use_abstract_mesh(anywhere):
        return jax.jit(fn).lower(*placed)


def compile_for_tpu(fn: Callable, *args: Any, chip: str) -> jax.stages.Compiled:
    """Compiles `fn` to the machine code of one device of a chip; arguments as `lower_for_tpu`."""
    return lower_for_tpu(fn, *args, chip=chip).compile()
