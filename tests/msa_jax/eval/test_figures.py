import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from msa_jax.eval import figures

STEPS = np.arange(0, 100, 10)
CURVE = figures.LossCurve(STEPS, 3 - STEPS / 50, STEPS, 3.1 - STEPS / 50)
IDS = np.full((3, 8, 2), -1)
IDS[..., 0] = np.arange(8) // 2

FIGURES = {
    "loss": lambda: figures.loss_curves({"MSA": CURVE, "GQA": CURVE}),
    "gap": lambda: figures.loss_gap(STEPS, STEPS / 100, "MSA", "GQA"),
    "recall": lambda: figures.recall(
        {"score": STEPS}, {"score": np.linspace(0, 1, 20).reshape(10, 2)}, {"score": "MSA"}
    ),
    "kl": lambda: figures.kl_per_layer(STEPS, np.ones((10, 40)), range(40), 20),
    "kl_of_zero": lambda: figures.kl_per_layer(STEPS, np.zeros((10, 1)), [0], 0),
    "load": lambda: figures.expert_load({"MSA": np.ones((2, 4))}, {"MSA": [1, 2]}),
    "load_of_nothing": lambda: figures.expert_load({"MSA": np.zeros((2, 4))}, {"MSA": [1, 2]}),
    "blocks": lambda: figures.selected_blocks(IDS, np.ones(8, int), 2),
    "position": lambda: figures.loss_by_position(
        {"MSA": np.array([0, 4, 8])}, {"MSA": np.array([2.0, 1.0])}
    ),
    "context": lambda: figures.by_context(
        np.array([8192, 16384]), {"MSA": np.array([1.0, 2.0])}, "TFLOPs", log=True
    ),
}
LABELS = {
    "loss": ["optimizer step", "loss (nats per token)", "MSA validation (training: thin line)"],
    "gap": ["MSA loss above GQA (%)"],
    "recall": ["recall (1 = everything)", "MSA"],
    "kl": ["KL (nats)", "layer", "39"],
    "kl_of_zero": ["KL (nats)"],
    "load": ["expert", "layer", "load (1 = even)", "MSA"],
    "load_of_nothing": ["expert"],
    "blocks": ["group 0", "group 2", "key block (2 tokens each)", "query (token position)"],
    "position": ["position in the document (tokens)", "MSA"],
    "context": ["context (tokens)", "16K", "TFLOPs"],
}


def texts(svg: str) -> set[str]:
    return {
        "".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if "text" in e.tag
    }


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_one_labelled_svg_element(name):
    svg = FIGURES[name]()
    assert svg.startswith("<svg")
    assert set(LABELS[name]) <= texts(svg)
    assert svg == FIGURES[name](), "equal data must give equal files"


def test_figures_leave_colours_and_size_to_the_page():
    svg = FIGURES["loss"]()
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert not {"width", "height"} & set(root.attrib)
    for variable in ("ink", "grid", "series-0", "series-1"):
        assert f"var(--{variable}, #" in svg
    bare = re.sub(r"var\([^)]*\)", "", svg)
    assert not re.findall(r"#[0-9a-f]{6}\b", bare), "a colour that dark mode cannot change"


def test_ids_of_two_figures_do_not_meet():
    ids = [set(re.findall(r'\bid="([^"]+)"', FIGURES[name]())) for name in ("loss", "gap")]
    assert not ids[0] & ids[1]
    svg = FIGURES["loss"]()
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    assert used
    assert used <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_a_standalone_figure_brings_its_colours():
    svg = figures.standalone(FIGURES["loss"]())
    ElementTree.fromstring(svg)
    assert svg.count("prefers-color-scheme:dark") == 1
    assert "--ink:#" in svg
    assert "background:var(--paper)" in svg


def test_figures_leave_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    FIGURES["loss"]()
    assert dict(matplotlib.rcParams) == before


def test_selection_states_equal_a_loop():
    rng = np.random.default_rng(0)
    length, block = 42, 4
    segments = np.repeat([1, 2, 3, 0], [16, 12, 8, 6])
    starts = {1: 0, 2: 16, 3: 28}
    ids = np.full((length, 3), -1)
    expected = np.zeros((length, 11), int)
    for query in range(length):
        if segments[query] == 0:
            continue
        own, first = query // block, starts[segments[query]] // block
        expected[query, first : own + 1] = figures.VISIBLE
        chosen = sorted({*rng.integers(first, own + 1, 2).tolist(), own})
        ids[query, : len(chosen)] = chosen
        expected[query, chosen] = figures.KEPT
        expected[query, own] = figures.OWN
    states = figures.selection_states(ids, segments, block)
    np.testing.assert_array_equal(states, expected)
    assert set(np.unique(states)) == {0, 1, 2, 3}


def test_a_block_that_may_not_be_seen_shows_as_kept():
    """The picture must show a broken selection, not hide it."""
    ids = np.array([[0, -1], [1, -1], [1, -1], [0, 1]])
    states = figures.selection_states(ids, np.ones(4, int), 2)
    assert states[1].tolist() == [figures.VISIBLE, figures.KEPT]


@pytest.mark.parametrize(
    ("count", "most", "indices"), [(1, 4, [0]), (3, 4, [0, 1, 2]), (57, 4, [0, 19, 37, 56])]
)
def test_spread(count, most, indices):
    assert figures.spread(count, most) == indices


@pytest.mark.parametrize(
    ("tokens", "text"), [(512, "512"), (8192, "8K"), (1536, "1.5K"), (2**20, "1M")]
)
def test_short_length(tokens, text):
    assert figures.short_length(tokens) == text


def test_points_that_were_not_measured_are_hollow():
    lengths, line = np.array([8192, 16384, 32768]), np.array([1.0, 2.0, 3.0])

    def hollow(*points):
        found = {"MSA": np.array(points)} if points else {}
        svg = figures.by_context(lengths, {"MSA": line}, "TFLOPs", log=True, hollow=found)
        return svg.count("fill: var(--paper, #ffffff)")

    full = hollow()
    assert hollow(False, False, False) == full
    assert hollow(True, False, True) == full + 2
