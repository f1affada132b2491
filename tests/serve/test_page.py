"""The page to try models by: as its service gives it out, and in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from dray.feedback import Dataset
from dray.serve.recalling import Recall
from dray.serve.served import Served
from dray.serve.shares import Plan
from served_here import Address, served_here
from small_writer import save_small_writer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
KEY = "key-of-the-service"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    folder = str(save_small_writer(tmp_path_factory.mktemp("served") / "writer"))
    models = [Served(folder=folder), Served(folder=folder, name="other")]
    recall = Recall(Dataset(str(tmp_path_factory.mktemp("said")), "said"))
    with served_here(models, key=KEY.encode(), recall=recall) as address:
        address.recall = recall
        writer, other = (address.answerers[name] for name in ("writer", "other"))
        address.follow("writer", Plan(1, canary=2, share=0.5), {1: writer, 2: other})
        yield address


def test_the_page_asks_for_no_key_and_loads_nothing_from_elsewhere(service: Address) -> None:
    for path, kind in (("/", "html"), ("/page/app.js", "javascript"), ("/page/style.css", "css")):
        found = requests.get(service.url + path, timeout=30)
        assert found.status_code == 200, path
        assert kind in found.headers["content-type"]
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert "://" not in found.text.replace("http://www.w3.org", ""), path
        assert "innerHTML" not in found.text
    assert requests.get(f"{service.url}/page/../api.py", timeout=30).status_code in (401, 404)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield found
    finally:
        found.quit()


@pytest.mark.slow
@pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt install chromium chromium-driver"
)
def test_somebody_talks_to_two_models_by_keyboard_alone(service: Address, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    wait = WebDriverWait(browser, 60)

    def find(id_: str) -> Any:
        return browser.find_element(By.ID, id_)

    def active() -> Any:
        return browser.switch_to.active_element

    browser.get(service.url)
    wait.until(lambda _: "asks for its key" in find("told").text)
    assert not find("ask").is_displayed()
    active().send_keys(Keys.TAB)  # past the link to the question
    active().send_keys(Keys.TAB)
    assert active().get_attribute("id") == "key"
    active().send_keys(KEY, Keys.TAB)
    wait.until(lambda _: find("ask").is_displayed())
    offered = [option.text for option in Select(find("model")).options]
    assert offered == ["writer", "writer@1 (promoted)", "writer@2 (canary)", "other"]
    Select(find("model")).select_by_visible_text("writer@1 (promoted)")
    Select(find("beside")).select_by_visible_text("writer@2 (canary)")
    asked = browser.find_element(By.NAME, "text")
    asked.send_keys("what is the capital of <b>France</b>?", Keys.CONTROL, Keys.ENTER)
    wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "article .hint")) == 2)
    for place in ("model", "beside"):
        user, told = find(f"answer-{place}").find_elements(By.TAG_NAME, "pre")
        assert user.text == "what is the capital of <b>France</b>?"
        assert told.text.strip()
    assert active().get_attribute("name") == "text"  # the next question goes there
    assert find("answers").get_attribute("aria-busy") == "false"
    browser.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    # Everything that is typed into or chosen from has a name that a screen reader tells.
    for control in browser.find_elements(By.CSS_SELECTOR, "input, select, textarea, button"):
        assert control.accessible_name, control.get_attribute("outerHTML")
    # What was wrong is said by the buttons below the answer.
    better = find("answer-model").find_element(By.CSS_SELECTOR, ".judging textarea")
    better.send_keys("Paris")
    better.find_element(By.XPATH, "following-sibling::button").send_keys(Keys.ENTER)
    said = find("answer-model").find_element(By.CSS_SELECTOR, ".said")
    wait.until(lambda _: said.text == "Thank you: this is kept.")
    (entry,) = service.recall.dataset.entries()
    assert (entry.rating, entry.text, entry.route) == ("down", "Paris", "chat")
    assert entry.asked["messages"][-1]["content"] == "what is the capital of <b>France</b>?"
    Select(find("model")).select_by_visible_text("other")
    assert not browser.find_elements(By.TAG_NAME, "article")
    told = [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    assert [message for message in told if "401" not in message] == []  # before there was a key
