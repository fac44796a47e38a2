"""Times by hand for a model of one small layer, and break-even lengths that are known."""

import dataclasses
from typing import get_args

import pytest

from msa_jax import cost, economics
from msa_jax.config import (
    ArchitectureConfig,
    AttentionConfig,
    ConfigError,
    MixerKind,
    ModelConfig,
    MoEConfig,
    dense_twin,
)
from msa_jax.economics import Gpu, Machine
from msa_jax.kernel_rates import KernelRates, RateCurve

# One layer: projections 2*8*(2+1)*4 = 192, feed-forward 3*8*16 = 384, head 32*8 = 256, index
# projections 8*(1+1)*2 = 32 parameters; norms have 8*3 + 2*4 = 32, those of the index 2*2 = 4.
MSA = ArchitectureConfig(
    ModelConfig(vocab_size=32, d_model=8, num_layers=1, ffn_dim=16),
    AttentionConfig(
        num_heads=2, num_kv_heads=1, head_dim=4, rope_dim=4, block_size=2, top_k=1, index_dim=2
    ),
    MoEConfig(num_experts=0),
)
DENSE = dense_twin(MSA)
LENGTH = 4  # 10 causal pairs; 6 of them in blocks of 2
MAIN, INDEX, DENSE_MAIN = 4 * 2 * 4 * 6, 2 * 2 * 10, 4 * 2 * 4 * 10


def curve(rate: float) -> RateCurve:
    return RateCurve((LENGTH,), (rate,))


RATES = KernelRates(
    dense_forward=curve(2.0),
    dense_training=curve(3.0),
    selection=curve(5.0),
    main=curve(7.0),
    training_selection=curve(11.0),
    training_main=curve(13.0),
    backward=curve(17.0),
    kl=curve(19.0),
)
GPU = Gpu("made up", "A100", bytes_per_second=1e12, memory_bytes=10**9, price=1.0)
MACHINE = Machine(GPU, RATES, matmul_fraction=0.5, bytes_per_second=1e3, price=3.6)
MATMUL = 0.5 * 312e12


def with_remat(config: ArchitectureConfig, remat: str) -> ArchitectureConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def test_prefill_by_hand():
    dense = economics.prefill_time(DENSE, LENGTH, MACHINE)
    assert dense.attention == pytest.approx(DENSE_MAIN / 2 / LENGTH)
    assert dense.rest == pytest.approx(2 * (192 + 384 + 256) / MATMUL)
    msa = economics.prefill_time(MSA, LENGTH, MACHINE)
    assert msa.attention == pytest.approx((MAIN / 7 + INDEX / 5) / LENGTH)
    assert msa.rest == pytest.approx(2 * (192 + 384 + 256 + 32) / MATMUL)


def test_every_layer_counts():
    model = dataclasses.replace(MSA.model, num_layers=3, num_full_attention_layers=1)
    prefill = economics.prefill_time(dataclasses.replace(MSA, model=model), LENGTH, MACHINE)
    seconds = DENSE_MAIN / 2 + 2 * (MAIN / 7 + INDEX / 5)
    assert prefill.attention == pytest.approx(seconds / LENGTH)


def test_shares_by_hand():
    time = economics.Time(attention=1.0, rest=3.0)
    assert (time.total, time.attention_share) == (4.0, 0.25)


@pytest.mark.parametrize(
    ("remat", "attend", "select", "products"),
    [
        ("none", 0, 0, 0),
        ("dots", 0, 0, 0),
        ("attention", 0, 0, 1),
        ("save_selection", 1, 0, 1),
        ("full", 1, 1, 1),
    ],
)
def test_training_by_hand(remat, attend, select, products):
    dense = economics.training_time(with_remat(DENSE, remat), LENGTH, MACHINE)
    seconds = 3 * DENSE_MAIN / 3 + attend * DENSE_MAIN / 2
    assert dense.attention == pytest.approx(seconds / LENGTH)
    # The head is outside of what is computed again.
    again = products * 2 * (192 + 384)
    assert dense.rest == pytest.approx((6 * (192 + 384 + 256) + again) / MATMUL)
    msa = economics.training_time(with_remat(MSA, remat), LENGTH, MACHINE)
    seconds = (1 + attend) * MAIN / 13 + (1 + select) * INDEX / 11 + 2 * MAIN / 17 + MAIN / 19
    assert msa.attention == pytest.approx(seconds / LENGTH)
    # The index projections' input has no gradient.
    again += products * 2 * 32
    assert msa.rest == pytest.approx((6 * (192 + 384 + 256) + 4 * 32 + again) / MATMUL)


def test_a_layer_that_reuses_a_selection_neither_selects_nor_learns():
    attention = dataclasses.replace(MSA.attention, share_every=2)
    model = dataclasses.replace(MSA.model, num_layers=2)
    shared = dataclasses.replace(MSA, model=model, attention=attention)
    prefill = economics.prefill_time(shared, LENGTH, MACHINE)
    assert prefill.attention == pytest.approx((2 * MAIN / 7 + INDEX / 5) / LENGTH)
    training = economics.training_time(shared, LENGTH, MACHINE)
    seconds = 2 * MAIN / 13 + INDEX / 11 + 4 * MAIN / 17 + MAIN / 19
    assert training.attention == pytest.approx(seconds / LENGTH)


def test_decode_by_hand():
    weights = 2 * (192 + 384 + 256 + 32)  # norms included, 8 * 3 + 2 * 4 = 32
    dense = economics.decode_time(DENSE, LENGTH, MACHINE, batch=1)
    assert dense.attention == pytest.approx(2 * 2 * 4 * LENGTH / 1e3)
    assert dense.rest == pytest.approx(weights / 1e3)
    msa = economics.decode_time(MSA, LENGTH, MACHINE, batch=4)
    # The last of 4 tokens sees the 2 of its block; every token has an index key.
    assert msa.attention == pytest.approx((2 * 2 * 4 * 2 + 2 * 2 * LENGTH) / 1e3)
    assert msa.rest == pytest.approx((weights + 2 * (32 + 4)) / 4 / 1e3)


def test_decode_of_a_large_batch_multiplies_longer_than_it_reads():
    fast = dataclasses.replace(MACHINE, bytes_per_second=1e15)
    time = economics.decode_time(DENSE, LENGTH, fast, batch=100_000)
    assert time.rest == pytest.approx(2 * (192 + 384 + 256) / MATMUL)


def test_experts_that_a_batch_visits():
    moe = MoEConfig(num_experts=4, top_k=1, num_shared_experts=1, expert_dim=3)
    config = dataclasses.replace(DENSE, moe=moe)
    expert = 3 * 8 * 3
    rest = 192 + 32 + 256 + 8 * 4 + expert  # router, shared expert
    for batch, visited in ((1, 1), (2, 4 * 7 / 16), (1000, 4)):
        expected = 2 * (rest + visited * expert)
        assert economics.decode_weight_bytes(config, batch) == pytest.approx(expected)


def test_memory_is_weights_and_caches():
    weights = 2 * (192 + 384 + 256 + 256 + 32)
    assert economics.decode_memory_bytes(DENSE, 10, 3) == weights + 3 * 10 * 2 * 2 * 4
    index = 2 * (32 + 4) + 3 * 10 * 2 * 2
    assert economics.decode_memory_bytes(MSA, 10, 3) == weights + 3 * 10 * 2 * 2 * 4 + index


def test_dollars_are_price_times_hours():
    assert MACHINE.dollars(1000.0) == pytest.approx(1.0)
    twice = dataclasses.replace(MACHINE, price=2 * MACHINE.price)
    assert twice.dollars(1000.0) == pytest.approx(2.0)


def test_break_even_where_it_is_known():
    """Dense work grows as N, sparse work is that of 5000 tokens."""
    assert economics.break_even(lambda n: 5000, lambda n: n) == 5001
    assert economics.break_even(lambda n: n, lambda n: 5000) is None
    assert economics.break_even(lambda n: 1, lambda n: 1) is None
    assert economics.break_even(lambda n: 1, lambda n: n, shortest=64) == 64
    last = economics.break_even(lambda n: 7999, lambda n: n, longest=8000)
    assert last == 8000


def test_break_even_is_behind_the_last_length_where_it_loses():
    def sparse(length):
        return 0 if length < 1000 else 20_000

    assert economics.break_even(sparse, lambda n: n) == 20_001


def window_of(kind, tokens):
    """A mixer of this kind with a window, or None if the kind has none."""
    try:
        mixer = dataclasses.replace(MSA.attention, kind=kind, window=tokens)
    except ConfigError:
        return None
    return mixer if cost.visible_tokens(mixer, LENGTH) == tokens else None


def test_what_was_not_measured_is_refused():
    (window,) = filter(None, (window_of(kind, 3) for kind in get_args(MixerKind)))
    for attention in (window, dataclasses.replace(MSA.attention, selector="strided")):
        config = dataclasses.replace(MSA, attention=attention)
        for time in (economics.prefill_time, economics.training_time):
            with pytest.raises(ConfigError, match="rates are of learned MSA and of dense GQA"):
                time(config, LENGTH, MACHINE)


@pytest.mark.parametrize(
    ("field", "value"), [("matmul_fraction", 0.0), ("matmul_fraction", 1.5), ("price", 0.0)]
)
def test_a_machine_that_cannot_be_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        dataclasses.replace(MACHINE, **{field: value})


def test_a_gpu_without_a_known_peak_is_refused():
    with pytest.raises(ConfigError, match="device_kind='abacus'"):
        _ = dataclasses.replace(GPU, device_kind="abacus").peak_flops
    assert {name: gpu.peak_flops / 1e12 for name, gpu in economics.GPUS.items()} == {
        "h100": 989,
        "h200": 989,
        "a100": 312,
    }
