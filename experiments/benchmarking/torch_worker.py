"""The baselines that run in PyTorch: FlashAttention-4 and flash-msa, timed by CUDA events."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarking.cases import Case, phase
from experiments.benchmarking.timing import Timing, repeat

Record = dict[str, Any]

_CHUNK = 8192


def flash_attention_4(case: Case) -> Iterator[Record]:
    """Dense causal attention by FlashAttention-4."""
    phase("import flash_attn.cute")
    attention = importlib.import_module("flash_attn.cute")
    phase("draw inputs")
    drawn = _Draw(case)
    q = drawn((case.batch, case.length, case.num_heads, case.head_dim))
    k, v = (drawn((case.batch, case.length, case.num_kv_heads, case.head_dim)) for _ in "kv")

    def attend(length: int):
        return attention.flash_attn_func(q[:, :length], k[:, :length], v[:, :length], causal=True)

    yield {"timings": {"both": _timed(case, "both", attend).asdict()}, "peak_bytes": _peak()}


def flash_msa(case: Case) -> Iterator[Record]:
    """MSA by flash-msa: its forward, selection included, and its selection alone."""
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
        heads = (array[:, :, :length].contiguous() for array in (index_q, index_k, q, k, v))
        return library.flash_msa_func(*heads, minimum, scale)

    def select(length: int):
        return selecting.select_blocks(
            index_q[:, :, :length].contiguous(),
            index_k[:, :, :length].contiguous(),
            scale=scale,
            num_blocks=length // case.block_size,
            top_k_blocks=case.top_k,
        )

    timings = {
        name: _timed(case, name, call).asdict()
        for name, call in (("both", attend), ("selection", select))
    }
    yield {"timings": timings, "peak_bytes": _peak()}


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


def _timed(case: Case, name: str, call: Callable[[int], Any]) -> Timing:
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

    with torch.no_grad():
        first = case.length if case.length <= 2**17 else _CHUNK  # beyond, a call is seconds
        phase(f"first call of {name}, {first} tokens")
        call(first)
        torch.cuda.synchronize()
        phase(f"time {name}")
        return repeat(chain, case.repeats)


def _peak() -> int:
    return importlib.import_module("torch").cuda.max_memory_allocated()
