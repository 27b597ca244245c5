"""The page of a report in a real browser: drawn, chosen by mouse and keys, closed to the network."""

import json

import pytest
from browser import PHONE, chromium, folder_for_shots, head, needs_chromium, watched
from report_samples import HOSTILE, full_report, hostile_report, odd_report

from convbasis.report.html import write_report

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    reports = {"full": full_report(), "hostile": hostile_report(), "odd": odd_report()}
    for name, report in reports.items():
        write_report(report, folder / f"{name}.html")
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return folder_for_shots(tmp_path_factory)


@pytest.fixture
def visit(browser, files):
    """Open a page of a sample."""
    with watched(browser) as go:
        yield lambda name="full", **options: go(files / f"{name}.html", **options)


def drawn(page, name="exact"):
    """Return what the heatmap of the chosen head is drawn from."""
    return page.evaluate(f"JSON.stringify(document.getElementById('view-{name}').data[0].z)")


CHART_COLOUR = "document.querySelector('[data-chart=\"0\"]').layout.font.color"


def until(page, condition):
    """Wait some frames for a condition; the page's policy forbids the browser driver's own way."""
    frames = f"""new Promise((done) => {{
      let left = 300;
      const look = () => {{
        left -= 1;
        if ({condition} || left === 0) done(left);
        else requestAnimationFrame(look);
      }};
      look();
    }})"""
    assert page.evaluate(frames) > 0, condition


def picture(page):
    """Return what the matrices are drawn from, and what was drawn."""
    image = page.locator("#view-exact image")
    return drawn(page), drawn(page, "difference"), image.get_attribute("href")


def test_everything_is_drawn(visit, shots):
    page = visit()
    assert page.locator("#failure").is_hidden()
    assert page.locator("[data-chart] .main-svg").count() > 0
    for name in ("exact", "approximate", "difference"):
        assert page.locator(f"#view-{name} .heatmaplayer image").count() == 1
    assert page.locator("#view-lags .scatterlayer path.js-line").count() == 1
    chart = page.locator('[data-chart="0"]')
    assert chart.locator(".xtick").all_text_contents() == [
        "1,024", "2,048", "4,096", "8,192", "16,384", "32,768",
    ]  # fmt: skip
    assert chart.locator(".annotation").all_text_contents() == ["no faster"]
    assert chart.locator(".shapelayer path").count() == 1
    names = page.locator('[data-chart="1"] .legendtext').all_text_contents()
    assert names == ["one setting for all heads", "plans", "this plan"]
    page.screenshot(path=shots / "light.png", full_page=True)


def test_the_policy_lets_nothing_out(browser, files):
    page = browser.new_page()
    page.goto((files / "full.html").as_uri())
    for attempt in ("fetch('https://example.org')", "fetch('data:text/plain,x')"):
        with pytest.raises(Exception, match=r"Failed to fetch|Content Security Policy"):
            page.evaluate(attempt)
    refused = page.evaluate(
        """new Promise((done) => {
          document.addEventListener("securitypolicyviolation", (event) => {
            done(event.effectiveDirective);
          });
          const script = document.createElement("script");
          script.textContent = "window.intruded = true";
          document.head.append(script);
        })"""
    )
    assert refused == "script-src-elem"
    assert page.evaluate("window.intruded") is None
    page.close()


def test_a_click_shows_the_head(visit):
    page = visit()
    before = picture(page)
    head(page, 3, 4).click()
    assert page.locator("#view-title").inner_text() == "Layer 3, head 4"
    assert "kernel of layer 3, head 4" in page.locator("#view-caption").inner_text()
    after = picture(page)
    assert all(old != new for old, new in zip(before, after, strict=True))
    for grid in (0, 1):
        assert head(page, 3, 4, grid).get_attribute("aria-selected") == "true"
        assert page.locator(f'[data-map="{grid}"] [aria-selected="true"]').count() == 1
    values = page.locator("#view-values dd").all_inner_texts()
    report = full_report()
    assert values[0].endswith(" (relative L2 error)")
    assert float(values[0].split()[0]) == pytest.approx(report.maps[0].values[3][4], rel=1e-3)
    assert values[1] == report.maps[1].values[3][4]
    assert page.locator("#chooser").input_value() == "3,4"


def test_what_is_drawn_is_the_report(visit):
    page = visit()
    head(page, 14, 2).click()
    view = next(view for view in full_report().heads if (view.layer, view.head) == (14, 2))
    exact, shown = (json.loads(drawn(page, name)) for name in ("exact", "difference"))
    assert exact[0][1] is None
    names = page.evaluate("document.getElementById('view-exact').data[0].customdata")
    assert names[20][7].startswith("query 20, key 7<br>")
    assert 10 ** exact[20][7] == pytest.approx(max(view.exact[20][7], 1e-5), rel=5e-3)
    assert shown[20][20] == pytest.approx(view.approximate[20][20] - view.exact[20][20], abs=1e-3)


def test_heads_without_a_picture_and_exact_heads_say_so(visit):
    page = visit()
    head(page, 5, 5).click()
    assert page.locator("#view-caption").inner_text() == "This report has no picture of this head."
    assert page.locator("#view-pictures").is_hidden()
    head(page, 29, 0).click()
    assert "attends exactly" in page.locator("#view-approximate").inner_text()
    assert page.locator("#view-exact image").count() == 1
    head(page, 0, 0).click()
    assert page.locator("#view-approximate image").count() == 1
    assert page.locator(".absent").count() == 0


def test_keys_alone_reach_and_choose_heads(visit):
    page = visit()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.getAttribute('role')"))
        if seen[-1] == "gridcell":
            break
    assert seen[-1] == "gridcell"
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    before = drawn(page)
    page.keyboard.press("ArrowRight")
    assert page.locator("#view-title").inner_text() == "Layer 0, head 1"
    assert drawn(page) != before
    for key, title in (
        ("ArrowDown", "Layer 1, head 1"),
        ("End", "Layer 1, head 8"),
        ("ArrowRight", "Layer 1, head 8"),
        ("Home", "Layer 1, head 0"),
        ("ArrowUp", "Layer 0, head 0"),
        ("ArrowUp", "Layer 0, head 0"),
        ("Enter", "Layer 0, head 0"),
    ):
        page.keyboard.press(key)
        assert page.locator("#view-title").inner_text() == title
    assert drawn(page) == before
    head(page, 28, 8).focus()
    page.keyboard.press("Enter")
    assert page.locator("#view-title").inner_text() == "Layer 28, head 8"


def test_the_list_of_heads_chooses_too(visit):
    page = visit()
    page.locator("#chooser").select_option("28,8")
    assert page.locator("#view-title").inner_text() == "Layer 28, head 8"
    assert head(page, 28, 8).get_attribute("aria-selected") == "true"


def test_figures_of_the_chosen_head_are_a_table(visit):
    page = visit()
    page.locator("#view-figures summary").click()
    rows = page.locator("#view-figures tbody tr")
    rows.first.wait_for()
    assert rows.count() == 13 + 48 * 49 // 2
    assert rows.nth(0).locator("td").all_inner_texts() == ["0", "0.4"]
    view = full_report().heads[0]
    query, key, exact, approximate, difference = rows.nth(15).locator("td").all_inner_texts()
    assert (query, key) == ("1", "1")
    assert float(exact) == pytest.approx(view.exact[1][1], rel=5e-3)
    assert float(approximate) == pytest.approx(view.approximate[1][1], rel=5e-3)
    assert float(difference) == pytest.approx(view.approximate[1][1] - view.exact[1][1], abs=1e-3)
    head(page, 29, 0).click()
    assert page.locator("#view-figures th").all_inner_texts() == [
        "lag", "weight", "query", "key", "exact",
    ]  # fmt: skip


CONTRAST = """(pairs) => {
  const probe = document.createElement("i");
  document.body.append(probe);
  const light = (name) => {
    probe.style.color = name.startsWith("#") ? name : `var(--${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return pairs.map(([a, b]) => {
    const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out(visit, shots, scheme):
    page = visit(color_scheme=scheme)
    texts = [(a, b) for a in ("text", "muted", "accent") for b in ("page", "surface")]
    texts += [("on-accent", "accent"), *(("#171a20", f"w{number}") for number in range(8))]
    lines = [(f"l{number}", "surface") for number in range(7)]
    for least, pairs in ((4.5, texts), (3.0, lines)):
        found = page.evaluate(CONTRAST, pairs)
        assert {pair: ratio for pair, ratio in zip(pairs, found, strict=True) if ratio < least} == {}
    if scheme == "dark":
        page.screenshot(path=shots / "dark.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_button_changes_all_colours(visit, scheme):
    page = visit(color_scheme=scheme)
    state = """() => [getComputedStyle(document.body).backgroundColor,
      document.querySelector('[data-chart="0"]').layout.font.color,
      JSON.stringify(document.getElementById("view-exact").data[0].colorscale)]"""
    button = page.locator("#theme")
    other = {"light": "dark", "dark": "light"}[scheme]
    assert button.inner_text() == f"{other.capitalize()} colours"
    before = page.evaluate(state)
    dark = sum(map(int, before[0][4:-1].split(","))) < 384
    assert dark == (scheme == "dark")
    button.click()
    after = page.evaluate(state)
    assert all(old != new for old, new in zip(before, after, strict=True))
    button.click()
    assert page.evaluate(state) == before
    page.emulate_media(color_scheme=other)
    assert page.evaluate(state) == before  # what was chosen stays


def test_the_system_changes_colours_too(visit):
    page = visit(color_scheme="light")
    page.emulate_media(color_scheme="dark")
    until(page, f"{CHART_COLOUR} === 'rgb(233, 235, 239)'")
    assert page.locator("#theme").inner_text() == "Light colours"


def test_paper_is_light_and_the_screen_dark_again(visit, tmp_path):
    page = visit(color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(CHART_COLOUR) == "rgb(23, 26, 32)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(CHART_COLOUR) == "rgb(233, 235, 239)"
    assert page.evaluate("document.documentElement.dataset.theme") is None
    page.pdf(path=tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["full", "hostile"])
def test_a_phone_scrolls_down_only(visit, shots, name):
    page = visit(name, **PHONE)
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    for details in page.locator("details").all():
        details.locator("summary").click()
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    if name == "full":
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        page.screenshot(path=shots / "phone.png", full_page=True)
        head(page, 14, 2).tap()
        jump = page.locator(".jump")
        assert jump.inner_text() == "Layer 14, head 2: see below"
        jump.tap()
        until(page, "document.getElementById('view-title').getBoundingClientRect().top < 300")


def test_hostile_texts_stay_texts(visit, shots):
    page = visit("hostile")
    assert page.title() == f"t {HOSTILE}"
    assert HOSTILE in page.locator("header .facts").inner_text()
    assert HOSTILE in page.locator("#provenance").inner_text()
    assert page.locator("#view-caption").inner_text() == HOSTILE
    chart = page.locator('[data-chart="0"]')
    assert chart.locator(".xtitle").text_content() == f"{HOSTILE} %{{x}}"
    assert chart.locator(".ytitle").text_content() == HOSTILE
    assert chart.locator(".legendtext").all_text_contents() == [f"{HOSTILE}<b>bold</b>", HOSTILE]
    assert chart.locator(".annotation").all_text_contents() == [HOSTILE]
    chart.locator(".scatterlayer .trace").first.locator(".points path").nth(1).hover(force=True)
    hover = chart.locator(".hoverlayer").text_content()
    assert f"{HOSTILE}<b>bold</b> </script>" in hover
    assert f"{HOSTILE} %{{x}}: 2" in hover
    assert page.locator("main script, main img, main b").count() == 0
    page.screenshot(path=shots / "hostile.png", full_page=True)


def test_what_is_empty_or_has_no_place_is_drawn_without_complaint(visit):
    page = visit("odd")
    assert page.locator("#failure").is_hidden()
    assert page.locator("#view-title").inner_text() == "Layer 1, head 0"
    assert page.locator("#legend-difference").inner_text().startswith("0 everywhere")
    assert page.locator('[data-chart="1"] .annotation').count() == 0
    head(page, 0, 0).click()
    assert page.locator("#view-values dd").all_inner_texts() == ["—", "2", "-1e+300"]
    page.locator("#chooser").select_option("7,7")
    assert page.locator("#view-title").inner_text() == "Layer 7, head 7"
    page.locator("#view-figures summary").click()
    row = page.locator("#view-figures table").nth(1).locator("tbody td")
    row.first.wait_for()
    assert row.all_inner_texts() == ["960 to 1,023", "960 to 1,023", "1"]


def test_a_browser_that_cannot_unpack_says_so(browser, files):
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto((files / "full.html").as_uri())
    page.wait_for_selector("#failure:not([hidden])")
    assert "All figures are in the tables" in page.locator("#failure").inner_text()
    assert page.locator("#tables td").first.inner_text() == "prose"
    page.close()
