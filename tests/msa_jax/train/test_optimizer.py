"""The schedule at its corners, and AdamW against its equations written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from msa_jax.train.config import OptimizerConfig
from msa_jax.train.optimizer import decay_mask, make_optimizer, make_schedule


def config(**fields) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 10, **fields})


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        # Half the peak, the peak, the last flat step, half way down, the last step but one tenth.
        (
            {"schedule": "wsd", "decay_fraction": 0.2, "final_scale": 0.1},
            {4: 0.5, 9: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 200: 0.1},
        ),
        (
            {"schedule": "cosine", "final_scale": 0.2},
            {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.6, 100: 0.2},
        ),
        ({"schedule": "constant", "final_scale": 0.2}, {0: 0.1, 10: 1.0, 99: 1.0, 100: 1.0}),
        ({"schedule": "cosine", "warmup_steps": 0, "final_scale": 0.0}, {0: 1.0, 50: 0.5, 100: 0}),
        # The decay never begins inside the warm-up.
        ({"schedule": "wsd", "warmup_steps": 90, "decay_fraction": 1.0}, {89: 1.0, 95: 0.55}),
        # A run cut short for a trial never leaves the warm-up.
        ({"schedule": "wsd", "warmup_steps": 1000}, {0: 0.001, 99: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 1000}, {0: 0.001, 99: 0.1}),
    ],
)
def test_learning_rate_at_key_steps(fields, values):
    schedule = jax.jit(make_schedule(config(**fields), steps=100))
    for step, value in values.items():
        np.testing.assert_allclose(schedule(step), value, rtol=1e-6, atol=1e-7, err_msg=str(step))


def parameters() -> nnx.State:
    """A scanned layer's gain and matrix (three layers), an unscanned bias and an expert stack."""
    rng = np.random.default_rng(0)

    def param(shape, logical_axes):
        return nnx.Param(
            jnp.asarray(rng.normal(size=shape), jnp.float32), logical_axes=logical_axes
        )

    return nnx.State(
        {
            "layers": {
                "gain": param((3, 4), ("embed",)),
                "head_gain": param((3, 4), (None,)),
                "kernel": param((3, 4, 8), ("embed", "mlp")),
                "experts": param((3, 2, 4, 8), ("experts", "embed", "mlp")),
            },
            "bias": param((4,), ("embed",)),
            "embedding": param((16, 4), ("vocab", "embed")),
        }
    )


DECAYED = {"layers/kernel": True, "layers/experts": True, "embedding": True}


def by_name(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {
        name.removesuffix("/value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)
    }


def test_only_matrices_decay_stacked_or_not():
    mask = by_name(decay_mask(parameters()))
    assert {name: decays for name, decays in mask.items() if decays} == DECAYED
    assert len(mask) == 6


def test_a_parameter_without_logical_axes_is_an_error_that_names_it():
    params = nnx.State({"layers": {"kernel": nnx.Param(jnp.ones((2, 2)))}})
    with pytest.raises(ValueError, match="layers/kernel has no logical_axes"):
        decay_mask(params)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_two_steps_are_adamw_with_clipped_gradients(clip):
    settings = config(
        learning_rate=0.01,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.3,
        gradient_clip=clip,
    )
    optimizer = make_optimizer(settings, steps=10)
    params = parameters()
    gradients = [jax.tree.map(lambda x, s=s: jnp.sin(x * s), params) for s in (3.0, 5.0)]
    expected = {name: np.asarray(x, np.float64) for name, x in by_name(params).items()}
    first, second = (dict.fromkeys(expected, 0.0) for _ in range(2))

    state = optimizer.init(params)
    for count, gradient in enumerate(gradients, start=1):
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
        arrays = {name: np.asarray(x, np.float64) for name, x in by_name(gradient).items()}
        norm = np.sqrt(sum((x**2).sum() for x in arrays.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        assert norm > 0.5, "the clip must bite"
        for name, x in arrays.items():
            first[name] = settings.b1 * first[name] + (1 - settings.b1) * x * scale
            second[name] = settings.b2 * second[name] + (1 - settings.b2) * (x * scale) ** 2
            mean = first[name] / (1 - settings.b1**count)
            root = np.sqrt(second[name] / (1 - settings.b2**count))
            decay = settings.weight_decay * expected[name] if name in DECAYED else 0.0
            expected[name] = expected[name] - 0.01 * (mean / (root + settings.eps) + decay)

    for name, x in by_name(params).items():
        np.testing.assert_allclose(x, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_optimizer_state_is_float32_for_narrow_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters())
    optimizer = make_optimizer(config(), steps=10)
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 12
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(optax.apply_updates(params, updates))} == {
        jnp.dtype("bfloat16")
    }


def test_the_state_has_one_structure_whatever_is_switched_off():
    params = parameters()
    structures = {
        jax.tree.structure(make_optimizer(config(**fields), steps=10).init(params))
        for fields in (
            {},
            {"gradient_clip": 0.0},
            {"weight_decay": 0.0},
            {"schedule": "constant"},
        )
    }
    assert len(structures) == 1
