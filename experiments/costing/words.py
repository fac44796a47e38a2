"""What stands beside the numbers: assumptions in words, tables of text."""

import textwrap
from collections.abc import Callable, Sequence

from experiments.benchmarking.cases import BASELINES, FORWARD, TRAINING
from experiments.costing.costs import BEYOND, CostRow, Setting
from experiments.costing.measurements import MATMUL_FRACTION
from msa_jax import cost
from msa_jax.config import ArchitectureConfig, AttentionConfig
from msa_jax.eval.figures import short_length
from msa_jax.eval.tables import Table

# What the rate of a kernel depends on beside the length.
_FEATURES: dict[str, Callable[[AttentionConfig], int]] = {
    "query heads per KV head": lambda layer: layer.num_heads // layer.num_kv_heads,
    "dims per head": lambda layer: layer.head_dim,
    "index dims": lambda layer: layer.index_dim,
    "tokens per block": lambda layer: layer.block_size,
    "blocks per query": lambda layer: layer.top_k,
}


def title(config: ArchitectureConfig, setting: Setting) -> str:
    """Of one model's page and of the terminal's output."""
    count = cost.parameter_count(config)
    name = f"a model of {_size(count.total)} parameters ({_size(count.active)} active)"
    return f"What {name} costs on {setting.machine.gpu.name}{estimated(setting)}"


def dollars(setting: Setting) -> str:
    """The unit of all costs."""
    return f"US dollars per million tokens{estimated(setting)}"


def estimated(setting: Setting) -> str:
    """What stands behind the name of every number of a GPU that nothing was measured on."""
    return "" if setting.own else ", estimated"


def assumptions(setting: Setting) -> list[str]:
    """Every number that was put in, and whether it was measured."""
    machine, measured = setting.machine, setting.measured
    lengths = {p: ", ".join(map(short_length, n)) for p, n in measured.lengths.items()}
    kernel = BASELINES.get(measured.dense, "the faster of cuDNN and FlashAttention-4")
    price = " (assumed: a round figure, not a quote)"
    layer = measured.layer
    lines = [
        f"Attention: rates measured on {measured.device_kind} with {layer.num_heads} query and "
        f"{layer.num_kv_heads} KV heads of {layer.head_dim} dims, blocks of {layer.block_size}, "
        f"{layer.top_k} per query: MSA with {measured.selection} selection and a bf16 index, "
        f"forward at {lengths[FORWARD]} tokens, training at {lengths[TRAINING]}; dense attention "
        f"by {kernel}. Times are scaled by the "
        "FLOPs of the model's heads and dims; between measured lengths a rate follows the power "
        "law through both. A value with * lies beyond what was measured, at the nearest length's "
        "rate.",
        f"All other products: {machine.matmul_fraction:.0%} of {machine.gpu.peak_flops / 1e12:.0f} "
        f"TFLOP/s ({_fraction_source(setting)}). In training they and attention count what "
        "`model.remat` computes again.",
        f"Decoding, {setting.batch} sequences at a time: bytes of weights and caches (bf16) at "
        f"{machine.bytes_per_second / 1e12:.2f} TB/s "
        f"({'measured for a large copy' if setting.own else 'estimated'}); no decoding kernel was "
        "timed. Weights are read once for all sequences.",
        f"Price: {machine.price:.2f} US dollars per GPU hour"
        f"{price if machine.price == machine.gpu.price else ''}. Networks between GPUs and idle "
        "time cost nothing here.",
    ]
    if not setting.own:
        lines.insert(
            0,
            f"Estimated: nothing was measured on {machine.gpu.name}. Attention is taken to reach "
            f"the share of the matmul peak, and memory the share of the bandwidth, that they "
            f"reached on {measured.device_kind}.",
        )
    return lines


def unlike_the_measured(attention: AttentionConfig, setting: Setting) -> str:
    """In what a model's layer differs from the measured one, beside the number of groups."""
    found = []
    for what, size in _FEATURES.items():
        mine, measured = size(attention), size(setting.measured.layer)
        if mine != measured:
            found.append(f"{mine} {what} ({measured} measured)")
    return ", ".join(found)


def caveat(config: ArchitectureConfig, setting: Setting) -> list[str]:
    """A sentence where the rates are of a layer unlike the model's, else none."""
    unlike = unlike_the_measured(config.attention, setting)
    sentence = f"This model has {unlike}. That the measured rates hold for it is an assumption."
    return [sentence] if unlike else []


def _fraction_source(setting: Setting) -> str:
    if setting.machine.matmul_fraction != MATMUL_FRACTION:
        return "assumed, --matmul_fraction"
    where = "measured on an H100 in training a dense 350M model"
    return f"{where}; an assumption for any other model" + ("" if setting.own else " and GPU")


def share_table(rows: Sequence[CostRow]) -> Table:
    """Attention's share of FLOPs and of prefill time, and what MSA saves of the whole."""
    header = ["tokens", "attention's share of FLOPs, dense", "MSA", "FLOPs saved"]
    header += ["attention's share of prefill time, dense", "MSA", "prefill time saved"]
    lines = []
    for row in rows:
        mark = _mark(row.prefill_basis)
        line = [short_length(row.length), *map(percent, (*row.flops_share, row.flops.saved))]
        line += [percent(v) + mark for v in (*row.time_share, row.prefill.saved)]
        lines.append(line)
    return header, lines


def dollar_table(rows: Sequence[CostRow]) -> Table:
    """US dollars per million tokens."""
    header = ["tokens"]
    for what in ("prefill", "training", "decode"):
        header += [f"{what}, dense ($)", "MSA ($)", "dense / MSA"]
    lines = []
    for row in rows:
        line = [short_length(row.length)]
        marks = _mark(row.prefill_basis), _mark(row.training_basis), ""
        for pair, mark in zip((row.prefill, row.training, row.decode), marks, strict=True):
            line += [f"{value:#.3g}".rstrip(".") + mark for value in pair]
            line.append(f"{pair.dense / pair.msa:.2f}{mark}")
        lines.append(line)
    return header, lines


def memory_table(rows: Sequence[CostRow], setting: Setting) -> Table:
    """Caches of a sequence, and how many GPUs decoding takes."""
    header = ["tokens", "keys and values of a sequence (GB)", "index keys on top (GB)"]
    holding = f"{setting.machine.gpu.name} GPUs that hold weights and {setting.batch} sequences"
    header += [f"{holding}, dense", "MSA"]
    lines = []
    for row in rows:
        line = [short_length(row.length), f"{row.kv_cache_gb:.2f}", f"{row.index_cache_gb:.2f}"]
        lines.append([*line, *(f"{gpus:.0f}" for gpus in row.decode_gpus)])
    return header, lines


def _size(parameters: int) -> str:
    billions = parameters / 1e9
    return f"{billions:.3g}B" if billions >= 1 else f"{1e3 * billions:.3g}M"


def _mark(basis: str) -> str:
    return "*" if BEYOND in basis else ""


def percent(value: float, digits: int = 1) -> str:
    """A share in percent, without a minus before zero."""
    text = f"{round(100 * value, digits) + 0.0:.{digits}f} %"
    return text.replace("-", "\N{MINUS SIGN}")


def bullets(sentences: Sequence[str]) -> str:
    """A Markdown list in lines of at most 100 characters."""
    indents = {"initial_indent": "* ", "subsequent_indent": "  "}
    wrapped = (textwrap.fill(s, 100, **indents, break_on_hyphens=False) for s in sentences)
    return "\n".join(wrapped)
