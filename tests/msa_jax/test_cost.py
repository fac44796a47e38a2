import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msa_jax import cost
from msa_jax.config import (
    ArchitectureConfig,
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    dense_twin,
)
from msa_jax.model import Transformer

PAPER = AttentionConfig()  # 64/4/128, Bk 128, K 16, Di 128
PAPER_DENSE = AttentionConfig(kind="gqa")
PAPER_WINDOW = AttentionConfig(kind="sliding_window", window=512)
SMALL = AttentionConfig(
    num_heads=6, num_kv_heads=2, head_dim=5, rope_dim=4, block_size=4, top_k=3, index_dim=8
)
SMALL_MODEL = ArchitectureConfig(
    ModelConfig(
        vocab_size=11,
        d_model=7,
        num_layers=4,
        num_dense_layers=1,
        num_full_attention_layers=1,
        ffn_dim=13,
    ),
    SMALL,
    MoEConfig(num_experts=5, top_k=2, num_shared_experts=1, expert_dim=3),
)


BIGBIRD = dataclasses.replace(
    SMALL, kind="bigbird", top_k=5, num_sink_blocks=1, num_random_blocks=2
)
# With the fields that the kind asks for.
BASELINES = {
    "gqa": dataclasses.replace(SMALL, kind="gqa"),
    "mha": dataclasses.replace(SMALL, kind="mha"),
    "sliding_window": dataclasses.replace(SMALL, kind="sliding_window", window=9),
    "longformer": dataclasses.replace(SMALL, kind="longformer", num_sink_blocks=1),
    "bigbird": BIGBIRD,
}


def brute_force_mask(attention: AttentionConfig, length: int, rng) -> np.ndarray:
    """A [N, N] token mask built block by block; what is learned or random is drawn."""
    mask = np.zeros((length, length), bool)
    for query in range(length):
        if attention.kind in ("gqa", "mha", "sliding_window"):
            first = max(0, query - attention.window + 1) if attention.window else 0
            mask[query, first : query + 1] = True
            continue
        own = query // attention.block_size
        sinks = [block for block in range(own) if block < attention.num_sink_blocks]
        if attention.kind == "msa":
            earlier = rng.permutation(own)[: attention.top_k - 1]
        else:
            near = attention.top_k - attention.num_sink_blocks - attention.num_random_blocks
            window = [block for block in range(own) if own - block < near]
            others = rng.permutation([n for n in range(own) if n not in sinks + window])
            earlier = {*sinks, *window, *others[: attention.num_random_blocks].astype(int)}
        for block in [*earlier, own]:
            tokens = np.arange(attention.block_size) + block * attention.block_size
            mask[query, tokens[tokens <= query]] = True
    return mask


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11, 12, 13, 16, 31, 64, 97])
@pytest.mark.parametrize(
    "attention",
    [
        SMALL,
        dataclasses.replace(SMALL, top_k=1),
        dataclasses.replace(SMALL, block_size=1, top_k=5),
        dataclasses.replace(SMALL, num_local_blocks=2, num_sink_blocks=1),
        dataclasses.replace(SMALL, kind="gqa"),
        dataclasses.replace(SMALL, kind="mha"),
        dataclasses.replace(SMALL, kind="sliding_window", window=1),
        dataclasses.replace(SMALL, kind="sliding_window", window=9),
        dataclasses.replace(SMALL, kind="longformer", num_sink_blocks=1),
        BIGBIRD,
    ],
    ids=[
        "msa",
        "local_only",
        "block_1",
        "forced_blocks",
        "gqa",
        "mha",
        "window_1",
        "window_9",
        "longformer",
        "bigbird",
    ],
)
def test_exact_counts_equal_a_count_over_masks(attention, length):
    mask = brute_force_mask(attention, length, np.random.default_rng(length))
    assert cost.visible_pairs(attention, length) == mask.sum()
    assert cost.visible_tokens(attention, length) == mask[-1].sum()
    flops = cost.attention_flops(attention, length)
    scored = np.tril(np.ones((length, length))).sum() if attention.kind == "msa" else 0
    assert flops.main == 2 * 2 * 6 * 5 * mask.sum()  # scores and values, 6 heads of 5 dims
    assert flops.index == 2 * 2 * 8 * scored  # 2 index heads of 8 dims


@pytest.mark.parametrize(
    ("length", "ratio", "index_share"),
    [
        (8 * 1024, 1.88, 0.06),
        (32 * 1024, 6.40, 0.20),
        (128 * 1024, 16.0, 0.50),
        (256 * 1024, 21.3, 0.67),
        (512 * 1024, 25.6, 0.80),
        (2**20, 28.44, 0.89),
        (2**50, 32.0, 1.00),
    ],
)
def test_eq12_gives_the_published_ratios(length, ratio, index_share):
    dense, msa = cost.eq12_flops(PAPER_DENSE, length), cost.eq12_flops(PAPER, length)
    assert dense.total / msa.total == pytest.approx(ratio, abs=5e-2 if ratio > 20 else 5e-3)
    assert dense.total / msa.total == pytest.approx(32 / (1 + 131072 / length), rel=1e-12)
    assert msa.index_share == pytest.approx(index_share, abs=6e-3)


def test_headline_ratio_and_break_even():
    ratio = cost.eq12_flops(PAPER_DENSE, 2**20).total / cost.eq12_flops(PAPER, 2**20).total
    assert round(ratio, 2) == 28.44
    even = cost.eq12_flops(PAPER, 4228)
    assert cost.eq12_flops(PAPER_DENSE, 4228).total / even.total == pytest.approx(1, abs=2e-4)
    assert round(100 * even.index_share) == 3


@pytest.mark.parametrize("kind", ["sliding_window", "longformer", "bigbird"])
def test_eq12_refuses_what_it_does_not_cover(kind):
    with pytest.raises(ValueError, match=rf"attention\.kind='{kind}': Eq\. 12 is about MSA and"):
        cost.eq12_flops(BASELINES[kind], 1024)


def test_eq12_of_multi_head_attention_is_that_of_its_query_heads():
    mha = AttentionConfig(kind="mha")
    assert cost.eq12_flops(mha, 1024) == cost.eq12_flops(PAPER_DENSE, 1024)


def test_exact_count_approaches_eq12_at_long_context():
    published, exact = cost.eq12_flops(PAPER, 2**20), cost.attention_flops(PAPER, 2**20)
    assert exact.index == pytest.approx(published.index, rel=1e-6)
    # The local block is half seen on average: 15 * 128 + 64.5 of the 2048 tokens of Eq. 12.
    assert exact.main / published.main == pytest.approx(1984.5 / 2048, rel=1e-3)
    assert exact.total == pytest.approx(published.total, rel=4e-3)
    dense = cost.attention_flops(PAPER_DENSE, 2**20)
    assert dense.total == pytest.approx(cost.eq12_flops(PAPER_DENSE, 2**20).total, rel=1e-6)
    assert dense.total / exact.total == pytest.approx(28.44, rel=4e-3)


def test_counts_stay_exact_past_64_bits():
    attention, length = AttentionConfig(num_heads=128), 2**30
    flops = cost.attention_flops(attention, length)
    assert flops.index > 2**63  # would have wrapped as int64
    assert flops.index == 2 * 4 * 128 * (length * (length + 1) // 2)
    assert isinstance(flops.total, int)


def test_model_flops_are_two_per_weight_and_token_plus_the_pairs():
    length = 37
    flops, parameters = cost.model_flops(SMALL_MODEL, length), cost.parameter_count(SMALL_MODEL)
    matrices = parameters.active_non_embedding - parameters.norms + 11 * 7
    attention = 1 * 4 * 30 * cost.causal_pairs(length)  # the leading layer is dense
    attention += 3 * 4 * 30 * cost.visible_pairs(SMALL, length)
    index = 3 * 2 * 2 * 8 * cost.causal_pairs(length)
    assert (flops.attention, flops.index_scores) == (attention, index)
    assert flops.total == 2 * matrices * length + attention + index
    assert flops.attention_share == (attention + index) / flops.total


def test_parameters_of_a_small_model_by_hand():
    count = cost.parameter_count(SMALL_MODEL)
    assert count.embedding == count.head == 11 * 7
    assert count.attention == 4 * (7 * 30 + 7 * 10 + 7 * 10 + 30 * 7)
    assert count.index == 3 * (7 * 16 + 7 * 8)  # the full-attention layer has no index branch
    assert count.norms == 4 * (7 + 7 + 5 + 5) + 3 * (8 + 8) + 7
    assert count.dense_feed_forward == 1 * 3 * 7 * 13
    assert count.router == 3 * 7 * 5
    expert = 3 * 7 * 3
    assert count.shared_experts == 3 * expert
    assert count.routed_experts == 3 * 5 * expert
    assert count.total - count.active == 3 * (5 - 2) * expert
    assert count.active - count.active_non_embedding == 2 * 11 * 7
    tied = dataclasses.replace(SMALL_MODEL.model, tie_embeddings=True)
    tied = cost.parameter_count(dataclasses.replace(SMALL_MODEL, model=tied))
    assert tied.total == count.total - 11 * 7


def test_a_model_without_experts_is_dense_throughout():
    config = dataclasses.replace(SMALL_MODEL, moe=MoEConfig(num_experts=0))
    count = cost.parameter_count(config)
    assert count.dense_feed_forward == 4 * 3 * 7 * 13
    assert count.router == count.routed_experts == count.shared_experts == 0
    assert count.total == count.active


def test_shared_selections_score_once_per_group_of_layers():
    config = dataclasses.replace(
        SMALL_MODEL, attention=dataclasses.replace(SMALL, share_every=2)
    )  # layer 0 dense, 1 selects, 2 reuses, 3 selects
    assert 3 * cost.parameter_count(config).index == 2 * cost.parameter_count(SMALL_MODEL).index
    flops, every = cost.model_flops(config, 40), cost.model_flops(SMALL_MODEL, 40)
    assert 3 * flops.index_scores == 2 * every.index_scores
    assert flops.attention == every.attention
    assert 3 * cost.index_cache_bytes(config, 40) == 2 * cost.index_cache_bytes(SMALL_MODEL, 40)
    shared, own = (
        cost.decode_bytes(SMALL, 40, computes_selection=selects) for selects in (False, True)
    )
    assert own - shared == 2 * 8 * 40


@pytest.mark.parametrize(
    ("selector", "per_pair", "per_key"),
    [("learned", 32, 8), ("oracle", 60, 10), ("random", 0, 0), ("strided", 0, 0)],
)
def test_only_scoring_selectors_pay_for_scores(selector, per_pair, per_key):
    attention = dataclasses.replace(SMALL, selector=selector)
    assert cost.attention_flops(attention, 40).index == per_pair * cost.causal_pairs(40)
    attended = 2 * 2 * 10 * 12  # keys and values of 12 tokens, 2 bytes each
    assert cost.decode_bytes(attention, 40) == attended + 2 * per_key * 40


def test_training_a_dense_model_is_three_forwards():
    dense = dense_twin(SMALL_MODEL)
    forward, training = cost.model_flops(dense, 40), cost.training_flops(dense, 40)
    assert training.total == 3 * forward.total
    assert training.index_scores == training.index_projections == 0


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_training_an_msa_model_adds_the_kl(phase):
    length = 40
    forward = cost.model_flops(SMALL_MODEL, length)
    training = cost.training_flops(SMALL_MODEL, length, phase=phase)
    sparse, causal = cost.visible_pairs(SMALL, length), cost.causal_pairs(length)
    support = sparse if phase == "sparse" else causal
    # Per layer: scores of every causal pair, then one product each for d(index_q) and d(index_k).
    assert training.index_scores == 3 * 32 * (causal + 2 * support)
    assert training.index_projections == 2 * forward.index_projections
    assert training.attention == 3 * 4 * 30 * (causal + 3 * support)
    for part in ("projections", "feed_forward", "head"):
        assert getattr(training, part) == 3 * getattr(forward, part)


def test_an_attached_index_input_needs_its_gradient_too():
    config = dataclasses.replace(
        SMALL_MODEL, attention=dataclasses.replace(SMALL, detach_index_input=False)
    )
    forward = cost.model_flops(config, 40)
    assert cost.training_flops(config, 40).index_projections == 3 * forward.index_projections


def test_training_flops_per_token_in_both_conventions():
    sparse, dense = cost.training_flops_per_token(SMALL_MODEL, 400)
    assert sparse == cost.training_flops(SMALL_MODEL, 400).total / 400
    assert dense == 3 * cost.model_flops(dense_twin(SMALL_MODEL), 400).total / 400
    assert sparse < dense
    assert cost.training_flops_per_token(SMALL_MODEL, 400, phase="warmup").sparse > dense


@pytest.mark.parametrize(
    ("length", "ratio"), [(2048, 8 / 9), (2**20, 7.9), (2**60, 8.0)], ids=["2K", "1M", "limit"]
)
def test_decode_reads_the_published_bytes(length, ratio):
    dense, msa = cost.decode_bytes(PAPER_DENSE, length), cost.decode_bytes(PAPER, length)
    assert dense == 2048 * length
    assert msa == 256 * length + 4_194_304
    assert dense / msa == pytest.approx(ratio, abs=0.05)


def test_decode_reads_only_the_window():
    assert cost.decode_bytes(PAPER_WINDOW, 100) == 2048 * 100
    assert cost.decode_bytes(PAPER_WINDOW, 10_000) == 2048 * 512


def test_decode_reads_every_kv_head_of_multi_head_attention():
    assert cost.decode_bytes(AttentionConfig(kind="mha"), 100) == 16 * 2048 * 100


def test_decode_reads_the_blocks_of_a_pattern():
    """The last of 40 tokens ends block 9: 5 blocks of 4 tokens, 2 groups of 5 dims, no index."""
    assert cost.decode_bytes(BIGBIRD, 40) == 2 * 2 * 10 * 5 * 4
    assert cost.decode_bytes(BIGBIRD, 38) == 2 * 2 * 10 * (4 * 4 + 2)


@pytest.mark.parametrize("kind", BASELINES)
def test_parameters_and_caches_are_those_that_are_built(kind):
    config = dataclasses.replace(SMALL_MODEL, attention=BASELINES[kind])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert cost.parameter_count(config).total == sum(sizes)
    caches = model.init_cache(1, 40)
    entries = sum(leaf.size for leaf in jax.tree.leaves(caches) if leaf.dtype != jnp.int32)
    assert cost.kv_cache_bytes(config, 40) == 2 * entries
    assert cost.index_cache_bytes(config, 40) == 0
    kv_heads = 6 if kind == "mha" else 2
    assert cost.kv_cache_bytes(config, 40) == 2 * (3 * 2 * kv_heads * 5 + 2 * kv_heads * 5) * 40


@pytest.mark.parametrize("kind", BASELINES)
def test_training_a_baseline_is_three_forwards_in_every_phase(kind):
    config = dataclasses.replace(SMALL_MODEL, attention=BASELINES[kind])
    forward = cost.model_flops(config, 40)
    for phase in ("sparse", "warmup"):
        assert cost.training_flops(config, 40, phase=phase).total == 3 * forward.total
    assert forward.index_scores == forward.index_projections == 0
    own, dense = cost.training_flops_per_token(config, 40)
    assert (own == dense) == (kind in ("gqa", "mha"))
    assert own <= dense


def test_caches():
    config = ArchitectureConfig(model=ModelConfig(num_layers=41))
    assert cost.kv_cache_bytes(config, 2**20) == 41 * 2048 * 2**20
    assert cost.index_cache_bytes(config, 2**20) * 8 == cost.kv_cache_bytes(config, 2**20)
    assert cost.index_cache_bytes(dense_twin(config), 2**20) == 0
    assert cost.kv_cache_bytes(config, 100, dtype_bytes=4) == 2 * cost.kv_cache_bytes(config, 100)


def test_compute_table_adds_up():
    rows = cost.compute_table(SMALL_MODEL, [16, 256])
    assert [row.length for row in rows] == [16, 256]
    row, dense = rows[1], dense_twin(SMALL_MODEL)
    assert row.dense_tflops == cost.model_flops(dense, 256).attention / 1e12
    assert row.msa_tflops * row.ratio == pytest.approx(row.dense_tflops)
    assert row.dense_attention_share == cost.model_flops(dense, 256).attention_share
    assert row.msa_attention_share < row.dense_attention_share
    assert row.kv_cache_gb == cost.kv_cache_bytes(SMALL_MODEL, 256) / 1e9
    dense_read, msa_read = cost.decode_bytes(dense.attention, 256), cost.decode_bytes(SMALL, 256)
    assert row.decode_ratio == 4 * dense_read / (dense_read + 3 * msa_read)


def test_compute_table_of_the_paper_spans_8k_to_1m():
    rows = cost.compute_table(ArchitectureConfig())
    assert (rows[0].length, rows[-1].length) == (8192, 1048576)
    assert round(rows[-1].eq12_ratio, 2) == 28.44
    assert rows[-1].decode_ratio == pytest.approx(7.9, abs=0.05)


def test_compute_table_refuses_a_dense_model():
    with pytest.raises(ValueError, match=r"attention\.kind='gqa'.*pass the config with"):
        cost.compute_table(dense_twin(ArchitectureConfig()))
