"""The site builds without a warning, needs no network, and works in a browser at desktop and phone width."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {"desktop": 1280, "phone": 390}
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "docs", str(target)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium isn't installed")
    with Browser() as browser:
        yield browser


class _Parsed(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []  # targets of links
        self.loaded: list[str] = []  # loaded together with the page
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.add(values.get("id") or "")
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif tag in ("img", "script", "link", "iframe", "source"):
            self.loaded.append(values.get("src") or values.get("href") or "")


def test_links_and_pictures(site: Path) -> None:
    pages = {page: _Parsed(page) for page in site.rglob("*.html")}
    for page, parsed in pages.items():
        outside = [link for link in parsed.loaded if re.match(r"(https?:)?//", link)]
        assert not outside, f"{page.name} loads {outside}"
        for link in parsed.links + parsed.loaded:
            path, _, anchor = link.partition("#")
            if not re.match(r"(https?|data|mailto):", link):
                to = (page.parent / path.partition("?")[0]).resolve() if path else page
                assert to.exists(), f"{page.relative_to(site)}: nothing is at {link!r}"
                assert not anchor or to not in pages or anchor in pages[to].anchors, f"{page.name}: {link!r}"
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*", styles)


def test_the_api_has_every_public_name(site: Path) -> None:
    anchors = set().union(*(_Parsed(page).anchors for page in (site / "api").glob("*.html")))
    for module in re.findall(r"<!-- generated: api ([\w.]+)", "".join(p.read_text() for p in _sources("api"))):
        for name in importlib.import_module(module).__all__:
            assert {f"custom_ops.{name}", f"{module}.{name}"} & anchors, name


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / "docs" / folder).glob("*.md"))


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_every_page_in_a_browser(site: Path, browser: Browser, width: int) -> None:
    pages = [page for page in sorted(site.rglob("*.html")) if page.parent.name != "_modules"]
    assert len(pages) > 25
    for page in pages:
        browser.open(page.as_uri(), width)
        name = f"{page.relative_to(site)} at {width}"
        assert not browser.errors, (name, browser.errors)
        assert all(url.startswith(("file:", "data:")) for url in browser.requests), (name, browser.requests)
        broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert browser.evaluate(broken) == [], name
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways"


def test_formulas_have_a_size_and_a_font(site: Path, browser: Browser) -> None:
    browser.open((site / "guides" / "ranking.html").as_uri(), WIDTHS["desktop"])
    assert browser.evaluate("document.fonts.ready.then(() => document.fonts.check('16px \"STIX Two Math\"'))")
    heights = browser.evaluate("[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)")
    assert len(heights) > 20
    assert min(heights) > 5


@pytest.mark.parametrize(("words", "page"), [("voxel_sum", "custom_ops.voxel_sum"), ("hessian", "start.html")])
def test_search(site: Path, browser: Browser, words: str, page: str) -> None:
    browser.open(f"{(site / 'search.html').as_uri()}?q={words}", WIDTHS["phone"])
    found = """new Promise(done => {
        const look = () => {
            const summary = document.querySelector(".search-summary")?.innerText ?? "";
            const links = [...document.querySelectorAll("#search-results li a")].map(a => a.href);
            /finished/i.test(summary) && links.length ? done(links) : setTimeout(look, 50);
        };
        look();
    })"""
    assert any(page in link for link in browser.evaluate(found))


def test_code_is_copied_without_its_prompts(site: Path, browser: Browser) -> None:
    browser.open((site / "start.html").as_uri(), WIDTHS["desktop"])
    copied = """new Promise(done => {
        document.addEventListener("copy", event => done(event.target.value ?? ""), true);
        const block = [...document.querySelectorAll("div.highlight")].find(d => d.innerText.includes(">>> x = "));
        block.querySelector("button.copybtn").click();
    })"""
    text = browser.evaluate(copied)
    assert text.startswith("x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)\ncustom_ops.relu(x)")
    assert ">>>" not in text and "tensor([0., 0., 1.])" not in text
