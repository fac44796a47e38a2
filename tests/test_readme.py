"""The README's examples run as they stand, and its commands and links name what there is."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_an_example_of_each_way_to_import():
    imports = ("from msa_jax import", "from msa_jax.interop.linen import", "from pallas_kernels")
    assert [sum(name in example for example in EXAMPLES) > 0 for name in imports] == [True] * 3


@pytest.mark.fast
@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example):
    names: dict = {"__name__": "readme"}
    exec(compile(example, "README.md", "exec"), names)
    if "y" in names:
        assert names["y"].shape[:2] == (2, 256)
    assert (names["kl"] > 0).any()


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)|<img src=\"([^\"]+)\"", README)
    links = [link or image for link, image in links]
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_named_scripts_configs_and_targets_exist():
    scripts = set(re.findall(r"python -m (experiments\.\w+)", README))
    assert {"experiments.train", "experiments.generate", "experiments.report"} <= scripts
    files = [name.replace(".", "/") + ".py" for name in scripts]
    files += re.findall(r"configs/\w+\.py", README)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`?make (\w+)", README)
    assert {"quickstart", "test"} <= set(targets)
    assert [name for name in targets if f"\n{name}:" not in makefile] == []
