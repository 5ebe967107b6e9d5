"""What annotators see and do, in a real browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as NotThereError

from conftest import RunningLabelStudio, Station
from station.local_services import PROJECT, audio_server, free_port
from support import add_sample

CHROMIUM = "/usr/bin/chromium"
CLIP = "cs-01-deploy"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        assert "CI" not in os.environ, f"{CHROMIUM} is missing: apt install chromium"
        pytest.skip(f"{CHROMIUM} is not installed (Debian: apt install chromium)")
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic", *quiet]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, running_label_studio: RunningLabelStudio) -> Iterator[Page]:
    """A page of the administrator's, logged in."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{running_label_studio.address}/user/login/")
    page.fill("#email", running_label_studio.account.email)
    page.fill("#password", running_label_studio.account.password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda url: "/user/login" not in url)
    yield page
    page.close()


@pytest.fixture
def sample_id(station: Station, tmp_path: Path) -> Iterator[str]:
    """A sample whose audio is served from another origin than Label Studio's."""
    audio = audio_server(tmp_path / "audio", PROJECT / "demo" / "corpus", free_port())
    audio.start()
    with station.env_file.open("a") as settings:
        settings.write(f"AUDIO_SERVER_URL='{audio.address}'\n")
    yield add_sample(station.db, CLIP, "hôm qua tim em đép lôi lên prốt", "Yesterday my heart deployed to prod")
    audio.stop()


def open_task(page: Page, station: Station, task_type: str, sample_id: str) -> None:
    station.run("push", "--task-type", task_type)
    task_id = station.tasks(task_type)[sample_id]
    page.goto(f"{station.address}/projects/{station.projects[task_type]}/data?task={task_id}")
    page.wait_for_selector("[class*=main-view]")


def submit(page: Page) -> None:
    with page.expect_response(lambda answer: "/annotations" in answer.url and answer.request.method == "POST") as sent:
        page.click("[data-testid=bottombar-submit-button]")
    assert sent.value.ok
    expect(page.get_by_text("Annotation saved successfully", exact=True)).to_be_visible()


def test_a_transcript_is_heard_corrected_and_brought_home(
    page: Page, station: Station, sample_id: str, tmp_path: Path
) -> None:
    open_task(page, station, "transcript_correction", sample_id)
    text = page.locator('textarea[name="corrected_transcript"]')
    expect(text).to_have_value("hôm qua tim em đép lôi lên prốt")
    # The wave is drawn only when the browser may read the audio: the audio server's CORS headers are right.
    page.wait_for_selector("canvas")
    page.wait_for_function("document.querySelector('audio')?.duration > 1")
    page.screenshot(path=tmp_path / "transcript_correction.png")
    text.fill("Hôm qua team em deploy lên production")
    page.get_by_text("Heavy code-switching").click()
    page.locator(".ant-rate-star").nth(3).click()
    submit(page)
    station.run("pull", "--task-type", "transcript_correction")
    found = station.db.execute("SELECT text FROM transcript_revisions WHERE source = 'human'").fetchall()
    assert found == [("Hôm qua team em deploy lên production",)]


def test_a_transcript_that_is_right_is_submitted_untouched(page: Page, station: Station, sample_id: str) -> None:
    open_task(page, station, "transcript_correction", sample_id)
    submit(page)
    station.run("pull", "--task-type", "transcript_correction")
    found = station.db.execute("SELECT text FROM transcript_revisions WHERE source = 'human'").fetchall()
    assert found == [("hôm qua tim em đép lôi lên prốt",)]


def test_a_translation_is_reviewed_beside_its_source(page: Page, station: Station, sample_id: str) -> None:
    open_task(page, station, "translation_review", sample_id)
    expect(page.locator(".lsf-richtext__line", has_text="hôm qua tim em đép lôi lên prốt")).to_be_visible()
    text = page.locator('textarea[name="corrected_translation"]')
    expect(text).to_have_value("Yesterday my heart deployed to prod")
    text.fill("Yesterday our team deployed to production")
    page.locator(".ant-rate-star").nth(1).click()
    submit(page)
    station.run("pull", "--task-type", "translation_review")
    found = station.db.execute("SELECT text FROM translation_revisions WHERE source = 'human'").fetchall()
    assert found == [("Yesterday our team deployed to production",)]


def test_a_segment_is_marked_and_brought_home(page: Page, station: Station, sample_id: str) -> None:
    open_task(page, station, "audio_segmentation", sample_id)
    page.wait_for_function("document.querySelector('audio')?.duration > 1")
    wave = page.locator("canvas").first.bounding_box()
    assert wave is not None
    region = page.locator("[data-testid^=outliner-item], .lsf-outliner-item").filter(has_text="Vietnamese")
    # The wave takes a region only once it has drawn itself, which it does not tell.
    for _attempt in range(20):
        page.keyboard.press("1")
        page.mouse.move(wave["x"] + wave["width"] * 0.2, wave["y"] + wave["height"] * 0.6)
        page.mouse.down()
        page.mouse.move(wave["x"] + wave["width"] * 0.4, wave["y"] + wave["height"] * 0.6, steps=8)
        page.mouse.move(wave["x"] + wave["width"] * 0.5, wave["y"] + wave["height"] * 0.6, steps=8)
        page.mouse.up()
        try:
            region.first.wait_for(timeout=1000)
            break
        except NotThereError:
            continue
    submit(page)
    station.run("pull", "--task-type", "audio_segmentation")
    ((segments,),) = station.db.execute("SELECT segments FROM segmentation_revisions").fetchall()
    assert segments[0]["label"] == "Vietnamese"
    assert 0 < segments[0]["start"] < segments[0]["end"] < 6
