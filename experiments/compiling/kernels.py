"""The kernels of an operation as programs of their own, without what XLA does around them.

A kernel's schedule is the same there, and the compiler spends most of its time on the rest: on the
sorts of a million tokens' lists for minutes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from experiments.compiling.programs import Program
from experiments.compiling.targets import Place
from pallas_kernels.mosaic_tpu import CHIPS


@dataclasses.dataclass(frozen=True)
class KernelProgram:
    """One call of a kernel.

    Attributes:
      name: as `pallas_call` was given it.
      runs: how often the operation runs it.
      program: the call alone.
    """

    name: str
    runs: int
    program: Program


def kernels_of(program: Program, place: Place) -> list[KernelProgram]:
    """The kernels that a program calls, in order.

    Args:
      program: an operation.
      place: a TPU, to trace for.

    Raises:
      LookupError: one stands in a loop of which nobody knows how often it runs.
    """
    # Equations keep the mesh that they are traced under, which says what the chip has.
    device = place.devices()[0]
    kind = AbstractDevice(device.device_kind, CHIPS[place.chip].num_cores, device.platform)
    with place.traced(), use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        jaxpr = jax.make_jaxpr(program.function)(*program.arguments)
    return [
        KernelProgram(equation.params["name"], runs, _alone(equation))
        for equation, runs in _calls(jaxpr.jaxpr, 1)
    ]


def _calls(jaxpr: Jaxpr, runs: int) -> Iterator[tuple[JaxprEqn, int]]:
    """Calls of kernels, and how often each runs if the jaxpr does so often."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation, runs
            continue
        inner = runs * equation.params["length"] if equation.primitive.name == "scan" else runs
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    part = part.jaxpr if isinstance(part, ClosedJaxpr) else part
                    found = list(_calls(part, inner))
                    if found and equation.primitive.name == "while":
                        raise LookupError(f"{found[0][0].params['name']} stands in a while loop")
                    yield from found


def _alone(equation: JaxprEqn) -> Program:
    variables = list({v: None for v in equation.invars if not isinstance(v, Literal)})

    def call(*arrays):
        known = dict(zip(variables, arrays, strict=True))
        inputs = [v.val if isinstance(v, Literal) else known[v] for v in equation.invars]
        return equation.primitive.bind(*inputs, **equation.params)

    call.__name__ = equation.params["name"]  # which its instruction gets
    return Program(call, tuple(_struct(variable.aval) for variable in variables))


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
