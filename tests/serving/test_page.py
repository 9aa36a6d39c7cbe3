"""The built-in page, in a real headless Chromium, before the real server."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.serving.servers import ServerProcess, running_server
from tests.worlds import PROBABILITY_TOLERANCE, draw_raw

Raw = dict[str, Any]

WAIT_S = 30.0  # A poll comes every second; two test processes share the machine with the browser.
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
TAP_PX = 40
# A score is shown with six digits; the form's own request may find K/V where the other did not.
SHOWN_TOLERANCE = PROBABILITY_TOLERANCE + 0.5e-6
MARKUP = "<img src=x onerror=alert(1)>"

# Runs before the page's own script, and keeps what the page must never cause.
WATCH_FAULTS = """
window.faults = [];
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, (event) => faults.push(
    `${kind}: ${event.message || event.reason || event.violatedDirective}`));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    driver = Chrome(new_options(tmp_path_factory.mktemp("chromium")), new_service())
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH_FAULTS})
    yield driver
    driver.quit()


def new_options(profile: Path) -> ChromeOptions:
    options = ChromeOptions()
    options.binary_location = find_program("chromium")
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage"),
        *("no-first-run", "disable-background-networking", "disable-component-update"),
        *("disable-sync", f"user-data-dir={profile}", "window-size=1280,900"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return options


def new_service() -> ChromeService:
    return ChromeService(find_program("chromedriver"))


def find_program(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is not on the PATH; the page is tested in a real browser"
    return path


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[ServerProcess]:
    with running_server(f"artifact={artifact}") as running:
        yield running


@pytest.fixture
def page(browser: Chrome, server: ServerProcess) -> Iterator[Chrome]:
    """The page with its first numbers and its example in the form, and no fault at the end."""
    open_page(browser, server)
    wait(browser, lambda: text(browser, "badge") == "ready" and request_text(browser))
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert faults(browser) == []


def open_page(browser: Chrome, server: ServerProcess) -> None:
    console(browser)  # What an earlier page said is not this one's.
    browser.get(server.http_url)


# --- what the page shows


def wait(browser: Chrome, happened: Callable[[], Any]) -> None:
    WebDriverWait(browser, WAIT_S, poll_frequency=0.05).until(lambda _: happened())


def text(browser: Chrome, element_id: str) -> str:
    """Read in one step: the page may draw the element anew at any time."""
    script = "return document.getElementById(arguments[0]).innerText"
    return browser.execute_script(script, element_id)


def rows(browser: Chrome, selector: str) -> list[list[str]]:
    script = """return [...document.querySelectorAll(arguments[0])].map(
        (row) => [...row.cells].map((cell) => cell.textContent))"""
    return browser.execute_script(script, selector)


def faults(browser: Chrome) -> list[str]:
    return browser.execute_script("return window.faults")


def request_text(browser: Chrome) -> str:
    return browser.execute_script("return document.getElementById('request').value")


def num_answered(browser: Chrome) -> int:
    found = re.search(r"^ok\s+([\d,]+)$", text(browser, "requests"), re.MULTILINE)
    assert found, text(browser, "requests")
    return int(found[1].replace(",", ""))


def console(browser: Chrome) -> list[dict[str, Any]]:
    """Read the browser log, which empties it."""
    get_log: Callable[[str], list[dict[str, Any]]] = browser.get_log
    return get_log("browser")


def severe(browser: Chrome, *but: str) -> list[str]:
    """Console errors, except those of the sources that are named."""
    errors = [one for one in console(browser) if one["level"] == "SEVERE"]
    return [one["message"] for one in errors if one["source"] not in but]


# --- actions


def raw_request(request_id: str, user_id: str = "user 1") -> Raw:
    """A request whose four items are all different."""
    raw = draw_raw(9, 4, seed=5) | {"request_id": request_id, "user_id": user_id}
    raw["candidates"]["item_id"] = ["103", "100", "107", "105"]
    return raw


def post(server: ServerProcess, body: str) -> Raw:
    """Return the answer of the server, also if it is an error."""
    request = Request(f"{server.http_url}/v1/rank", body.encode(), method="POST")
    try:
        with urlopen(request, timeout=WAIT_S) as response:
            return json.load(response)
    except HTTPError as error:
        with error:
            return json.load(error)


def write_request(browser: Chrome, words: str) -> None:
    script = "document.getElementById('request').value = arguments[0]"
    browser.execute_script(script, words)


def score(browser: Chrome, words: str) -> None:
    """Press the button and wait for the answer."""
    write_request(browser, words)
    browser.execute_script("document.getElementById('answers').replaceChildren()")
    browser.find_element(By.ID, "score").click()
    wait(browser, lambda: text(browser, "answers"))


# --- tests


def test_it_loads_without_an_error_in_the_console(page: Chrome, server: ServerProcess) -> None:
    wait(page, lambda: text(page, "uptime").startswith("up "))
    assert severe(page) == []
    with urlopen(server.http_url, timeout=WAIT_S) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy, "the page was not tried under the policy it is sent with"


def test_it_fetches_nothing_but_the_servers_json(page: Chrome, server: ServerProcess) -> None:
    names = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    fetched = {name.split("?")[0] for name in names if not name.startswith("data:")}
    assert fetched == {f"{server.http_url}/v1/state", f"{server.http_url}/v1/example"}


def test_its_numbers_move_with_the_traffic(page: Chrome, server: ServerProcess) -> None:
    before = num_answered(page)
    for number in range(3):
        post(server, json.dumps(raw_request(f"moving {number}", f"user {number}")))
    wait(page, lambda: num_answered(page) >= before + 3)
    wait(page, lambda: float(text(page, "qps")) > 0.0)
    assert float(text(page, "p50").replace(",", "")) > 0.0
    assert "kvshare" in text(page, "versions")
    line = page.find_element(By.CSS_SELECTOR, "#sparkline .line").get_attribute("d")
    assert line is not None
    assert "L" in line  # It has been drawn from two polls at least.


def test_the_form_shows_the_servers_scores_best_first(page: Chrome, server: ServerProcess) -> None:
    raw = raw_request("by hand")
    answer = post(server, json.dumps(raw))
    score(page, json.dumps(raw))
    shown = [(item, float(value)) for _, item, value, _ in rows(page, "#answers tbody tr")]
    pairs = zip(answer["scores"], raw["candidates"]["item_id"], strict=True)
    best_first = sorted(pairs, reverse=True)
    assert [item for item, _ in shown] == [item for _, item in best_first]
    expected = pytest.approx([value for value, _ in best_first], abs=SHOWN_TOLERANCE)
    assert [value for _, value in shown] == expected
    assert "Request by hand" in text(page, "answers")
    assert answer["model_version"] in text(page, "answers")


def test_the_form_says_what_the_cache_did_and_how_long_it_took(
    page: Chrome, server: ServerProcess
) -> None:
    words = json.dumps(raw_request("again", "user 2"))
    post(server, words)
    score(page, words)
    assert re.search(r"^cache\s+hit$", text(page, "answers"), re.MULTILINE)
    assert re.search(r"9 cached \(pages\), 0 computed", text(page, "answers"))
    assert re.search(r"K/V made .+ ago", text(page, "answers"))
    assert re.fullmatch(r"1 request scored, [\d.,]+ ms there and back", text(page, "verdict"))


def test_the_example_can_be_scored_with_the_keyboard_alone(page: Chrome) -> None:
    example = request_text(page)
    write_request(page, "")
    page.find_element(By.ID, "example").send_keys(Keys.ENTER)
    wait(page, lambda: request_text(page) == example)
    page.find_element(By.ID, "request").send_keys(Keys.CONTROL, Keys.ENTER)
    wait(page, lambda: rows(page, "#answers tbody tr"))
    num_candidates = len(json.loads(example)["candidates"]["item_id"])
    assert len(rows(page, "#answers tbody tr")) == num_candidates


def test_ids_of_64_bits_are_shown_as_they_were_written(page: Chrome) -> None:
    raw = raw_request("wide")
    raw["candidates"]["item_id"] = [2**63 - 1, 2**53 + 1, 7, 3]
    score(page, json.dumps(raw))
    shown = {item for _, item, *_ in rows(page, "#answers tbody tr")}
    assert shown == {"9223372036854775807", "9007199254740993", "7", "3"}


@pytest.mark.parametrize("words", ['{"request_id": "r7"}', "{", '"text"'])
def test_a_bad_request_shows_the_servers_message(
    page: Chrome, server: ServerProcess, words: str
) -> None:
    message = post(server, words)["error"]["message"]
    score(page, words)
    [alert] = page.find_elements(By.CSS_SELECTOR, "#answers [role=alert]")
    assert message in alert.text
    assert severe(page, "network") == []


def test_requests_of_a_list_are_answered_one_below_the_other(page: Chrome) -> None:
    score(page, json.dumps([raw_request("first"), {"request_id": "second"}, raw_request("third")]))
    shown = text(page, "answers")
    assert shown.index("first") < shown.index("second") < shown.index("third")
    assert len(rows(page, "#answers tbody tr")) == 8
    assert text(page, "verdict").startswith("2 requests scored")


def test_markup_in_a_request_id_is_text_and_runs_nothing(page: Chrome) -> None:
    score(page, json.dumps(raw_request(MARKUP, user_id=f"never seen {MARKUP}")))
    assert MARKUP in text(page, "answers")
    wait(page, lambda: any(MARKUP in row for row in rows(page, "#misses tr")))
    score(page, json.dumps({"request_id": MARKUP}))
    assert MARKUP in text(page, "answers")
    assert page.execute_script("return document.images.length") == 0
    with pytest.raises(NoAlertPresentException):
        _ = page.switch_to.alert


def test_it_is_usable_at_the_width_of_a_phone(page: Chrome) -> None:
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    wait(page, lambda: page.execute_script("return innerWidth") == PHONE["width"])
    score(page, json.dumps(raw_request("long" * 50, user_id="on the phone")))
    assert len(rows(page, "#answers tbody tr")) == 4
    wait(page, lambda: rows(page, "#misses tr"))
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    script = """return [...document.querySelectorAll("button, select, input, textarea, a")]
        .filter((one) => one.checkVisibility())
        .map((one) => [one.id, one.getBoundingClientRect().height])"""
    heights = dict(page.execute_script(script))
    assert {"model", "example", "request", "score"} <= heights.keys()
    assert {name: height for name, height in heights.items() if height < TAP_PX} == {}


def test_every_input_has_a_label(page: Chrome) -> None:
    script = """return [...document.querySelectorAll("input, select, textarea")]
        .filter((one) => !one.labels.length).map((one) => one.id)"""
    assert page.execute_script(script) == []


def test_it_comes_back_by_itself_when_the_server_answers_again(
    page: Chrome, server: ServerProcess
) -> None:
    server.process.send_signal(signal.SIGSTOP)
    try:
        wait(page, lambda: "No answer from the server since" in text(page, "silence"))
        assert text(page, "badge") == "no answer"
    finally:
        server.process.send_signal(signal.SIGCONT)
    wait(page, lambda: text(page, "badge") == "ready")
    assert not page.find_element(By.ID, "silence").is_displayed()


def test_it_says_so_when_the_server_is_gone(browser: Chrome, artifact: Path) -> None:
    with running_server(f"artifact={artifact}") as server:
        open_page(browser, server)
        wait(browser, lambda: text(browser, "badge") == "ready" and request_text(browser))
        server.process.terminate()
        assert server.process.wait(WAIT_S) == 0
        wait(browser, lambda: "No answer from the server since" in text(browser, "silence"))
        score(browser, request_text(browser))
    assert "It cannot be reached" in text(browser, "answers")
    assert faults(browser) == []
    assert severe(browser, "network") == []


def test_a_token_opens_it_and_a_wrong_one_does_not(
    browser: Chrome, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("sesame\n")
    with running_server(f"artifact={artifact}", f"server.token_file={tmp_path}/token") as server:
        open_page(browser, server)
        token = browser.find_element(By.ID, "token")
        wait(browser, token.is_displayed)
        token.send_keys("mustard", Keys.ENTER)
        wait(browser, lambda: "did not take this token" in text(browser, "token-error"))
        token.send_keys("sesame", Keys.ENTER)
        wait(browser, lambda: text(browser, "badge") == "ready" and request_text(browser))
        assert not token.is_displayed()
        score(browser, json.dumps(raw_request("with a token")))
        assert len(rows(browser, "#answers tbody tr")) == 4
    assert faults(browser) == []


def test_a_refused_version_stands_out(browser: Chrome, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "models" / "shop" / "1")
    shutil.copytree(artifact, tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{")
    with running_server(f"models={tmp_path / 'models'}") as server:
        open_page(browser, server)
        wait(browser, lambda: text(browser, "badge") == "ready")
        (tmp_path / "broken").rename(tmp_path / "models" / "shop" / "2")
        wait(browser, lambda: "Version 2 of shop was refused." in text(browser, "alarms"))
        [row] = browser.find_elements(By.CSS_SELECTOR, "#versions .notice")
        assert "manifest.json" in row.text
        assert "serving" in text(browser, "versions")
    assert faults(browser) == []
