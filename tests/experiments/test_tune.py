"""The tuner: what it drops, what it times and what it writes, on a kernel made for the purpose."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments import cli, tune
from experiments.benchmarking import search, timing
from experiments.benchmarking.cases import Case
from experiments.benchmarking.search import KERNELS, SearchSpace
from pallas_kernels import tuning
from pallas_kernels.mosaic_gpu import matmul, swizzled


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """How many products a thread block keeps in registers, and rows of scratch that it wastes."""

    products: int = 1
    waste: int = 8

    def __post_init__(self):
        if self.products < 1:
            raise ValueError(f"products={self.products} must be >= 1")


def toy_op(a, b):
    """Three products of 64 x 256 spill; 256 rows of 1 KB are more than shared memory."""
    config = tuning.tuned("toy", ToyConfig(), dtype="bfloat16", bucket="8K")

    def kernel(a_gmem, b_gmem, o_gmem, a, b, o, waste, barrier):
        for source, target in ((a_gmem, a), (b_gmem, b)):
            plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)
        products = [matmul(a, b, (64, 256)) for _ in range(config.products)]
        factor = jax.lax.broadcast_in_dim(jnp.max(products[-1], axis=1), (64, 256), (0,))
        o[...] = sum(product * factor for product in products)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o, o_gmem)
        plgpu.wait_smem_to_gmem(0)

    operand = swizzled(jnp.bfloat16)
    scratch = [
        plgpu.SMEM((64, 64), jnp.bfloat16, transforms=operand),
        plgpu.SMEM((64, 256), jnp.bfloat16, transforms=operand),
        plgpu.SMEM((64, 256), jnp.float32),
        plgpu.SMEM((config.waste, 256), jnp.float32),
        plgpu.Barrier(),
    ]
    out = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    options = {"grid": (1,), "grid_names": ("block",), "scratch_types": scratch}
    return plgpu.kernel(kernel, out_type=out, **options)(a, b)


@pytest.fixture
def toy(monkeypatch):
    """A search space of the toy kernel: one candidate of each fate."""
    fields = {"products": (0, 1, 3), "waste": (8, 256)}
    monkeypatch.setitem(KERNELS, "toy", SearchSpace("toy_op", fields))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, 64), (64, 256))]
    monkeypatch.setattr(search, "_op", lambda *_: (toy_op, shapes))
    return Case("msa", 8192)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "tuned.json")
    return tmp_path / "tuned.json"


def test_what_spills_overflows_or_is_refused_is_dropped_with_its_reason(toy, table, capsys):
    assert list(search.compiling("toy", toy, "bfloat16")) == [{"products": 1, "waste": 8}]
    reasons = capsys.readouterr().out.splitlines()
    assert len(reasons) == 5
    assert "products=0, waste=8: trial of toy: products=0 must be >= 1" in reasons[0]
    assert "products=1, waste=256" in reasons[2]
    assert "shared memory" in reasons[2]
    assert reasons[3].startswith("  products=3, waste=8: ")
    assert reasons[3].endswith(" spills")


def test_a_kernel_that_the_op_does_not_run_is_an_error(monkeypatch, capsys):
    shapes = [jax.ShapeDtypeStruct((8,), jnp.float32)]
    monkeypatch.setattr(search, "_op", lambda *_: (lambda x: x + 1, shapes))
    arguments = ["tune", "--compile_only", "--kernel=select_blocks.top_k", "--lengths=8K"]
    assert cli.run(tune.main, arguments) == 2
    assert "does not ask for select_blocks.top_k" in capsys.readouterr().err


def test_gradients_are_tuned_with_the_kernels_that_take_them(monkeypatch, capsys):
    name = "sparse_attention.backward"
    # Five tiles of queries and their cotangents are more than shared memory.
    space = dataclasses.replace(KERNELS[name], fields={"num_query_slots": (3, 5)})
    monkeypatch.setitem(KERNELS, name, space)
    compiled = search.compiling(name, Case("msa", 256), "bfloat16")
    assert list(compiled) == [{"num_query_slots": 3}]
    assert "num_query_slots=5 needs" in capsys.readouterr().out


def test_the_fastest_candidate_is_written(table, monkeypatch, capsys):
    def op(*_):
        def call(index_q, index_k):
            return (
                index_q * tuning.tuned("toy", ToyConfig(), dtype="bfloat16", bucket="256").products
            )

        return call, ()

    times = iter((3.0, 1.0, 2.0))
    candidates = [{"products": products} for products in (1, 2, 3)]
    monkeypatch.setattr(search, "_op", op)
    monkeypatch.setattr(tune, "compiling", lambda *_: candidates)
    monkeypatch.setattr(tune, "peak_flops", lambda _: 1e15)
    ran = []

    def repeat(chain, repeats):
        chain(1)
        ran.append(repeats)
        return timing.summarise([next(times)], 1)

    monkeypatch.setattr(search, "repeat", repeat)
    arguments = ["tune", "--kernel=toy", "--lengths=256", "--selection=random"]
    monkeypatch.setitem(KERNELS, "toy", SearchSpace("select_blocks", {}))
    assert cli.run(tune.main, arguments) == 0
    assert len(ran) == 3
    kind = jax.devices()[0].device_kind
    written = json.loads(table.read_text())
    assert written == {"toy": {kind: {"bfloat16": {"256": {"products": 2}}}}}
    assert "best: products=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel=nothing"], "--kernel=nothing: choose from select_blocks.scores"),
        ([], "is no GPU to time kernels on: --compile_only needs none"),
        (["--compile_only", "--lengths=8X"], "'8X' is not a number of tokens"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert cli.run(tune.main, ["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
