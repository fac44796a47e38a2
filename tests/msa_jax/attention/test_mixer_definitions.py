"""Whole mixers against the equations of their papers, in numpy, one token and head at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax.attention import build_mixer
from msa_jax.attention.short_convolution import ShortConvolution
from msa_jax.attention.step_size import StepSize
from msa_jax.config import AttentionConfig
from msa_jax.mixer_config import LinearConfig, Mamba2Config, MLAConfig

LENGTH, D_MODEL, EPS = 9, 12, 1e-6
CONFIG = AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rope_dim=0,
    rope_theta=100.0,
    mla=MLAConfig(latent_dim=5, query_latent_dim=7, rope_head_dim=2, value_dim=3),
    linear=LinearConfig(value_dim=3, conv_width=3, chunk_size=4),
    mamba2=Mamba2Config(state_dim=3, head_dim=6, conv_width=3, chunk_size=4),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean() + EPS) * (1 + weight)


def convolved(inputs, kernel, bias=0.0):
    """silu of the sum over the last tokens, the newest under the kernel's last row."""
    width = len(kernel)
    padded = np.concatenate([np.zeros((width - 1, *inputs.shape[1:])), inputs])
    return silu(np.stack([(padded[t : t + width] * kernel).sum(0) for t in range(LENGTH)]) + bias)


def rotated(x, t):
    """Of two dims: one pair, frequency 1."""
    return np.array([x[0] * np.cos(t) - x[1] * np.sin(t), x[1] * np.cos(t) + x[0] * np.sin(t)])


def mla(x, p):
    """Section 2.1.2 of DeepSeek-V2: q = [q^C, q^R], k = [k^C, k^R], softmax, values."""
    sizes = CONFIG.mla
    latents = [rms_norm(row @ p["latent"], p["latent_norm/weight"]) for row in x]
    queries = [rms_norm(row @ p["q_down"], p["q_norm/weight"]) for row in x]
    y = np.zeros_like(x)
    for t, head in np.ndindex(LENGTH, CONFIG.num_heads):
        q = queries[t] @ p["q"][:, head]
        q = np.concatenate([q[:4], rotated(q[4:], t)])
        keys = [
            np.concatenate([latents[s] @ p["k"][:, head], rotated(x[s] @ p["rope_k"], s)])
            for s in range(t + 1)
        ]
        scores = np.array([q @ k for k in keys]) / np.sqrt(4 + sizes.rope_head_dim)
        shares = np.exp(scores) / np.exp(scores).sum()
        values = [latents[s] @ p["v"][:, head] for s in range(t + 1)]
        y[t] += sum(a * v for a, v in zip(shares, values, strict=True)) @ p["o"][head]
    return y


def steps_and_decays(x, p):
    """softplus of the projection plus bias, and exp(-rate * step)."""
    step = np.log1p(np.exp(x @ p["step"] + p["step_size/bias"]))
    return step, np.exp(-np.exp(p["step_size/log_rate"]) * step)


def linear(x, p):
    """Figure 1 and Eq. 10 of Gated DeltaNet."""
    qkv = convolved(np.einsum("tm,mhc->thc", x, p["qkv"]), p["convolution/kernel"])
    _, decay = steps_and_decays(x, p)
    beta, y = sigmoid(x @ p["beta"]), np.zeros_like(x)
    for head in range(CONFIG.num_heads):
        state = np.zeros((4, 3))
        for t in range(LENGTH):
            q, k, v = np.split(qkv[t, head], [4, 8])
            q, k = (a / np.sqrt(a @ a + 1e-6) for a in (q, k))
            erase = np.eye(4) - beta[t, head] * np.outer(k, k)
            state = decay[t, head] * erase @ state + beta[t, head] * np.outer(k, v)
            o = rms_norm(state.T @ q / np.sqrt(4), p["norm/weight"])
            y[t] += o * silu(x[t] @ p["gate"][:, head]) @ p["o"][head]
    return y


def mamba2(x, p):
    """Figure 6 (right) and Eq. 1 of Mamba-2, A a number per head."""
    inputs = convolved(
        np.einsum("tm,mhp->thp", x, p["x"]),
        p["x_convolution/kernel"],
        p["x_convolution/bias"].reshape(4, 6),
    )
    bc = convolved(x @ p["bc"], p["bc_convolution/kernel"], p["bc_convolution/bias"])
    step, decay = steps_and_decays(x, p)
    outputs = np.zeros((LENGTH, 4, 6))
    for head in range(4):
        state = np.zeros((6, 3))
        for t in range(LENGTH):
            b, c = np.split(bc[t], 2)
            state = decay[t, head] * state + step[t, head] * np.outer(inputs[t, head], b)
            outputs[t, head] = state @ c + p["skip"][head] * inputs[t, head]
    gated = outputs.reshape(LENGTH, 24) * silu(x @ p["gate"])
    return np.stack([rms_norm(row, p["norm/weight"]) for row in gated]) @ p["o"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("definition", "changes"),
    [
        (mla, {}),
        (linear, {}),
        (linear, {"linear": LinearConfig(value_dim=3, conv_width=1)}),
        (mamba2, {}),
    ],
    ids=["mla", "linear", "linear without convolution", "mamba2"],
)
def test_a_mixer_is_what_its_paper_says(definition, changes, filled):
    config = dataclasses.replace(CONFIG, kind=definition.__name__, **changes)
    options = {"norm_eps": EPS, "dtype": "float64", "param_dtype": "float64"}

    def build(rngs):
        return build_mixer(config, D_MODEL, computes_selection=False, rngs=rngs, **options)

    x = np.random.default_rng(0).normal(size=(1, LENGTH, D_MODEL))
    with jax.enable_x64(True):
        mixer = filled(build)
        y = jax.jit(lambda mixer, x: mixer(x).y)(mixer, x)
    assert y.dtype == jnp.float64
    flat = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    params = {"/".join(path): np.asarray(leaf.get_value()) for path, leaf in flat}
    np.testing.assert_allclose(y[0], definition(x[0], params), rtol=1e-9, atol=1e-9)


def test_initial_steps_and_rates_are_mamba2s():
    """Steps log-uniform in 0.001 to 0.1, rates uniform in 1 to 16, for a projection of 0."""
    sizes = jax.jit(lambda: StepSize(2000, param_dtype="float32", rngs=nnx.Rngs(0)))()
    step, log_decay = (np.asarray(a)[0, 0] for a in sizes(jnp.zeros((1, 1, 2000))))
    rate = -log_decay / step
    for values, low, high in ((np.log(step), np.log(1e-3), np.log(1e-1)), (rate, 1, 16)):
        assert low - 1e-3 < values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() < high + 1e-3
        np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=0.03 * (high - low))


def test_initial_convolutions_are_pytorchs():
    make = jax.jit(
        lambda: ShortConvolution(
            (50, 20), ("heads", None), 4, bias=True, param_dtype="float32", rngs=nnx.Rngs(0)
        )
    )
    kernel, bias = make().arrays("float32")
    assert (kernel.shape, bias.shape) == ((4, 50, 20), (50, 20))
    for values in (kernel, bias):
        assert 0.49 < np.abs(values).max() <= 0.5
        np.testing.assert_allclose(values.std(), 0.5 / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "undecayed"),
    [
        ("linear", {"norm/weight", "step_size/bias", "step_size/log_rate"}),
        (
            "mamba2",
            {"norm/weight", "step_size/bias", "step_size/log_rate", "skip"}
            | {"x_convolution/bias", "bc_convolution/bias"},
        ),
        ("mla", {"latent_norm/weight", "q_norm/weight"}),
    ],
)
def test_rates_biases_and_gains_are_no_matrices(kind, undecayed):
    """Weight decay is for parameters with two named axes or more."""
    config = dataclasses.replace(CONFIG, kind=kind)
    mixer = nnx.eval_shape(
        lambda: build_mixer(config, D_MODEL, computes_selection=False, rngs=nnx.Rngs(0))
    )
    flat = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    axes = {"/".join(path): leaf.get_metadata("logical_axes") for path, leaf in flat}
    assert {name for name, names in axes.items() if len(names) < 2} == undecayed
