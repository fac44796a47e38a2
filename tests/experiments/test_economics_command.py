"""The command: from the committed measurements to tables, files and the page of the docs."""

import csv
import dataclasses
import json
import pathlib

import pytest

from configs import h100_350m, msa_109b
from experiments import cli, economics
from experiments.costing import comparison, costs, measurements, words
from experiments.costing.shapes import ESTIMATES, LLAMA_3
from msa_jax import cost
from msa_jax.config import AttentionConfig, dense_twin
from msa_jax.economics import GPUS, prefill_time, training_time
from msa_jax.train.config import ExperimentConfig, from_config_dict

ROOT = pathlib.Path(__file__).parents[2]
BENCHMARK = ROOT / "docs/benchmarks/h100.json"
PROFILES = ROOT / "docs/benchmarks"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(*arguments):
    return cli.run(economics.main, ["economics", *arguments])


def error(capsys, *arguments):
    """The one line that a wrong command line ends with."""
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def load(module) -> ExperimentConfig:
    return from_config_dict(ExperimentConfig, module.get_config())


def setting(**changes):
    fields = {
        "price": None,
        "selection": "correlated",
        "dense": "fastest",
        "matmul_fraction": measurements.MATMUL_FRACTION,
        "batch": 32,
    }
    return costs.setting(BENCHMARK, changes.pop("gpu", "h100"), **fields | changes)


def summary(subject, length, passes, selection=""):
    """A time that the benchmark reports, in milliseconds."""
    for row in json.loads(BENCHMARK.read_text())["summary"]:
        found = row["subject"], row["length"], row["passes"], row["selection"]
        if found == (subject, length, passes, selection) and row["precision"] in ("", "native"):
            return row["parts"]["both" if passes == "forward" else "training"]["median_ms"]
    raise LookupError(f"{subject} {length} {passes} {selection}")


def one_layer(kind):
    """The benchmark's layer alone: what attention takes of such a model is what was measured."""
    config = load(msa_109b)
    model = {"num_layers": 1, "num_dense_layers": 0, "remat": "none"}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        attention=AttentionConfig(kind=kind),
    ).architecture


@pytest.mark.parametrize("selection", ["random", "correlated"])
@pytest.mark.parametrize("length", [2**13, 2**15, 2**17, 2**20])
def test_a_measured_layer_takes_what_was_measured(selection, length):
    machine = setting(selection=selection).machine
    forward = prefill_time(one_layer("msa"), length, machine).attention * length
    assert 1e3 * forward == pytest.approx(summary("msa", length, "forward", selection))
    dense = prefill_time(one_layer("gqa"), length, machine).attention * length
    assert 1e3 * dense == pytest.approx(summary("flash_attention_4", length, "forward"))
    if length in (2**15, 2**17):
        trained = training_time(one_layer("msa"), length, machine).attention * length
        assert 1e3 * trained == pytest.approx(summary("msa", length, "training", selection))
        dense = training_time(one_layer("gqa"), length, machine).attention * length
        assert 1e3 * dense == pytest.approx(summary("flash_attention_4", length, "training"))


def test_the_dense_kernel_can_be_chosen():
    machine = setting(dense="cudnn").machine
    dense = prefill_time(one_layer("gqa"), 2**15, machine).attention * 2**15
    assert 1e3 * dense == pytest.approx(summary("cudnn", 2**15, "forward"))


def test_the_matmul_fraction_is_what_the_profiled_step_leaves():
    """All of the dense step but attention, over the products outside of it, done again as remat."""
    table = json.loads((PROFILES / "h100_350m_profile_gqa.json").read_text())
    attention = sum(o["share"] for o in table["operations"] if "sdpa" in o["name"])
    config = dense_twin(load(h100_350m))
    length = config.data.sequence_length
    training, forward = cost.training_flops(config, length), cost.model_flops(config, length)
    assert config.model.remat == "save_selection"  # each layer's products run once more
    flops = training.projections + training.feed_forward + training.head
    flops += forward.projections + forward.feed_forward
    seconds = 1e-3 * table["milliseconds_per_step"] * (1 - attention) / config.data.batch_size
    fraction = flops / seconds / GPUS["h100"].peak_flops
    assert fraction == pytest.approx(measurements.MATMUL_FRACTION, abs=5e-3)


def test_the_cost_model_agrees_with_measured_steps():
    _, lines = comparison.measured_steps(PROFILES, load(h100_350m), setting(dense="cudnn"))
    assert [line[0] for line in lines] == ["MSA", "GQA"]
    for _, predicted, measured, _ in lines:
        assert float(predicted) == pytest.approx(float(measured), rel=0.05)


def test_bases_say_where_rates_come_from():
    found = setting()
    bases = [costs.basis(found, "forward", n) for n in (2**12, 2**13, 2**14, 2**20, 2**21)]
    beyond = "beyond what was measured"
    measured = "rates measured at this length"
    assert bases == [beyond, measured, "between measured lengths", measured, beyond]
    assert costs.basis(found, "training", 2**13) == beyond
    assert costs.basis(setting(gpu="h200"), "forward", 2**13) == f"estimated, {measured}"


def test_the_comparison_says_estimated_at_every_table_of_times(tmp_path):
    assert run("--shapes", "--gpu=h200", "--lengths=8K", f"--output={tmp_path}") == 0
    lines = (tmp_path / "economics.md").read_text().splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert [line for line in headings if "estimated" in line] == [
        "### By prefill time, estimated",
        "## From which context length on is MSA cheaper, estimated?",
        "## What msa_109b costs, estimated",
    ]
    assert "measured kernel rates" not in "".join(headings)


def test_another_gpu_reaches_the_same_share_of_its_peaks():
    h100, a100 = setting().machine, setting(gpu="a100").machine
    ratio = 312 / 989
    assert a100.kernels.main.at(9000) == pytest.approx(ratio * h100.kernels.main.at(9000))
    share = a100.bytes_per_second / a100.gpu.bytes_per_second
    assert share == pytest.approx(h100.bytes_per_second / h100.gpu.bytes_per_second)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the command wrote for the paper's model, by price."""
    folders = {price: tmp_path_factory.mktemp("economics") for price in (2, 4)}
    config = f"--config={ROOT}/configs/msa_109b.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for price, folder in folders.items():
            shorter = [f"--price={price}", "--lengths=1M,4K,128K", f"--output={folder}"]
            assert run(config, *shorter) == 0
    return folders


def test_a_price_doubled_doubles_the_dollars(files):
    rows = [json.loads((files[p] / "economics.json").read_text())["rows"] for p in (2, 4)]
    for cheap, dear in zip(*rows, strict=True):
        dollars = [name for name in cheap if name.endswith("_dollars")]
        assert len(dollars) == 6
        for name, value in cheap.items():
            if name in dollars:
                assert dear[name] == pytest.approx(2 * value)
            else:
                assert dear[name] == value


def test_all_files_hold_the_same_numbers(files):
    folder = files[2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "economics.csv",
        "economics.html",
        "economics.json",
        "economics.svg",
    ]
    values = json.loads((folder / "economics.json").read_text())
    with (folder / "economics.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [int(row["length"]) for row in table] == [2**12, 2**17, 2**20]
    assert [{k: str(v) for k, v in row.items()} for row in values["rows"]] == table
    assert values["settings"]["price_per_gpu_hour"] == 2
    page = (folder / "economics.html").read_text()
    row = values["rows"][1]
    for name in ("prefill_msa_dollars", "decode_dense_dollars"):
        assert f"<td>{row[name]:#.3g}</td>" in page
    # What lies beyond the measurements is marked wherever it stands.
    first = values["rows"][0]
    assert first["prefill_basis"] == "beyond what was measured"
    assert f"<td>{first['prefill_msa_dollars']:#.3g}*</td>" in page
    assert (folder / "economics.svg").read_text().startswith("<svg ")


def test_units_against_a_sum_by_hand(files):
    row = json.loads((files[2] / "economics.json").read_text())["rows"][1]
    config, found = load(msa_109b).architecture, setting()
    seconds = prefill_time(config, 2**17, found.machine).total
    assert row["prefill_msa_dollars"] == pytest.approx(1e6 * seconds * 2 / 3600)
    assert row["kv_cache_gb"] == pytest.approx(41 * 2 * 4 * 128 * 2 * 2**17 / 1e9)
    assert row["index_cache_gb"] == pytest.approx(41 * 128 * 2 * 2**17 / 1e9)
    dense = cost.model_flops(dense_twin(config), 2**17)
    assert row["flops_share_dense"] == pytest.approx(dense.attention / dense.total)


def test_an_estimate_says_so_everywhere(tmp_path, capsys):
    config = "--config=configs/msa_109b.py"
    assert run(config, "--gpu=a100", "--lengths=8K,64K", f"--output={tmp_path}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "costs on A100, estimated" in shown
    assert "US dollars per million tokens, estimated" in shown
    assert "nothing was measured on A100" in shown
    for name in ("html", "svg", "csv", "json"):
        assert "estimated" in (tmp_path / f"economics.{name}").read_text(), name


def test_a_layer_unlike_the_measured_one_is_named(capsys, tmp_path):
    config = load(msa_109b).architecture
    assert words.caveat(config, setting()) == []
    assert run("--config=configs/quickstart.py", "--lengths=8K", f"--output={tmp_path}") == 0
    unlike = "2 query heads per KV head (16 measured), 32 dims per head (128 measured)"
    assert unlike in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "economics.html").read_text()
    assert unlike in page
    assert "costs on H100" in page
    assert "a model of 2.05M parameters (0.874M active)" in page


def test_break_even_lengths_are_rounded_and_marked():
    evens = {even.what: even for even in costs.break_evens(load(msa_109b).architecture, setting())}
    assert evens["training"].text.endswith("00*")  # it was measured from 32K on
    assert "at the rates of 32K, the shortest length measured" in evens["training"].sentence
    decode = evens["decode"]
    assert decode.text == f"{decode.length:,}"
    assert decode.length > 2048
    never = costs.BreakEven("decode", None, "")
    assert never.sentence == "decode: MSA is not cheaper at any length up to 1M"


def test_llama_shapes_have_their_published_sizes():
    sizes = {n: cost.parameter_count(dense_twin(c)).total / 1e9 for n, c in LLAMA_3.items()}
    assert {name: round(size, 1) for name, size in sizes.items()} == {
        "Llama 3 8B": 8.0,
        "Llama 3 70B": 70.6,
        "Llama 3 405B": 405.9,
    }


def test_what_the_estimate_implies():
    (at_128k, low_high), (at_1m, highest) = comparison.implied_shares()
    assert (at_128k.length, at_1m.length) == (2**17, 2**20)
    # Odds of 1/19 and 1/9, 16 and 128 times as large.
    assert low_high == pytest.approx((16 / 35, 16 / 25))
    assert highest == pytest.approx((128 / 147, 128 / 137))
    assert comparison.implied_speedup(ESTIMATES[0]) == pytest.approx(0.075 / 0.06)


def test_the_page_of_the_docs_is_what_the_command_writes(tmp_path, capsys):
    assert run("--shapes", f"--output={tmp_path}") == 0
    assert "Llama 3 405B" in capsys.readouterr().out
    for name in ("economics.md", "economics.csv"):
        written = (tmp_path / name).read_text().replace(f"--output={tmp_path}", "--output=docs")
        assert written == (ROOT / "docs" / name).read_text(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu=b300"], "b300"),
        (["--benchmark=nowhere.json"], "nowhere.json: not a result of experiments.benchmark"),
        (["--selection=captured"], "no training pass of MSA, captured selection"),
        (["--lengths=8X"], "'8X' is not a number of tokens"),
        (["--matmul_fraction=2"], "matmul_fraction=2.0: must lie"),
        (["--price=0"], "price=0.0: must be > 0"),
        (["--config.attention.kind=gqa"], 'pass a config with attention.kind="msa"'),
        (["--config.attention.selector=strided"], 'attention.selector="learned"'),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    line = error(capsys, "--config=configs/msa_109b.py", f"--output={tmp_path}", *arguments)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_results_of_an_unknown_gpu_are_one_line(tmp_path, capsys):
    text = BENCHMARK.read_text().replace("NVIDIA H100 80GB HBM3", "NVIDIA B300")
    (tmp_path / "b300.json").write_text(text)
    arguments = ["--config=configs/msa_109b.py", f"--benchmark={tmp_path}/b300.json"]
    assert "'NVIDIA B300'" in error(capsys, *arguments)


def test_a_missing_profile_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(economics, "_PROFILES", tmp_path)
    assert "not a table of experiments.profile_table" in error(capsys, "--shapes")
