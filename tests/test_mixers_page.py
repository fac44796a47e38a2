"""The page about mixers names every kind and selector, and its numbers are those of the code."""

import pathlib
import re
from typing import get_args

import pytest

from msa_jax.config import AttentionConfig, MixerKind, Selector
from msa_jax.cost import attention_flops, decode_bytes

PAGE = (pathlib.Path(__file__).parents[1] / "docs/mixers.md").read_text(encoding="utf-8")
# Of the relative costs, by the first cell of their rows.
ROWS = {
    "`mha`": AttentionConfig(kind="mha"),
    "`sliding_window`": AttentionConfig(kind="sliding_window", window=2048),
    "`longformer`, `bigbird`": AttentionConfig(
        kind="bigbird", num_sink_blocks=1, num_random_blocks=3
    ),
    "`msa`, `learned`": AttentionConfig(),
    "`msa`, `oracle`": AttentionConfig(selector="oracle"),
}


@pytest.mark.parametrize("name", [*get_args(MixerKind), *get_args(Selector)])
def test_every_kind_and_selector_has_a_row(name):
    assert re.search(rf"^\| `{name}` \|", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ROWS)
def test_relative_costs_are_those_of_the_code(name):
    section = PAGE[PAGE.index("Relative to `gqa`") :]
    (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", section, flags=re.MULTILINE)
    dense, mixer = AttentionConfig(kind="gqa"), ROWS[name]
    expected = [
        cost(mixer, length) / cost(dense, length)
        for cost in (lambda *a: attention_flops(*a).total, decode_bytes)
        for length in (8192, 32768, 131072)
    ]
    assert [float(cell) for cell in line.split("|")] == [round(value, 3) for value in expected]


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(example, "docs/mixers.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) == 6
