"""One model's costs: cost curves, an HTML page, and the same numbers as CSV and JSON."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.costing import words
from experiments.costing.costs import BEYOND, ESTIMATED, BreakEven, CostRow, Pair, Setting
from experiments.costing.files import as_csv, as_json
from msa_jax.config import ArchitectureConfig
from msa_jax.eval import figures, page

_HOLLOW = "Hollow: beyond the lengths that kernels were measured at, or estimated."


def cost_curves(rows: Sequence[CostRow], setting: Setting) -> str:
    """Prefill and decode of both models over the context, one SVG."""
    lines = _lines("prefill", [row.prefill for row in rows])
    lines |= _lines("decode", [row.decode for row in rows])
    bases = [[row.prefill_basis for row in rows]] * 2 + [[row.decode_basis for row in rows]] * 2
    return _curves(
        rows, lines, words.dollars(setting), dict(zip(lines, bases, strict=True)), log=True
    )


def files(
    config: ArchitectureConfig,
    rows: Sequence[CostRow],
    evens: Sequence[BreakEven],
    setting: Setting,
    command: str,
) -> dict[str, str]:
    """The files of one model by name; `command` is what makes them."""
    plain = [row.flat() for row in rows]
    return {
        "economics.html": html(config, rows, evens, setting, command),
        "economics.svg": figures.standalone(cost_curves(rows, setting)),
        "economics.csv": as_csv(plain),
        "economics.json": as_json(plain, {"": evens}, setting, command),
    }


def html(
    config: ArchitectureConfig,
    rows: Sequence[CostRow],
    evens: Sequence[BreakEven],
    setting: Setting,
    command: str,
) -> str:
    """The page of one model; `command` is what makes it."""
    body = (
        "<p>MSA costs more than dense attention at short context, and less from these lengths on:"
        f"</p>{_list([even.sentence for even in evens])}"
        + page.grid(_pictures(rows, setting))
        + page.section(words.dollars(setting), page.table(*words.dollar_table(rows)))
        + page.section("Attention's share", page.table(*words.share_table(rows)))
        + page.section("Memory", page.table(*words.memory_table(rows, setting)))
        + page.section(
            "What goes in", _list(words.caveat(config, setting) + words.assumptions(setting))
        )
        + page.note(command)
    )
    return page.document(words.title(config, setting), body)


def _pictures(rows: Sequence[CostRow], setting: Setting) -> list[str]:
    training = _lines("training", [row.training for row in rows])
    shares = _lines("", [Pair(*(100 * v for v in row.time_share)) for row in rows])
    caches = {
        "keys and values": np.array([row.kv_cache_gb for row in rows]),
        "index keys": np.array([row.index_cache_gb for row in rows]),
    }
    trained = {name: [row.training_basis for row in rows] for name in training}
    prefilled = {name: [row.prefill_basis for row in rows] for name in shares}
    share = "attention's share of prefill time (%)"
    return [
        page.figure(
            cost_curves(rows, setting),
            f"Prefill and decode by length of the context, dense and MSA. {_HOLLOW}",
        ),
        page.figure(
            _curves(rows, training, words.dollars(setting), trained, log=True),
            f"Training by length of the document, the sparse phase. {_HOLLOW}",
        ),
        page.figure(
            _curves(rows, shares, share, prefilled, log=False),
            f"Selection and attention against all that a prefill does. {_HOLLOW}",
        ),
        page.figure(
            _curves(rows, caches, "GB per sequence (bf16)", {}, log=True),
            "What one sequence keeps in memory. Index keys are MSA's alone.",
        ),
    ]


def _curves(
    rows: Sequence[CostRow],
    lines: Mapping[str, np.ndarray],
    quantity: str,
    bases: Mapping[str, Sequence[str]],
    *,
    log: bool,
) -> str:
    """Lines over the context; hollow where `bases`, of each row by line, say no measured rate."""
    hollow = {n: np.array([BEYOND in b or ESTIMATED in b for b in bs]) for n, bs in bases.items()}
    lengths = np.array([row.length for row in rows])
    return figures.by_context(lengths, lines, quantity, log=log, hollow=hollow)


def _lines(what: str, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    label = f"{what}, " if what else ""
    return {
        f"{label}dense": np.array([pair.dense for pair in pairs]),
        f"{label}MSA": np.array([pair.msa for pair in pairs]),
    }


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{page.text(sentence)}</li>" for sentence in sentences) + "</ul>"
