"""The report as a reader sees it: Chromium draws, hovers, sorts and prints."""

from __future__ import annotations

import pytest

SCHEMES = ("light", "dark")
BOTH = pytest.mark.parametrize("name", ["run", "runs"])


@BOTH
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_asks_for_nothing_and_complains_of_nothing(visit, name, scheme):
    seen = visit(name, scheme)
    for plot in seen.page.locator(".plot").all():
        plot.focus()
        seen.page.keyboard.press("ArrowRight")
    seen.page.wait_for_timeout(100)
    assert seen.complaints == []
    assert seen.requests == [seen.url]


def test_a_complaint_and_a_request_would_be_seen(visit):
    seen = visit("run")
    seen.page.evaluate(
        "console.error('loud'); new Image().src = 'http://127.0.0.1:9/x.png'"
    )
    seen.page.wait_for_timeout(100)
    assert "loud" in seen.complaints
    assert len(seen.requests) > 1


@BOTH
def test_every_figure_is_drawn_with_data(visit, name):
    page = visit(name).page
    figures = page.evaluate("""
        [...document.querySelectorAll("figure")].map(f => {
            const box = f.querySelector("svg").getBoundingClientRect();
            const marks = f.querySelectorAll("svg use, svg path").length;
            const points = JSON.parse(f.querySelector("script").textContent);
            const view = f.querySelector("svg").viewBox.baseVal;
            return {id: f.id, width: box.width, height: box.height, marks,
                    points: points.length,
                    inside: points.every(([x, y]) => x >= 0 && y >= 0 &&
                                         x <= view.width && y <= view.height),
                    broken: /NaN|undefined/.test(f.innerHTML)};
        })""")
    ids = {f["id"] for f in figures}
    if name == "run":
        assert {
            *("parity_energy", "parity_forces", "parity_stress", "parity_magmoms"),
            *("parity_magforces", "error_by_element", "error_by_config_type"),
            *("error_by_frame", "training_curves", "training_layers"),
            *("updated_paths", "retention", "short_range"),
        } == ids
    else:
        assert {"learning", "trade_off", "run0-updated_paths"} <= ids
    for figure in figures:
        assert figure["width"] > 200 and figure["height"] > 60, figure
        assert figure["marks"] > 10 and figure["points"] > 1, figure
        assert figure["inside"] and not figure["broken"], figure


PLACES = """figure => {
    const svg = figure.querySelector("svg");
    const points = JSON.parse(figure.querySelector("script").textContent);
    return points.map(([x, y, text]) => {
        const p = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
        return [p.x, p.y, text];
    });
}"""


@pytest.mark.parametrize("figure", ["parity_energy", "updated_paths", "short_range"])
def test_hovering_reads_a_value(visit, figure):
    page = visit("run").page
    drawn = page.locator(f"#{figure}")
    drawn.scroll_into_view_if_needed()
    x, y, text = drawn.evaluate(PLACES)[3]
    page.mouse.move(x, y)
    tip = page.locator("#tip")
    assert tip.evaluate("e => getComputedStyle(e).visibility") == "visible"
    assert tip.text_content() == text
    page.mouse.move(2, 2)
    assert tip.evaluate("e => getComputedStyle(e).visibility") == "hidden"


def test_arrow_keys_read_the_values_one_after_the_other(visit):
    page = visit("run").page
    plot = page.locator("#parity_energy .plot")
    texts = [text for _, _, text in page.locator("#parity_energy").evaluate(PLACES)]
    plot.focus()
    tip = page.locator("#tip")
    for expected in texts[:3]:
        page.keyboard.press("ArrowRight")
        assert tip.text_content() == expected
    page.keyboard.press("End")
    assert tip.text_content() == texts[-1]
    page.keyboard.press("Escape")
    assert tip.evaluate("e => getComputedStyle(e).visibility") == "hidden"


def test_everything_that_acts_is_reached_with_tab(visit):
    page = visit("run").page
    wanted = page.evaluate(
        'document.querySelectorAll("a, button, select, summary, [tabindex]").length'
        ' - document.querySelectorAll("details:not([open]) .scroll, '
        'details:not([open]) button").length'
    )
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("""() => {
            const all = [...document.querySelectorAll("*")];
            return all.indexOf(document.activeElement);
        }""")
        )
    assert len(reached) >= wanted


def test_a_click_sorts_numbers_as_numbers(visit):
    page = visit("run").page
    table = page.locator("#outliers")

    def column(index: int) -> list[float]:
        cells = table.locator(f"tbody td:nth-child({index})").all_text_contents()
        return [float(c.replace("−", "-").replace("▲", "")) for c in cells]

    assert column(5) == sorted(column(5), reverse=True)
    button = table.get_by_role("button", name="Index")
    button.click()
    assert column(1) == sorted(column(1))
    head = table.locator("th").first
    assert head.get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert column(1) == sorted(column(1), reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    table.get_by_role("button", name="Energy error").click()
    assert column(4) == sorted(column(4))
    assert head.get_attribute("aria-sort") is None


def test_one_layer_can_be_shown_alone(visit):
    page = visit("run").page
    select = page.locator("#training_layers select")
    select.select_option(index=2)
    opacities = page.evaluate("""
        [...document.querySelectorAll("#training_layers g.series")].map(
            g => +getComputedStyle(g).opacity)""")
    # Four layers, each in the panel of sparsity and in that of thresholds.
    assert sorted(opacities) == [0.12] * 6 + [1.0] * 2
    select.select_option(index=0)
    assert page.locator("#training_layers .plot.alone").count() == 0


def test_figures_follow_the_colour_scheme(visit):
    colours = {}
    for scheme in SCHEMES:
        page = visit("run", scheme).page
        colours[scheme] = page.evaluate("""() => {
            const of = (e, what) => getComputedStyle(e)[what];
            return [of(document.body, "backgroundColor"), of(document.body, "color"),
                    of(document.querySelector("#parity_energy text"), "fill"),
                    of(document.querySelector("#parity_energy use"), "fill")];
        }""")
    light, dark = colours["light"], colours["dark"]
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_prints(visit, scheme):
    page = visit("run", scheme).page
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") in (
        "rgb(255, 255, 255)",
        "rgba(0, 0, 0, 0)",
    )
    text = page.evaluate("getComputedStyle(document.body).color")
    assert text == "rgb(27, 31, 36)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0


@BOTH
@pytest.mark.parametrize("width", [360, 800])
def test_a_narrow_window_does_not_scroll_sideways(visit, name, width):
    page = visit(name, width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_names_of_the_data_are_text(visit):
    page = visit("run").page
    assert page.locator("#error_by_config_type b").count() == 0
    assert "<b>slab</b> & co" in page.locator("#outliers").text_content() + (
        page.locator("#error_by_config_type").text_content()
    )


def severe(page, axe) -> list[str]:
    """Return the serious and critical findings of axe-core."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


@BOTH
@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_has_no_serious_finding(visit, axe, name, scheme):
    page = visit(name, scheme).page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert severe(page, axe) == []


def test_axe_would_find_something(visit, axe):
    page = visit("run").page
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\">')"
    )
    assert any(finding.startswith("image-alt") for finding in severe(page, axe))
