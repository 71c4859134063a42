"""Changes of the pool in the console, in a real Chromium, over an Ingress with fakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from tests.browsing import Browsing, drop_folder
from tests.deployments.adapter_records import adapter, pool_of
from tests.deployments.app_fakes import Served
from tests.deployments.console_fakes import MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.looking import ask, folder_of, look

pytestmark = pytest.mark.browser


def test_withdrawing_needs_confirmation(browsing: Browsing) -> None:
    async def question(page: Page, served: Served) -> None:
        withdraw = page.get_by_role("button", name="Withdraw poet")
        await withdraw.click()
        await page.locator("#confirm-dialog").get_by_role("button", name="Cancel").click()
        await withdraw.click()
        await page.keyboard.press("Escape")
        assert served.store.called("withdraw") == []
        await withdraw.click()
        async with page.expect_response(lambda answer: answer.request.method == "DELETE") as answered:
            await page.locator("#confirm-yes").click()
        assert (await answered.value).status == 200
        [(*withdrawn, _)] = served.store.called("withdraw")
        assert withdrawn == ["local", ["poet"], "local"]

    look(browsing, question)


def test_rolling_back_needs_confirmation_and_names_the_version(browsing: Browsing) -> None:
    live, older = adapter("poet"), adapter("poet", version="older", generation=0)

    async def question(page: Page, served: Served) -> None:
        await page.get_by_role("button", name="Roll back poet").click()
        await expect(page.locator("#confirm-title")).to_have_text("Roll back poet?")
        await expect(page.locator("#confirm-text")).to_contain_text(f"Version {older.ref.digest[:12]}")
        await page.locator("#confirm-dialog").get_by_role("button", name="Cancel").click()
        assert served.store.called("restage") == []
        await page.get_by_role("button", name="Roll back poet").click()
        async with page.expect_response(lambda answer: answer.request.method == "POST") as answered:
            await page.locator("#confirm-yes").click()
        assert (await answered.value).status == 201
        assert [record.ref for (record,) in served.store.called("restage")] == [older.ref]

    look(browsing, question, store=FakeStore(pool_of(live, older)))


def test_another_tenants_adapter_cannot_be_changed_even_with_an_own_one_of_its_name(browsing: Browsing) -> None:
    held = [adapter("poet"), adapter("poet", version="theirs", tenant="them")]

    async def question(page: Page, served: Served) -> None:
        await expect(page.locator("#pool-rows .name")).to_have_text(["poet", "them/poet"])
        for what in ("Withdraw", "Roll back"):
            await expect(page.get_by_role("button", name=what)).to_have_count(1)
        await page.get_by_role("button", name="Ask them/poet").click()
        await ask(page)
        await expect(page.locator("#plan li .name")).to_have_text(["them/poet"])
        [row] = served.job.plan.adapters
        assert row.ref == held[1].ref

    look(browsing, question, retriever=MappedRetriever(held))


@pytest.mark.parametrize("how", ["drop", "choose"])
def test_folders_are_published_one_after_the_other(browsing: Browsing, tmp_path: Path, how: str) -> None:
    folders = [folder_of(tmp_path / "many", name) for name in ("verse", "bad-one")]

    async def question(page: Page, served: Served) -> None:
        await page.get_by_label("Tags for the next uploads").fill("one, two")
        if how == "drop":
            await drop_folder(page, folders[0].parent)
        else:
            await page.locator("#folder").set_input_files(folders[0].parent)
        await expect(page.locator("#uploads .good .state")).to_contain_text("live at generation 8; most similar: poet")
        await expect(page.locator("#uploads .bad .state")).to_contain_text("it is bad")
        uploads = {args[0].name: args[0] for args in served.store.called("stage")}
        assert uploads.keys() == {"verse", "bad-one"}
        assert dict(uploads["verse"].files) == {"adapter_config.json": b"{}", "adapter_model.safetensors": b"12345"}
        assert uploads["verse"].tags == ("one", "two")

    look(browsing, question)


def test_a_live_name_is_replaced_only_after_confirmation(browsing: Browsing, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "poet")

    async def question(page: Page, served: Served) -> None:
        await drop_folder(page, folder)
        await expect(page.locator("#confirm-title")).to_have_text("Publish a new version of poet?")
        await page.locator("#confirm-dialog").get_by_role("button", name="Cancel").click()
        await expect(page.locator("#uploads .state")).to_have_text("not published")
        assert served.store.called("stage") == []
        await drop_folder(page, folder)
        await page.locator("#confirm-yes").click()
        await expect(page.locator("#uploads .good")).to_have_count(1)

    look(browsing, question)
