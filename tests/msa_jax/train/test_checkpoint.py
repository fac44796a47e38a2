"""Round trips to the bit, refusals that say why, and a real SIGKILL in the middle of a write."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from msa_jax.config import AttentionConfig
from msa_jax.train.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_config,
    load_parameters,
    named_arrays,
)
from msa_jax.train.config import ExperimentConfig

CONFIG = ExperimentConfig()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """As the training state: a scalar, variables with metadata, optimizer tuples."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)

    def param(shape, dtype="float32", axes=("embed", "mlp")):
        return nnx.Param(jnp.asarray(rng.normal(size=shape), dtype), logical_axes=axes)

    layers = {"kernel": param((2, 8, 4)), "gain": param((2, 8), "bfloat16", ("embed",))}
    params = nnx.State({"layers": layers, "blocks": {0: {"bias": param((8,), axes=("embed",))}}})
    return State(jnp.int32(seed), params, optax.adamw(1e-3).init(params))


def shard(state: State, axis: str) -> State:
    """Every array whose first axis of 8 divides is split over the mesh axis."""
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))

    def place(x):
        spec = [axis if size == 8 else None for size in x.shape]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name, want in named_arrays(expected).items():
        got = named_arrays(actual)[name]
        assert got.dtype == want.dtype, name
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), name


def save_one(workdir, state, config=CONFIG, step=5):
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(step, state, {"position": 3}, config)


def with_attention(**fields) -> ExperimentConfig:
    return dataclasses.replace(CONFIG, attention=AttentionConfig(**fields))


def test_round_trip_is_equal_to_the_bit_in_the_asked_shardings(tmp_path):
    state = shard(make_state(), "data")
    assert not state.params["layers"]["kernel"].get_value().sharding.is_fully_replicated
    save_one(tmp_path, state)
    with Checkpointer(tmp_path) as checkpointer:
        for target in (state, shard(state, "fsdp")):
            restored = checkpointer.restore(abstract(target), CONFIG)
            assert_equal(restored.state, state)
            for got, want in zip(
                jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True
            ):
                assert got.sharding == want.sharding
        assert (restored.step, restored.data_state) == (5, {"position": 3})
    assert restored.state.params["layers"]["gain"].get_metadata("logical_axes") == ("embed",)
    assert load_config(tmp_path) == CONFIG


def test_the_newest_ones_are_kept(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (2, 4, 6):
            checkpointer.save(step, dataclasses.replace(state, step=jnp.int32(step)), {}, CONFIG)
        checkpointer.wait()
        assert checkpointer.latest_step() == 6
        assert checkpointer.restore(state, CONFIG, step=4).state.step == 4
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 .* steps \[4, 6\]"):
            checkpointer.restore(state, CONFIG, step=2)


def test_a_state_that_is_donated_while_it_is_written_is_saved_as_it_was(tmp_path):
    update = jax.jit(lambda x: -x, donate_argnums=0)
    x = jnp.arange(2.0**22)
    expected = np.array(x)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": x}, {}, CONFIG)
        for _ in range(3):
            x = update(x)
        checkpointer.wait()
        restored = checkpointer.restore({"x": x}, CONFIG)
    np.testing.assert_array_equal(restored.state["x"], expected)
    np.testing.assert_array_equal(x, -expected)


def test_another_architecture_is_refused_by_its_fields_before_arrays_are_read(
    tmp_path, monkeypatch
):
    save_one(tmp_path, make_state(), with_attention(num_heads=4, index_dim=64))
    monkeypatch.setattr("msa_jax.train.checkpoint._read_arrays", None)
    expected = (
        r"attention\.num_heads: checkpoint 4, config 8; attention\.index_dim: checkpoint 64, "
        r"config 128\)"
    )
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=expected),
    ):
        checkpointer.restore(make_state(), with_attention(num_heads=8))
    with pytest.raises(CheckpointError, match=expected):
        load_parameters(tmp_path, {"params": make_state().params}, with_attention(num_heads=8))


def test_other_data_is_refused_on_resume_but_not_for_parameters(tmp_path):
    save_one(tmp_path, make_state())
    other = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, seed=7))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match=r"data\.seed: checkpoint 0, config 7"),
    ):
        checkpointer.restore(make_state(), other)
    load_parameters(tmp_path, {"params": make_state().params}, other)


def test_fields_of_the_run_may_differ(tmp_path):
    save_one(tmp_path, make_state())
    other = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, steps=7, log_every=1),
        optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=1.0),
        model=dataclasses.replace(CONFIG.model, remat="full"),
    )
    with Checkpointer(tmp_path) as checkpointer:
        assert_equal(checkpointer.restore(make_state(1), other).state, make_state())


def test_a_missing_checkpoint_says_where_it_was_sought(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*absent"):
        load_config(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match="nothing was saved there"),
    ):
        checkpointer.restore(make_state(), CONFIG)


def test_parameters_alone_are_read_without_the_rest(tmp_path):
    state = make_state()
    save_one(tmp_path, state)
    target = {"params": abstract(shard(make_state(1), "fsdp")).params}
    params = load_parameters(tmp_path, target, CONFIG)["params"]
    assert_equal(params, state.params)
    kernel = params["layers"]["kernel"].get_value()
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers.pop("gain"), "params/layers/gain: in the checkpoint only"),
        (
            lambda layers: layers.update(other=nnx.Param(jnp.ones(2))),
            "params/layers/other: not in the checkpoint",
        ),
        (
            lambda layers: layers.update(kernel=nnx.Param(jnp.ones((2, 8, 5)))),
            r"params/layers/kernel: checkpoint \(2, 8, 4\), model \(2, 8, 5\)",
        ),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda checkpointer, workdir, state: checkpointer.restore(state, CONFIG),
        lambda checkpointer, workdir, state: load_parameters(
            workdir, {"params": state.params}, CONFIG
        ),
    ],
    ids=["restore", "load_parameters"],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, change, message, read):
    save_one(tmp_path, make_state())
    state = make_state()
    layers = dict(state.params["layers"])
    change(layers)
    state.params = nnx.State({"layers": layers, "blocks": dict(state.params["blocks"])})
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=message):
        read(checkpointer, tmp_path, state)


def test_a_config_saved_before_a_field_existed_has_its_default(tmp_path):
    save_one(tmp_path, make_state(), with_attention(top_k=4))
    (saved,) = pathlib.Path(tmp_path, "checkpoints", "5", "config").glob("metadata")
    values = json.loads(saved.read_text())
    assert values["attention"].pop("pooling") == "max"
    saved.write_text(json.dumps(values))
    assert load_config(tmp_path) == with_attention(top_k=4)


WRITER = textwrap.dedent(
    """
    import pathlib, sys
    import jax.numpy as jnp, numpy as np
    from msa_jax.train.checkpoint import Checkpointer
    from msa_jax.train.config import ExperimentConfig

    workdir = pathlib.Path(sys.argv[1])
    checkpointer = Checkpointer(workdir)
    noise = np.random.default_rng(0).random(2**26, dtype=np.float32)
    checkpointer.save(1, {"x": jnp.arange(8.0)}, {"position": 1}, ExperimentConfig())
    checkpointer.wait()
    checkpointer.save(2, {"x": jnp.asarray(noise)}, {"position": 2}, ExperimentConfig())
    while not any(path.name.startswith("2") for path in (workdir / "checkpoints").iterdir()):
        pass
    print("writing", flush=True)
    checkpointer.wait()
    """
)


def test_sigkill_in_the_middle_of_a_write_leaves_the_previous_checkpoint(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WRITER, os.fspath(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = [path.name for path in pathlib.Path(tmp_path, "checkpoints").iterdir()]
    assert "2" not in left
    assert len(left) == 2, "the write had not begun: nothing was tested"

    target = {"x": jnp.zeros(8)}
    loaded = load_parameters(tmp_path, target, CONFIG)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored = checkpointer.restore(target, CONFIG)
        checkpointer.save(3, {"x": jnp.ones(8)}, {"position": 3}, CONFIG)
        checkpointer.wait()
        assert checkpointer.latest_step() == 3
    np.testing.assert_array_equal(restored.state["x"], np.arange(8))
    np.testing.assert_array_equal(loaded["x"], np.arange(8))
    assert restored.data_state == {"position": 1}
    left = sorted(path.name for path in pathlib.Path(tmp_path, "checkpoints").iterdir())
    assert left == ["1", "3"], "the left-overs are deleted"
