"""The page of a difference, in a real browser."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest
from oxmerge.cli import main
from writers import random_arrays, tuned, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Page = Any  # of playwright, which need not be there

LAYERS = 3
#: A name that would act in a page that takes it for HTML, or for the end of a script.
NASTY = '</script><img src="http://127.0.0.1:9/x" onerror="document.title=1">.weight'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    parts = ("self_attn.q_proj", "mlp.up_proj")
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts]
    base = random_arrays(dict.fromkeys([*names, "lm_head.weight", NASTY], (30, 40)), 1)
    config = {"num_hidden_layers": LAYERS}
    write_model(folder / "a", base, config=config)
    scales = (10.0 ** -(2 + number % 5) for number in range(len(base)))
    other = {
        name: tuned({name: values}, 2, scale)[name]
        for (name, values), scale in zip(base.items(), scales, strict=True)
    }
    other[names[0]] = base[names[0]]
    write_model(folder / "b", other, config=config)
    return folder


@pytest.fixture(scope="module")
def seen() -> list[str]:
    """What the browser fetched and complained of."""
    return []


@pytest.fixture(scope="module")
def page(models: Path, seen: list[str]) -> Iterator[Page]:
    api = pytest.importorskip(
        "playwright.sync_api", reason="not installed: playwright (see the dependency group `test`)"
    )
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("not installed: chromium (`.ci/run` installs it)")
    path = models / "page.html"
    code = main(["diff", str(models / "a"), str(models / "b"), "--html", str(path), "-q"])
    assert code == 1
    with api.sync_playwright() as playwright:
        # In a container there is no sandbox; the page is our own.
        running = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = running.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.set_default_timeout(10_000)
        page.goto(path.as_uri())
        yield page
        running.close()


def column(page: Page, number: int) -> list[str]:
    texts: list[str] = page.locator(f"#tensors tbody td:nth-child({number})").all_inner_texts()
    return texts


def head(page: Page, name: str) -> Any:
    return page.locator("#tensors th", has_text=name)


def test_it_fetches_nothing_and_has_no_faults(page: Page, seen: list[str], models: Path) -> None:
    assert seen == [(models / "page.html").as_uri()]
    assert page.title() == "How a and b differ"
    assert page.locator("img").count() == 0
    assert NASTY in column(page, 1)


def test_a_click_on_a_column_head_sorts(page: Page, models: Path) -> None:
    found = oxmerge.diff(models / "a", models / "b")
    in_order = [tensor.name for tensor in found.tensors]
    relative = {tensor.name: tensor.numbers.relative or 0.0 for tensor in found.tensors}
    assert column(page, 1) == in_order
    head(page, "relative").get_by_role("button").click()
    largest_first = sorted(in_order, key=lambda name: -relative[name])
    assert column(page, 1) == largest_first != in_order
    assert head(page, "relative").get_attribute("aria-sort") == "descending"
    head(page, "relative").get_by_role("button").click()
    assert column(page, 1) == largest_first[::-1]
    head(page, "tensor").get_by_role("button").click()
    assert column(page, 1) == sorted(in_order)
    assert head(page, "relative").get_attribute("aria-sort") == "none"


def test_names_are_filtered(page: Page) -> None:
    page.locator("#filter").fill("q_proj")
    assert sorted(column(page, 3)) == ["self_attn.q_proj"] * LAYERS
    page.locator("#filter").fill("")
    assert len(column(page, 1)) == 2 * LAYERS + 2


def test_the_map_has_a_cell_for_each_module_of_each_layer(page: Page) -> None:
    heads = page.locator("#map th").all_inner_texts()
    assert heads[:3] == ["layer", "self_attn.q_proj", "mlp.up_proj"]
    assert heads[-1] == "outside of layers"
    cells = page.locator("#map td.cell")
    assert cells.count() == 2 * LAYERS + 2
    same, other = cells.nth(0), cells.nth(1)
    assert same.inner_text() == "0"
    assert same.get_attribute("style") is None
    assert "rgb(" in (other.get_attribute("style") or "")
    before = other.inner_text()
    page.locator("#measure").select_option(label="share of elements with another number")
    assert other.inner_text() != before
    assert "%" in other.inner_text()


def test_the_distributions_count_every_tensor(page: Page) -> None:
    figures = page.locator("#distributions figure")
    assert figures.count() == 6
    texts = figures.nth(0).locator("text").all_text_contents()
    assert sum(int(text or 0) for text in texts[::2]) == 2 * LAYERS + 2
