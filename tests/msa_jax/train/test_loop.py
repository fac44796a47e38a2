"""Whole runs of a tiny model: interrupted, killed and poisoned ones against one left alone."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msa_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, dense_twin
from msa_jax.data import packing
from msa_jax.data.pipeline import train_iterator
from msa_jax.train import evaluation, loop
from msa_jax.train.checkpoint import CheckpointError, named_arrays
from msa_jax.train.config import (
    DataConfig,
    ExperimentConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from msa_jax.train.loop import NonFiniteError, TrainResult, length_of, phase_of, train
from msa_jax.train.metrics import CLOCK_PREFIX, metrics_path, read_metrics

STEPS = 8
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=256,
        d_model=16,
        num_layers=1,
        tie_embeddings=True,
        compute_dtype="float32",
    ),
    attention=AttentionConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope_dim=4,
        block_size=8,
        top_k=2,
        index_dim=8,
    ),
    moe=MoEConfig(num_experts=2, top_k=1, expert_dim=8, num_shared_experts=0),
    data=DataConfig(source="retrieval", sequence_length=96, batch_size=2),
    optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
    objective=ObjectiveConfig(index_warmup_steps=3),
    train=TrainConfig(steps=STEPS, log_every=2, eval_every=4, eval_batches=2, checkpoint_every=4),
)


def with_train(**fields) -> ExperimentConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **fields))


@pytest.fixture(autouse=True, scope="module")
def compile_once():
    """All runs share compiled steps and the fresh state, and read little."""
    make_step, make_eval, create = (
        functools.cache(f)
        for f in (loop.make_train_step, evaluation.make_eval_step, loop.create_state)
    )

    def shared(config):
        return dataclasses.replace(config, train=CONFIG.train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "POOL_TOKENS", 1)  # the smallest pool of rows
        patch.setattr(loop, "make_train_step", lambda config: make_step(shared(config)))
        patch.setattr(evaluation, "make_eval_step", lambda config: make_eval(shared(config)))
        patch.setattr(
            loop,
            "create_state",
            lambda config, mesh: jax.tree.map(jnp.copy, create(shared(config), mesh)),
        )
        yield


class Hook:
    """A progress that does something once a step is read, before it is logged and saved.

    The next step runs already then, unless it is another program.
    """

    def __init__(self, step: int = 0, action=lambda: None):
        self.step, self.action = step, action
        self.phases: list[str] = []
        self.messages: list[str] = []

    def update(self, step, *, phase, loss=None, rate=None):
        self.phases.append(phase)
        assert loss is not None
        if step == self.step:
            self.action()

    def message(self, text):
        self.messages.append(text)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the loop catches it."""


def kill():
    raise Killed


def run(workdir, config=CONFIG, hook=None) -> TrainResult:
    return train(config, workdir, progress=hook or Hook(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compile_once):
    """The run that went through, and its directory."""
    workdir = tmp_path_factory.mktemp("whole")
    return run(workdir), workdir


def records(workdir) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.startswith(CLOCK_PREFIX)}
        for record in read_metrics(metrics_path(workdir))
    ]


def assert_same_run(result, workdir, whole):
    expected, expected_dir = whole
    assert result.step == expected.step == STEPS
    arrays = named_arrays(result.state)
    for name, array in named_arrays(expected.state).items():
        assert np.asarray(arrays[name]).tobytes() == np.asarray(array).tobytes(), name
    assert records(workdir) == records(expected_dir)


def test_a_whole_run_leaves_its_records(whole):
    result, workdir = whole
    assert result.interrupted is None
    assert result.state.step == STEPS
    train_records = [record for record in records(workdir) if record["split"] == "train"]
    assert [record["step"] for record in train_records] == [2, 4, 6, 8]
    assert [record["sparse"] for record in train_records] == [0, 1, 1, 1]
    for record in train_records:
        assert {"loss", "gradient_norm", "learning_rate", "router_entropy"} <= record.keys()
        assert len(record["index_kl"]) == 1
        assert np.shape(record["expert_load"]) == (1, 2)
        assert record["dropped_tokens"] == [0.0]
        assert sum(record["expert_load"][0]) == record["tokens"]
    assert train_records[0]["learning_rate"] == pytest.approx(1e-2)
    assert train_records[-1]["loss"] < train_records[0]["loss"]
    validation = [record for record in records(workdir) if record["split"] == "validation"]
    assert [record["step"] for record in validation] == [4, 8]
    assert validation[1]["loss"] < validation[0]["loss"]
    assert 0 <= validation[1]["block_recall"][0] <= 1
    (start,) = json.loads((workdir / "manifest.json").read_text())["starts"]
    assert start["resumed_from_step"] is None


def test_clock_fields_are_there(whole):
    fields = {name for record in read_metrics(metrics_path(whole[1])) for name in record}
    assert {
        name.removeprefix(CLOCK_PREFIX) for name in fields if name.startswith(CLOCK_PREFIX)
    } == {
        "compile_seconds",
        "step_seconds",
        "data_seconds",
        "evaluation_seconds",
        "checkpoint_seconds",
        "tokens_per_second",
    }


def test_a_step_is_started_before_the_last_one_is_read(tmp_path, monkeypatch):
    """But not before an evaluation (after step 4 here), or for a program that is to be compiled."""
    events, make = [], loop.make_train_step

    def make_noted(config):
        real = make(config)

        def train_step(state, *arguments):
            events.append(f"start {int(state.step) + 1}")
            return real(state, *arguments)

        return train_step

    class Reader(Hook):
        def update(self, step, **values):
            events.append(f"read {step}")

    monkeypatch.setattr(loop, "make_train_step", make_noted)
    run(tmp_path, with_train(steps=6, eval_every=4, checkpoint_every=0), Reader())
    assert events == [
        *("start 1", "start 2", "read 1", "start 3", "read 2", "read 3"),  # the warm-up
        *("start 4", "read 4", "start 5", "start 6", "read 5", "read 6"),
    ]


def test_each_phase_is_compiled_once(whole):
    """However a step learns whether it is to proceed."""
    assert loop.make_train_step(CONFIG)._cache_size() == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, whole, number):
    hook = Hook(2, lambda: signal.raise_signal(number))
    stopped = run(tmp_path, hook=hook)
    assert (stopped.step, stopped.interrupted) == (3, number)
    assert hook.phases == ["warmup"] * 3
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3"]

    hook = Hook()
    assert_same_run(run(tmp_path, hook=hook), tmp_path, whole)
    assert hook.phases == ["sparse"] * 5
    starts = json.loads((tmp_path / "manifest.json").read_text())["starts"]
    assert [start["resumed_from_step"] for start in starts] == [None, 3]


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_bits(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, hook=Hook(7, kill))
    assert records(tmp_path)[-1]["step"] == 6, "the record that is cut off again"
    assert_same_run(run(tmp_path), tmp_path, whole)


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, hook=Hook(3, kill))
    assert_same_run(run(tmp_path), tmp_path, whole)


def test_a_finished_run_has_nothing_to_do(tmp_path, whole):
    _, workdir = whole
    before = metrics_path(workdir).read_bytes()
    hook = Hook()
    assert run(workdir, hook=hook).step == STEPS
    assert hook.phases == []
    assert "nothing to do" in hook.messages[-1]
    assert metrics_path(workdir).read_bytes() == before


def test_another_architecture_in_the_same_directory_is_refused(whole):
    with pytest.raises(CheckpointError, match=r"attention\.kind: checkpoint 'msa', config 'gqa'"):
        run(whole[1], dense_twin(CONFIG))


def poisoned(step: int):
    """`make_train_step`, but one parameter turns NaN just before a step."""
    make = loop.make_train_step

    def make_poisoned(config):
        real = make(config)

        def train_step(state, *arguments):
            if state.step == step - 1:
                params = jax.tree.map(lambda x: x * jnp.nan, state.params)
                state = dataclasses.replace(state, params=params)
            return real(state, *arguments)

        return train_step

    return make_poisoned


def test_a_step_that_is_not_finite_is_kept_with_all_it_takes_to_repeat_it(
    tmp_path, whole, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", poisoned(6))
        with pytest.raises(NonFiniteError) as error:
            run(tmp_path)
    kept = tmp_path / "nan_step_6"
    message = str(error.value)
    assert message.startswith("step 6 (sparse) is not finite: loss nan, gradient norm nan")
    assert "index_kl" in message
    assert f"--workdir={kept}" in message
    assert (kept / "message.txt").read_text() == f"{message}\n"
    assert np.isnan(records(tmp_path)[-1]["loss"])

    batches = train_iterator(CONFIG.data, block_size=CONFIG.attention.block_size)
    for _ in range(6):
        batch = next(batches)
    with np.load(kept / "batch.npz") as arrays:
        assert set(arrays) == set(batch)
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], batch[name])

    with pytest.raises(NonFiniteError, match="step 6 "):
        run(kept)
    # The run itself goes on from step 4 without what poisoned it.
    assert_same_run(run(tmp_path), tmp_path, whole)


def test_the_state_before_a_step_that_is_not_finite_is_the_one_kept(tmp_path, whole, monkeypatch):
    """With a loss that is infinite only in the report, repeating the step gives the same run."""
    make = loop.make_train_step

    def make_faulty(config):
        real = make(config)

        def train_step(state, *arguments):
            if state.step != 5:
                return real(state, *arguments)
            kept = jax.tree.map(jnp.copy, state)
            _, metrics = real(state, *arguments)
            metrics |= {"loss": jnp.float32(jnp.inf), "finite": jnp.array(False)}
            return dataclasses.replace(kept, step=kept.step + 1), metrics

        return train_step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_faulty)
        with pytest.raises(NonFiniteError, match="NaN or infinite: loss\\."):
            run(tmp_path)
    result = run(tmp_path / "nan_step_6")
    for name, array in named_arrays(whole[0].state).items():
        np.testing.assert_array_equal(named_arrays(result.state)[name], array, name)


def test_a_run_starts_from_another_runs_parameters_but_resumes_from_its_own(
    tmp_path, whole, monkeypatch
):
    states = []
    initialize_from = loop.initialize_from

    def noted(*arguments):
        state = initialize_from(*arguments)
        states.append(jax.tree.map(np.array, state))
        return state

    monkeypatch.setattr(loop, "initialize_from", noted)
    config = with_train(init_from=str(whole[1]), steps=2, checkpoint_every=1, eval_every=0)
    with pytest.raises(Killed):
        run(tmp_path, config, Hook(2, kill))
    assert run(tmp_path, config).step == 2
    (state,) = states
    assert state.step == 0
    for name, array in named_arrays(whole[0].state.params).items():
        np.testing.assert_array_equal(named_arrays(state.params)[name], array, name)
    assert records(tmp_path)[0]["loss"] < records(whole[1])[0]["loss"]


def test_the_profiler_window_writes_a_trace(tmp_path):
    run(tmp_path, with_train(steps=3, profile_start=2, profile_steps=1, eval_every=0))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("on", [True, False])
def test_debug_nans_is_on_where_the_config_says_so(tmp_path, monkeypatch, on):
    seen = []

    def make_train_step(config):
        seen.append(jax.config.jax_debug_nans)
        raise Killed

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    with pytest.raises(Killed):
        run(tmp_path, with_train(debug_nans=on))
    assert seen == [on]
    assert not jax.config.jax_debug_nans


def replace(section: str, **fields) -> ExperimentConfig:
    changed = dataclasses.replace(getattr(CONFIG, section), **fields)
    return dataclasses.replace(CONFIG, **{section: changed})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace("model", vocab_size=100), "model.vocab_size=100"),
        (replace("mesh", tensor=3), "mesh="),
        (replace("data", source="files", files="/absent/*.txt"), "data.files"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_is_written(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_split_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.batch_size=2: must be a multiple of 8"):
        train(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_steps_may_have_short_rows(tmp_path, monkeypatch):
    """As many tokens in every step; a run interrupted among them goes on with them."""
    shapes = []
    place = loop.place_batch
    monkeypatch.setattr(
        loop,
        "place_batch",
        lambda batch, mesh: shapes.append(shape_of(batch)) or place(batch, mesh),
    )
    config = replace("data", warmup_length=24, length_warmup_steps=3)
    assert [length_of(config, step) for step in (1, 3, 4)] == [24, 24, 96]
    run(tmp_path / "whole", config)
    assert shapes == [(8, 24)] * 3 + [(2, 96)] * 5
    hook = Hook(1, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(tmp_path / "halves", config, hook).step == 2
    shapes.clear()
    run(tmp_path / "halves", config)
    assert shapes == [(8, 24)] + [(2, 96)] * 5
    losses = [
        [record["loss"] for record in records(tmp_path / name)] for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1]


def shape_of(batch) -> tuple[int, ...]:
    return batch["tokens"].shape


def test_phases():
    assert [phase_of(CONFIG, step) for step in (1, 3, 4)] == ["warmup", "warmup", "sparse"]
    assert phase_of(dense_twin(CONFIG), 1) == "sparse"
