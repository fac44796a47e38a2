"""The baselines that run in PyTorch: FlashAttention-4 and flash-msa, timed by CUDA events."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarking.cases import TRAINING, Case, phase
from experiments.benchmarking.timing import Timing, repeat

Record = dict[str, Any]

_CHUNK = 8192


def flash_attention_4(case: Case) -> Iterator[Record]:
    """Dense causal attention by FlashAttention-4; in training with its gradients."""
    phase("import flash_attn.cute")
    attention = importlib.import_module("flash_attn.cute")
    phase("draw inputs")
    drawn = _Draw(case)
    q = drawn((case.batch, case.length, case.num_heads, case.head_dim))
    k, v = (drawn((case.batch, case.length, case.num_kv_heads, case.head_dim)) for _ in "kv")

    def attend(length: int):
        arrays = (_first(x, length, axis=1) for x in (q, k, v))
        return attention.flash_attn_func(*arrays, causal=True)

    if case.passes == TRAINING:
        do = drawn(tuple(q.shape))
        yield _trained(case, lambda n: attend(n)[:1], (q, k, v), lambda n: (_first(do, n, axis=1),))
    else:
        yield {"timings": {"both": _timed(case, "both", attend).asdict()}, "peak_bytes": _peak()}


def flash_msa(case: Case) -> Iterator[Record]:
    """MSA by flash-msa: its forward, selection included, and its selection alone.

    In training: selection, forward, backward and the gradients of its KL, as one.
    """
    phase("import flash_msa")
    library = importlib.import_module("flash_msa")
    selecting = importlib.import_module("flash_msa.msa_select_cutedsl")
    phase("draw inputs")
    drawn = _Draw(case)
    index_q = drawn((case.batch, case.num_kv_heads, case.length, case.index_dim))
    index_k = drawn((case.batch, 1, case.length, case.index_dim))
    q = drawn((case.batch, case.num_heads, case.length, case.head_dim))
    k, v = (drawn((case.batch, case.num_kv_heads, case.length, case.head_dim)) for _ in "kv")
    scale = case.head_dim**-0.5
    minimum = case.top_k * case.block_size

    def attend(length: int):
        heads = (_first(array, length, axis=2) for array in (index_q, index_k, q, k, v))
        return library.flash_msa_func(*heads, minimum, scale)

    if case.passes == TRAINING:
        do = drawn((case.batch, case.length, case.num_heads * case.head_dim))
        one = importlib.import_module("torch").ones((), device="cuda")
        arrays = (index_q, index_k, q, k, v)
        yield _trained(case, attend, arrays, lambda n: (_first(do, n, axis=1), one))
        return

    def select(length: int):
        return selecting.select_blocks(
            _first(index_q, length, axis=2),
            _first(index_k, length, axis=2),
            scale=scale,
            num_blocks=length // case.block_size,
            top_k_blocks=case.top_k,
        )

    timings = {
        name: _timed(case, name, call).asdict()
        for name, call in (("both", attend), ("selection", select))
    }
    yield {"timings": timings, "peak_bytes": _peak()}


def _first(x: Any, length: int, *, axis: int):
    """The first tokens; all of them as they are, for a view's gradient would be another copy."""
    return x if length == x.shape[axis] else x.narrow(axis, 0, length).contiguous()


def _trained(
    case: Case,
    forward: Callable[[int], tuple],
    inputs: tuple,
    cotangents: Callable[[int], tuple],
) -> Record:
    """Times a forward pass and the gradients of all inputs, given those of what it returns."""
    torch = importlib.import_module("torch")
    for tensor in inputs:
        tensor.requires_grad_()

    def train(length: int):
        results = forward(length)
        given = [
            cotangent.to(result.dtype).reshape(result.shape)
            for result, cotangent in zip(results, cotangents(length), strict=True)
        ]
        return torch.autograd.grad(results, inputs, given)

    timing = _timed(case, "training", train, gradients=True)
    return {"timings": {"training": timing.asdict()}, "peak_bytes": _peak()}


class _Draw:
    """Standard normal bf16 tensors, drawn in chunks of their longest axis."""

    def __init__(self, case: Case):
        self._torch = importlib.import_module("torch")
        self._generator = self._torch.Generator(device="cuda").manual_seed(case.seed)

    def __call__(self, shape: tuple[int, ...]):
        options = {"device": "cuda", "dtype": self._torch.bfloat16}
        out = self._torch.empty(shape, **options)
        axis = max(range(len(shape)), key=shape.__getitem__)
        for part in out.split(_CHUNK, dim=axis):
            part.copy_(self._torch.randn(part.shape, generator=self._generator, **options))
        return out


def _timed(case: Case, name: str, call: Callable[[int], Any], *, gradients: bool = False) -> Timing:
    """Times `call` at the case's length after a first call, a shorter one where it takes long."""
    torch = importlib.import_module("torch")

    def chain(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call(case.length)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    with torch.set_grad_enabled(gradients):
        first = case.length if case.length <= 2**17 else _CHUNK  # beyond, a call is seconds
        phase(f"first call of {name}, {first} tokens")
        call(first)
        torch.cuda.synchronize()
        phase(f"time {name}")
        return repeat(chain, case.repeats)


def _peak() -> int:
    return importlib.import_module("torch").cuda.max_memory_allocated()
