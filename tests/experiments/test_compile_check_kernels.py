"""How often the loops of each TPU kernel run, against the schedules that the compiler makes."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from experiments.compiling import page, trips
from experiments.compiling.dumps import dumping_to, read_dump
from experiments.compiling.kernels import kernels_of
from experiments.compiling.machines import MACHINES
from experiments.compiling.programs import Options, Program, Shape, program
from experiments.compiling.targets import parse_target
from experiments.compiling.timing import kernel_timing
from experiments.compiling.worker import DUMP_VARIABLE, MARK

# Kernels alone are compiled for so many.
SHAPE = Shape(2**17)
# One with two cores per device and one whose loops and branches are laid out otherwise.
CHIPS = "v5p", "v7x"
# Kernels whose grid the data decide.
OVER_TILES = "sparse_attention_key_value_gradient", "index_kl_index_k_gradient"

# Kernels that cut the keys of a step into pieces, as wide as a register.
IN_PIECES = "index_kl_divergence", "index_kl_index_q_gradient"


@pytest.fixture(scope="module")
def schedules(tmp_path_factory):
    """Schedules of all kernels, by chip and name, and the records of the operations."""
    running = []
    for chip in CHIPS:
        folder = tmp_path_factory.mktemp(chip)
        orders = [
            order
            for order in page.orders(["128K"])
            if order["target"] == f"tpu-{chip}" and order.get("kernels_only")
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.compiling.worker"],
            env=os.environ | dumping_to(folder) | {DUMP_VARIABLE: str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        running.append((chip, folder, process, "".join(json.dumps(o) + "\n" for o in orders)))
    found = {}
    for chip, folder, process, lines in running:
        printed, _ = process.communicate(lines)
        marked = [line for line in printed.splitlines() if line.startswith(MARK)]
        records = [json.loads(line.removeprefix(MARK)) for line in marked]
        assert [record.get("error") for record in records] == [None] * len(page.OPERATIONS)
        for kernel in (kernel for record in records for kernel in record["kernels"]):
            name = kernel["name"].partition(".")[0]
            schedule, _ = read_dump(kernel["name"], folder, MACHINES[chip])
            found[chip, name] = schedule, kernel
    return found


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_has_an_entry_and_a_time(schedules, chip):
    assert {name for place, name in schedules if place == chip} == set(trips.KERNELS)
    for (_, name), (_, record) in schedules.items():
        assert record.get("ms", 0) > 0, (name, record.get("untimed"))


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", trips.KERNELS)
def test_what_an_entry_counts_is_in_the_schedule(schedules, chip, kernel):
    schedule, _ = schedules[chip, kernel]
    known = trips.expected(kernel, SHAPE, chip, schedule.root)
    sections = {section.path: section for section in schedule.root.walk()}
    loops = {path for path, s in sections.items() if path.split(".")[-1].startswith("L")}
    assert {path for path in loops if sections[path].trips is None} <= set(known.counts)
    named = {path for path in known.counts if "*" not in path}
    # A first or an only tile is no loop of its own where the compiler makes none of it.
    assert named - set(sections) == set()
    assert sections["Lm0.Lm0"].work == "m"
    if sections["Lm0"].trips is not None:
        assert sections["Lm0"].trips in (known.counts["Lm0"], known.counts["Lm0"] + 2)
    else:
        assert kernel in OVER_TILES
    branches = [known.counts[path] for path in named if path.startswith("Lm0.Lm0.Bm")]
    assert sum(branches) == pytest.approx(1 if branches else 0)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kernel", trips.KERNELS)
def test_copies_and_products_of_an_entry_are_those_of_the_schedule(schedules, chip, kernel):
    schedule, record = schedules[chip, kernel]
    machine = MACHINES[chip]
    known = trips.expected(kernel, SHAPE, chip, schedule.root)
    copied = kernel_timing(schedule, machine, dataclasses.replace(known, copied_bytes=None))
    # Lists come in besides, and what a grid's step shares with the one before it does not.
    assert record["copy_ms"] == pytest.approx(copied.copy_ms, rel=0.15)
    if known.flops is not None:
        products = record["occupancy"]["MXU"] * record["schedule_ms"]
        width = min(SHAPE.head_dim / machine.chip.mxu_size, 1)
        # Pieces of 128 keys leave as much of an MXU's columns idle as 128 dims do of its rows.
        used = width**2 if kernel in IN_PIECES else width
        # Parts that are multiplied whole have places without a block.
        assert 0.9 <= products * used / record["floor_tiles_ms"] < 1.4


@pytest.mark.parametrize("length", [2**13, 2**20])
def test_slices_are_as_long_as_the_kernels(length):
    shape, place = Shape(length), parse_target("tpu-v5p")
    with place.traced():
        wanted = program("sparse_attention_gradient", shape, Options(implementation="mosaic_tpu"))
    kernels = {kernel.name: kernel.program for kernel in kernels_of(wanted, place)}
    arguments = kernels["sparse_attention_key_value_gradient"].arguments
    (lists,) = {a.shape for a in arguments if a.dtype == jnp.int32 and len(a.shape) == 3}
    assert lists[2] == trips.slice_length(shape, "v5p")


def test_slices_of_blocks_that_are_picked_evenly():
    # A block at a share u of the sequence has -ln(u) times the mean of 100 tiles.
    shares = [(place + 0.5) / 1e5 for place in range(100_000)]
    tiles = [-100 * float(jnp.log(jnp.float32(share))) for share in shares[::1000]]
    mean = sum(-(-count // 128) for count in tiles) / len(tiles)
    assert trips.slices_per_owner(100, 128) == pytest.approx(mean, rel=0.05)


def double(x_ref, o_ref):
    o_ref[...] = x_ref[...] * 2


def twice(x):
    return pl.pallas_call(double, jax.ShapeDtypeStruct(x.shape, x.dtype), name="double")(x)


def repeated(x):
    return jax.lax.scan(lambda y, _: (jax.jit(twice)(y), None), twice(x), length=3)[0]


def endless(x):
    return jax.lax.while_loop(lambda y: y[0, 0] < 7, twice, x)


def test_kernels_are_found_with_the_loops_around_them():
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    place = parse_target("tpu-v5e")
    found = kernels_of(Program(repeated, (x,)), place)
    assert [(kernel.name, kernel.runs) for kernel in found] == [("double", 1), ("double", 3)]
    assert found[1].program.arguments == (x,)
    with pytest.raises(LookupError, match="double stands in a while loop"):
        kernels_of(Program(endless, (x,)), place)
