"""Does the page do in a browser what it promises? Skipped without playwright or Chromium."""
import os
import re
import shutil

import pytest
import report
from conftest import load
from test_report import MADE_UP, Page, scored

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("Chromium is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def run(handmade, monkeypatch):
    """Prompt 1 has the most disputed ending, then 0; prompt 2 has none."""
    return scored(handmade, monkeypatch, MADE_UP | {"made-0": [1.0, 0.55, 0.2, 0.2]})


@pytest.fixture
def opened(run, chromium):
    """A function that opens the page of `run`; no error of a script is left unseen."""
    page_file = run / "report.html"
    page_file.write_text(report.build_page([run]), encoding="utf-8")
    contexts, errors = [], []

    def opened(address="", **options):
        contexts.append(chromium.new_context(**{"viewport": {"width": 1000, "height": 800}} | options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{page_file}{address}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def number(page):
    """The prompt that is shown: the box, the address and the tree agree."""
    shown = page.input_value("#number")
    assert page.evaluate("location.hash") == f"#{shown}"
    assert page.inner_text("#says") == page.evaluate(f"prompts[{shown}].says")
    return int(shown)


def color_of(page, token):
    """Red, green, blue and alpha of each stripe behind a token."""
    background = token.evaluate("element => getComputedStyle(element).backgroundImage")
    stripes = re.findall(r"color\(srgb ([\d.]+) ([\d.]+) ([\d.]+) / ([\d.]+)\)", background)
    return list(dict.fromkeys(tuple(map(float, stripe)) for stripe in stripes))


def push(color):
    red, _, blue, alpha = color
    return 0 if alpha == 0 else 1 if blue > red else -1


def test_it_opens_on_the_most_disputed_prompt_and_next_goes_down_the_ranking(opened, run):
    page = opened()
    ranked = Page(report.build_page([run])).ranked
    assert ranked == [1, 0, 2]
    seen = [number(page)]
    for _ in range(3):
        page.click("#next")
        seen.append(number(page))
    assert seen == [1, 0, 2, 1]
    page.click("#previous")
    assert number(page) == 2


def test_sort_there_and_back(opened):
    page = opened("#2")
    page.select_option("#sort", "number")
    assert number(page) == 2  # it stays
    page.click("#next")
    assert number(page) == 0
    page.select_option("#sort", "ranked")
    assert number(page) == 1  # the first
    page.click("#next")
    assert number(page) == 0
    page.select_option("#sort", "number")
    assert number(page) == 0
    page.click("#next")
    assert number(page) == 1


def test_arrow_keys_also_after_a_click_but_not_in_a_field(opened):
    page = opened("#0")
    page.select_option("#sort", "number")
    page.click("#next")
    page.keyboard.press("ArrowRight")
    assert number(page) == 2
    page.click("#previous")
    page.keyboard.press("ArrowLeft")
    assert number(page) == 0
    page.locator("summary").first.focus()
    page.keyboard.press("ArrowRight")
    assert number(page) == 1
    page.focus("#number")
    page.keyboard.press("ArrowRight")
    assert number(page) == 1


@pytest.mark.parametrize("typed", ["999", "-5", "2.5", "", "x", "3"])
def test_a_number_that_is_no_prompt_is_refused(opened, typed):
    page = opened("#2")
    page.fill("#number", typed)
    page.keyboard.press("Enter")
    assert number(page) == 2 and page.inner_text("#wrong") == f"There is no prompt {typed}."
    page.fill("#number", "0")
    page.keyboard.press("Enter")
    assert number(page) == 0 and page.inner_text("#wrong") == ""


def test_the_address(opened):
    page = opened("#2")
    assert number(page) == 2
    page.evaluate("location.hash = '#0'")
    page.wait_for_function("document.getElementById('number').value === '0'")
    assert number(page) == 0
    page.evaluate("location.hash = '#12'")
    page.wait_for_function("document.getElementById('wrong').textContent !== ''")
    assert number(page) == 0
    assert number(opened("#999")) == 1


def test_the_columns_are_those_of_the_methods(opened, run):
    """A mean over the copies; each cell in the colour of its own sign."""
    page = opened("#0")
    rows = Page(report.build_page([run])).prompts[0]["rows"]
    lines = page.locator("#tree summary")
    assert lines.count() == len(rows)
    assert page.locator("section .row.dim b").all_inner_texts() == ["", "n", "value", "LEAF", "GRPO"]
    for place, row in enumerate(rows):
        cells = lines.nth(place).locator("> b")
        n, value, leaf, grpo = cells.all_inner_texts()
        assert n == str(len(row["members"])) and value == f"{row['value']:.2f}"
        if row["level"] >= 0:
            assert (leaf, grpo) == (f"{row['leaf']:.2f}", f"{row['grpo']:.2f}")
            for method, cell in (("leaf", cells.nth(2)), ("grpo", cells.nth(3))):
                [color] = color_of(page, cell)
                assert push(color) == (1 if row[method] > 0 else -1)
    assert any(row["leaf"] * row["grpo"] < 0 for row in rows[1:])


def test_leaf_colours_spans_and_grpo_whole_responses(opened, run):
    page = opened("#0")
    credit = load(run, "advantages")["prompts"][0]
    order = Page(report.build_page([run])).prompts[0]["responses"]
    for method in ("leaf", "grpo", "leaf"):
        page.check(f"[value={method}]")
        for place, (k,) in enumerate(order):
            tokens = page.locator("#responses .row").nth(place).locator(".token")
            colors = [color_of(page, tokens.nth(t)) for t in range(tokens.count())]
            assert all(len(stripes) == 1 for stripes in colors)
            expected = [1 if a > 0 else -1 for a in credit[method][k, :tokens.count()].tolist()]
            assert [push(color) for [color] in colors] == expected
            assert len({color for [color] in colors}) == (1 if method == "grpo" else len(credit["spans"][k]))


def test_a_shared_span_has_a_stripe_for_each_of_its_copies_under_grpo(opened):
    page = opened("#0")
    token = page.locator("#tree summary").nth(2).locator(".token").first  # shared by 1.0 and 0.55
    assert len(color_of(page, token)) == 1
    page.check("[value=grpo]")
    stripes = color_of(page, token)
    assert len(stripes) == 2 and stripes[0][3] > stripes[1][3]  # the better above


def test_surprisal_has_a_scale(opened):
    page = opened("#0")
    page.check("[value=nats]")
    assert page.locator("#legend b").all_inner_texts() == ["0", "1", "2", "3"]
    shades = [color_of(page, page.locator("#legend b").nth(i))[0][3] for i in range(4)]
    assert shades == sorted(set(shades))
    tokens = page.locator("#tree summary", has_text="drei").locator(".token")
    alphas = [color_of(page, tokens.nth(t))[0][3] for t in range(tokens.count())]
    assert alphas[0] == max(alphas) and alphas[0] > 2 * max(alphas[1:])  # 3 nats, then 1/8


def test_poor_endings_are_outlined_in_the_tree_and_in_the_responses(opened):
    page = opened("#0")
    for place in ("#tree", "#responses"):
        assert sorted(page.locator(f"{place} .poor").all_inner_texts()) == [" alte Nachrichten.",
                                                                            " drei neue Nachrichten."]
    assert page.locator(".poor").first.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"


def test_whole_responses_with_their_rewards_the_best_first(opened):
    page = opened("#0")
    lines = page.locator("#responses .row")
    texts = lines.locator(".text").all_inner_texts()
    assert texts[0] == "Sie haben nur zwei neue Nachrichten." and len(texts) == 4
    assert lines.locator(".value").all_inner_texts() == ["1.00", "0.55", "0.20", "0.20"]
    assert page.inner_text("#tree summary >> nth=0").split() == ["all", "responses", "4", "0.49"]
    assert "reference: Sie haben nur zwei neue Nachrichten." in page.inner_text("#look")


def test_identical_responses_are_one_line(opened):
    page = opened("#1")
    line = page.locator("#responses .row", has_text="Es")
    assert line.count() == 1 and line.locator("b").first.inner_text() == "×2"


def test_a_line_opens_by_keyboard_with_its_responses_and_tokens(opened):
    page = opened("#0")
    line = page.locator("#tree summary", has_text="alte")
    line.focus()
    page.keyboard.press("Enter")
    detail = page.locator("#tree .detail")
    detail.wait_for()
    assert detail.locator(".text").all_inner_texts() == ["Sie haben nur zwei alte Nachrichten."]
    assert "0.55" in detail.inner_text() and "Nats: alte 2, Nachrichten. 0.12" in detail.inner_text()
    page.check("[value=grpo]")
    assert detail.is_visible()  # the colour changes, nothing else


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_tap_on_a_phone_answers_where_it_was(opened, scheme):
    page = opened("#0", viewport={"width": 390, "height": 844}, has_touch=True, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    line = page.locator("#tree summary", has_text="alte")
    assert line.locator(".text").bounding_box()["width"] > 250  # the numbers stand below it
    line.tap()
    detail = page.locator("#tree .detail")
    detail.wait_for()
    above, below = line.bounding_box(), detail.bounding_box()
    assert 0 <= below["y"] - (above["y"] + above["height"]) < 20
    assert below["x"] + below["width"] <= 390


def test_dark_and_light(opened):
    grounds = {}
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        style = page.evaluate("""[getComputedStyle(document.body).backgroundColor,
                                  getComputedStyle(document.body).color]""")
        grounds[scheme] = [sum(map(int, re.findall(r"\d+", color))) for color in style]
    assert grounds["light"][0] > 600 > 150 > grounds["light"][1]
    assert grounds["dark"][0] < 150 < 600 < grounds["dark"][1]


def test_without_prompts_there_are_the_curves_alone(run, opened):
    (run / "rollouts.pt").unlink()
    (run / "report.html").write_text(report.build_page([run]), encoding="utf-8")
    page = opened()
    assert page.locator("#look").count() == 0 and "01_sample.py" in page.inner_text("body")
