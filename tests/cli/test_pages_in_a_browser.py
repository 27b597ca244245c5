"""Pages that the commands write, in a real browser: drawn, closed to the network, heads to click."""

import pytest
from browser import chromium, folder_for_shots, head, needs_chromium, watched
from typer.testing import CliRunner

from convbasis.cli.app import app

pytestmark = needs_chromium
NAME = "<script>alert(1)"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    with watched(browser) as go:
        yield go


@pytest.fixture(scope="module")
def written(save, text, tmp_path_factory):
    """Pages of a model of five layers whose name tries to be markup; settings take half the time."""
    place = tmp_path_factory.mktemp("pages")
    model = save(place / NAME, num_hidden_layers=5)
    given, plan = ["--text", text, "--length"], place / "plan.json"
    commands = {
        "analyze": [model, *given, 128],
        "calibrate": [model, *given, 300, "--tolerance", 0.9, "--budget", 1, "-o", plan],
        "compare": [model, *given, 200, "--scored", 40, "--plan", plan, "--min-length", 0],
        "bench": ["--lengths", "64,1024", "--bases", "1", "--repeats", 1],
    }
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(
            "convbasis.plan.ladder._seconds", lambda *_, **o: 2.0 if o.get("is_causal") else 1.0
        )
        # SDPA is faster at 64 tokens and slower at 1,024, on whatever machine this runs.
        changed.setattr(
            "convbasis.cli.bench.interleaved_medians",
            lambda functions, repeats: {
                name: (functions["SDPA"]().shape[-2] / 256 if name == "SDPA" else 1.0)
                for name in functions
            },
        )
        for name, words in commands.items():
            words = [name, *words, "--report", place / f"{name}.html"]
            done = CliRunner().invoke(app, list(map(str, words)))
            assert done.exit_code == 0, done.output
    return place


@pytest.fixture
def drawn(visit, written, tmp_path_factory):
    """Open a command's page: everything on it is drawn, and a table stands behind every picture."""

    def open_page(command, charts=1, maps=3):
        page = visit(written / f"{command}.html")
        assert page.locator("#failure").is_hidden()
        assert page.locator("[data-chart]").count() == charts
        assert page.locator("[data-chart] .main-svg .scatterlayer").count() >= charts
        assert page.locator("figure.chart details table").count() == charts
        assert page.locator("figure.map").count() == maps
        assert page.locator("figure.map details table").count() == maps
        page.screenshot(path=folder_for_shots(tmp_path_factory) / f"{command}.png", full_page=True)
        if maps:
            assert NAME in page.locator("h1").inner_text()
            head(page, 2, 3).click()
            assert page.locator("#view-title").inner_text() == "Layer 2, head 3"
            assert page.locator("#view-values dd").count() == maps
        return page

    return open_page


def test_calibrate_shows_every_head_and_error_against_cost(drawn):
    page = drawn("calibrate")
    assert page.locator('[data-chart="0"] .legendtext').all_text_contents() == [
        "one setting for all heads", "choices head by head, by budget", "this plan",
    ]  # fmt: skip
    assert (
        page.locator("figure.chart details tr").last.locator("td").first.text_content() == "this plan"
    )
    assert page.locator("[data-viewed]").count() == 20 * page.locator("figure.map").count()
    head(page, 4, 1).click()
    for name in ("exact", "approximate", "difference"):
        assert page.locator(f"#view-{name} .heatmaplayer image").count() == 1
    assert page.locator("#view-lags .scatterlayer path.js-line").count() == 1


def test_analyze_shows_a_kernel_of_every_layer(drawn):
    page = drawn("analyze", charts=2, maps=8)
    assert page.locator("#view-exact").is_visible()
    head(page, 1, 2).click()
    assert "No picture of this layer" in page.locator("#view-caption").inner_text()
    assert page.locator("#view-lags .scatterlayer path.js-line").count() == 1
    for name in ("#view-exact", "#view-approximate", "#view-difference", "#legend-weight"):
        assert page.locator(name).is_hidden()
    page.locator("#view-figures summary").click()
    page.locator("#view-figures tbody tr").first.wait_for()
    assert page.locator("#view-figures th").all_inner_texts() == ["lag", "weight"]
    # And a picture is whole again after it.
    page.locator("#chooser").select_option("2,0")
    assert page.locator("#view-exact .heatmaplayer image").count() == 1
    assert page.locator("#view-difference").is_visible()


def test_compare_shows_what_was_measured_beside_what_was_predicted(drawn):
    page = drawn("compare")
    assert page.locator('[data-chart="0"] .legendtext').all_text_contents() == [
        "measured", "predicted at 300 tokens",
    ]  # fmt: skip
    titles = page.locator("figure.map figcaption").all_inner_texts()
    assert titles == ["Setting", "Error estimate, 0 for exact heads", "Time"]


def test_bench_marks_where_methods_begin_to_be_faster(drawn):
    page = drawn("bench", maps=0)
    texts = page.locator('[data-chart="0"] .textpoint').all_text_contents()
    assert texts == ["conv basis, k = 1: 260", "hybrid: 260"]
    rows = page.locator("figure.chart details tr").all_text_contents()
    assert [row for row in rows if row.endswith("2601")] == [f"{name}2601" for name in texts]
    ticks = page.locator('[data-chart="0"] .xtick').all_text_contents()
    assert ticks == ["64", "1,024"]
