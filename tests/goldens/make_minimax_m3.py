"""Writes the MiniMax-M3 goldens from the PyTorch model of Hugging Face transformers.

    python3.11 -m venv oracle
    oracle/bin/pip install numpy==2.4.6 torch==2.13.0 transformers==5.23.0
    oracle/bin/python tests/goldens/make_minimax_m3.py

torch is no dependency of this project: the script runs on the CPU in an environment of its own and
only its arrays are committed. transformers before 5.13 selects wrongly (one selection for all KV
groups) and is refused.

Three files, all with T = 100 tokens (no multiple of the block size 8), top-k 4 and head dim 32 with
16 rotating dims:

* `minimax_m3_attention_2_groups.npz`, `..._4_groups.npz`: one sparse attention layer, x -> y, with
  its selection `block_ids` [B, Hkv, T, K], ascending, then -1;
* `minimax_m3_model.npz`: a decoder of one dense layer and two sparse mixture-of-experts layers
  with two local blocks, tokens -> logits; and one x through its second layer (`layer.y`) and
  through that layer's mixture-of-experts block alone (`moe.y`).

No top-k is near a tie (the script refuses a lead below 1e-4): selections can be compared exactly.

Weights carry the names of the released checkpoint (transformers writes them itself when it saves
the model) and PyTorch's layout [out, in]. They and the inputs are float16 numbers, so that the
files are small and every implementation starts from exactly the same values. A result NAME comes
twice: `NAME.float32` is the eager model exactly as released; `NAME.float64` is the same model in
double precision, with the casts to float32 inside its norms, scores, softmax and RoPE lifted, so
that a float64 implementation can be held to rounding. The RoPE base is 2**16: with 16 rotating
dims every frequency is a power of two and the two precisions have the same angles.
"""

import contextlib
import pathlib
import tempfile
from unittest import mock

import numpy as np
import safetensors.torch
import torch
import transformers
from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as configuration
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

HERE = pathlib.Path(__file__).parent
BATCH, TOKENS, D_MODEL, VOCAB = 2, 100, 40, 56
TEXT_PREFIX = "language_model."


def text_config(num_layers, num_kv_heads, index_dim, num_local_blocks):
    """Sparse layers throughout, but for a leading dense one where there are several."""
    dense = 1 if num_layers > 1 else 0
    sparse = num_layers - dense
    return configuration.MiniMaxM3VLTextConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=num_kv_heads,
        head_dim=32,
        rotary_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 2.0**16,
            "partial_rotary_factor": 0.5,
        },
        layer_types=["full_attention"] * dense + ["minimax_m3_sparse"] * sparse,
        mlp_layer_types=["dense"] * dense + ["sparse"] * sparse,
        index_n_heads=num_kv_heads,
        index_head_dim=index_dim,
        index_block_size=8,
        index_topk_blocks=4,
        index_local_blocks=num_local_blocks,
        num_local_experts=8,
        num_experts_per_tok=3,
        intermediate_size=20,
        shared_intermediate_size=20,
        dense_intermediate_size=48,
        bos_token_id=None,
        eos_token_id=None,
    )


def build(text, seed):
    """The released model class around `text` with random float16-valued weights, in float32."""
    vision = configuration.MiniMaxM3VLVisionConfig(
        hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config = configuration.MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, projector_hidden_size=8
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = modeling.MiniMaxM3SparseForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if name.endswith("correction_bias")}
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            value = torch.randn(tensor.shape, generator=generator) * deviation(name, tensor.shape)
            tensor.copy_(value.to(torch.float16))
    return model


def deviation(name, shape):
    """Far from the initial values: gains that matter, and gates that reach the clamps at 7."""
    if "norm" in name or name.endswith("correction_bias"):
        return 0.3
    if "embed_tokens" in name:
        return 1.0
    gain = 3.0 if "gate_up_proj" in name else 1.0
    return gain * shape[-1] ** -0.5


def released_state(model):
    """The text weights as transformers saves them: names of the released checkpoint, float16."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        state = safetensors.torch.load_file(f"{folder}/model.safetensors")
    state = {k: v for k, v in state.items() if k.startswith(TEXT_PREFIX)}
    halves = {name: value.to(torch.float16).numpy() for name, value in state.items()}
    assert all(torch.equal(torch.from_numpy(halves[k]).float(), v) for k, v in state.items())
    return halves


@contextlib.contextmanager
def in_double_precision(model):
    """Runs `model` in float64 with the float32 casts of its own code lifted."""
    softmax = torch.nn.functional.softmax

    def softmax_without_cast(x, dim, dtype=None):
        return softmax(x, dim=dim)

    model.double()
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.nn.functional, "softmax", softmax_without_cast),
    ):
        yield
    model.float()


def both_precisions(model, name, function, *inputs):
    """`function(*inputs)` as released and in float64, as golden entries of this name."""
    with torch.no_grad():
        single = function(*inputs)
        with in_double_precision(model):
            double = function(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    error = (single - double).abs().max() / double.abs().max()
    print(f"  {name}: {tuple(single.shape)}, float32 differs from float64 by {error:.1e}")
    assert error < 1e-5, "a near tie fell differently in float32: take another seed"
    return {f"{name}.float32": single.numpy(), f"{name}.float64": double.numpy()}


@contextlib.contextmanager
def recorded_topk():
    """Collects (scores, chosen) of every top-k: what selects blocks, and what routes to experts."""
    calls, topk = [], torch.topk

    def record(scores, k, dim=-1, **options):
        values, indices = topk(scores, k, dim=dim, **options)
        calls.append((scores.clone(), indices.masked_fill(values == -torch.inf, -1)))
        return values, indices

    with mock.patch.object(torch, "topk", record), mock.patch.object(torch.Tensor, "topk", record):
        yield calls


def refuse_near_ties(calls):
    """Every chosen score must lead every one left out by far more than float32 rounding."""
    gaps = []
    for scores, chosen in calls:
        ordered = scores.double().sort(dim=-1, descending=True).values
        last_in, first_out = ordered[..., chosen.shape[-1] - 1], ordered[..., chosen.shape[-1]]
        gaps.append((last_in - first_out)[first_out > -torch.inf].min().item())
    print(f"  smallest gaps that decide a top-k: {', '.join(f'{gap:.1e}' for gap in gaps)}")
    assert min(gaps) > 1e-4, "too close to a tie: take another seed"


def random_input(seed):
    """Residual-stream-like floats [B, T, d_model] with float16 values."""
    x = torch.randn(BATCH, TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return x.to(torch.float16).float()


def attention_golden(num_kv_heads, index_dim, seed):
    """One sparse attention layer by itself."""
    text = text_config(1, num_kv_heads, index_dim, num_local_blocks=1)
    model = build(text, seed)
    attention = model.model.language_model.layers[0].self_attn
    rotary = model.model.language_model.rotary_emb
    x = random_input(seed + 1)

    def forward(x):
        positions = torch.arange(TOKENS)[None]
        return attention(x, rotary(x, positions), None, position_ids=positions)[0]

    with recorded_topk() as calls:
        results = both_precisions(model, "y", forward, x)
    (_, single), (scores, double) = calls
    assert torch.equal(single, double)
    num_blocks = scores.shape[-1]
    block_ids = double.masked_fill(double < 0, num_blocks).sort(dim=-1).values
    block_ids = block_ids.masked_fill(block_ids == num_blocks, -1)
    results |= {"block_ids": block_ids.to(torch.int8).numpy()}
    refuse_near_ties(calls)
    prefix = f"{TEXT_PREFIX}model.layers.0.self_attn."
    state = {
        k.removeprefix(prefix): v for k, v in released_state(model).items() if k.startswith(prefix)
    }
    return {"x": x.to(torch.float16).numpy(), **results, **state}


def model_golden(seed):
    """A whole decoder, and its second layer by itself."""
    model = build(text_config(3, num_kv_heads=2, index_dim=16, num_local_blocks=2), seed)
    tokens = torch.randint(
        VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed + 1)
    )
    decoder = model.model.language_model
    layer, positions = decoder.layers[1], torch.arange(TOKENS)[None]
    x = random_input(seed + 2)
    gate, up = torch.einsum("btd,eid->beti", x, layer.mlp.experts.gate_up_proj).chunk(2, dim=-1)
    clamped = ((gate > 7).float().mean(), (up.abs() > 7).float().mean())
    assert min(clamped) > 0.005, "the clamps of swiglu-oai are not exercised"

    def one_layer(x):
        return layer(x, decoder.rotary_emb(x, positions), None, position_ids=positions)

    results = {"tokens": tokens.to(torch.int32).numpy(), "x": x.to(torch.float16).numpy()}
    with recorded_topk() as calls:
        results |= both_precisions(model, "moe.y", layer.mlp, x)
        results |= both_precisions(model, "layer.y", one_layer, x)
        results |= both_precisions(model, "logits", lambda ids: model(input_ids=ids).logits, tokens)
    refuse_near_ties(calls)
    return results | released_state(model)


def save(name, arrays):
    """Writes one compressed file beside this script."""
    path = HERE / name
    np.savez_compressed(path, **arrays)
    print(f"{name}: {path.stat().st_size / 1024:.0f} KiB, {len(arrays)} arrays")


def main():
    """Writes the three files."""
    transformers.utils.logging.disable_progress_bar()
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    assert version >= (5, 13), "transformers before 5.13 shares one selection between all groups"
    save("minimax_m3_attention_2_groups.npz", attention_golden(2, index_dim=16, seed=0))
    save("minimax_m3_attention_4_groups.npz", attention_golden(4, index_dim=24, seed=10))
    save("minimax_m3_model.npz", model_golden(seed=20))


if __name__ == "__main__":
    main()
