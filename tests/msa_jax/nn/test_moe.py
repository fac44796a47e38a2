"""Mixture of experts against a loop over tokens in numpy: routing, dropless, padding, reports."""

import jax
import numpy as np
import pytest

from msa_jax.config import MoEConfig
from msa_jax.nn.moe import MoE

D_MODEL, EXPERTS, TOP_K, INNER = 6, 4, 2, 5
ROUTED_SCALE = 2.5

pytestmark = pytest.mark.usefixtures("quick_compilation")
run = jax.jit(lambda moe, x, segment_ids: moe(x, segment_ids))


def config(**changes):
    sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "expert_dim": INNER}
    return MoEConfig(**(sizes | {"routed_scale": ROUTED_SCALE, "num_shared_experts": 0} | changes))


def inputs():
    """x, and segment ids with padding in the second row."""
    segment_ids = np.ones((2, 10), np.int32)
    segment_ids[1, 6:] = 0
    return np.random.default_rng(1).normal(size=(2, 10, D_MODEL)).astype(np.float32), segment_ids


def swiglu(x, gate, up, down):
    gate = x @ gate
    return (gate / (1 + np.exp(-gate)) * (x @ up)) @ down


def loop(moe, x, segment_ids):
    """y [B, T, M], load [E], mean entropy over real tokens and, for softmax, the balance loss."""
    router, bias, gate, up, down = (
        np.asarray(w[...], np.float64)
        for w in (moe.router, moe.selection_bias, moe.gate, moe.up, moe.down)
    )
    sigmoid = moe.config.router == "sigmoid"
    y, load = np.zeros(x.shape), np.zeros(EXPERTS)
    entropies, distributions = [], []
    for place in np.ndindex(x.shape[:2]):
        token = x[place].astype(np.float64)
        if moe.shared is not None:
            shared = (moe.shared.gate, moe.shared.up, moe.shared.down)
            y[place] += swiglu(token, *(np.asarray(w[...], np.float64) for w in shared))
        if segment_ids[place] == 0:
            continue
        logits = token @ router
        scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-(scores + bias if sigmoid else scores))[:TOP_K]
        for expert in chosen:
            share = scores[expert] / scores[chosen].sum()
            y[place] += ROUTED_SCALE * share * swiglu(token, gate[expert], up[expert], down[expert])
            load[expert] += 1
        distributions.append(scores / scores.sum())
        entropies.append(-(distributions[-1] * np.log(distributions[-1])).sum())
    balance = EXPERTS * (load / load.sum() * np.mean(distributions, axis=0)).sum()
    return y, load, np.mean(entropies), balance


@pytest.fixture(scope="module", params=["sigmoid", "softmax", "shared experts"])
def moe(request, filled):
    changes = {"sigmoid": {}, "softmax": {"router": "softmax"}}
    options = config(**changes.get(request.param, {"num_shared_experts": 2}))
    return filled(lambda rngs: MoE(options, D_MODEL, rngs=rngs), scale=0.7)


@pytest.mark.fast
def test_every_token_gets_its_chosen_experts_in_their_shares(moe):
    x, segment_ids = inputs()
    y, aux = run(moe, x, segment_ids)
    expected, load, entropy, balance = loop(moe, x, segment_ids)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(aux["expert_load"], load)
    np.testing.assert_allclose(aux["router_entropy"], entropy, rtol=1e-5)
    assert aux["dropped_tokens"] == 0
    assert ("balance_loss" in aux) == (moe.config.router == "softmax")
    if "balance_loss" in aux:
        np.testing.assert_allclose(aux["balance_loss"], balance, rtol=1e-5)


def test_the_selection_bias_chooses_and_never_weighs(moe):
    """It changes some choices, by the loop; of the softmax router it changes none."""
    x, segment_ids = inputs()
    unbiased = jax.tree.map(lambda leaf: leaf, moe)
    unbiased.selection_bias.set_value(np.zeros(EXPERTS, np.float32))
    y, load = loop(moe, x, segment_ids)[:2]
    unbiased_y, unbiased_load = loop(unbiased, x, segment_ids)[:2]
    assert (load != unbiased_load).any() == (moe.config.router == "sigmoid")
    np.testing.assert_allclose(run(unbiased, x, segment_ids).y, unbiased_y, rtol=1e-4, atol=1e-5)
    assert (np.abs(y - unbiased_y).max() > 0.1) == (moe.config.router == "sigmoid")


def test_padding_changes_nothing_and_gets_shared_experts_alone(moe):
    x, segment_ids = inputs()
    y, aux = run(moe, x, segment_ids)
    other = np.where(segment_ids[..., None] == 0, 100, x)
    other_y, other_aux = run(moe, other, segment_ids)
    real = segment_ids > 0
    np.testing.assert_array_equal(y[real], other_y[real])
    for name in aux:
        np.testing.assert_array_equal(aux[name], other_aux[name])
    assert (np.abs(y[~real]).max() > 0) == (moe.shared is not None)


def test_no_token_is_dropped_when_all_choose_the_same_experts(moe):
    """The worst imbalance: every token goes to experts 2 and 3, none to the others."""
    x, segment_ids = inputs()
    imbalanced = jax.tree.map(lambda leaf: leaf, moe)
    imbalanced.selection_bias.set_value(np.array([0, 0, 9, 9], np.float32))
    if moe.config.router == "softmax":  # by the router itself: the bias has no say
        x[..., 0] = 1
        router = np.asarray(moe.router[...]).copy()
        router[0] = [-20, -20, 20, 20]
        imbalanced.router.set_value(router)
    y, aux = run(imbalanced, x, segment_ids)
    real = (segment_ids > 0).sum()
    np.testing.assert_array_equal(aux["expert_load"], [0, 0, real, real])
    assert aux["dropped_tokens"] == 0
    np.testing.assert_allclose(y, loop(imbalanced, x, segment_ids)[0], rtol=1e-4, atol=1e-5)


def test_without_segment_ids_all_tokens_are_real(filled):
    moe = filled(lambda rngs: MoE(config(), D_MODEL, rngs=rngs))
    x, _ = inputs()
    aux = jax.jit(lambda moe, x: moe(x).aux)(moe, x)
    assert aux["expert_load"].sum() == x[..., 0].size * TOP_K


def test_gradients_reach_the_router_through_the_weights_and_never_the_bias(filled):
    moe = filled(lambda rngs: MoE(config(), D_MODEL, rngs=rngs), scale=0.7)
    x, segment_ids = inputs()
    gradient = jax.jit(jax.grad(lambda *arguments: (run(*arguments).y ** 2).sum()))(
        moe, x, segment_ids
    )
    np.testing.assert_array_equal(gradient.selection_bias[...], np.zeros(EXPERTS))
    step = 1e-3 * np.random.default_rng(2).normal(size=moe.router.shape)

    def moved(sign):
        other = jax.tree.map(lambda leaf: leaf, moe)
        other.router.set_value(np.asarray(moe.router[...], np.float64) + sign * step)
        return (loop(other, x, segment_ids)[0] ** 2).sum()

    expected = (moved(1) - moved(-1)) / 2
    np.testing.assert_allclose((gradient.router[...] * step).sum(), expected, rtol=1e-3)
    assert abs(expected) > 1e-4
