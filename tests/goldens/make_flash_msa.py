"""Writes the goldens of sparse attention and of the index loss from flash-msa's eager models.

    python3.11 -m venv oracle
    oracle/bin/pip install numpy==2.4.6 torch==2.13.0
    oracle/bin/pip install --no-deps flash-msa==0.1.1
    oracle/bin/python tests/goldens/make_flash_msa.py

flash-msa is made of CUDA kernels, but the models its tests compare them with are plain PyTorch. Its
top module imports the kernels, so an empty one stands in for it; torch and flash-msa are needed
only here, on a CPU and in an environment of its own.

`flash_msa.npz`, in the layouts of `docs/architecture.md`: the inputs q, k, v, index_q, index_k (fed
behind the projections and RoPE) and a cotangent `do` of the output, then for the two models

* `sparse.*`: block size 128, top-k 2 of 4 blocks;
* `dense.*`: the warm-up, main and index branch over the whole causal prefix;

the output `o`, the value `kl`, the gradients of sum(o * do) with respect to q, k, v, and those of
kl with respect to index_q, index_k. (kl reaches neither q nor k: the teacher is detached. o does
not reach the index branch.) Computed in float64 from float16 numbers, then rounded to float32.

What differs from `docs/architecture.md`, and how the golden deals with it:

* kl is the mean over batch, queries and groups of KL(teacher || student), natural log. The eager
  models return that value; only the CUDA kernels return a zero in its place.
* Both models scale index scores by head_dim**-0.5, the scale of the main branch, whatever the
  index dim. Here D = 8 and Di = 4, so `index_scale` has to be passed as 8**-0.5.
* A query of the first block sees one block only, but the model picks two all the same and masks
  the future one afterwards. `sparse.picked_blocks` is what it picked, in its order (score
  descending, so the forced local block comes first); `sparse.block_ids` is the same choice in our
  form: visible blocks only, ascending, then -1.
"""

import importlib
import importlib.util
import pathlib
import sys
import types
from unittest import mock

import numpy as np
import torch

PATH = pathlib.Path(__file__).with_name("flash_msa.npz")
BATCH, TOKENS, HEADS, KV_HEADS, HEAD_DIM, INDEX_DIM = 1, 512, 4, 2, 8, 4
BLOCK_SIZE, TOP_K = 128, 2


def eager_models():
    """The two eager model classes, imported past flash-msa's own top module."""
    spec = importlib.util.find_spec("flash_msa")
    package = types.ModuleType("flash_msa")
    package.__path__ = list(spec.submodule_search_locations)
    package.flash_msa_func = package.flash_msa_warmup_func = None
    sys.modules["flash_msa"] = package
    sparse = importlib.import_module("flash_msa.tests.testing_model").Model
    dense = importlib.import_module("flash_msa.tests.testing_model_warmup").WarmupModel
    return {"sparse": sparse, "dense": dense}


def inputs():
    """Standard normal float16 arrays by name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (HEADS, HEAD_DIM),
        "k": (KV_HEADS, HEAD_DIM),
        "v": (KV_HEADS, HEAD_DIM),
        "index_q": (KV_HEADS, INDEX_DIM),
        "index_k": (INDEX_DIM,),
        "do": (HEADS, HEAD_DIM),
    }
    return {
        name: torch.randn(BATCH, TOKENS, *shape, generator=generator).to(torch.float16)
        for name, shape in shapes.items()
    }


def run(model_class, arrays):
    """Output, loss and gradients of one eager model, and what its top-k saw and picked."""
    model = model_class(
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        n_proxy_heads=KV_HEADS,
        n_proxy_kv_heads=1,
        top_k=TOP_K * BLOCK_SIZE,
        use_kernel=False,
    )
    leaves = {name: x.double().requires_grad_() for name, x in arrays.items()}
    heads_first = {n: x.transpose(1, 2) if x.ndim == 4 else x[:, None] for n, x in leaves.items()}
    picks, topk = [], torch.Tensor.topk

    def record(scores, k, dim):
        result = topk(scores, k, dim=dim)
        picks.append((scores.detach(), result.indices))
        return result

    with mock.patch.object(torch.Tensor, "topk", record):
        names = ("index_q", "index_k", "q", "k", "v")
        o, kl = model._attention_eager(*(heads_first[name] for name in names))
    o = o.reshape(BATCH, TOKENS, HEADS, HEAD_DIM)

    main = ("q", "k", "v")
    gradients = torch.autograd.grad(
        (o * leaves["do"].detach()).sum(),
        [leaves[name] for name in (*main, "index_q", "index_k")],
        retain_graph=True,
        allow_unused=True,
    )
    assert gradients[3:] == (None, None), "o must not reach the index branch"
    index = ("index_q", "index_k")
    index_gradients = torch.autograd.grad(
        kl, [leaves[name] for name in (*index, *main)], allow_unused=True
    )
    assert index_gradients[2:] == (None, None, None), "kl must not reach the main branch"
    results = {"o": o, "kl": kl}
    results |= {f"d{name}": g for name, g in zip(main, gradients, strict=False)}
    results |= {f"d{name}": g for name, g in zip(index, index_gradients, strict=False)}
    results = {name: x.detach().numpy().astype(np.float32) for name, x in results.items()}
    results["kl"] = np.float64(kl.item())
    return results, picks


def block_ids(picked):
    """The picks [B, G, T, K] as visible blocks only, ascending, then -1."""
    own_block = torch.arange(TOKENS)[:, None] // BLOCK_SIZE
    beyond_all = TOKENS // BLOCK_SIZE
    ids = picked.masked_fill(picked > own_block, beyond_all).sort(dim=-1).values
    return ids.masked_fill(ids == beyond_all, -1)


def main():
    """Writes the file."""
    arrays = inputs()
    golden = {name: x.numpy() for name, x in arrays.items()}
    for kind, model_class in eager_models().items():
        results, picks = run(model_class, arrays)
        print(f"{kind}: kl = {results['kl']:.6f}")
        golden |= {f"{kind}.{name}": x for name, x in results.items()}
        for scores, picked in picks:
            ordered = scores.sort(dim=-1, descending=True).values
            gap = (ordered[..., TOP_K - 1] - ordered[..., TOP_K])[..., TOP_K * BLOCK_SIZE :].min()
            print(f"{kind}: smallest gap between a picked block and one left out {gap:.1e}")
            assert gap > 1e-5, "too close to a tie: take another seed"
            golden[f"{kind}.picked_blocks"] = picked.to(torch.int8).numpy()
            golden[f"{kind}.block_ids"] = block_ids(picked).to(torch.int8).numpy()
    np.savez_compressed(PATH, **golden)
    print(f"{PATH.name}: {PATH.stat().st_size / 1024:.0f} KiB, {len(golden)} arrays")


if __name__ == "__main__":
    main()
