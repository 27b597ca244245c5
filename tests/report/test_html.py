"""The page of a report as text: complete, closed to the network, every text escaped."""

import base64
import dataclasses
import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs
from report_samples import HOSTILE, SIZE, attention, full_report, hostile_report, provenance
from rich.console import Console

from convbasis.cli.report import run_report
from convbasis.errors import FileFormatError, InputError, MissingPathError
from convbasis.report.content import Chart, HeadMap, HeadView, Line, Report, Table
from convbasis.report.file import read_report, report_json
from convbasis.report.html import report_html, write_report
from convbasis.report.scale import scale_of
from convbasis.report.words import cell_text, rounded, time_text

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """The elements of a page, and what stands in each cell and element with a name."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.cells = [], [], {}, []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, attributes in self.open:
            if "id" in attributes:
                self.texts[attributes["id"]] = self.texts.get(attributes["id"], "") + data
        if self.open and self.open[-1][0] in ("td", "th"):
            self.cells[-1] += data

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def text():
    return report_html(full_report())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def hostile():
    return Page(report_html(hostile_report()))


def test_every_section_is_there_and_named(page):
    sections = [a["id"] for a in page.all("section") if "id" in a]
    assert sections == ["summary", "notes", "heads", "charts", "tables", "provenance"]
    assert [a["href"] for a in page.all("a") if a["href"] != "#main"][:6] == [f"#{s}" for s in sections]
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(names)) == len(names)
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in names
    for landmark in ("header", "main", "nav", "h1"):
        assert len(page.all(landmark)) == 1
    assert page.all("html") == [{"lang": "en"}]


def test_nothing_is_shown_of_what_is_not_there():
    page = Page(report_html(Report("bare", provenance(model=None))))
    assert [a["id"] for a in page.all("section")] == ["provenance"]
    assert json.loads(page.texts["pictures"]) == {"charts": [], "heads": []}


def test_values_of_the_tables_are_present(page):
    for text in (
        "14.21",
        "14.23",
        "3.871",
        "0.0031",
        "1.2e-05",
        "layer 12, head 3",
        "8,192",
        "ab" * 32,
    ):
        assert text in page.cells
    provenance_text = page.texts["provenance"]
    for text in ("convbasis heads --model smollm2", "torch 2.13.0", "AMD EPYC", "SmolLM2-135M"):
        assert text in provenance_text
    for text in ("1.62", "+0.16 %", "KL to the exact model, nats"):
        assert text in page.texts["summary"]
    assert "medians of five interleaved runs" in page.texts["notes"]


def test_every_picture_has_its_figures_as_a_table(page):
    report = full_report()
    assert len(page.all("details")) == len(report.maps) + len(report.charts) + 1
    for chart in report.charts:
        for line in chart.lines:
            for x, y in zip(line.x, line.y, strict=True):
                assert {cell_text(x), cell_text(y), *line.labels} <= set(page.cells)
    for row in report.maps[0].values:
        assert {cell_text(value) for value in row} <= set(page.cells)


def test_every_head_is_a_cell_with_a_name(page):
    report = full_report()
    cells = page.all("td", role="gridcell")
    assert len(cells) == 2 * 30 * 9
    assert cells[3 * 9 + 2]["aria-label"] == (
        f"Layer 3, head 2: {cell_text(report.maps[0].values[3][2])} (relative L2 error)"
    )
    assert cells[270]["aria-label"] == f"Layer 0, head 0: {report.maps[1].values[0][0]}"
    viewed = {(int(a["data-layer"]), int(a["data-head"])) for a in cells if "data-viewed" in a}
    assert viewed == {(view.layer, view.head) for view in report.heads}


def test_greater_numbers_are_deeper(page):
    values = [value for row in full_report().maps[0].values for value in row]

    def depth(cell):
        step, part = re.search(r"var\(--s(\d)\) (\d+)%", cell["style"]).groups()
        return int(step) - 1 + int(part) / 100

    depths = [depth(cell) for cell in page.all("td", role="gridcell")[:270]]
    order = sorted(range(270), key=values.__getitem__)
    assert [depths[at] for at in order] == sorted(depths)
    assert depths[order[0]] == 0
    assert depths[order[-1]] == 4


def test_words_have_letters_and_colours_of_their_own(page):
    cells = page.all("td", role="gridcell")[270:]
    colours = {}
    for cell in cells:
        word = cell["aria-label"].split(": ")[1]
        colours.setdefault(word, set()).add(cell.get("style"))
    assert len(colours) == 5
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 5
    assert colours["—"] == {None}


def test_pictures_are_the_reports_data_rounded(page):
    content = json.loads(page.texts["pictures"])
    view = content["heads"][2]
    assert (view["layer"], view["head"], view["size"]) == (3, 4, SIZE)
    exact = attention(3, 4, 0.0)
    assert view["exact"][:3] == [1, rounded(exact[1][0], 3), rounded(exact[1][1], 3)]
    assert len(view["exact"]) == len(view["approximate"]) == SIZE * (SIZE + 1) // 2
    assert content["heads"][-1]["approximate"] is None
    assert content["charts"][1]["marked"] == [4.7, 0.0024, "this plan"]
    assert content["charts"][0]["level"] == [1.0, "no faster"]


def test_the_page_runs_its_own_scripts_alone_and_asks_for_nothing(text, page):
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.split(" ", 1) for rule in policy["content"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].count("sha256-") == 2
    assert "unsafe" not in rules["script-src"]
    assert "connect-src" not in rules  # so that the default stands
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    plotly = gzip.decompress(base64.b64decode(page.texts["plotly"])).decode()
    assert plotly == get_plotlyjs()
    for run in (script, plotly):
        assert base64.b64encode(hashlib.sha256(run.encode()).digest()).decode() in rules["script-src"]
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:,")), f"{tag} {name}={value}"
    assert "url(" not in text
    assert "@import" not in text
    assert "Copyright 2012-" in text
    assert "MIT license" in text


def test_the_page_is_small_and_the_same_each_time(text):
    assert len(text) < 2.5e6
    assert report_html(full_report()) == text


def test_hostile_texts_are_texts(hostile, page):
    assert len(hostile.all("script")) == len(page.all("script")) == 3
    assert not hostile.all("img")
    assert not hostile.all("b")
    for _, attributes in hostile.elements:
        assert not [name for name in attributes if name.startswith("on")]
    for section in ("summary", "notes", "heads", "charts", "tables", "provenance"):
        assert HOSTILE in hostile.texts[section]
    assert "&lt;&amp;" in hostile.cells
    content = json.loads(hostile.texts["pictures"])
    assert content["charts"][0]["title"] == HOSTILE
    assert content["charts"][0]["lines"][0]["labels"] == [HOSTILE, "</script>"]


def test_text_that_is_no_unicode_is_written_too(tmp_path):
    report = dataclasses.replace(full_report(), title="name \udcff")
    write_report(report, tmp_path / "r.html")
    assert "<h1>name ?</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_map_of_nothing_says_so():
    page = report_html(Report("r", provenance(), maps=(HeadMap("m", "u", ((None, None),)),)))
    assert '<p class="muted">nothing</p>' in page


def test_points_that_cannot_be_drawn_are_counted():
    line = Line("l", (1.0, 2.0, 0.0), (0.0, 1.0, 1.0))
    charts = {
        "1 point is not drawn": Chart("c", "x", "y", (line,), y_log=True),
        "2 points are not drawn": Chart("c", "x", "y", (line,), x_log=True, y_log=True),
    }
    for words, chart in charts.items():
        assert words in report_html(Report("r", provenance(), charts=(chart,)))
    chart = Chart("c", "x", "y", (line,))
    assert "not drawn" not in report_html(Report("r", provenance(), charts=(chart,)))


def test_points_that_stand_out_are_in_the_table_too():
    line = Line("l", (1.0,), (2.0,), ("first",))
    chart = Chart(
        "c", "x", "y", (line,), marked=(3.0, 4.0, "the plan"), crossings=((5.0, 1.0, "from here"),)
    )
    page = Page(report_html(Report("r", provenance(), charts=(chart,))))
    assert page.cells[:16] == [
        "line", "x", "y", "point", "l", "1", "2", "first", "the plan", "3", "4", "—", "from here", "5",
        "1", "—",
    ]  # fmt: skip


def test_a_kernel_alone_has_no_picture():
    alone = HeadView(0, 1, "kernel", None, None, (0, 1), (0.5, 0.25))
    maps = (HeadMap("m", "u", ((0.5, 0.25),)),)
    text = report_html(Report("r", provenance(), maps=maps, heads=(alone,)))
    page = Page(text)
    (view,) = json.loads(page.texts["pictures"])["heads"]
    assert (view["exact"], view["approximate"], view["size"]) == (None, None, 0)
    assert view["weights"] == [0.5, 0.25]
    assert "A dark corner marks" not in text
    assert 'id="chooser"' not in text


def test_numbers_are_aligned_and_nothing_is_a_dash():
    table = Table("t", ("n", "w", "none"), ((1.5, "a", None), (None, "b", None)))
    page = Page(report_html(Report("r", provenance(), tables=(table,))))
    assert page.cells[:9] == ["n", "w", "none", "1.5", "a", "—", "—", "b", "—"]
    kinds = [attributes.get("class") for tag, attributes in page.elements if tag == "th"][:3]
    assert kinds == ["number", None, None]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "—"),
        ("word", "word"),
        (1234567, "1,234,567"),
        (8192.0, "8,192"),
        (12345.678, "12,346"),
        (0.00012345678, "0.0001235"),
        (1.5e-7, "1.5e-07"),
        (-0.25, "-0.25"),
        (1e300, "1e+300"),
    ],
)
def test_numbers_for_readers(cell, text):
    assert cell_text(cell) == text


def test_times_are_to_the_minute():
    assert time_text("2026-05-04T10:20:30Z") == "2026-05-04 10:20 UTC"
    assert time_text("2026-05-04T10:20:30.123456+00:00") == "2026-05-04 10:20 UTC"
    for other in ("2026-05-04T10:20:30+02:00", "yesterday"):
        assert time_text(other) == other


@pytest.mark.parametrize(
    ("values", "log", "middle"),
    [
        ([1.0, 3.0], False, 2.0),
        ([0.001, 10.0], True, 0.1),
        ([0.0, 0.01, 1.0], True, 0.1),
        ([-1.0, 0.01, 3.0], False, 1.0),
        ([2.0], False, 2.0),
        ([], False, 0.0),
    ],
)
def test_scales(values, log, middle):
    scale = scale_of(values)
    assert scale.log is log
    assert scale.value(0.5) == pytest.approx(middle)
    assert all(0 <= scale.position(value) <= 1 for value in values)
    if scale.high > scale.low:
        assert scale.position(scale.high) == pytest.approx(1)
        assert scale.position(middle) == pytest.approx(0.5)
        assert scale.position(min(values)) == 0


def test_maps_of_many_heads_stand_above_the_view():
    few, many = (
        Report("r", provenance(), maps=(HeadMap("m", "u", ((0.5,) * heads,) * 2),)) for heads in (8, 32)
    )
    assert '<div class="pair">' in report_html(few)
    assert '<div class="stack">' in report_html(many)


def test_more_words_than_colours_and_letters_stay_apart():
    row = tuple(f"setting {number}" for number in range(40))
    page = Page(report_html(Report("r", provenance(), maps=(HeadMap("m", "", (row,)),))))
    letters = [cell for cell in page.cells if re.fullmatch("[A-Z]{1,2}", cell)]
    assert len(letters) == len(set(letters)) == 40


def test_a_page_is_written_beside_and_renamed(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(full_report(), path)
    assert path.read_text(encoding="utf-8") == report_html(full_report())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(MissingPathError, match="there is no folder"):
        write_report(full_report(), tmp_path / "none" / "report.html")


def test_parts_that_do_not_agree_make_no_page():
    report = dataclasses.replace(full_report(), tables=(Table("t", ("a", "b"), ((1,),)),))
    with pytest.raises(InputError, match="row 0 has 1 cells for 2 columns"):
        report_html(report)


def test_the_command_writes_the_page_of_a_file(tmp_path):
    source, output = tmp_path / "report.json", tmp_path / "[red] page.html"
    source.write_text(report_json(full_report()), encoding="utf-8")
    console = Console(record=True, width=300)
    run_report(source, output, tmp_path / "told.json", console)
    assert output.read_text(encoding="utf-8") == report_html(full_report())
    size = f"{output.stat().st_size / 1e6:.1f} MB"
    assert f"[red] page.html ({size}); open it" in console.export_text()
    told = dict(read_report(tmp_path / "told.json").summary)
    assert told["title"] == full_report().title
    assert (told["maps"], told["heads"], told["charts"], told["tables"]) == (2, 6, 2, 1)
    assert told["bytes of the page"] == output.stat().st_size
    source.write_text("{}")
    with pytest.raises(FileFormatError, match="its format is None"):
        run_report(source, output, None, console)


def test_plotly_is_not_imported_before_a_page_is_made():
    code = (
        "import sys, convbasis, convbasis.report.html, convbasis.report.file\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'plotly'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
