"""The modules inside Linen models: plain parameters, the NNX modules' numbers, scan and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from msa_jax import AttentionConfig, Mode, MoEConfig
from msa_jax import GQAttention as NNXGQAttention
from msa_jax import MoE as NNXMoE
from msa_jax import MSAttention as NNXMSAttention
from msa_jax.interop.linen import GQAttention, MoE, MSAttention

CONFIG = AttentionConfig(
    num_heads=4, num_kv_heads=2, head_dim=8, rope_dim=4, block_size=8, top_k=2, index_dim=8
)
EXPERTS = MoEConfig(num_experts=4, top_k=2, expert_dim=8)
WIDTH = 16


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (2, 40, WIDTH))


def nnx_twin(cls, config, variables):
    """The NNX module with a Linen module's parameters."""
    module = cls(config, WIDTH, rngs=nnx.Rngs(0))
    state = nnx.state(module)
    flat = {name: leaf for part in variables.values() for name, leaf in flatten(part)}
    assert set(flat) == {path for path, _ in nnx.to_flat_state(state)}
    values = [(path, v.replace(flat[path])) for path, v in nnx.to_flat_state(state)]
    nnx.update(module, nnx.from_flat_state(values))
    return module


def flatten(tree, path=()):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*path, name))
        else:
            yield (*path, name), value


@pytest.mark.parametrize(
    ("linen_module", "nnx_class", "config"),
    [
        (MSAttention, NNXMSAttention, CONFIG),
        (GQAttention, NNXGQAttention, CONFIG),
        (MoE, NNXMoE, EXPERTS),
    ],
)
def test_equals_the_nnx_module_with_plain_parameters(x, linen_module, nnx_class, config):
    module = linen_module(config, WIDTH)
    variables = module.init(jax.random.key(1), x)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))
    expected = nnx_twin(nnx_class, config, variables)(x).y
    np.testing.assert_array_equal(module.apply(variables, x).y, expected)


def test_losses_and_gradients_reach_linen_parameters(x):
    module = MSAttention(CONFIG, WIDTH)
    params = module.init(jax.random.key(1), x)

    def kl(params):
        return module.apply(params, x, mode=Mode(losses=True)).aux["index_kl"]

    gradients = jax.grad(kl)(params)["params"]
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["index"]))
    assert all(jnp.abs(leaf).max() == 0 for leaf in jax.tree.leaves(gradients["main"]))


def test_scanned_and_rematerialised_layers_under_a_strangers_mesh(x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + MSAttention(CONFIG, WIDTH, name="attention")(x).y, None

    options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    stack = nn.scan(nn.remat(Layer), **options)()
    params = stack.init(jax.random.key(1), x, None)
    assert params["params"]["attention"]["main"]["q"].shape == (3, WIDTH, 4, 8)
    expected = x
    for layer in range(3):
        one = jax.tree.map(lambda a, i=layer: a[i], params)
        expected, _ = Layer().apply(one, expected, None)
    found, _ = stack.apply(params, x, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((2,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        inside, _ = jax.jit(stack.apply)(params, x, None)
    np.testing.assert_allclose(inside, expected, rtol=1e-5, atol=1e-6)
