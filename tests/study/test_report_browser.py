"""A page in headless Chromium, where the system has one: it works, and people who cannot see it or use a mouse can."""

import shutil

import pytest

from ldm.commands import Program
from tests.study import results_folder

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")]
EVIL = "<img src=x onerror=document.title='ran'><script>document.title='ran'</script>"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "first"
    rows = results_folder.rows(folder, prompts=("a sks dog", EVIL))
    rows.append({**results_folder.FAILED, "reason": EVIL})
    Program("report")([str(results_folder.write(folder, rows)), "--out", str(folder / "page.html")])
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser, page_file):
    """The page, and what it complained of."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened = context.new_page()
    opened.complaints, opened.asked = [], []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.goto(page_file.as_uri())
    opened.wait_for_selector("html[data-ready]")
    yield opened
    context.close()


def rows_of(page):
    return page.locator("#big-table tbody tr:visible")


def test_it_asks_for_nothing_and_complains_of_nothing(page):
    assert [url for url in page.asked if not url.startswith(("data:", "blob:"))] == [page.url]
    assert page.complaints == []
    assert page.title() == "first · sweep report", "no text of a file ran"
    assert page.locator(".plot .main-svg").count() >= 3


def violations(page):
    found = axe.Axe().run(page).response["violations"]
    return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.wait_for_selector(f"#theme[aria-pressed={'true' if scheme == 'dark' else 'false'}]")  # the page has heard
    assert violations(page) == []


def test_the_table_sorts_and_filters(page):
    assert rows_of(page).count() == 17, "16 trials at their last checkpoint, and one that failed"
    header = page.locator("#big-table th", has_text="clip_i").first
    column = header.evaluate("node => node.cellIndex")
    for order, sign in (("ascending", 1), ("descending", -1)):
        header.locator("button").press("Enter")
        assert header.get_attribute("aria-sort") == order
        cells = [row.locator("th, td").nth(column) for row in rows_of(page).all()]
        values = [float(cell.get_attribute("data-order")) for cell in cells[:-1]]
        assert values == sorted(values, key=lambda value: sign * value) and cells[-1].inner_text() == "–"
    page.get_by_label("subject", exact=False).last.scroll_into_view_if_needed()
    page.locator("select[data-name=subject]").select_option("b")
    assert rows_of(page).count() == 8
    page.fill("#search", "clip_i>0.74 attn2o")
    assert {row.locator("th").inner_text() for row in rows_of(page).all()} == {"attn2o-ffni"}
    assert page.inner_text("#count") == "2 of 33 rows"
    page.click("#clear")
    page.check("#earlier")
    assert rows_of(page).count() == 33
    page.click("#clear")


def test_a_field_of_the_heat_map_shows_its_trials(page):
    page.evaluate(
        "document.getElementById('plot-heat-map').emit('plotly_click', {points: [{customdata: 'attn2o-ffni'}]})"
    )
    assert page.locator("select[data-name=route]").input_value() == "attn2o-ffni" and rows_of(page).count() == 4
    page.click("#clear")


def test_pictures_are_shown_and_enlarged_from_the_keyboard(page):
    buttons = page.locator("#wall-table button")
    assert buttons.count() == 2 * 5, "four configs and the base, two prompts"
    assert page.evaluate("[...document.querySelectorAll('#wall-table img')].every(one => one.naturalWidth === 16)")
    buttons.first.focus()
    page.keyboard.press("ArrowDown")
    assert "attn2o-ffni" in page.locator("#tip").inner_text() and page.locator("#tip").is_visible()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    assert viewer.is_visible() and viewer.locator("figcaption").all_inner_texts() == [
        "photographs of a", "the base, before tuning", "attn2o-ffni",
    ]  # fmt: skip
    page.keyboard.press("ArrowRight")
    assert EVIL in viewer.inner_text() and "clip_i of this picture" in viewer.inner_text()
    assert violations(page) == []
    page.keyboard.press("Escape")
    assert not viewer.is_visible()


def test_another_score_is_drawn(page):
    page.select_option("select[data-plot=heat-map]", "clip_t")
    assert page.evaluate("document.getElementById('plot-heat-map').data[0].z[0][0]") == pytest.approx(0.3)


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    for _ in range(50):  # plotly draws anew when it finds time
        if page.evaluate("[...document.querySelectorAll('.main-svg')].every(one => one.clientWidth < 360)"):
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the plots are wider than a phone")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.set_viewport_size({"width": 1200, "height": 900})


def test_a_button_changes_light_and_dark(page):
    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before, plotted = background(), page.evaluate("document.getElementById('plot-curves').layout.font.color")
    page.click("#theme")
    assert background() != before
    assert page.evaluate("document.getElementById('plot-curves').layout.font.color") != plotted
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    assert page.complaints == []
