"""Sizes that make comparisons fair: against the counts of the cost model, and by hand."""

import dataclasses
from typing import get_args

import pytest

from msa_jax import cost
from msa_jax.config import (
    ArchitectureConfig,
    AttentionConfig,
    ConfigError,
    MixerKind,
    ModelConfig,
    MoEConfig,
    dense_twin,
)
from msa_jax.matching import match
from msa_jax.train.config import ExperimentConfig

LENGTH = 512
DENSE_MODEL = ModelConfig(d_model=64, num_layers=3, num_dense_layers=1, ffn_dim=192)
MSA = ArchitectureConfig(
    DENSE_MODEL,
    AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, rope_dim=8, block_size=16, top_k=4, index_dim=16
    ),
    MoEConfig(num_experts=0),
)
WITH_EXPERTS = dataclasses.replace(MSA, moe=MoEConfig(num_experts=8, top_k=2, expert_dim=96))


def window_of(kind, tokens):
    """A mixer of this kind with a window, or None if the kind has none."""
    try:
        mixer = dataclasses.replace(MSA.attention, kind=kind, window=tokens)
    except ConfigError:
        return None
    return mixer if cost.visible_tokens(mixer, LENGTH) == tokens else None


(WINDOW,) = filter(None, (window_of(kind, 16) for kind in get_args(MixerKind)))


def with_attention(config, **changes):
    attention = dataclasses.replace(config.attention, **changes)
    return dataclasses.replace(config, attention=attention)


def matched_with(*arguments, **options):
    found = match(*arguments, **options)
    return found.config, found.report


def quantity(config, by):
    if by == "params":
        return cost.parameter_count(config).active
    return cost.training_flops_per_token(config, LENGTH).sparse


@pytest.mark.parametrize("by", ["params", "flops"])
@pytest.mark.parametrize("kind", ["msa", "gqa"])
@pytest.mark.parametrize(
    ("model", "field"), [(MSA, "model.ffn_dim"), (WITH_EXPERTS, "moe.expert_dim")]
)
def test_the_feed_forward_makes_models_equal(model, field, kind, by):
    config = with_attention(model, kind=kind)
    reference = with_attention(model, kind={"msa": "gqa", "gqa": "msa"}[kind])
    before = quantity(config, by) / quantity(reference, by) - 1
    assert abs(before) > 0.01
    matched, report = matched_with(config, reference, by=by, length=LENGTH)
    residual = quantity(matched, by) / quantity(reference, by) - 1
    assert abs(residual) <= 0.005
    assert report.residual_percent == pytest.approx(100 * residual)
    section, name = field.split(".")
    assert report.field == field
    assert (report.new < report.old) == (before > 0)
    # Nothing else changed.
    part = dataclasses.replace(getattr(config, section), **{name: report.new})
    assert matched == dataclasses.replace(config, **{section: part})


@pytest.mark.parametrize("by", ["params", "flops"])
@pytest.mark.parametrize("size", [17, 64, 192, 1000])
def test_a_size_that_gives_exactly_the_reference_is_found(by, size):
    """Of equal models: the reference's own size, unless a rounder one comes within 0.5 %."""
    model = dataclasses.replace(MSA.model, ffn_dim=size)
    reference = dataclasses.replace(MSA, model=model)
    matched, report = matched_with(MSA, reference, by=by, length=LENGTH, tolerance=1e-6)
    assert matched == reference
    assert (report.old, report.new, report.residual_percent) == (192, size, 0)


def test_of_near_sizes_the_multiple_of_the_largest_power_of_two():
    """A feed-forward unit has 3 * 64 parameters in each of 3 layers, the whole model about 1e5."""
    reference = dataclasses.replace(MSA, model=dataclasses.replace(MSA.model, ffn_dim=1021))
    sizes = [
        match(MSA, reference, by="params", tolerance=tolerance).report.new
        for tolerance in (1e-5, 2e-3, 1e-2, 0.2)
    ]
    assert sizes == [1021, 1020, 1024, 1024]
    # The index branch has 9312 parameters, 16.2 units.
    dense = dataclasses.replace(MSA.model, ffn_dim=193)
    config = dataclasses.replace(MSA, model=dense)
    found = match(dense_twin(config), config, by="params", tolerance=1e-3)
    assert found.report.new == 193 + 16


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_a_window_as_costly_as_the_selection(top_k):
    reference = with_attention(MSA, top_k=top_k)
    config = dataclasses.replace(MSA, attention=WINDOW)
    matched, report = matched_with(
        config, reference, by="flops", length=LENGTH, field="attention.window"
    )
    assert quantity(matched, "flops") == pytest.approx(quantity(reference, "flops"), rel=5e-3)
    # The window pays for the index branch too.
    assert report.new > 16 * top_k
    assert matched == dataclasses.replace(
        config, attention=dataclasses.replace(WINDOW, window=report.new)
    )


@pytest.mark.parametrize("by", ["params", "flops"])
def test_a_larger_reference_never_gives_a_smaller_size(by):
    sizes = []
    for width in range(64, 640, 64):
        reference = dataclasses.replace(MSA, model=dataclasses.replace(MSA.model, ffn_dim=width))
        found = match(MSA, dense_twin(reference), by=by, length=LENGTH)
        sizes.append(found.report.new)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


def test_blocks_as_many_as_the_dense_twin_costs():
    matched, report = matched_with(
        MSA, dense_twin(MSA), by="flops", length=LENGTH, field="attention.top_k", tolerance=0.1
    )
    assert 4 < report.new < LENGTH // 16  # fewer than all: the index branch has its share
    flops = [quantity(with_attention(MSA, top_k=report.new + more), "flops") for more in (-1, 0, 1)]
    off = [abs(f - quantity(dense_twin(MSA), "flops")) for f in flops]
    assert min(off) == off[1]
    assert quantity(matched, "flops") == flops[1]


def test_of_blocks_it_is_the_nearest_number_however_odd():
    reference = with_attention(MSA, top_k=7)
    options = {"by": "flops", "length": LENGTH, "field": "attention.top_k", "tolerance": 0.2}
    assert match(MSA, reference, **options).config == reference


def test_blocks_that_are_always_kept_stay():
    config = with_attention(MSA, num_local_blocks=3, top_k=3)
    low = with_attention(config, index_dim=2)
    with pytest.raises(ConfigError, match=r"attention\.top_k=3: no size comes within 0\.1%"):
        match(config, low, by="flops", length=LENGTH, field="attention.top_k", tolerance=1e-3)


def test_a_run_stays_a_run():
    run = ExperimentConfig(MSA.model, MSA.attention, MSA.moe)
    matched = match(dense_twin(run), run, by="params").config
    assert isinstance(matched, ExperimentConfig)
    assert matched.data == run.data


def test_the_report_is_one_line():
    report = match(dense_twin(MSA), MSA, by="flops", length=LENGTH).report
    line = str(report)
    assert line.startswith(f"model.ffn_dim 192 -> {report.new}: {report.reached:,.0f} training")
    assert f"at 512 tokens, the reference has {report.target:,.0f} (" in line
    assert line.endswith(" %)")
    assert "\n" not in line
    params = str(match(dense_twin(MSA), MSA, by="params").report)
    assert "active parameters, the reference" in params


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "flops"}, 'length=None: by="flops" needs a number of tokens'),
        ({"by": "flops", "length": 0}, "length=0"),
        ({"by": "time"}, "by='time': choose one of 'flops', 'params'"),
        ({"by": "params", "field": "model.d_model"}, "field='model.d_model': choose one of"),
        ({"by": "params", "field": "attention.window"}, "active parameters do not depend on it"),
        ({"by": "params", "field": "moe.expert_dim"}, "active parameters do not depend on it"),
    ],
)
def test_what_cannot_be_matched_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        match(MSA, dense_twin(MSA), **arguments)


def test_a_reference_out_of_reach_is_refused():
    """Attention alone costs more than the whole reference, or no window as much as it."""
    small = with_attention(MSA, num_heads=2, head_dim=8)
    with pytest.raises(
        ConfigError, match=r"model\.ffn_dim=192: no size comes within 0\.5%; .*-> 1:"
    ):
        match(dense_twin(MSA), small_model(small), by="flops", length=LENGTH)
    window = dataclasses.replace(MSA, attention=WINDOW)
    wide = dataclasses.replace(MSA, model=dataclasses.replace(MSA.model, ffn_dim=4096))
    with pytest.raises(ConfigError, match=r"attention\.window=16: no size .* -> 512:"):
        match(window, wide, by="flops", length=LENGTH, field="attention.window")


def small_model(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, ffn_dim=1))
