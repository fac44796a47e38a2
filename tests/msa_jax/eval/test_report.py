import html.parser
import re

import pytest
from fabricated_runs import CONFIG, STEPS, write_run

from experiments import cli
from experiments import report as script
from msa_jax import cost
from msa_jax.config import ArchitectureConfig, dense_twin
from msa_jax.eval.report import comparison_table, render_report
from msa_jax.eval.runs import RunFileError, read_runs


class Outline(html.parser.HTMLParser):
    """Counts elements, collects the addresses that a browser would load, checks the nesting."""

    VOID = ("meta", "use", "path", "image", "br")

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.open, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attributes if name in ("src", "href", "xlink:href")
        ]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [
        str(write_run(base / "msa", "msa", final_loss=1.75)),
        str(write_run(base / "gqa", "gqa", final_loss=1.74)),
    ]


@pytest.fixture(scope="module")
def page(folders):
    return render_report(
        read_runs(folders), cost_config=ArchitectureConfig(), cost_name="a <test> model"
    )


def test_the_page_is_whole_and_needs_no_network(page):
    parsed = outline(page)
    assert parsed.tags.count("svg") == 2 + 2 + 3 + 2 + 2  # training, index, blocks, final, cost
    assert parsed.addresses
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in parsed.addresses)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<>]+", page)) <= namespaces
    for part in ("prefers-color-scheme:dark", 'name="viewport"'):
        assert part in page


def test_ids_are_unique_over_the_page(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_text_from_the_files_is_not_markup(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "a &lt;test&gt; model" in page


def test_the_comparison_shows_what_the_files_say(folders):
    head, rows = comparison_table(read_runs(folders))
    assert head == ["", "MSA", "GQA", "MSA relative to GQA"]
    cells = {name: rest for name, *rest in rows}
    assert cells["validation loss (nats per token)"] == ["1.7500", "1.7400", "+0.57 %"]
    assert cells["bits per byte"] == ["2.5247", "2.5103", "+0.57 %"]
    # Speeds are 50 (compilation), then 4010, 4015, ... 4200: the first is left out.
    assert cells["tokens per second, median"] == ["4,105", "4,105", "same"]
    assert cells["optimizer steps"] == [f"{STEPS}"] * 2 + ["same"]
    twin = dense_twin(CONFIG)
    flops = [
        (cost.model_flops(config, 256).attention + cost.model_flops(config, 256).index_scores) / 256
        for config in (CONFIG, twin)
    ]
    expected = [f"{value / 1e3:.3g}K" for value in flops]
    assert cells["attention FLOPs per token, forward"][:2] == expected
    assert cells["parameters"][0] == f"{cost.parameter_count(CONFIG).total / 1e6:.3g}M"


def test_the_headline_and_the_manifest(page):
    words = " ".join(outline(page).words)
    assert "MSA has a validation loss of 1.7500 nats per token after 200 steps" in words
    assert "The configurations differ in: attention.kind." in words
    assert "abc123" in words


def test_the_layer_table_numbers_the_real_layers(page):
    table = page[page.index("What the MSA model selects") :]
    table = table[: table.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table)[1:]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert cells[0] == ["1", "0.910", "0.710", "0.031"]
    assert [row[0] for row in cells] == ["1", "2", "3"]


def test_the_marked_text_is_the_last_querys_selection(folders, page):
    run = read_runs(folders)[0]
    query = 239  # the last one before the padding, in the document that starts at block 10
    boxes = re.findall(r'<div class="text">(.*?)</div>', page, re.DOTALL)
    ids = run.selection.block_ids[0, 0, query]
    spans = re.findall(r'<span class="(\w*)">(.*?)</span>', boxes[0], re.DOTALL)
    styles = {block: style for block, (style, _) in enumerate(spans, start=10)}
    assert len(boxes) == 3 * 2
    assert sorted(styles) == list(range(10, 15))
    assert {block for block, style in styles.items() if style} == set(ids[ids >= 0].tolist())
    assert styles[14] == "own"
    assert html.unescape(spans[0][1]) == run.evaluation.text[10]


def test_the_cost_table_has_the_published_ratio(page):
    table = page[page.index("Compute and memory of") :]
    row = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])[-1]
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert (cells[0], cells[4], cells[8]) == ("1M", "28.44", "7.88")


def test_one_run_alone_has_a_report(folders):
    page = render_report(
        read_runs(folders[:1]), cost_config=ArchitectureConfig(), cost_name="model"
    )
    outline(page)
    assert "relative to MSA" not in page


def test_a_speed_that_was_not_logged_is_said_to_be_missing(folders, tmp_path):
    folder = write_run(tmp_path / "msa", "msa")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace("clock/tokens_per_second", "clock/other"))
    _, rows = comparison_table(read_runs([folder, folders[1]]))
    assert rows[2] == ["tokens per second, median", "not recorded", "4,105", ""]


def test_mfu_is_shown_where_it_was_logged(folders, tmp_path):
    folder = write_run(tmp_path / "msa", "msa")
    text = (folder / "metrics.jsonl").read_text()
    text = text.replace('"clock/', '"clock/mfu_sparse": 0.25, "clock/')
    (folder / "metrics.jsonl").write_text(text)
    _, rows = comparison_table(read_runs([folder, folders[1]]))
    assert rows[3] == ["MFU, own FLOPs, median", "25.0%", "not recorded", ""]
    assert not rows[4][0].startswith("MFU")


def test_layer_metrics_of_unequal_length_are_refused(folders, tmp_path):
    folder = write_run(tmp_path / "msa", "msa")
    text = (folder / "evaluation.json").read_text().replace("[0.71, 0.72, 0.73]", "[0.71]")
    (folder / "evaluation.json").write_text(text)
    with pytest.raises(RunFileError, match=r"evaluation\.json: .*unequal lengths \[1, 3\]"):
        render_report(read_runs([folder]), cost_config=CONFIG, cost_name="model")


def test_the_script_writes_the_page_and_the_figures(folders, tmp_path):
    output, svg_dir = tmp_path / "new" / "report.html", tmp_path / "svg"
    runs = [f"--run={folder}" for folder in folders]
    argv = ["report", *runs, f"--output={output}", f"--svg_dir={svg_dir}"]
    assert cli.run(script.main, argv) == 0
    assert "the paper&#x27;s 109B model" in output.read_text()
    names = {path.stem for path in svg_dir.iterdir()}
    assert {"loss", "kl_msa", "selection_msa_layer_1", "attention_flops"} <= names
    assert len(names) == 11


def test_the_script_names_the_missing_file_in_one_line(folders, tmp_path, capsys):
    assert cli.run(script.main, ["report", f"--run={tmp_path / 'none'}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none/manifest.json: no such file" in error


def test_the_script_wants_a_run(capsys):
    assert cli.run(script.main, ["report"]) == 2
    assert "--run is missing" in capsys.readouterr().err
