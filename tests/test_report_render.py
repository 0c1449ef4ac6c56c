from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_rows import bench, both, memory, new_run, niah, pair, window

from hfpatch.report import figures
from hfpatch.report.figures import CHANGE_SCALE, SCORE_SCALE, Chart, charts
from hfpatch.report.kernels import write_kernel_report
from hfpatch.report.render import render
from hfpatch.report.results import summarise
from hfpatch.report.run import RunDir

HOSTILE = (
    "<script>alert('x')</script> | pipe \n# head **bold** `tick` &amp; \x00\x1b[31m \udc80 ![i](http://a.example/x.png)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two arms, two lengths, three depths with a hole, bench, memory, layers, fidelity, hostile outputs."""
    run = new_run(tmp_path_factory.mktemp("runs"))
    for length in (1024, 2048):
        for depth in (0, 50, 100):
            if (length, depth) != (2048, 100):
                for id in range(3):
                    both(run, length, depth, id, 1, float(depth == 100 or id == 0), output=HOSTILE)
    for length, factor in ((1024, 2.0), (4096, 0.5)):
        for what, base in (("prefill", 100.0), ("decode", 10.0)):
            bench(run, what, length, [base, base * 1.1, base * 1.2], [base * factor, base * factor * 1.1])
        memory(run, "dense", length, 100, length / 100, 180, 150)
        memory(run, "patched", length, 100, length / 200, 160, 120)
    common = {"phase": "prefill", "refused": {"flash": "a | b"}, "calls": 4}
    run.write_layers(
        [
            common | {"layer": 0, "action": "Dense", "kernel": "sdpa", "density": 1.0},
            common | {"layer": 1, "action": "Window", "kernel": "fast", "density": 0.25},
        ]
    )
    shared = {"task": "fidelity", "subtask": None, "cell": {"length": 1024}, "per_layer": {"attn_cosine": [1.0, 0.9]}}
    run.append_sample(niah("patched", 1024, 0, 0, 0) | shared | {"scores": {"top1_agree": 0.9, "kl_last": 0.01}})
    return run


@pytest.fixture(scope="module")
def files(run: RunDir) -> list[Path]:
    return render(run)


class Page(HTMLParser):
    """Collects tags and text, and checks that every opened tag is closed in turn."""

    VOID = ("meta", "br", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def table_after(text: str, heading: str) -> list[list[str]]:
    """The first Markdown table below a heading, cells split at pipes that are not escaped."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def test_files(run: RunDir, files: list[Path]) -> None:
    names = ["heatmap-niah-number", "latency", "memory", "density", "fidelity"]
    expected = {f"figures/{name}{suffix}" for name in names for suffix in (".csv", ".png", ".svg")}
    assert {str(path.relative_to(run.path)) for path in files} == expected | {"report.md", "report.html"}
    assert all(path.stat().st_size > 0 for path in files)
    assert run.results() == summarise(run)


def test_page_is_well_formed_and_self_contained(run: RunDir, files: list[Path]) -> None:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and "link" not in tags and "img" not in tags
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action") and not name.startswith("on")
            if name in ("href", "xlink:href"):
                assert value is not None and value.startswith("#")
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert "prefers-color-scheme: dark" in text and figures.INK not in text.split("</style>", 1)[1]


def test_page_says_the_verdict_first_and_reproduces(run: RunDir, files: list[Path]) -> None:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    header = text[text.index("<header>") : text.index("</header>")]
    assert '<p class="verdict bad"><strong>worse than dense</strong>' in header
    assert "hfpatch apply recipe.resolved.yaml" in text
    assert "reference path, not a performance claim" in text
    order = re.findall(r"<h2>(.*?)</h2>", text)
    assert order == [
        "What was run",
        "Quality",
        "Needle by length and depth",
        "Fidelity to dense",
        "Latency and memory",
        "Density, kernels and fallbacks",
        "Dense right, patched wrong",
        "Warnings and limits",
        "Environment",
    ]


def test_hostile_output_is_only_text(run: RunDir, files: list[Path]) -> None:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in text
    assert "\x00" not in text and "\x1b" not in text
    shown = "".join(Page(text).text)
    assert "<script>alert('x')</script> | pipe \n# head **bold** `tick` &amp; ␀␛[31m \ufffd" in shown

    markdown = (run.path / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown and "\x00" not in markdown
    assert r"\| pipe \# head \*\*bold\*\* \`tick\` &amp;amp;" in markdown
    # an image of a model's making would be fetched by whoever looks at the report
    assert "![i]" not in markdown
    rows = table_after(markdown, "## Dense right, patched wrong")
    assert {len(row) for row in rows} == {4}


def test_markdown_quality_table(run: RunDir, files: list[Path]) -> None:
    text = (run.path / "report.md").read_text(encoding="utf-8")
    header, rule, *rows = table_after(text, "## Quality")
    assert header[:9] == ["task", "length", "metric", "dense", "patched", "Δ", "95 % CI", "n", "win / tie / loss"]
    assert rule[1] == "---:" and rule[0] == ":---"
    # 1k: 9 pairs, patched right at depth 100 (3) and for id 0 (2)
    assert rows[0][:6] == ["niah/number", "1k", "contains", "1.000", "0.556", "−0.444"]
    assert rows[0][7:10] == ["9", "0 / 5 / 4", "worse, indicative"]
    assert [row[1] for row in rows] == ["1k", "2k", "all"]
    for link in re.findall(r"(?<!\\)\]\(([^)]+)\)", text):
        assert (run.path / link).is_file()


def test_table_columns_without_values_are_left_out(tmp_path: Path) -> None:
    run = new_run(tmp_path, {"patches": []})
    run.append_sample(niah("dense", 1024, 0, 0, 1))
    render(run, ["md"])
    assert not (run.path / "report.html").exists()
    header, _, row = table_after((run.path / "report.md").read_text(encoding="utf-8"), "## Quality")
    assert header == ["task", "length", "metric", "dense", "n"]
    assert row == ["niah/number", "1k", "contains", "1.000", "1"]


def test_subtasks_by_length(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(20):
        for length in (4096, 8192):
            pair(run, "ruler", {"length": length, "subtask": "cwe"}, id, 1, 1)
            pair(run, "ruler", {"length": length, "subtask": "vt"}, id, 1, float(length == 4096))
        pair(run, "longbench", {"subtask": "qasper"}, id, 0.25, 0.5)
        pair(run, "longbench", {"subtask": "lcc"}, id, 0.5, 0.5)
    pair(run, "ruler", {"length": 8192, "subtask": "qa_1"}, 0, 0, 0, error="refused: too | long", scores={})
    render(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    _, _, *main = table_after(text, "## Quality")
    assert [row[:3] for row in main] == [
        ["longbench, all subtasks", "all", "score"],
        ["ruler, 2 of 3 subtasks", "4k", "score"],
        ["ruler, 2 of 3 subtasks", "8k", "score"],
        ["ruler, 2 of 3 subtasks", "all", "score"],
    ]  # fmt: skip
    header, _, *cells = table_after(text[text.index("| ruler, score |") :], "| ruler, score |")
    assert header == ["ruler, score", "4k", "8k", "all lengths"]
    assert cells == [
        ["cwe", "1.00 → 1.00", "1.00 → 1.00", "1.00 → 1.00"],
        ["qa\\_1", "–", "refused", "refused"],
        ["vt", "1.00 → 1.00", "1.00 → 0.00 ▼", "1.00 → 0.50 ▼"],
        ["all subtasks", "1.00 → 1.00", "1.00 → 0.50 ▼", "1.00 → 0.75 ▼"],
    ]
    header, _, *cells = table_after(text[text.index("| longbench, score |") :], "| longbench, score |")
    assert header == ["longbench, score", "dense", "patched", "Δ"]
    assert cells[1:] == [["qasper", "0.250", "0.500", "+0.250 ▲"], ["all subtasks", "0.375", "0.500", "+0.125 ▲"]]
    assert "The whole 95 % interval is ▼ worse or ▲ better than dense." in text
    assert "| ruler | 1 of 81 | too \\| long |" in text

    page = (run.path / "report.html").read_text(encoding="utf-8")
    Page(page)
    assert '<span class="state bad">1.00 → 0.00 ▼</span>' in page
    assert '<span class="state good">+0.250 ▲</span>' in page
    # the intervals of the subtasks are there on demand
    assert "<details><summary>Subtasks with intervals and counts</summary>" in page


def test_lost_samples_open_one_by_one(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(12):
        pair(run, "ruler", {"length": 4096, "subtask": "vt"}, id, 1, 1)
        both(run, 1024, 50, id, 1, 0, output=f"{HOSTILE} {id}")
    render(run)
    text = (run.path / "report.html").read_text(encoding="utf-8")
    lost = text[text.index("<h2>Dense right, patched wrong</h2>") : text.index("<h2>Warnings and limits</h2>")]
    page = Page(lost[lost.index("<details>") : lost.rindex("</section>")])
    assert sum(tag == "details" for tag, _ in page.tags) == 1 + 10
    assert "niah/number: 12 samples, the 10 largest drops" in page.text
    shown = [line.strip() for line in page.text if line.strip()]
    assert shown[1:6] == ["length 1k, depth 50 %, id 0, seed 0", "expected answer", "1234567", "dense", "1234567"]
    assert shown[6] == "patched" and shown[7].startswith("<script>alert('x')</script> | pipe")
    assert "ruler" not in "".join(shown)


def test_where_less_is_better_the_report_says_so(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for id in range(20):
        window(run, 1024, id, 2.0, 1.5)
    render(run)
    text = (run.path / "report.md").read_text(encoding="utf-8")
    header, _, *rows = table_after(text, "## Quality")
    reading = header.index("reading")
    assert [(row[2], row[header.index("Δ")], row[header.index("win / tie / loss")], row[reading]) for row in rows] == [
        ("nll", "−0.500", "20 / 0 / 0", "as good"),
        ("ppl", "−2.907", "20 / 0 / 0", "as good"),
    ]
    assert "Less is better for nll, ppl." in text and "**as good as dense**" in text


def test_positions_are_a_table(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    shared = {"task": "fidelity", "subtask": None, "cell": {"length": 1024}, "scores": {"top1_agree": 0.9}}
    along = {"start": [0, 512], "top1": [1.0, 0.5], "kl": [0.001, 0.25]}
    run.append_sample(niah("patched", 1024, 0, 0, 0) | shared | {"per_position": along})
    render(run, ["md"])
    text = (run.path / "report.md").read_text(encoding="utf-8")
    header, _, *rows = table_after(text, "Along positions")
    assert header == ["length", "from token", "n", "top-1 agreement", "KL to dense"]
    assert rows == [["1k", "0", "1", "1", "0.001"], ["1k", "512", "1", "0.5", "0.25"]]


def test_limited_run_is_said_at_the_top(tmp_path: Path) -> None:
    run = new_run(tmp_path, env={"notes": ["LIMITED RUN – not comparable: the first 2 samples of each task"]})
    render(run)
    assert "LIMITED RUN" in (run.path / "report.html").read_text(encoding="utf-8").split("</header>")[0]
    assert "LIMITED RUN" in (run.path / "report.md").read_text(encoding="utf-8").split("## ")[0]


def test_reports_are_the_same_when_rebuilt(run: RunDir, files: list[Path]) -> None:
    before = {path: path.read_bytes() for path in files if path.suffix != ".png"}
    render(run)
    assert {path: path.read_bytes() for path in before} == before


# Figures ------------------------------------------------------------------------------------------------------------


def chart(run: RunDir, name: str) -> Chart:
    return next(c for c in charts(summarise(run)) if c.name == name)


def numbers(run: RunDir, name: str) -> list[dict[str, float | str | None]]:
    """The rows of a figure's CSV file."""
    text = (run.path / "figures" / f"{name}.csv").read_text()

    def value(text: str) -> float | str | None:
        try:
            return float(text) if text else None
        except ValueError:
            return text

    return [{key: value(cell) for key, cell in row.items()} for row in csv.DictReader(io.StringIO(text))]


def test_csv_of_the_heatmap_equals_results_and_picture(run: RunDir, files: list[Path]) -> None:
    rows = numbers(run, "heatmap-niah-number")
    assert rows == [dict(cell) for cell in summarise(run)["heatmaps"][0]["cells"]]
    svg = ET.parse(run.path / "figures" / "heatmap-niah-number.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    tips = [title.text for title in svg.iter(f"{space}title")]
    expected = [
        f"{panel}: {row['length'] / 1024:g}k, depth {row['depth']:g} %, n = {row['n']:g}: {row[panel]:.4g}"
        for panel in ("dense", "patched", "difference")
        for row in sorted(rows, key=lambda row: (row["depth"], row["length"]))
    ]
    assert tips == expected
    shown = [text.text for text in svg.iter(f"{space}text")]
    assert {"dense", "patched", "difference", "0 %", "50 %", "100 %", "1k", "2k", "1,020", "2,044"} <= set(shown)
    assert shown.count("−0.67") == 4 and shown.count("0.33") == 4
    title = " ".join(shown[:2])
    assert all(part in title for part in ("some/model", "toy(keep=0.25)", "n = 3 per cell", "score: contains"))


def test_heatmap_has_depth_0_on_top_and_hatches_what_is_missing(run: RunDir, files: list[Path]) -> None:
    svg = ET.parse(run.path / "figures" / "heatmap-niah-number.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    height = {text.text: float(text.get("y", "nan")) for text in svg.iter(f"{space}text")}
    assert height["0 %"] < height["50 %"] < height["100 %"]
    missing = [rect for rect in svg.iter(f"{space}rect") if (rect.get("fill") or "").startswith("url(")]
    assert len(missing) == 3


def test_colours_have_a_fixed_range() -> None:
    header = ("length", "depth", "prompt_tokens", "n", "dense", "patched", "difference")
    dense, patched, difference = figures._panels(header, [(1024, 0, 1020, 1, 0.5, 0.5, 0.0)])
    assert [dense.colour(v) for v in (0, 1, 2)] == [SCORE_SCALE[0], SCORE_SCALE[-1], SCORE_SCALE[-1]]
    assert patched.colour(0.5) == dense.colour(0.5)
    assert [difference.colour(v) for v in (-1, 0, 1)] == [CHANGE_SCALE[0], CHANGE_SCALE[4], CHANGE_SCALE[-1]]
    assert figures._on("#fde725") == "#000000" and figures._on("#440154") == "#ffffff"


def test_dense_only_has_one_panel(tmp_path: Path) -> None:
    run = new_run(tmp_path, {"patches": []})
    run.append_sample(niah("dense", 1024, 0, 0, 1))
    svg = chart(run, "heatmap-niah-number").svg
    assert svg is not None and ">dense<" in svg and ">patched<" not in svg and ">difference<" not in svg


def test_latency_picture_equals_its_csv(run: RunDir, files: list[Path]) -> None:
    made = chart(run, "latency")
    rows = numbers(run, "latency")
    assert [tuple(row.values()) for row in rows] == list(made.rows)
    figure = made.draw(made)
    for axes, what in zip(figure.axes, ("prefill", "decode"), strict=True):
        assert axes.get_xscale() == "log"
        for container, arm in zip(axes.containers, ("dense", "patched"), strict=True):
            of_arm = [row for row in rows if (row["what"], row["arm"]) == (what, arm)]
            line, _, (bars,) = container
            assert list(line.get_xdata()) == [row["length"] for row in of_arm]
            assert list(line.get_ydata()) == [row["median_ms"] for row in of_arm]
            ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
            assert ends == [pytest.approx([row["q1_ms"], row["q3_ms"]]) for row in of_arm]
        # twice as slow at 1k, twice as fast at 4k
        assert axes.texts[0].get_text() == "break-even ≈ 2,000"
        assert rows[0]["break_even_length"] == pytest.approx(2048, rel=0.05)


def test_memory_picture_equals_its_csv(run: RunDir, files: list[Path]) -> None:
    made = chart(run, "memory")
    rows = numbers(run, "memory")
    assert rows[0] == {
        "length": 1024, "arm": "dense", "weights_mb": 100, "kv_mb": 10.24, "activations_mb": pytest.approx(69.76)
    }  # fmt: skip
    bars = made.draw(made).axes[0].containers
    for part, name in zip(bars, ("weights_mb", "kv_mb", "activations_mb"), strict=True):
        assert [bar.get_height() for bar in part] == pytest.approx([row[name] for row in rows])
    top = [bar.get_y() + bar.get_height() for bar in bars[-1]]
    assert top == pytest.approx([180, 160, 180, 160])


def test_layer_pictures_equal_their_csv(run: RunDir, files: list[Path]) -> None:
    density, cosine = chart(run, "density"), chart(run, "fidelity")
    assert numbers(run, "density") == [
        {"phase": "prefill", "layer": 0, "density": 1.0},
        {"phase": "prefill", "layer": 1, "density": 0.25},
    ]
    assert [bar.get_height() for bar in density.draw(density).axes[0].patches] == [1.0, 0.25]
    assert [row["attn_cosine"] for row in numbers(run, "fidelity")] == [1.0, 0.9]
    assert list(cosine.draw(cosine).axes[0].lines[0].get_ydata()) == [1.0, 0.9]


def test_without_matplotlib_the_heatmap_is_still_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "has_matplotlib", lambda: False)
    run = new_run(tmp_path)
    both(run, 1024, 0, 0, 1, 0)
    bench(run, "prefill", 1024, [1.0], [2.0])
    made = {path.name for path in render(run)}
    assert {"heatmap-niah-number.svg", "heatmap-niah-number.csv", "latency.csv"} <= made
    assert not any(name.endswith(".png") for name in made)
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.tags) == 1
    assert "hfpatch[plots]" in "".join(page.text)
    assert "figures/heatmap-niah-number.svg" in (run.path / "report.md").read_text(encoding="utf-8")


def test_the_kernel_report_has_table_and_figure(tmp_path: Path) -> None:
    row = {"kernel": "fast", "dtype": "bf16", "lists": "kv", "length": 8192, "density": 0.1, "refused": None}
    row |= {"dense_ms": 800.0, "kernel_ms": 40.0, "speedup": 20.0, "efficiency": 2.0, "extra_mb": 1.0, "n": 10}
    row |= {"q_heads": 14, "kv_heads": 2, "head_dim": 64, "block": 128, "dense": "sdpa", "inner_loop": "compiled"}
    row |= {"device_name": "chip", "threads": 2, "torch": "2", "seed": 0}
    declined = {key: row[key] for key in row if not key.endswith("_ms")} | {"refused": "not for <b>"}
    markdown, page = write_kernel_report([row, row | {"density": 0.3, "efficiency": 2.27}, declined], tmp_path)
    assert "| 2.00 | 1.0 MB | compiled |" in markdown.read_text()
    text = page.read_text()
    assert "efficiency 2.00 to 2.27" in text and "refused: not for &lt;b&gt;" in text and "<svg" in text
    rows = list(csv.DictReader((tmp_path / "figures" / "efficiency.csv").open()))
    assert [float(r["efficiency"]) for r in rows] == [2.0, 2.27]
    nothing = write_kernel_report([declined], tmp_path / "none")[1].read_text()
    assert "no kernel ran" in nothing
