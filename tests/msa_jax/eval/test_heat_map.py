"""Heat maps: every number is there, can be read on its cell, and the labels stand in order."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from msa_jax.eval import heat_map as module
from msa_jax.eval.heat_map import heat_map


def test_numbers_and_labels_are_in_the_figure():
    values = np.array([[0.0, 0.25], [0.5, np.nan], [1.0, 0.75]])
    svg = heat_map(values, ["0%", "50%", "100%"], ["2K", "4K"], x="context", y="depth", title="run")
    ElementTree.fromstring(svg)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    numbers = ["0.00", "0.25", "0.50", "-", "1.00", "0.75"]
    labels = ["0%", "50%", "100%", "2K", "4K", "context", "depth", "run"]
    assert sorted(texts) == sorted([*numbers, *labels])


@pytest.mark.parametrize("value", np.linspace(0, 1, 21))
def test_numbers_can_be_read_on_their_cells(value):
    """Contrast of at least 4.5 (WCAG AA) between a cell and its number."""
    svg = heat_map(np.array([[value]]), ["row"], ["column"], x="", y="")
    cell = re.search(r'<g id="[^"]*patch_2">.*?fill: (#[0-9a-f]{6})', svg, re.DOTALL)[1]
    number = re.search(r"fill: (#[0-9a-f]{6})[^>]*>\d\.\d\d<", svg)[1]
    light, dark = sorted((luminance(cell), luminance(number)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_shares_can_be_told_apart_without_hue():
    """A quarter apart, colours differ in lightness or between warm and cold."""
    colours = [np.array(module._COLOURS(share)[:3]) for share in np.linspace(0, 1, 5)]
    for first, second in itertools.pairwise(colours):
        warmth = (first[0] - first[2]) - (second[0] - second[2])
        assert warmth > 0.1


def luminance(colour):
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]
