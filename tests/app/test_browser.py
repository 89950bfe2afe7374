"""The page in a real browser, used as a person would; needs Debian's chromium and its driver."""

import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.processes import Server, serving

WAIT_S = 20
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
Browser = webdriver.Chrome
Open = Callable[..., Browser]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return headless Chromium, or skip."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed (apt-get install both)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    with ExitStack() as stack:
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        stack.callback(chrome.quit)
        yield chrome


@pytest.fixture
def page(browser: Browser, live: Server) -> Browser:
    """Return the browser with the page open and its model shown."""
    return show(browser, live.url)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Return three colorful pictures and a file that only claims to be one."""
    files = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), np.uint8)
        files.append(tmp_path / f"photo {number}.png")
        Image.fromarray(pixels).resize((320, 240)).save(files[-1])
    files.append(tmp_path / "fake.jpg")
    files[-1].write_bytes(b"hello")
    return files


def show(browser: Browser, url: str, width: int = 1200, scheme: str = "light") -> Browser:
    """Open the page at a width and in a color scheme."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    complaints(browser)  # forget what other tests have caused
    browser.get(url)
    wait(
        browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#model dt, #access:not([hidden])")
    )
    return browser


def wait(browser: Browser, found: Callable[[], Any]) -> Any:
    """Wait until `found` returns something true, and return that."""
    return WebDriverWait(browser, WAIT_S, poll_frequency=0.05).until(lambda _: found())


def upload(page: Browser, *files: Path) -> list[dict[str, Any]]:
    """Choose files, and return what each card says when all are done, oldest first."""
    page.find_element(By.ID, "files").send_keys("\n".join(map(str, files)))
    return cards(page, len(files))


def cards(page: Browser, count: int) -> list[dict[str, Any]]:
    """Return what each of `count` cards says when all are done, oldest first."""
    text = f"{count} of {count} image"
    wait(page, lambda: page.find_element(By.ID, "status").text.startswith(text))
    found = []
    for card in page.find_elements(By.CLASS_NAME, "card"):
        rows = card.find_elements(By.CSS_SELECTOR, ".predictions li")
        found.append(
            {
                "name": card.find_element(By.CLASS_NAME, "name").text,
                "predictions": [tuple(row.text.removesuffix(" %").split("\n")) for row in rows],
                "problem": card.find_element(By.CLASS_NAME, "problem").text,
                "timing": card.find_element(By.CLASS_NAME, "legend").text,
            }
        )
    return found[::-1]


def complaints(page: Browser) -> list[str]:
    """Return what the browser's console holds against the page."""
    log = page.get_log("browser")  # type: ignore[no-untyped-call] # selenium has no type for it
    found = [entry["message"] for entry in log]
    return [text for text in found if "the server responded with" not in text]


def test_photo(page: Browser, live: Server, photos: list[Path]) -> None:
    """A chosen image shows its labels and percentages as the API gives them, and its timing."""
    [card] = upload(page, photos[0])
    answer = httpx2.post(f"{live.url}/classify", content=photos[0].read_bytes()).json()
    expected = [
        (one["label"], f"{one['score'] * 100:.1f}" if one["score"] >= 0.0005 else "< 0.1")
        for one in answer["predictions"]
    ]
    assert [label for label, _ in card["predictions"]] == [label for label, _ in expected]
    assert card["predictions"][0] == expected[0]
    assert card["name"] == "photo 0.png"
    assert all(stage in card["timing"] for stage in ("decode", "queue", "infer", "total"))
    assert complaints(page) == []


def test_several_with_a_bad_one(page: Browser, photos: list[Path]) -> None:
    """Several images are classified at once; the bad one says in plain words what is wrong."""
    found = upload(page, *photos)
    assert [card["name"] for card in found] == [photo.name for photo in photos]
    assert all(len(card["predictions"]) == 5 for card in found[:3])
    assert "not a JPEG, PNG, WebP, GIF or BMP" in found[3]["problem"]
    assert "1 with a problem" in page.find_element(By.ID, "status").text
    page.find_element(By.ID, "clear").click()
    assert not page.find_elements(By.CLASS_NAME, "card")


def test_answers_of_others(page: Browser, photos: list[Path]) -> None:
    """What a gateway answers is told with its status, and the images after it are classified."""
    page.execute_script(
        """
        window.kept = window.fetch;
        const answers = [["null", 502], ["{}", 200], ['{"message": "No"}', 403], ["<p>", 200]];
        window.fetch = async () => {
          const [body, status] = answers.pop();
          return new Response(body, { status, headers: { "Content-Type": "application/json" } });
        };
        """
    )
    told = sorted(card["problem"][-13:] for card in upload(page, *photos))
    assert told == ["(status 200)."] * 2 + ["(status 403).", "(status 502)."]
    page.execute_script("window.fetch = window.kept")
    page.find_element(By.ID, "clear").click()
    [card] = upload(page, photos[0])
    assert len(card["predictions"]) == 5


def test_more_than_a_page_holds(page: Browser, tmp_path: Path) -> None:
    """What a page cannot hold, or is no image, is said to be left out, and stays said."""
    files = [tmp_path / f"{number}.png" for number in range(203)]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    (tmp_path / "notes.txt").write_text("hello")
    page.find_element(By.ID, "files").send_keys(
        "\n".join(map(str, [*files, tmp_path / "notes.txt"]))
    )
    status = page.find_element(By.ID, "status")
    wait(page, lambda: status.text.startswith("200 of 200 images done"))
    assert "1 of the files are no images" in status.text
    assert "3 were left out: this page holds 200" in status.text
    names = [card.text for card in page.find_elements(By.CSS_SELECTOR, ".card .name")]
    assert names == [file.name for file in files[199::-1]]


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_drop_and_paste(page: Browser, event: str) -> None:
    """Images that are dropped or pasted are classified as well."""
    page.execute_async_script(
        """
        const [event, done] = arguments;
        const canvas = document.createElement("canvas");
        canvas.getContext("2d").fillRect(0, 0, 99, 99);
        canvas.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], "canvas.png", { type: "image/png" }));
          const init = { bubbles: true, dataTransfer: data, clipboardData: data };
          document.body.dispatchEvent(
            event === "drop" ? new DragEvent("drop", init) : new ClipboardEvent("paste", init));
          done();
        });
        """,
        event,
    )
    [card] = cards(page, 1)
    assert card["name"] == "canvas.png"
    assert len(card["predictions"]) == 5


def test_camera(page: Browser) -> None:
    """A photo from the camera is classified."""
    page.find_element(By.ID, "camera").click()
    wait(
        page,
        lambda: page.execute_script("return document.querySelector('video').videoWidth > 0"),
    )
    page.find_element(By.ID, "shoot").click()
    [card] = cards(page, 1)
    assert card["name"] == "photo.jpg"
    assert len(card["predictions"]) == 5
    assert not page.find_element(By.ID, "viewfinder").is_displayed()


def test_why(page: Browser, photos: list[Path]) -> None:
    """A click shows which patches speak for the label, another one the photo again."""
    upload(page, photos[0])
    image = page.find_element(By.CSS_SELECTOR, ".card img")
    button = page.find_element(By.CLASS_NAME, "why")
    photo = image.get_attribute("src")
    button.click()
    wait(page, lambda: image.get_attribute("src") != photo)
    wait(page, lambda: page.execute_script("return arguments[0].naturalWidth", image) == 448)
    assert button.get_attribute("aria-pressed") == "true"
    assert "what speaks for the label" in str(image.get_attribute("alt"))
    button.click()
    assert image.get_attribute("src") == photo
    assert complaints(page) == []


def test_camera_is_opened_once(page: Browser) -> None:
    """A second click while the camera is being opened starts no second stream."""
    page.execute_script(
        """
        window.streams = [];
        const media = navigator.mediaDevices, open = media.getUserMedia.bind(media);
        media.getUserMedia = async (wish) => {
          const stream = await open(wish);
          window.streams.push(stream);
          return stream;
        };
        const camera = document.querySelector("#camera");
        camera.click();
        camera.click();
        """
    )
    wait(page, lambda: page.find_element(By.ID, "shoot").is_enabled())
    page.find_element(By.ID, "leave").click()
    wait(page, lambda: not page.find_element(By.ID, "viewfinder").is_displayed())
    states = page.execute_script("return streams.map((one) => one.getTracks()[0].readyState)")
    assert states == ["ended"]


def test_why_fails(page: Browser, photos: list[Path]) -> None:
    """An explanation that fails is said, costs the label nothing, and is gone with the next try."""
    upload(page, photos[0])
    button = page.find_element(By.CLASS_NAME, "why")
    problem = page.find_element(By.CSS_SELECTOR, ".card .problem")
    page.execute_script(
        "window.kept = window.fetch; window.fetch = () => Promise.reject(new TypeError('gone'))"
    )
    button.send_keys("\ue007")
    wait(page, lambda: "cannot be reached" in problem.text)
    assert page.switch_to.active_element == button
    assert page.find_element(By.ID, "status").text == "1 of 1 image done."
    assert not page.find_element(By.CLASS_NAME, "again").is_displayed()
    page.execute_script("window.fetch = window.kept")
    button.click()
    wait(page, lambda: button.get_attribute("aria-pressed") == "true")
    assert not problem.is_displayed()


def answer_instead(page: Browser, answer: str) -> None:
    """Have the page's requests answered with a JavaScript expression, a Promise of a Response."""
    page.execute_script(f"window.kept = window.fetch; window.fetch = () => {answer}")


def test_why_breaks_off(page: Browser, photos: list[Path]) -> None:
    """An explanation whose connection ends inside its picture is a problem; the next try works."""
    upload(page, photos[0])
    button = page.find_element(By.CLASS_NAME, "why")
    problem = page.find_element(By.CSS_SELECTOR, ".card .problem")
    answer_instead(
        page,
        "Promise.resolve(new Response(new ReadableStream({start: (it) => it.error(new Error())}),"
        " {headers: {'Content-Type': 'image/png'}}))",
    )
    button.click()
    wait(page, lambda: "The answer cannot be read (status 200)." in problem.text)
    assert problem.get_attribute("role") == "alert"  # a screen reader's only hint
    page.execute_script("window.fetch = window.kept")
    button.click()
    wait(page, lambda: button.get_attribute("aria-pressed") == "true")


def test_why_of_a_card_that_is_gone(page: Browser, photos: list[Path]) -> None:
    """An explanation that comes after its card has been cleared away is kept by nobody."""
    upload(page, photos[0])
    answer_instead(page, "new Promise((done) => (window.finish = done))")
    page.find_element(By.CLASS_NAME, "why").click()
    wait(page, lambda: page.execute_script("return Boolean(window.finish)"))
    page.find_element(By.ID, "clear").click()
    page.execute_async_script(
        """
        const done = arguments[0], make = URL.createObjectURL;
        window.made = 0;
        URL.createObjectURL = (blob) => (window.made += 1, make(blob));
        window.finish(new Response("png", {headers: {"Content-Type": "image/png"}}));
        setTimeout(done, 200);
        """
    )
    assert page.execute_script("return window.made") == 0
    assert complaints(page) == []


def test_why_without_a_key(page: Browser, photos: list[Path]) -> None:
    """Where keys have changed meanwhile, a refused explanation brings up the form for one."""
    upload(page, photos[0])
    answer_instead(
        page,
        """Promise.resolve(new Response('{"status": 401, "detail": "Send an API key."}',
        {status: 401, headers: {"Content-Type": "application/problem+json"}}))""",
    )
    page.find_element(By.CLASS_NAME, "why").click()
    wait(page, lambda: page.find_element(By.ID, "access").is_displayed())


def test_try_again_keeps_the_focus(page: Browser, photos: list[Path]) -> None:
    """Who asks again by keyboard goes on from the card, not from the top of the page."""
    answer_instead(page, "Promise.reject(new TypeError('gone'))")
    upload(page, photos[0])
    page.find_element(By.CLASS_NAME, "again").send_keys("\ue007")
    assert page.switch_to.active_element == page.find_element(By.CLASS_NAME, "card")


def test_storage_that_is_blocked(browser: Browser, tmp_path: Path, photos: list[Path]) -> None:
    """Where the browser lets no page keep anything, the page works, a key as long as it is open."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    deny = "Object.defineProperty(window, 'sessionStorage', {get() { throw new Error('denied'); }})"
    blocked = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": deny})
    try:
        with serving(tmp_path / "log", "--api-keys-file", str(keys)) as server:
            page = show(browser, server.url)
            page.find_element(By.ID, "key").send_keys("secret")
            page.find_element(By.ID, "key").submit()
            wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#model dt"))
            [card] = upload(page, photos[0])
            assert len(card["predictions"]) == 5
            assert complaints(page) == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", blocked)


@pytest.mark.parametrize("name", ["photo 0.png", """it's a "cat", or; a dog.png"""])
def test_command(page: Browser, photos: list[Path], name: str) -> None:
    """The command that the page shows works in a terminal, whatever the file's name."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    [card] = upload(page, photos[0].rename(photos[0].with_name(name)))
    command = shlex.split(page.find_element(By.ID, "command").text)
    assert command[0] == "curl"
    done = subprocess.run(
        [curl, "-s", *command[1:]], cwd=photos[0].parent, capture_output=True, text=True, check=True
    )
    assert f'"label":"{card["predictions"][0][0]}"' in done.stdout


def test_model_at_a_glance(page: Browser, live: Server) -> None:
    """The page names the model, its size and where it runs, and lists its labels."""
    facts = page.find_element(By.ID, "model").text
    assert "mixer-cifar10" in facts
    assert "1,132,170" in facts
    assert "CPU" in facts
    page.find_element(By.TAG_NAME, "summary").click()
    labels = [label.text for label in page.find_elements(By.CSS_SELECTOR, "#labels li")]
    assert labels == httpx2.get(f"{live.url}/model").json()["labels"]


def test_keyboard_and_names(page: Browser, photos: list[Path]) -> None:
    """Every control has a name for a screen reader and is reached by the Tab key."""
    upload(page, photos[0])
    names = page.execute_script(
        """
        const controls = [...document.querySelectorAll("button, input, a, summary, img, dialog")];
        return controls.filter((one) => one.offsetParent !== null)
          .map((one) => [one.tagName, one.computedName ?? "", one.innerText || one.alt || ""]);
        """
    )
    assert len(names) > 6
    unnamed = [tag for tag, _, text in names if not text and tag != "IMG"]
    assert unnamed == []
    reached = []
    for _ in range(12):
        page.switch_to.active_element.send_keys("\ue004")
        reached.append(page.switch_to.active_element.text)
    for wanted in ("API", "Choose images", "Use the camera", "Copy", "Clear", "Why this label?"):
        assert wanted in reached
    live_region = page.find_element(By.ID, "status")
    assert live_region.get_attribute("aria-live") == "polite"


def test_dark(browser: Browser, live: Server) -> None:
    """The page follows the system's dark mode."""

    def brightness(scheme: str) -> int:
        show(browser, live.url, scheme=scheme)
        color = browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        return int(color.removeprefix("rgba(").split(",")[0])

    assert brightness("dark") < 40 < 200 < brightness("light")


def test_phone(browser: Browser, live: Server, photos: list[Path]) -> None:
    """On a phone's width nothing needs sideways scrolling."""
    page = show(browser, live.url, width=360)
    upload(page, *photos)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize(
    ("path", "selector", "words"),
    [("/docs", ".opblock-summary-path", "/classify"), ("/redoc", "h1", "Mixer Serve")],
)
def test_docs_offline(browser: Browser, live: Server, path: str, selector: str, words: str) -> None:
    """/docs and /redoc show the API with nothing from a foreign host."""
    browser.get(live.url + path)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, selector))
    assert words in browser.find_element(By.CSS_SELECTOR, selector).text.replace("\u200b", "")
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').filter((e) => e.responseStatus === 200)"
        ".map((e) => e.name)"
    )
    assert loaded
    assert all(name.startswith((live.url, "data:", "blob:")) for name in loaded)
    # Redoc would like its maker's logo from a foreign host, which the policy refuses.
    assert [text for text in complaints(browser) if "logo-mini.svg" not in text] == []


def test_api_key(browser: Browser, tmp_path: Path, photos: list[Path]) -> None:
    """A service with API keys asks for one on the page, and then works."""
    keys = tmp_path / "keys"
    keys.write_text("schl\u00fcssel\n")
    with serving(tmp_path / "log", "--api-keys-file", str(keys)) as server:
        page = show(browser, server.url)
        assert "API key" in page.find_element(By.ID, "access").text
        form, key = page.find_element(By.ID, "access"), page.find_element(By.ID, "key")
        assert form.location["y"] < page.find_element(By.ID, "drop").location["y"]
        key.send_keys("wrong\u20ac")
        key.submit()
        wait(page, lambda: "does not know this key" in form.text)
        assert page.switch_to.active_element == key
        key.send_keys("schl\u00fcssel")  # in the place of the other, which is selected
        key.submit()
        wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#model dt"))
        assert not form.is_displayed()
        [card] = upload(page, photos[0])
        assert len(card["predictions"]) == 5
        assert '-H "X-API-Key: $KEY"' in page.find_element(By.ID, "command").text
