"""A stranger's program: the library imported into a model that is none of ours."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import msa_jax
from msa_jax import AttentionConfig, Mode, MSAttention

CONFIG = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_dim=4,
    block_size=4,
    top_k=2,
    index_dim=4,
)
D_MODEL, LENGTH = 12, 16

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOREIGN = """
import sys
from flax import nnx
before = set(sys.modules)
from msa_jax import AttentionConfig, MSAttention
added = {name.split(".")[0] for name in set(sys.modules) - before}
ours = {name for name in sys.modules if name.startswith("msa_jax")}
print(sorted(added), sorted(ours))
"""


@pytest.mark.fast
def test_importing_the_mixer_loads_no_training_code():
    """Beyond what flax itself loads."""
    run = subprocess.run(
        [sys.executable, "-c", FOREIGN], capture_output=True, text=True, check=True
    )
    added, ours = run.stdout.strip().split("] [")
    for package in ("optax", "orbax", "grain", "ml_collections", "absl", "matplotlib", "rich"):
        assert f"'{package}'" not in added, package
    assert "'pallas_kernels'" in added
    for module in ("msa_jax.train", "msa_jax.data", "msa_jax.eval", "msa_jax.model"):
        assert f"'{module}'" not in ours, module
    assert "'msa_jax.attention.msa'" in ours


@pytest.mark.fast
def test_importing_starts_no_backend():
    """One would take most of a GPU's memory, and come before jax.distributed.initialize."""
    modules = "msa_jax.attention.msa, msa_jax.train.loop, experiments.benchmarking.worker"
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    subprocess.run([sys.executable, "-c", f"import {modules}"], env=environment, check=True)


def test_every_public_name_is_there():
    for name in msa_jax.__all__:
        assert getattr(msa_jax, name).__name__ == name
    assert dir(msa_jax) == sorted(msa_jax.__all__)
    with pytest.raises(AttributeError, match="module 'msa_jax' has no attribute 'MSAttenton'"):
        msa_jax.MSAttenton  # noqa: B018


@pytest.fixture(scope="module")
def attention(filled):
    return filled(lambda rngs: MSAttention(CONFIG, D_MODEL, rngs=rngs))


def inputs(rows=4):
    x = np.random.default_rng(1).normal(size=(rows, LENGTH, D_MODEL))
    return jnp.asarray(x, jnp.float32)


@pytest.fixture(scope="module")
def expected(attention):
    return np.asarray(jax.jit(lambda layer, x: layer(x).y)(attention, inputs()))


def test_works_under_vmap_and_scan(attention, expected):
    @jax.jit
    def mapped(layer, x):
        return jax.vmap(lambda row: layer(row[None]).y[0])(x)

    @jax.jit
    def scanned(layer, x):
        return jax.lax.scan(lambda _, row: (None, layer(row[None]).y[0]), None, x)[1]

    for run in (mapped, scanned):
        np.testing.assert_allclose(run(attention, inputs()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_works_on_a_strangers_mesh(axis_type, attention, expected):
    """With an axis name that none of our rules knows."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        layer = jax.device_put(attention, NamedSharding(mesh, P()))
        x = jax.device_put(inputs(), NamedSharding(mesh, P("rows")))
        y = jax.jit(lambda layer, x: layer(x).y)(layer, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


class Classifier(nnx.Module):
    """Somebody's model: whether the last token occurred before."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(8, D_MODEL, rngs=rngs)
        self.attention = MSAttention(CONFIG, D_MODEL, rngs=rngs)
        self.head = nnx.Linear(D_MODEL, 1, rngs=rngs)

    def __call__(self, tokens):
        mixed = self.attention(self.embedding(tokens), mode=Mode(losses=True))
        return self.head(mixed.y[:, -1])[:, 0], mixed.aux["index_kl"]


def loss_of(model, tokens, labels):
    logits, index_kl = model(tokens)
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean() + index_kl


def task():
    tokens = np.random.default_rng(0).integers(0, 8, (32, LENGTH)).astype(np.int32)
    return tokens, (tokens[:, :-1] == tokens[:, -1:]).any(1).astype(np.float32)


@pytest.mark.fast
def test_trains_in_an_nnx_model_with_the_nnx_optimizer():
    @nnx.jit
    def make():
        model = Classifier(nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, labels):
        loss, gradients = nnx.value_and_grad(loss_of)(model, tokens, labels)
        optimizer.update(model, gradients)
        return loss

    model, optimizer = make()
    losses = [step(model, optimizer, *task()).item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_trains_with_plain_jax_and_optax():
    optimizer = optax.adam(1e-2)

    @jax.jit
    def make():
        model = Classifier(nnx.Rngs(0))
        return model, optimizer.init(model)

    @jax.jit
    def step(model, state, tokens, labels):
        loss, gradients = jax.value_and_grad(loss_of)(model, tokens, labels)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(model, updates), state, loss

    model, state = make()
    losses = []
    for _ in range(20):
        model, state, loss = step(model, state, *task())
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
