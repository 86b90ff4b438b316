"""The web UI in a real browser: the login, the lineage, a backup launched and its file found, a restore refused.

With KANBU_SCREENSHOTS=1 the pictures in docs/screenshots/ are made anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import (
    Browser,
    Error,
    FloatRect,
    HttpCredentials,
    Locator,
    Page,
    Response,
    ViewportSize,
    expect,
)

from kanbu_backup_dagster_tests.server.serving import PASSWORD, USERNAME, Serving

SCREENSHOTS = Path(__file__).parents[2] / "docs" / "screenshots"
MAKE_SCREENSHOTS = os.environ.get("KANBU_SCREENSHOTS") == "1"
VIEWPORT = ViewportSize(width=1280, height=720)
PATIENCE = 90_000  # milliseconds
DEPENDENCIES = """
query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode { dependencyKeys { path } } } }
"""
JOBS = "/locations/kanbu_backup/jobs"


class Visitor:
    """A logged-in page, and what went wrong on it."""

    def __init__(self, page: Page, kanbu: Serving) -> None:
        self.page = page
        self.kanbu = kanbu
        self.refused: list[str] = []
        self.websockets: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("response", self._note)
        page.on("websocket", lambda socket: self.websockets.append(socket.url))

    def _note(self, response: Response) -> None:
        if response.status >= 400:
            self.refused.append(f"{response.status} {response.url}")

    def go(self, path: str) -> None:
        self.page.goto(self.kanbu.url + path)

    def screenshot(self, name: str, above: Locator | None = None) -> None:
        """Keep a picture of the page, or of the part of it above something, if pictures are asked for."""
        if not MAKE_SCREENSHOTS:
            return
        self.page.wait_for_timeout(2000)  # until animations have ended
        SCREENSHOTS.mkdir(exist_ok=True)
        clip = FloatRect(x=0, y=0, **VIEWPORT)
        if above is not None:
            box = above.bounding_box()
            assert box is not None
            clip["height"] = box["y"] - 4
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", clip=clip)

    def launch(self) -> None:
        """Press the Launchpad's button, and go where it leads: the run's page."""
        self.page.get_by_role("button", name="Launch run").click()
        self.page.wait_for_url("**/runs/**")


@pytest.fixture
def visitor(browser: Browser, kanbu: Serving) -> Iterator[Visitor]:
    context = browser.new_context(
        # Sent when the server asks for it, as a person would.
        http_credentials=HttpCredentials(username=USERNAME, password=PASSWORD),
        viewport=VIEWPORT,
        timezone_id="UTC",
    )
    visitor = Visitor(context.new_page(), kanbu)
    yield visitor
    assert visitor.refused == [], "the login or our headers keep a part of the UI from working"
    context.close()


def test_without_the_password_there_is_nothing_to_see(browser: Browser, kanbu: Serving) -> None:
    for credentials in (None, HttpCredentials(username=USERNAME, password="wrong")):
        with browser.new_context(http_credentials=credentials) as context:
            page = context.new_page()
            try:
                answer = page.goto(kanbu.url)
            except Error as error:
                # Some versions show a refused login as an error of their own.
                refused = "ERR_INVALID_AUTH_CREDENTIALS" in str(error)
            else:
                refused = answer is not None and answer.status == 401
            assert refused


def test_a_backup_is_launched_watched_and_found_in_the_lineage(visitor: Visitor) -> None:
    page = visitor.page
    before = {file.name for file in visitor.kanbu.storage.glob("*.sql.gz")}
    visitor.go(f"{JOBS}/database_backup/playground")
    expect(page.get_by_role("button", name="Launch run")).to_be_enabled(timeout=PATIENCE)
    visitor.screenshot("launchpad")
    visitor.launch()
    expect(page.get_by_text("Success", exact=True).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text('Finished execution of run for "database_backup".')).to_be_visible(timeout=PATIENCE)
    assert visitor.websockets, "events came without a websocket"
    visitor.screenshot("run")
    (made,) = {file.name for file in visitor.kanbu.storage.glob("*.sql.gz")} - before

    visitor.go("/asset-groups")
    for asset in ("kanbu_database", "database_backup", "restored_database"):
        expect(page.locator("svg, div").get_by_text(asset, exact=True).first).to_be_visible(timeout=PATIENCE)
    visitor.screenshot("lineage")
    page.get_by_text("database_backup", exact=True).first.click()
    node = visitor.kanbu.graphql(DEPENDENCIES, key={"path": ["database_backup"]})["assetNodeOrError"]
    assert node["dependencyKeys"] == [{"path": ["kanbu_database"]}]

    visitor.go(f"/assets/database_backup?view=partitions&partition={quote(made)}")
    expect(page.get_by_text("Materialized", exact=True).first).to_be_visible(timeout=PATIENCE)
    for text in (made, "size_bytes", "stored_sha256", "verification", "rows_per_table"):
        expect(page.get_by_text(text, exact=True).last).to_be_attached(timeout=PATIENCE)
    visitor.screenshot("backup-file")


def test_a_restore_without_both_confirmations_is_refused(visitor: Visitor) -> None:
    page = visitor.page
    done = visitor.kanbu.trigger({"type": "database"}, wait=200).json()
    file = done["backup"]["filename"]
    config = f"ops: {{validate: {{config: {{file: {file}, confirm_overwrite: true}}}}}}"
    visitor.go(f"{JOBS}/restore_database/playground/setup?config={quote(config)}")
    expect(page.get_by_text("No errors")).to_be_visible(timeout=PATIENCE)
    visitor.launch()
    expect(page.get_by_text("Failure", exact=True).first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("confirm_target").first).to_be_visible(timeout=PATIENCE)
    visitor.screenshot("restore-refused", above=page.get_by_text("Stack Trace:").last)


def test_the_schedules_of_the_file_are_there_with_their_state(visitor: Visitor) -> None:
    page = visitor.page
    visitor.go("/automation")
    expect(page.get_by_text("schedule_1_nightly_database", exact=True).first).to_be_visible(timeout=PATIENCE)
    visitor.screenshot("schedules")
    visitor.go("/locations/kanbu_backup/schedules/schedule_1_nightly_database")
    expect(page.get_by_text("At 02:00 AM").first).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("checkbox").first).to_be_checked(timeout=PATIENCE)
