"""The mesh: where arrays live, and the single device's loss and gradients on every kind of mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from msa_jax.attention import Mode
from msa_jax.config import (
    ArchitectureConfig,
    AttentionConfig,
    ConfigError,
    ModelConfig,
    MoEConfig,
)
from msa_jax.model import Transformer
from msa_jax.sharding import (
    MESH_AXES,
    ShardingRules,
    constrain,
    explicit_axes,
    make_mesh,
    out_spec,
    parameter_shardings,
    place_batch,
)

BATCH, LENGTH, VOCAB = 8, 24, 16
# Layer 0: dense attention and feed-forward. Layer 1: MSA, experts and a shared expert.
CONFIG = ArchitectureConfig(
    ModelConfig(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=2,
        num_dense_layers=1,
        num_full_attention_layers=1,
        ffn_dim=12,
        compute_dtype="float32",
        scan_layers=False,
    ),
    AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_dim=4,
        rope_theta=100.0,
        block_size=4,
        top_k=2,
        index_dim=4,
    ),
    MoEConfig(num_experts=8, top_k=2, expert_dim=6, router="softmax"),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def sizes(**changes):
    return dict.fromkeys(MESH_AXES, 1) | changes


def mesh_of(**changes):
    """A mesh of these sizes, over as many of the devices as it takes."""
    axes = sizes(**changes)
    return make_mesh(axes, jax.devices()[: math.prod(axes.values())])


@pytest.fixture(scope="module")
def make_parts(filled):
    """(graph, params, other variables) of a model."""

    def make(config=CONFIG):
        return nnx.split(filled(lambda rngs: Transformer(config, rngs=rngs)), nnx.Param, ...)

    return make


def batch():
    """Ragged: documents of different lengths, padding behind them."""
    rng = np.random.default_rng(1)
    segment_ids = np.ones((BATCH, LENGTH), np.int32)
    segment_ids[:, 12:] = 2
    for row in range(BATCH):
        segment_ids[row, LENGTH - row :] = 0
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids}


def losses_and_gradient(graph, params, rest, batch):
    """Of all terms of the training loss, with what the layers report."""

    def loss(params):
        output = nnx.merge(graph, params, rest)(
            batch["tokens"], segment_ids=batch["segment_ids"], mode=Mode(losses=True)
        )
        language = (jax.nn.logsumexp(output.logits, axis=-1) * batch["segment_ids"]).mean()
        aux = output.aux
        return language + aux["index_kl"].sum() + aux["balance_loss"].sum(), aux

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def on_one_device(make_parts):
    graph, params, rest = make_parts()
    return jax.jit(lambda *arrays: losses_and_gradient(graph, *arrays))(params, rest, batch())


@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ({"data": 8}, {}),
        ({"fsdp": 8}, {}),
        ({"tensor": 2}, {}),
        ({"expert": 8}, {}),
        ({"fsdp": 4, "tensor": 2}, {}),
        ({"data": 2, "expert": 4}, {}),
        ({"expert": 2, "tensor": 2, "context": 2}, {"remat": "attention", "scan_layers": True}),
        pytest.param(
            {"fsdp": 2, "tensor": 2, "expert": 2},
            {"remat": "full", "scan_layers": True},
            marks=pytest.mark.fast,
        ),
    ],
    ids=lambda options: "-".join(f"{name}{value}" for name, value in options.items()),
)
def test_every_mesh_gives_the_single_devices_loss_and_gradients(
    axes, changes, make_parts, on_one_device
):
    """Unrolled, which compiles faster; once scanned and rematerialised, as one trains."""
    model = dataclasses.replace(CONFIG.model, **changes)
    graph, params, rest = make_parts(dataclasses.replace(CONFIG, model=model))
    mesh = mesh_of(**axes)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(params, mesh))
        rest = jax.device_put(rest, parameter_shardings(rest, mesh))
        run = jax.jit(lambda *arrays: losses_and_gradient(graph, *arrays))
        (loss, aux), gradient = run(params, rest, place_batch(batch(), mesh))
    (expected_loss, expected_aux), expected = on_one_device
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for name, array in expected_aux.items():
        np.testing.assert_allclose(aux[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    actual, expected, placed = map(arrays_by_path, (gradient, expected, params))
    assert actual.keys() == expected.keys()
    for path, array in actual.items():
        np.testing.assert_allclose(array, expected[path], rtol=1e-4, atol=1e-6, err_msg=path)
        assert np.abs(expected[path]).max() > 1e-4, path
        assert array.sharding == placed[path].sharding, path


def test_activations_and_diagnostics_of_sequences_that_are_split(make_parts):
    """Three tokens per device in blocks of four; the diagnostics look at neighbouring queries."""
    graph, params, rest = make_parts()

    def run(params, rest, batch):
        mode = Mode(diagnostics=True, selections=True)
        model = nnx.merge(graph, params, rest)
        return model(batch["tokens"], segment_ids=batch["segment_ids"], mode=mode)

    expected = jax.jit(run)(params, rest, batch())
    mesh = mesh_of(context=8)
    with jax.set_mesh(mesh):
        actual = jax.jit(run)(params, rest, place_batch(batch(), mesh))
    assert {shard.data.shape for shard in actual.logits.addressable_shards} == {(BATCH, 3, VOCAB)}
    np.testing.assert_allclose(actual.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert np.asarray(expected.aux["union_4"]).all()
    for name, array in expected.aux.items():
        np.testing.assert_allclose(actual.aux[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def arrays_by_path(state):
    return {"/".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}


def test_parameters_are_split_as_the_rules_say(make_parts):
    """On 2 fsdp x 2 tensor x 2 expert devices, by the shapes that each device holds."""
    _, params, rest = make_parts()
    mesh = mesh_of(fsdp=2, tensor=2, expert=2)
    placed = arrays_by_path(jax.device_put(params, parameter_shardings(params, mesh)))
    held = {path: array.addressable_shards[0].data.shape for path, array in placed.items()}
    d_model, experts, vocab, heads, groups = 16 // 2, 8 // 2, 16 // 2, 4 // 2, 2 // 2
    expected = {
        "embedding/table": (vocab, d_model),
        "embedding/head": (d_model, vocab),
        "final_norm/weight": (16,),
        "stages/0/0/mixer/main/q": (1, d_model, heads, 8),
        "stages/0/0/mixer/main/k": (1, d_model, groups, 8),
        "stages/0/0/mixer/main/o": (1, heads, 8, d_model),
        "stages/0/0/mixer/main/q_norm/weight": (1, 8),
        "stages/0/0/feed_forward/gate": (1, d_model, 12 // 2),
        "stages/0/0/feed_forward/down": (1, 12 // 2, d_model),
        "stages/1/0/mixer/index/q": (1, d_model, groups, 4),
        "stages/1/0/mixer/index/k": (1, d_model, 4),
        "stages/1/0/feed_forward/router": (1, d_model, 8),
        "stages/1/0/feed_forward/gate": (1, experts, d_model, 6 // 2),
        "stages/1/0/feed_forward/down": (1, experts, 6 // 2, d_model),
    }
    assert {name: held[name] for name in expected} == expected
    (bias,) = jax.tree.leaves(jax.device_put(rest, parameter_shardings(rest, mesh)))
    assert bias.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"tensor": 4},
            r"mesh.tensor=4: does not divide the heads axis of .*/main/k, .* 2 entries; choose",
        ),
        ({"fsdp": 3}, r"mesh.fsdp=3: does not divide the embed axis of embedding/head, .* 16 ent"),
        ({"expert": 3}, r"mesh.expert=3: does not divide the experts axis .*, which has 8 entries"),
    ],
)
def test_a_mesh_that_does_not_divide_names_itself_and_the_parameter(axes, message, make_parts):
    _, params, _ = make_parts()
    with pytest.raises(ConfigError, match=message):
        parameter_shardings(params, mesh_of(**axes))


def test_a_batch_that_does_not_divide_names_the_field():
    with pytest.raises(ConfigError, match=r"data.batch_size=8: .* 6 .*; choose a multiple of 6"):
        place_batch(batch(), mesh_of(data=3, fsdp=2))


def test_a_sequence_that_does_not_divide_names_the_field():
    for context in (7, 6):  # 6 divides the 24 tokens, not the 8 devices
        message = rf"mesh.context={context}: does not divide the 24 tokens of a row or the 8 dev"
        with pytest.raises(ConfigError, match=message):
            place_batch(batch(), mesh_of(context=context))


def test_a_placed_batch_is_split_over_data_fsdp_expert_and_context():
    placed = place_batch(batch(), mesh_of(data=2, expert=2, context=2))
    for name, array in batch().items():
        np.testing.assert_array_equal(placed[name], array)
        assert {shard.data.shape for shard in placed[name].addressable_shards} == {(2, LENGTH // 2)}


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"data": -1}, (8, 1, 1, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2, 1, 1)),
        ({"fsdp": 2, "tensor": 2, "expert": -1}, (1, 2, 2, 2, 1)),
        ({"data": 8, "tensor": -1}, (8, 1, 1, 1, 1)),
        ({"expert": 8}, (1, 1, 1, 8, 1)),
        ({"data": -1, "context": 4}, (2, 1, 1, 1, 4)),
    ],
)
def test_one_axis_may_take_the_devices_that_remain(axes, shape):
    mesh = make_mesh(sizes(**axes))
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, shape, strict=True))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    "axes", [{"data": 3, "fsdp": -1}, {"data": 4}, {"data": 16}, {"data": 16, "fsdp": -1}]
)
def test_sizes_that_do_not_fit_the_devices_are_an_error(axes):
    with pytest.raises(ConfigError, match=r"mesh=.*the 8 devices there are; set one axis to -1"):
        make_mesh(sizes(**axes))


def test_rules_resolve_to_the_axes_that_the_mesh_has():
    rules = ShardingRules(embed=None)
    assert rules.spec("batch", None, "heads", mesh_axes=MESH_AXES) == P(
        ("data", "fsdp", "expert"), None, "tensor"
    )
    assert rules.spec("batch", "embed", "vocab", mesh_axes=("fsdp",)) == P("fsdp", None, None)


def test_without_an_explicit_mesh_nothing_is_constrained():
    """A stranger's program: no mesh, an Auto mesh, the inside of a shard_map."""
    x = jnp.ones((2, 4))
    assert constrain(x, "batch", "heads") is x
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))):
        assert explicit_axes() == ()
        assert out_spec("heads") is None
    mesh = mesh_of(tensor=2)
    with jax.set_mesh(mesh):
        assert explicit_axes() == MESH_AXES
        assert constrain(x, None, "heads").sharding.spec == P(None, "tensor")

        def local(x):
            assert explicit_axes() == ()
            return constrain(x, None, "heads")

        jax.shard_map(local, in_specs=P(), out_specs=P())(x)
