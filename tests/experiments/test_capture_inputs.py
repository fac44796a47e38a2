"""Captured inputs are those that the layer's own attention gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import capture_inputs, cli
from msa_jax.attention import Mode
from msa_jax.config import ArchitectureConfig, AttentionConfig, ModelConfig, MoEConfig
from msa_jax.model import Transformer
from pallas_kernels import select_blocks

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model():
    attention = AttentionConfig(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        index_dim=8,
        rope_dim=4,
        block_size=4,
        top_k=3,
        share_every=2,
    )
    sizes = ModelConfig(vocab_size=32, d_model=16, num_layers=4, compute_dtype="float32")
    config = ArchitectureConfig(sizes, attention, MoEConfig(num_experts=2, top_k=1, expert_dim=8))
    return Transformer(config, rngs=nnx.Rngs(0))


TOKENS = jax.random.randint(jax.random.key(0), (1, 32), 0, 32)


def test_they_select_what_the_model_selects(model):
    expected = model(TOKENS, mode=Mode(selections=True)).aux["block_ids"]
    assert len(expected) == 2  # layers 0 and 2 select, 1 and 3 reuse
    for number, layer in enumerate((0, 2)):
        found = capture_inputs.capture(model, TOKENS, layer)
        ids = select_blocks(found["index_q"], found["index_k"], block_size=4, top_k=3).block_ids
        np.testing.assert_array_equal(ids, expected[number])


def test_keys_and_values_are_those_the_model_caches(model):
    caches = model(TOKENS, cache=model.init_cache(1, 32)).cache
    (stage,) = caches
    found = capture_inputs.capture(model, TOKENS, 2)
    for name in ("k", "v", "index_k"):
        cached = getattr(stage[0], name)[1]
        np.testing.assert_allclose(found[name], cached, rtol=2e-5, atol=2e-5)
    assert found["q"].shape == (1, 32, 4, 8)


@pytest.mark.parametrize(
    ("layer", "message"), [(1, "selects no blocks"), (4, "the model has layers 0 to 3")]
)
def test_a_layer_without_an_index_branch_is_refused(model, layer, message):
    with pytest.raises(cli.UsageError, match=message):
        capture_inputs.capture(model, TOKENS, layer)


def test_the_file_holds_every_token_in_float32(model, monkeypatch, tmp_path, capsys):
    class Config:
        attention = model.config.attention

        class data:
            sequence_length, tokenizer = 24, "byte"

    text = tmp_path / "text"
    text.write_text("\t\n" * 30)  # bytes below the model's 32 ids
    monkeypatch.setattr(capture_inputs, "load_model", lambda _: (model, Config))
    monkeypatch.setattr(
        capture_inputs, "encode_prompt", lambda _, text: np.array([*text.encode()], np.int32)
    )
    output = tmp_path / "new" / "captured.npz"
    arguments = ["--workdir=run", f"--text={text}", f"--output={output}", "--layer=2"]
    assert cli.run(capture_inputs.main, ["capture", *arguments]) == 0
    with np.load(output) as file:
        shapes = {name: file[name].shape for name in file}
        assert all(file[name].dtype == np.float32 for name in file)
    assert shapes == {
        "q": (24, 4, 8),
        "k": (24, 2, 8),
        "v": (24, 2, 8),
        "index_q": (24, 2, 8),
        "index_k": (24, 8),
    }
    assert "24 tokens, 3 blocks per query" in capsys.readouterr().out
    assert jnp.isfinite(np.load(output)["index_q"]).all()


@pytest.mark.parametrize("arguments", [[], ["--workdir=run"]])
def test_missing_flags_are_one_line(arguments, capsys):
    assert cli.run(capture_inputs.main, ["capture", *arguments]) == 2
    assert "--workdir and --text are needed" in capsys.readouterr().err
