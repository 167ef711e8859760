"""The page shows each exit's prediction, the exit taken and its cost; in a browser it does so live."""

import re
import shutil

import pytest
import timm
import torch
from PIL import Image

import timm_dfs
from timm_dfs import demo, space

LABELS = ("ant", "<bee>", "cat")
LOGITS = torch.tensor([[[0.0, 0.5, 0.0]], [[0.0, 0.0, 4.0]], [[9.0, 0.0, 0.0]]])
COSTS, WHOLE = [10_000_000, 20_000_000, 44_000_000], 40_000_000


def shown(*thresholds):
    return space.describe(LOGITS, timm_dfs.ExitPolicy(thresholds), LABELS, COSTS, WHOLE)


@pytest.mark.parametrize(
    ("thresholds", "exit_index", "label", "share"),
    [
        ((0.4, 0.9, 0.0), 0, "&lt;bee&gt;", "25%"),
        ((0.9, 0.9, 0.0), 1, "cat", "50%"),
        ((None, None, 0), 2, "ant", "110%"),
    ],
)
def test_the_first_confident_exit_is_taken_and_its_cost_is_a_share_of_the_last_exit_alone(
    thresholds, exit_index, label, share
):
    page = shown(*thresholds)
    assert f'<h2 class="dfs-prediction">{label}</h2>' in page
    assert f"Exit {exit_index} of exits 0 to 2 was taken" in page and f"{share} of the last exit alone" in page
    rows = re.findall(r'<tr class="([\w-]*)">', page)
    before = ["dfs-unused" if threshold is None else "" for threshold in thresholds[:exit_index]]
    assert rows == before + ["dfs-taken"] + ["dfs-unused"] * (2 - exit_index)


def test_exits_that_never_answer_are_grey_and_patience_counts_predictions():
    alike = LOGITS[1:2].repeat(4, 1, 1)
    page = space.describe(alike, timm_dfs.ExitPolicy([2, 2, 2, 0], "patience"), LABELS, [*COSTS, 50_000_000], WHOLE)
    assert "Exit 2 of" in page and "never" not in page and page.count("<td>2.00</td>") == 3
    off = shown(None, 0.9, 0.0)
    assert re.findall(r'<tr class="([\w-]*)">', off) == ["dfs-unused", "dfs-taken", "dfs-unused"]
    assert "never" in off.partition("<td>1</td>")[0]


def test_a_class_is_named_as_text_not_as_html():
    assert "<bee>" not in shown(0.5, 0.5, 0)


def test_the_logits_behind_the_page_are_the_networks_own(tmp_path):
    model = timm.create_model(demo.MODEL, pretrained=True).eval()
    Image.new("RGB", (50, 40), "orange").save(tmp_path / "orange.png")
    logits = space.all_logits(model, str(tmp_path / "orange.png"))
    assert logits.shape == (7, 1, 100)


# In a browser.

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def browser_page(tmp_path_factory):
    """The page in headless Chromium, and the addresses outside this machine that it asked for."""
    pytest.importorskip("gradio", reason="the page needs the space extra")
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    pytest.importorskip("skimage", reason="the examples come from scikit-image")
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    blocks = space.page(timm.create_model(demo.MODEL, pretrained=True).eval(), demo.MODEL)
    address = space.launch(blocks, wait=False)
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.outside = []
            tab.on("request", lambda request: tab.outside.append(request.url) if is_outside(request.url) else None)
            tab.goto(address)
            tab.get_by_text("Drop an image, or").wait_for()
            yield tab
            browser.close()
    finally:
        blocks.close()


def is_outside(url):
    return re.match(r"https?://(127\.0\.0\.1|localhost)[:/]", url) is None and url.startswith("http")


@pytest.mark.slow
def test_a_person_drops_an_image_moves_the_slider_and_gives_a_wrong_file(browser_page, tmp_path):
    tab = browser_page
    upload = tab.locator("#image input[type=file]")
    demo.photographs()["rocket"].save(tmp_path / "rocket.png")
    upload.set_input_files(tmp_path / "rocket.png")
    tab.locator(".dfs-prediction").wait_for()
    assert tab.locator(".dfs-exits tr").count() == 1 + 7
    for row in tab.locator(".dfs-exits tr").all()[1:]:
        assert row.inner_text().count("%") == 5

    slider = tab.locator("#threshold input[type=range]")
    for threshold, exit_index in (("0", 0), ("1", 6), ("0", 0)):
        slider.fill(threshold)
        tab.get_by_text(f"Exit {exit_index} of exits").wait_for()
        assert tab.locator(".dfs-taken td").first.inner_text() == str(exit_index)
    assert tab.locator("#point input").input_value() == space.ONE_THRESHOLD

    tab.get_by_label("Clear").first.click() if tab.get_by_label("Clear").count() else tab.reload()
    (tmp_path / "notes.txt").write_text("no image")
    upload.set_input_files(tmp_path / "notes.txt")
    tab.get_by_text("'notes.txt' is not an image").wait_for()
    assert tab.locator(".dfs-prediction").count() == 0 and str(tmp_path) not in tab.content()
    assert tab.outside == []


@pytest.mark.slow
def test_an_example_is_predicted_with_a_click(browser_page):
    browser_page.get_by_text("coffee.png").first.click()
    browser_page.locator(".dfs-prediction").wait_for()
    browser_page.locator("#point input").click()
    browser_page.get_by_role("option", name="balanced").click()
    assert browser_page.locator(".dfs-prediction").count() == 1
