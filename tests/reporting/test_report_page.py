"""The page in a real Chromium: light, quiet, usable with keys alone, readable, and deaf to what models write."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1zero.reporting import report
from r1zero.run_folder import append_json_line
from tests.reporting import simulated_run

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

pytestmark = pytest.mark.xdist_group("chromium")  # one browser, in one worker

READY = "html[data-state=ready]"
SHOWN = "[figures[0].uplot.scales.x.min, figures[0].uplot.scales.x.max]"  # of the first figure, in steps
LOAD_S = 2.0
MOST_BYTES = 10_000_000
TABS = 700
HOSTILE = "</script><script>window.hurt=1</script><img src=x onerror='window.hurt=2'><svg onload='window.hurt=3'>"
# Each text against what it stands on (WCAG 2.1, success criterion 1.4.3), as the browser computes both.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const linear = [r, g, b].map((each) => (each /= 255) <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ratio = (one, two) => {
    const [high, low] = [light(one), light(two)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const field = element.matches("input, select");
    if (!element.checkVisibility() || (!text && !field) || element.disabled) continue;
    const style = getComputedStyle(element);
    const where = `${element.tagName} ${element.className} ${element.id}`;
    found.push([where, ratio(parse(style.color), ground(element)), 4.5]);
    if (field && element.type !== "checkbox" && element.type !== "range")
      found.push([`${where} edge`, ratio(parse(style.borderTopColor), ground(element.parentElement)), 3]);
  }
  const paper = ground(document.body);
  const probe = document.body.appendChild(document.createElement("span"));
  for (const name of [0, 1, 2, 3, 4, 5, 6, 7].map((at) => `--c${at}`).concat("--focus")) {
    probe.style.color = `var(${name})`;
    found.push([name, ratio(parse(getComputedStyle(probe).color), paper), 3]);
  }
  probe.remove();
  return found;
}"""


def chromium() -> str | None:
    """Debian's, or another that is on the PATH; R1ZERO_CHROMIUM names one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("R1ZERO_CHROMIUM") or next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own rule for root
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=arguments)
        except sync_api.Error as error:
            why = str(error).splitlines()[0]
            pytest.skip(
                f"no Chromium ({why}): `playwright install chromium`, `apt install chromium` or R1ZERO_CHROMIUM"
            )
        yield found
        found.close()


class Tab:
    """A page that was opened from disk, without a network, and all that it complained of or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(READY, timeout=60_000)

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, *exc: object) -> None:
        self.context.close()
        assert not self.complaints
        assert all(url.startswith(("file:", "data:", "blob:")) for url in self.requests)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def found(self) -> int:
        """How many completions are listed."""
        match = re.search(r"of ([\d,]+) completions", self.text("#found"))
        return int(match[1].replace(",", "")) if match else 0


@pytest.fixture(scope="module")
def page_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was resumed once, with an alert and evaluations."""
    folder = simulated_run.write(tmp_path_factory.mktemp("run") / "first", steps=12, completions=32, evaluate_each=4)
    alert = {"kind": "alert", "time": simulated_run.BEGAN + 30, "step": 5, "message": "look at it"}
    append_json_line(folder.metrics, alert)
    return report.write([folder.path]).path


@pytest.fixture(scope="module")
def page_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("runs")
    one = simulated_run.write(at / "first", steps=6, evaluate_each=3)
    other = simulated_run.write(at / "second", steps=9, recipe={**simulated_run.RECIPE, "learning_rate": 1e-6})
    return report.write([one.path, other.path], at / "both.html").path


@pytest.mark.alone
def test_500_steps_of_512_completions_load_within_two_seconds(browser: Any, tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=500, completions=512, evaluate_each=100)
    written = report.write([folder.path])
    assert written.bytes < MOST_BYTES
    seconds = []
    for _ in range(3):  # a machine that is busy with other tests may be slow once
        with Tab(browser, written.path) as tab:
            seconds.append(tab.page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000)
            assert "of 266,240 completions are in this page" in tab.text("#said")
            assert tab.page.locator("#charts figure:visible").count() > 15
    assert min(seconds) < LOAD_S, seconds


def test_every_control_does_what_it_says(browser: Any, page_of_two: Path) -> None:
    with Tab(browser, page_of_two) as tab:
        page = tab.page
        used = set()

        def use(name: str) -> Any:
            used.add(name)
            return page.locator(f"#{name}")

        # Curves
        first = page.locator("figure:visible").first
        runs = first.locator(".legend button")
        assert runs.count() == 2
        use("run-1").uncheck()
        assert runs.count() == 1
        use("run-1").check()
        use("run-0").uncheck()
        use("run-0").check()
        runs.first.click()
        assert runs.first.get_attribute("aria-pressed") == "false"
        assert page.evaluate("figures[0].uplot.series[1].show") is False
        assert "first:" not in first.locator(".plot").get_attribute("aria-label")
        runs.first.click()
        assert "first:" in first.locator(".plot").get_attribute("aria-label")
        plot = first.locator(".plot")
        plot.focus()
        page.keyboard.press("End")
        assert first.locator("output").inner_text().startswith("step 9: ")
        use("axis").select_option("hours")
        plot.focus()
        page.keyboard.press("Home")
        assert first.locator("output").inner_text().startswith("hour 0.0")
        use("axis").select_option("step")
        plot.focus()
        page.keyboard.press("End")
        rough = first.locator("output").inner_text()
        use("smoothing").fill("0.9")
        plot.focus()
        page.keyboard.press("End")
        assert tab.text("#smoothing-value") == "0.9"
        smooth = first.locator("output").inner_text()
        assert smooth[:7] == rough[:7] == "step 9:" and smooth != rough
        use("smoothing").fill("0")
        use("from").fill("2")
        use("to").fill("5")
        assert page.evaluate(SHOWN) == [2, 5]
        use("whole").click()
        assert page.evaluate(SHOWN) == [1, 9]
        assert page.input_value("#from") == "" and page.input_value("#to") == ""
        drawn = plot.bounding_box()
        assert drawn is not None
        across, down = drawn["x"] + drawn["width"] / 2, drawn["y"] + 80
        page.mouse.move(across, down)
        page.mouse.down()
        page.mouse.move(across + 60, down, steps=4)
        page.mouse.up()
        assert 1 < page.evaluate(SHOWN)[0] < page.evaluate(SHOWN)[1] < 9
        page.mouse.dblclick(across, down)
        assert page.evaluate(SHOWN) == [1, 9] and page.input_value("#from") == ""
        first.locator("summary").click()
        assert first.locator("table tbody tr").count() == 9
        use("other").select_option("publish/bytes")
        assert "publish/bytes" in page.locator("figcaption").first.inner_text()
        use("other").select_option("")
        assert "publish/bytes" not in page.locator("figcaption").first.inner_text()

        # Rollouts
        use("reader-run").select_option("1")
        assert tab.found() == 9 * 16
        use("reader-run").select_option("0")
        everything = tab.found()
        assert everything == 6 * 16 + 2 * 64
        use("split").select_option("train")
        assert tab.found() == 6 * 16
        use("step").select_option("3")
        assert tab.found() == 16
        use("step-after").click()
        assert page.input_value("#step") == "4"
        use("step-before").click()
        assert page.input_value("#step") == "3"
        use("clear").click()
        assert tab.found() == everything
        use("verdict").select_option(label="correct")
        right = tab.found()
        assert 0 < right < everything
        use("clear").click()
        use("reward-low").fill("0.5")
        assert tab.found() == right
        use("reward-low").fill("")
        use("reward-high").fill("0.5")
        assert tab.found() == everything - right
        use("clear").click()
        use("length-low").fill("250")
        long = tab.found()
        use("clear").click()
        use("length-high").fill("249")
        assert tab.found() == everything - long > 0 < long
        use("clear").click()
        use("source").select_option(label="math/train")
        assert tab.found() == everything / 2
        use("clear").click()
        use("clipped").check()
        assert 0 < tab.found() < everything / 5
        use("clear").click()
        use("text").fill("LET ME CHECK")
        assert 0 < tab.found() < everything
        assert "let me check" in tab.text("#completion").lower()
        use("clear").click()
        use("order").select_option("oldest")
        assert tab.text("#list button >> nth=0").startswith("step 1 ")
        use("page-after").click()
        assert tab.text("#found").startswith("26 to 50 ")
        use("page-before").click()
        assert tab.text("#found").startswith("1 to 25 ")
        page.locator("#list button").nth(3).click()
        assert page.locator("#list button").nth(3).get_attribute("aria-current") == "true"
        use("clear").click()
        use("split").select_option("test")
        use("question-on").click()
        assert tab.found() == 8 and page.is_visible("#question-filter")
        page.locator(".across button").last.click()
        assert tab.text("#detail h3").startswith("step 6 held-out")
        use("question-off").click()
        assert tab.found() == everything and not page.is_visible("#question-filter")

        # Self-verification
        use("phrase-split").select_option("test")
        use("phrase-split").select_option("train")
        page.locator("#examples summary").first.click()
        assert "Wait, let me check" in tab.text("#examples blockquote >> nth=0")
        page.locator("#examples button").first.click()
        assert page.input_value("#text") == "wait" and tab.found() > 0

        # Facts
        few = page.locator("#recipe tbody tr").count()
        assert "learning_rate" in tab.text("#recipe")
        use("recipe-choice").select_option("all")
        assert page.locator("#recipe tbody tr").count() > few - 1
        use("recipe-text").fill("learning")
        assert page.locator("#recipe tbody tr").count() == 1
        assert {"runs", "differs", "command line"} <= set(page.locator("#recipe .badge").all_inner_texts())
        page.locator("#more-facts summary").first.click()
        assert "Optimizer step" in tab.text("#more-facts details[open]")

        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        use("theme").select_option("dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        named = page.eval_on_selector_all("button[id], select[id], input[id]", "all => all.map((each) => each.id)")
        assert used == set(named)


def test_keys_alone_reach_every_control(browser: Any, page_of_a_run: Path) -> None:
    with Tab(browser, page_of_a_run) as tab:
        wanted = tab.page.evaluate(
            """() => {
                const all = document.querySelectorAll("a[href], button, select, input, summary, [tabindex='0']");
                const shown = [...all].filter((each) => each.checkVisibility() && !each.disabled);
                shown.forEach((each, at) => (each.dataset.wanted = at));
                return shown.length;
            }"""
        )
        reached = set()
        for _ in range(min(TABS, wanted + 20)):
            tab.page.keyboard.press("Tab")
            reached.add(tab.page.evaluate("document.activeElement.dataset.wanted"))
        assert reached >= {str(at) for at in range(wanted)}
        unlabelled = tab.page.evaluate(
            """() => [...document.querySelectorAll("select, input, button")]
                .filter((each) => !(each.labels?.length || each.getAttribute("aria-label") || each.textContent.trim()))
                .map((each) => each.id)"""
        )
        assert unlabelled == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_readable_on_a_telephone_and_a_wide_screen_in_light_and_dark(
    browser: Any, page_of_a_run: Path, page_of_two: Path, width: int, scheme: str
) -> None:
    for path in (page_of_a_run, page_of_two):
        with Tab(browser, path, width, scheme) as tab:
            for summary in tab.page.locator("summary").all():
                summary.click()
            scroll = tab.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert scroll[0] <= scroll[1] == width
            dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
            assert dark == (scheme == "dark")
            contrasts = tab.page.evaluate(CONTRASTS)
            assert len(contrasts) > 100
            assert [each for each in contrasts if each[1] < each[2]] == []


def test_what_a_model_writes_is_text_and_nothing_else(browser: Any, tmp_path: Path) -> None:
    manifest = {**simulated_run.MANIFEST, "host": HOSTILE}
    recipe = {**simulated_run.RECIPE, "prompt_template": HOSTILE}
    folder = simulated_run.write(tmp_path / "<img src=x onerror=hurt=1>", steps=2, manifest=manifest, recipe=recipe)
    chat = '[{"role": "user", "content": "<b>' + HOSTILE.replace('"', "") + '</b>"}]'
    everything = {name: [HOSTILE] * 3 for name in ("gold", "answer", "source", "verdict")}
    completions = [f"wait {HOSTILE} \\boxed{{{HOSTILE}}} {HOSTILE}", "{{script}}", "\U0001f9ee<think>\u2028"]
    rows = {"completion": completions, "prompt": [HOSTILE, chat, '[{"role'], **everything}
    simulated_run.write_rollouts(folder.rollouts(2), 2, rows)
    folder.plan.write_text(HOSTILE)
    append_json_line(folder.metrics, {"kind": "alert", "time": 0, "step": 1, "message": HOSTILE})
    written = report.write([folder.path])
    with Tab(browser, written.path) as tab:
        assert tab.page.text_content("#completion") == completions[0]
        assert tab.text("#completion mark") == f"\\boxed{{{HOSTILE}}}"
        assert tab.text("#gold") == HOSTILE
        for at in range(3):
            tab.page.locator("#list button").nth(at).click()
        for summary in tab.page.locator("summary").all():
            summary.click()
        assert (
            tab.page.evaluate("document.querySelectorAll('img, svg, body script + script + script + script').length")
            == 0
        )
        assert tab.page.evaluate("window.hurt") is None


def test_the_page_runs_no_script_but_its_own(browser: Any, page_of_a_run: Path) -> None:
    tab = Tab(browser, page_of_a_run)
    tab.page.evaluate("document.body.insertAdjacentHTML('beforeend', \"<img src=x onerror='window.hurt=1'>\")")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.hurt") is None
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)
    tab.context.close()


def test_events_are_marked_on_the_curves_and_listed(browser: Any, page_of_a_run: Path) -> None:
    with Tab(browser, page_of_a_run) as tab:
        assert "! alert (1)" in tab.text("#markers")
        assert "look at it" in tab.text("#more-facts")
