"""Adapters in the console, in a real Chromium, over an Ingress with fakes: the table, their pages, and publishing."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from playwright.async_api import Page, Route, expect

from deployments.publishing.adapter_folders import ADAPTER_FILES, nearest_name
from lora_store import AdapterRecord, Edit, Ranking, Sample, Trial
from lora_store.rankings import RankedAdapter
from retriever_svc import Drawn, Draws
from retriever_svc.draws import DrawnAdapter
from tests.browsing import Browsing, drop_folder
from tests.deployments.adapter_records import adapter, pool_of
from tests.deployments.console_fakes import MappedRetriever
from tests.deployments.fake_store import FakeStore
from tests.deployments.looking import ask, folder_of, go, look, open_adapter, press, publish, wait_frames

pytestmark = pytest.mark.browser


async def give(page: Page, folder: Path, how: str) -> None:
    """Drop the folder on the page, or choose it there."""
    if how == "drop":
        await drop_folder(page, folder)
    else:
        await go(page, "Publish")
        await page.locator("#folder").set_input_files(folder)


async def test_the_table_is_one_tab_stop_with_arrow_keys(browsing: Browsing) -> None:
    held = [adapter("poet"), adapter("coder"), adapter("novelist")]
    async with look(browsing, retriever=MappedRetriever(held)) as (page, _):
        await go(page, "Adapters")
        link = page.locator("#pool-rows").get_by_role("link")
        await expect(link).to_have_text(["coder", "novelist", "poet"])
        await link.first.focus()
        await page.keyboard.press("ArrowDown")
        await expect(link.nth(1)).to_be_focused()
        await page.keyboard.press("End")
        await expect(link.nth(2)).to_be_focused()
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.closest('#pool-rows')") is None
        await page.keyboard.press("Shift+Tab")
        await expect(link.nth(2)).to_be_focused()
        await page.keyboard.press("/")
        await expect(page.get_by_label("Search")).to_be_focused()
        await link.nth(1).focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#adapter-title")).to_have_text("novelist")


async def test_filters_and_order_are_kept_in_the_address(browsing: Browsing) -> None:
    def at(day: int, name: str, tenant: str = "local") -> AdapterRecord:
        return replace(adapter(name, version="fun", tenant=tenant), created_at=datetime(2026, 1, day, tzinfo=UTC))

    held = [at(1, "poet"), at(3, "novelist"), at(2, "bard", tenant="them"), adapter("coder")]
    async with look(browsing, retriever=MappedRetriever(held)) as (page, _):
        await go(page, "Adapters")
        links = page.locator("#pool-rows").get_by_role("link")
        await expect(links).to_have_count(4)
        assert await page.locator("#pool-owners option").evaluate_all("rows => rows.map((row) => row.value)") == [
            "local",
            "them",
        ]
        await page.locator("#pool-tag").fill("fun")
        await page.get_by_label("Order").select_option("newest first")
        await expect(links).to_have_text(["novelist", "them/bard", "poet"])
        await page.locator("#pool-owner").fill("local")
        await expect(links).to_have_text(["novelist", "poet"])
        await expect(page).to_have_url(re.compile(r"#adapters\?tag=fun&owner=local&sort=newest$"))
        await links.first.click()
        await page.get_by_role("link", name="All adapters").click()
        await expect(links).to_have_text(["novelist", "poet"])
        await page.reload()
        await expect(links).to_have_text(["novelist", "poet"])
        await expect(page.locator("#pool-tag")).to_have_value("fun")
        await go(page, "Adapters")
        await expect(links).to_have_count(4)


async def test_the_page_of_an_adapter_shows_what_it_is_and_how_to_use_it(browsing: Browsing) -> None:
    async with look(browsing) as (page, _):
        await open_adapter(page, "poet")
        facts = page.locator("#adapter-facts")
        for fact in ("Rank2, 4", "Size9 B", "Found by autoyes, by 2 samples", "Visibilitypublic"):
            await expect(facts).to_contain_text(fact)
        await expect(page.locator("#adapter-versions tr")).to_have_count(2)
        await expect(page.locator("#adapter-versions tr").last).to_contain_text("weights; tags: older")
        await expect(page.locator("#adapter-routed")).to_have_text("auto answers 2 of these 2 with it.")
        await expect(page.locator("#adapter-similar li")).to_have_text(["coder0.500"])
        await expect(page.get_by_label("curl code")).to_contain_text('"model": "poet"')
        await expect(page.get_by_label("Python code")).to_contain_text('model="poet"')
        await page.locator("#adapter-samples button").first.click()
        await expect(page.get_by_label("Prompt", exact=True)).to_have_value("A sample of poet.")
        await expect(page.get_by_label("Model", exact=True)).to_have_value("auto")
        await open_adapter(page, "poet")
        await page.get_by_role("button", name="Ask it").click()
        await expect(page.get_by_label("Model", exact=True)).to_have_value("poet")
        await open_adapter(page, "coder")
        await expect(page.locator("#adapter-routed")).to_have_text("auto answers 0 of these 2 with it; poet: 2.")
        for name in ("nosuch", "%"):  # an address that is no name, too
            await page.goto(page.url.partition("#")[0] + f"#adapter/{name}")
            await page.reload()
            await expect(page.locator("#adapter-title")).to_have_text(name)
            await expect(page.locator("#adapter-error")).to_contain_text(name)
            await expect(page.locator("#adapter-body")).to_be_hidden()
            await expect(page.locator("#pool-count")).to_have_text("1–2 of 2")  # the rest of the page is loaded


async def test_the_page_shows_who_answers_its_examples_best_and_since_when_it_is_live(browsing: Browsing) -> None:
    now, none = datetime.now(UTC), np.empty(0, np.float32)
    rolled_back = {"created_at": now - timedelta(days=3.5), "live_since": now - timedelta(hours=2.5)}
    poet, coder = replace(adapter("poet"), **rolled_back), adapter("coder")
    measured = (RankedAdapter(poet.ref, 0.75, 8, False), RankedAdapter(coder.ref, 0.125, 8, True))
    evaluated = Ranking(poet.ref, measured, "fake-encoder", none, none)
    async with look(browsing, retriever=MappedRetriever([poet, coder], evaluated=evaluated)) as (page, _):
        await open_adapter(page, "poet")
        rows = page.locator("#adapter-evaluation li")
        await expect(rows).to_have_text(["poet75 % of 8", "coder clearly worse13 % of 8"])
        await expect(page.locator("#adapter-facts")).to_contain_text("Published3 d ago by testerLive since2 h ago")
        await open_adapter(page, "coder")
        await expect(page.locator("#adapter-evaluation-part")).to_be_hidden()


async def test_withdrawing_needs_the_name(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await open_adapter(page, "poet")
        withdraw = page.get_by_role("button", name="Withdraw…")
        await withdraw.click()
        await page.locator("#confirm-dialog").get_by_role("button", name="Cancel").click()
        await withdraw.click()
        await page.keyboard.press("Escape")
        await expect(page.locator("#confirm-dialog")).to_be_hidden()
        await withdraw.click()
        await expect(page.locator("#confirm-yes")).to_be_disabled()
        await page.get_by_label("Type the name to confirm").fill("coder")
        await expect(page.locator("#confirm-yes")).to_be_disabled()
        assert served.store.called("withdraw") == []
        await page.get_by_label("Type the name to confirm").fill("poet")
        await press(page.locator("#confirm-yes"), "/v1/loras/poet")
        [(*withdrawn, _)] = served.store.called("withdraw")
        assert withdrawn == ["local", ["poet"], "local"]
        await expect(page.locator("#view-adapters")).to_be_visible()


async def test_an_approval_shows_what_the_version_would_draw(browsing: Browsing) -> None:
    theirs, own = adapter("poet", tenant="globex"), adapter("coder")
    drawn = Draws(Drawn(535, 0, 0), (DrawnAdapter(own.ref, Drawn(16, 8, 12), Drawn(16, 0, 0)),))
    retriever = MappedRetriever([theirs, own], drawn=drawn)
    async with look(browsing, retriever=retriever, store=FakeStore(pool_of(theirs, own))) as (page, served):
        await open_adapter(page, "coder")
        approve = page.get_by_role("button", name="Approve…")
        await expect(approve).to_be_hidden()  # its own
        await open_adapter(page, "globex/poet")
        await approve.click()
        await expect(page.locator("#confirm-text")).to_contain_text("50.0% (all adapters of globex 75.0%)")
        await page.locator("#confirm-dialog").get_by_role("button", name="Cancel").click()
        assert served.store.called("approve") == []
        held: list[Route] = []
        await page.route("**/approve?dry_run=true", lambda route: held.append(route))

        async def answer(count: int) -> None:
            while len(held) < count:
                await wait_frames(page, 1)
            for _ in range(count):
                async with page.expect_response("**/approve?dry_run=true"):
                    await held.pop().continue_()
            await wait_frames(page, 5)

        await approve.click()
        await open_adapter(page, "coder")
        await page.get_by_role("button", name="Withdraw…").click()
        await answer(1)
        await expect(page.locator("#confirm-title")).to_have_text("Withdraw coder?")
        await expect(page.locator("#confirm-yes")).to_be_disabled()
        await page.keyboard.press("Escape")
        await open_adapter(page, "globex/poet")
        for _ in range(2):
            await approve.click()
        await answer(2)
        await press(page.get_by_role("button", name="Approve it all the same"), "/approve")
        await wait_frames(page, 5)
        assert [refs for refs, _ in served.store.called("approve")] == [[theirs.ref]]


async def test_rolling_back_needs_confirmation_and_names_the_version(browsing: Browsing) -> None:
    live, older = adapter("poet"), adapter("poet", version="older", generation=0)
    async with look(browsing, store=FakeStore(pool_of(live, older))) as (page, served):
        await open_adapter(page, "poet")
        await page.get_by_role("button", name=f"Make live: version {older.ref.digest[:12]}").click()
        await expect(page.locator("#confirm-title")).to_have_text("Make another version of poet live?")
        await expect(page.locator("#confirm-text")).to_contain_text(f"Version {older.ref.digest[:12]}")
        await page.locator("#confirm-dialog").get_by_role("button", name="Cancel").click()
        assert served.store.called("restage") == []
        await page.get_by_role("button", name="Make live").click()
        await press(page.locator("#confirm-yes"), "/rollback", 201)
        assert [record.ref for (record,) in served.store.called("restage")] == [older.ref]
        await page.route("**/v1/loras/poet?*", _without_older_versions)
        await open_adapter(page, "poet")
        await expect(page.locator("#adapter-versions tr")).to_have_count(1)
        await expect(page.get_by_role("button", name="Make live")).to_have_count(0)
        await page.unroute_all(behavior="wait")  # an answer that is still being changed would fail with the page


async def _without_older_versions(route: Route) -> None:
    answer = await (await route.fetch()).json()
    await route.fulfill(json={**answer, "versions": answer["versions"][:1]})


async def test_a_version_under_trial_is_named_in_the_table_on_its_page_and_in_its_form(browsing: Browsing) -> None:
    tried = {"poet": Trial(adapter("poet", version="older").ref.digest, 0.1)}
    tried["coder"] = Trial(adapter("coder", version="older").ref.digest, 0.29, is_shadow=True)
    held = [replace(adapter(name), trial=tried.get(name)) for name in ("poet", "coder", "novelist")]
    async with look(browsing, retriever=MappedRetriever(held), store=FakeStore(pool_of(*held))) as (page, _):
        percent = page.get_by_label("on this many % of the requests")
        on_copies = page.get_by_label("on copies that no client sees")
        for name, label, answers, kind, number in (
            ("poet", "10 % to ", "10 % of the requests", "trial", "10"),
            ("coder", "29 % shadow ", "a copy of 29 % of the requests", "shadow", "29"),
        ):
            digest = tried[name].digest
            await go(page, "Adapters")
            await expect(page.locator("#pool-rows tr", has_text=name)).to_contain_text(label + digest[:8])
            await open_adapter(page, name)
            await expect(page.locator("#adapter-facts")).to_contain_text(f"Version {digest[:12]} answers {answers}")
            row = page.locator("#adapter-versions tr").nth(1)
            await expect(row).to_contain_text(kind)
            await expect(row.get_by_role("button", name="Make live")).to_be_visible()
            await expect(percent).to_have_value(number)
            await expect(on_copies).to_be_checked(checked=tried[name].is_shadow)
        await open_adapter(page, "novelist")  # which has no trial: nothing is left of the other's
        await expect(percent).to_have_value("10")
        await expect(on_copies).not_to_be_checked()


async def test_a_kept_version_is_tried_promoted_and_its_trial_ended(browsing: Browsing) -> None:
    older = adapter("poet", version="older", generation=0)
    live = replace(adapter("poet"), trial=Trial(older.ref.digest, 0.1))
    store = FakeStore(pool_of(live, older))
    async with look(browsing, retriever=MappedRetriever([live]), store=store) as (page, served):
        await open_adapter(page, "poet")
        percent = page.get_by_label("on this many % of the requests")
        await expect(percent).to_have_value("10")
        await percent.fill("25")
        await page.get_by_label("on copies that no client sees").check()
        for button in ("Start trial", "End trial"):
            await press(page.get_by_role("button", name=button), "/share")
        trials = [trial for _, _, trial, _ in served.store.called("set_trial")]
        assert trials == [Trial(older.ref.digest, 0.25, True), None]
        await page.get_by_role("button", name="Promote").click()
        await press(page.locator("#confirm-yes"), "/rollback", 201)
        assert [record.ref for (record,) in served.store.called("restage")] == [older.ref]


async def test_tags_template_visibility_and_samples_are_edited_without_an_upload(browsing: Browsing) -> None:
    live = replace(adapter("poet", version="fun", template="alpaca"), contract='{"stop": ["."]}')
    async with look(browsing, retriever=MappedRetriever([live]), store=FakeStore(pool_of(live))) as (page, served):
        save, edit = page.get_by_role("button", name="Save"), page.get_by_role("button", name="Edit", exact=True)
        await open_adapter(page, "poet")
        await edit.press("Enter")
        tags, samples = page.get_by_label("Tags", exact=True), page.get_by_label("Samples, one on each line")
        await expect(tags).to_be_focused()
        await expect(tags).to_have_value("fun")
        await expect(samples).to_have_value('A sample of poet.\n{"input":"Another one.","output":"Its output."}')
        await samples.fill('Only this.\n{"input": "<b>a</b>", "output": "b"}')
        await tags.fill("red,  blue")
        await press(save, "/v1/loras/poet", 201)
        await expect(page.locator("#edit-form")).to_be_hidden()
        await expect(edit).to_be_focused()
        [(edited, changes)] = served.store.called("edit")
        assert edited.ref == live.ref
        assert changes == Edit(tags=("red", "blue"), samples=(Sample("Only this."), Sample("<b>a</b>", "b")))
        await edit.click()  # the page's version is not live any more
        await page.locator("#edit-template").select_option("chat")
        await press(save, "/v1/loras/poet", 409)
        await expect(page.locator("#adapter-error")).to_contain_text("is not the live version of adapter 'poet'")
        await samples.fill('{"input": 1}')
        await save.click()
        await expect(page.locator("#adapter-error")).to_contain_text('line 1 of the samples needs "input"')
        await page.locator("#edit-cancel").click()
        contract = page.get_by_label("Contract, as JSON")
        await edit.click()
        await expect(contract).to_have_value('{\n  "stop": [\n    "."\n  ]\n}')
        await contract.fill("{")
        await save.click()
        await expect(page.locator("#adapter-error")).to_contain_text("the contract is not JSON")
        await contract.fill('{"instruction": "Negate: {input}"}')
        await press(save, "/v1/loras/poet", 409)  # refused for its version only
        assert len(served.store.called("edit")) == 1
        await page.locator("#edit-cancel").click()
        await edit.click()
        await page.locator("#edit-visibility").select_option("private")
        await press(save, "/v1/loras/poet")
        assert served.store.called("set_visibility") == [("local", "poet", "private", "local")]
        assert len(served.store.called("edit")) == 1


async def test_another_tenants_adapter_cannot_be_changed_even_with_an_own_one_of_its_name(browsing: Browsing) -> None:
    held = [adapter("poet"), adapter("poet", version="theirs", tenant="them")]
    async with look(browsing, retriever=MappedRetriever(held)) as (page, served):
        await open_adapter(page, "them/poet")
        for what in ("Withdraw", "Make live", "Edit"):
            await expect(page.get_by_role("button", name=what)).to_have_count(0)
        await expect(page.locator("#adapter-samples-note")).to_have_text("Only its owner sees its samples.")
        await page.get_by_role("button", name="Ask it").click()
        await ask(page)
        await expect(page.locator("#plan li .name")).to_have_text(["them/poet"])
        [row] = served.job.plan.adapters
        assert row.ref == held[1].ref
        await open_adapter(page, "poet")
        await expect(page.get_by_role("button", name="Withdraw")).to_have_count(1)


@pytest.mark.parametrize("how", ["drop", "choose"])
async def test_folders_are_previewed_and_the_ticked_ones_published(
    browsing: Browsing, tmp_path: Path, how: str
) -> None:
    parent = tmp_path / "many"
    config = '{"r": 16, "base_model_name_or_path": "tiny-base", "target_modules": ["q_proj", "v_proj"]}'
    folders = [folder_of(parent, "verse", ["Write a verse.", "Rhyme!"], config)]
    folders += [folder_of(parent, name) for name in ("bad-one", "left-out")]
    bodies: list[str | None] = []
    (folder_of(parent, "pickled") / "adapter_model.safetensors").rename(parent / "pickled" / "adapter_model.bin")
    async with look(browsing) as (page, served):
        page.on("request", lambda request: bodies.append(request.post_data) if request.method == "POST" else None)
        await give(page, parent, how)
        await expect(page.locator("#drop")).to_contain_text("Before you publish, the console sends only the samples")
        cards = page.locator("#previews > li")
        await expect(cards).to_have_count(4)
        verse = cards.filter(has=page.get_by_label("Publish verse"))
        for fact in (
            "tiny-base · rank 16 · 2 kinds of modules",
            "2 samples",
            "Write a verse.",
            "a new name in the pool",
        ):
            await expect(verse).to_contain_text(fact)
        await expect(verse).to_contain_text("auto answers 2 of 2 of its samples with poet now")
        await expect(page.locator(".problem")).to_contain_text("pickle files are never opened")
        await expect(page.get_by_label("Publish pickled")).to_be_disabled()
        assert served.store.called("stage") == [], "a preview sends no file"
        sent = {"prompt": ["Write a verse.", "Rhyme!"], "lora": {"fallback": "base"}}
        assert [json.loads(body or "") for body in bodies] == [sent]
        await page.get_by_label("Publish left-out").uncheck()
        await page.get_by_label("Tags of all").fill("one, two")
        await page.locator("#publish-visibility").select_option("private")
        await page.get_by_role("button", name="Dry run").click()
        await expect(page.locator("#previews .good .state")).to_contain_text("fit to publish")
        await expect(page.locator("#previews .bad .state").filter(has_text="it is bad")).to_have_count(1)
        assert served.store.called("commit") == []
        await page.get_by_role("button", name="Publish 2 adapters").click()
        await expect(page.locator("#previews .good .state")).to_contain_text("live at generation 8; most similar: poet")
        await expect(page.locator("#previews .bad .state").filter(has_text="it is bad")).to_have_count(1)
        assert len(served.store.called("commit")) == 1
        uploads = {args[0].name: args[0] for args in served.store.called("stage")}
        assert uploads.keys() == {"verse", "bad-one"}
        assert set(uploads["verse"].files) == {"adapter_config.json", "adapter_model.safetensors", "lora_samples.jsonl"}
        assert uploads["verse"].files["adapter_model.safetensors"] == b"12345"
        assert (uploads["verse"].tags, uploads["verse"].visibility) == (("one", "two"), "private")
        await page.get_by_role("button", name="Try it").click()
        await expect(page.get_by_label("Prompt", exact=True)).to_have_value("Write a verse.")


async def test_a_publish_loads_only_what_is_in_view_and_the_rest_once_it_is(browsing: Browsing, tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder_of(tmp_path / "all", name)
    loads: list[str] = []
    async with look(browsing) as (page, _):
        await expect(page.locator("#examples button")).to_have_count(2)
        await drop_folder(page, tmp_path / "all")
        await expect(page.locator("#publish-button")).to_have_text("Publish 2 adapters")
        page.on("request", lambda request: loads.append(request.url) if request.method == "GET" else None)
        await page.locator("#publish-button").click()
        await expect(page.locator("#previews .good")).to_have_count(2)
        await wait_frames(page, 20)
        assert not [url for url in loads if "/pool/map" in url or "/loras?" in url or "?samples=" in url]
        async with page.expect_request("**/v1/loras?*min_generation=9"):
            await go(page, "Adapters")
        async with page.expect_request("**/v1/loras/*?samples=8"):
            await go(page, "Ask")
        assert len([url for url in loads if "/v1/pool/map" in url]) == 1


async def test_a_base_model_that_the_server_refuses_is_a_problem_before_the_upload(
    browsing: Browsing, tmp_path: Path
) -> None:
    parent = tmp_path / "all"
    folder_of(parent, "alias", config='{"base_model_name_or_path": "an/alias"}')
    folder_of(parent, "other", config='{"r": 8, "base_model_name_or_path": "elsewhere/tiny"}')
    folder_of(parent, "unnamed", config='{"r": 8}')
    accepted = "; this server accepts an/alias, somewhere/tiny-base, tiny-base. If they are"
    async with look(browsing, accepts_base=("an/alias",)) as (page, served):
        await drop_folder(page, parent)
        await expect(page.locator("#previews > li")).to_have_count(3)
        refusals = {"other": "its base model is elsewhere/tiny", "unnamed": "adapter_config.json names no base model"}
        for name, given in refusals.items():
            card = page.locator("#previews .bad").filter(has=page.get_by_label(f"Publish {name}"))
            await expect(card.locator(".problem")).to_have_text(re.compile(f"^{given}{accepted}"))
            await expect(page.get_by_label(f"Publish {name}")).to_be_disabled()
            await expect(page.get_by_label(f"Publish {name}")).not_to_be_checked()
        await expect(page.get_by_label("Publish alias")).to_be_checked()
        await publish(page)
        assert [upload.name for (upload, _) in served.store.called("stage")] == ["alias"]


async def test_a_preview_says_what_a_name_would_replace(browsing: Browsing, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "verses", ["Write a verse."])
    async with look(browsing, store=FakeStore(pool_of(adapter("poet", version="fun")))) as (page, served):
        await drop_folder(page, folder)
        notes = page.get_by_label("Checks of verses")
        await expect(notes).to_contain_text("a new name in the pool")
        await page.get_by_role("button", name="Publish as a new version of poet").click()
        await expect(page.get_by_label("Name of verses")).to_have_value("poet")
        await expect(notes).to_contain_text("new version of poet; the present one is kept")
        await publish(page)
        await expect(page.locator("#previews .good .state")).to_contain_text(
            "tags: fun (kept); visibility: public (kept)"
        )
        [(upload, _)] = served.store.called("stage")
        assert (upload.name, upload.tags, upload.template) == ("poet", None, None)


async def test_tags_and_template_of_a_new_version_are_cleared_by_choice(browsing: Browsing, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "poet", ["Write a verse."])
    store = FakeStore(pool_of(adapter("poet", version="fun", template="alpaca")))
    async with look(browsing, store=store) as (page, served):
        await drop_folder(page, folder)
        await page.get_by_label("No tags").check()
        await expect(page.get_by_label("Tags of all")).to_be_disabled()
        await page.locator("#publish-template").select_option("server default")
        await page.get_by_role("button", name="Publish 1 adapter").click()
        changes = "tags: none (was fun); template: server default (was alpaca)"
        await expect(page.locator("#previews .good .state")).to_contain_text(changes)
        [(upload, _)] = served.store.called("stage")
        assert (upload.tags, upload.template) == ((), "server")


async def test_the_last_checkpoint_is_published_under_the_name_of_its_run(browsing: Browsing, tmp_path: Path) -> None:
    for step in (50, 100, 1000):
        folder_of(tmp_path / "my run (v2)", f"checkpoint-{step}")
    async with look(browsing) as (page, served):
        await drop_folder(page, tmp_path / "my run (v2)")
        for step, ticked in ((50, False), (100, False), (1000, True)):
            await expect(page.get_by_label(f"Publish checkpoint-{step}", exact=True)).to_be_checked(checked=ticked)
        for samples in await page.get_by_label("Sample prompts").all():
            await samples.fill("First prompt\n\nSecond prompt")
        await publish(page)
        [(upload, _)] = served.store.called("stage")
        assert upload.name == "my-run-v2"
        assert upload.files["lora_samples.jsonl"] == b'{"input":"First prompt"}\n{"input":"Second prompt"}\n'


async def test_a_folder_gets_the_name_that_the_command_line_gives(browsing: Browsing) -> None:
    names = ["c--d", "-x", "my run - (v2)", "émotion FR", "Straße 3", "x" * 70, "日本"]
    async with look(browsing) as (page, _):
        found = await page.evaluate(
            """async (names) => {
              const { src } = document.querySelector("script[type=module]");
              const { suggested } = await import(new URL("folders.js", src));
              return suggested(names.map((name) => ({ name, parent: "" }))).map((folder) => folder.as);
            }""",
            [*names, "a b", "a-b"],
        )
        assert found == [*map(nearest_name, names), "a b", "a-b"]  # two would be called a-b


async def test_a_drop_and_an_answer_that_cannot_be_used_are_reported(browsing: Browsing, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"12345")
    async with look(browsing) as (page, _):
        await drop_folder(page, file)
        await expect(page.locator("#publish-error")).to_have_text("drop the folder of the adapter, not its files")
        await expect(page.locator("#publish-form")).to_be_hidden()
        await drop_folder(page, folder_of(tmp_path, "verses"))
        await expect(page.locator("#publish-error")).to_be_hidden()
        await page.route("**/v1/loras", lambda route: route.fulfill(status=200, body="<html>"))
        await page.get_by_role("button", name="Publish 1 adapter").click()
        await expect(page.locator("#previews .bad .state")).to_contain_text("the answer is not JSON")
        await expect(page.locator("#publish-button")).to_be_enabled()
        await page.evaluate(
            """() => {
              const reader = { readEntries: (_, fail) => fail(new Error("gone")) };
              const entry = { isDirectory: true, name: "verses", createReader: () => reader };
              DataTransferItem.prototype.webkitGetAsEntry = () => entry;
            }"""
        )
        await drop_folder(page, tmp_path / "verses")
        await expect(page.locator("#publish-error")).to_have_text("a file cannot be read: gone")


async def test_a_dialog_closes_with_the_page_that_it_asks_about(browsing: Browsing) -> None:
    async with look(browsing) as (page, served):
        await open_adapter(page, "coder")
        await open_adapter(page, "poet")
        for button in ("Withdraw…", "Make live"):
            await page.get_by_role("button", name=button).click()
            await expect(page.locator("#confirm-title")).to_contain_text("poet")
            await page.evaluate("location.hash = 'adapter/coder'")
            await expect(page.locator("#adapter-title")).to_have_text("coder")
            await expect(page.locator("#confirm-dialog")).to_be_hidden()
            await page.go_back()
            await expect(page.locator("#adapter-title")).to_have_text("poet")
        assert served.store.called("withdraw") == served.store.called("restage") == []


async def test_an_adapter_that_is_opened_by_another_name_is_shown_by_its_id(browsing: Browsing) -> None:
    refused = {"error": {"message": "the trial was refused"}}
    async with look(browsing) as (page, _):
        await page.route("**/v1/loras/poet/share", lambda route: route.fulfill(status=409, json=refused))
        for name in ("local/poet", f"poet@{adapter('poet').ref.digest[:12]}"):
            await page.evaluate("(name) => { location.hash = `adapter/${encodeURIComponent(name)}`; }", name)
            await expect(page).to_have_url(re.compile(r"#adapter/poet$"))
            await expect(page.locator("#adapter-title")).to_have_text("poet")
            await expect(page).to_have_title("poet · LoraRetriever")
            await page.get_by_role("button", name="Edit", exact=True).click()
            await expect(page.get_by_label("Tags", exact=True)).to_be_visible()
            await page.get_by_role("button", name="Start trial").click()
            await expect(page.locator("#adapter-error")).to_have_text("the trial was refused")
        await page.go_back()
        await expect(page.locator("#view-adapter")).to_be_visible()


async def test_a_late_answer_changes_nothing_on_the_page_of_another_adapter(browsing: Browsing) -> None:
    waits, goes_on = asyncio.Event(), asyncio.Event()

    async def answer_late(route: Route) -> None:
        waits.set()
        await goes_on.wait()
        status = 200 if route.request.method == "PATCH" else 409
        await route.fulfill(status=status, json={"generation": 7, "error": {"message": "too late for poet"}})

    async def leave(page: Page) -> None:
        await waits.wait()
        waits.clear()
        await open_adapter(page, "coder")

    async def release(page: Page) -> None:
        async with page.expect_response(lambda answer: "poet" in answer.url):
            goes_on.set()
        goes_on.clear()
        await wait_frames(page, 5)
        await expect(page.locator("#adapter-error")).to_be_hidden()
        await expect(page.locator("#adapter-body")).to_be_visible()

    async with look(browsing) as (page, _):
        await page.route("**/v1/loras/poet/rollback", answer_late)
        await open_adapter(page, "poet")
        await page.get_by_role("button", name="Make live").click()
        await page.locator("#confirm-yes").click()
        await leave(page)
        await release(page)
        await open_adapter(page, "poet")
        edit, tags = page.get_by_role("button", name="Edit", exact=True), page.get_by_label("Tags", exact=True)
        await edit.click()
        await tags.fill("fun")
        await page.route("**/v1/loras/poet", answer_late)
        await page.get_by_role("button", name="Save").click()
        await leave(page)
        await edit.click()
        await tags.fill("of coder")
        await release(page)
        await expect(tags).to_have_value("of coder")
        await expect(tags).to_be_visible()
        await page.unroute_all(behavior="wait")


@pytest.mark.parametrize("how", ["drop", "choose"])
async def test_of_a_training_run_and_of_an_mlx_folder_the_adapters_files_are_published(
    browsing: Browsing, tmp_path: Path, how: str
) -> None:
    parent = tmp_path / "all"
    run, mlx = folder_of(parent, "my-task"), folder_of(parent, "mlx")
    (folder_of(run, "checkpoint-10") / "adapter_model.safetensors").write_bytes(b"not the final one")
    for name in ("optimizer.pt", "training_args.bin", "secrets.env"):
        (run / name).write_bytes(b"12345")
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "model": "tiny-base/", "lora_parameters": parameters}
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    (mlx / "adapter_model.safetensors").rename(mlx / "adapters.safetensors")
    async with look(browsing) as (page, served):
        await give(page, parent, how)
        cards = page.locator("#previews > li")
        await expect(cards).to_have_count(2)
        await expect(page.locator("#previews .problem")).to_have_count(0)
        await expect(cards.filter(has=page.get_by_label("Publish mlx"))).to_contain_text("tiny-base · rank 8")
        await expect(cards.filter(has=page.get_by_label("Publish my-task"))).to_contain_text("2 files")
        await publish(page, 2)
        uploads = {upload.name: upload.files for (upload, _) in served.store.called("stage")}
        assert uploads["my-task"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
        assert uploads["my-task"]["adapter_model.safetensors"] == b"12345"
        assert uploads["mlx"].keys() == {"adapter_config.json", "adapters.safetensors"}
        listed = """async () => {
          const { src } = document.querySelector("script[type=module]");
          return (await import(new URL("folders.js", src))).ADAPTER_FILES;
        }"""
        assert set(await page.evaluate(listed)) == set(ADAPTER_FILES), "as the command line sends"


async def test_ticks_and_clear_count_while_adapters_are_published(browsing: Browsing, tmp_path: Path) -> None:
    names = ("one", "three", "two")
    for name in names:
        folder_of(tmp_path / "all", name)
    waits, goes_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        if route.request.method == "POST":
            waits.set()
            await goes_on.wait()
        await route.continue_()

    async with look(browsing) as (page, served):
        button = page.locator("#publish-button")

        async def publish() -> None:
            await drop_folder(page, tmp_path / "all")
            await expect(button).to_have_text("Publish 3 adapters")
            waits.clear()
            goes_on.clear()
            await button.click()
            await waits.wait()

        await page.route("**/v1/loras", hold)
        await publish()
        for name in names[1:]:
            await page.get_by_label(f"Publish {name}", exact=True).uncheck()
        await page.get_by_label(f"Publish {names[1]}", exact=True).check()
        await expect(button).to_be_disabled()
        goes_on.set()
        await expect(page.locator("#previews .good")).to_have_count(2)
        await expect(button).to_have_text("Publish 0 adapters")
        await page.locator("#preview-clear").click()
        await publish()
        await page.locator("#preview-clear").click()
        async with page.expect_response(lambda answer: answer.request.method == "POST" and answer.ok):
            goes_on.set()
        await wait_frames(page, 20)
        assert [upload.name for (upload, _) in served.store.called("stage")] == ["one", "three", "one"]
        await page.unroute_all(behavior="wait")


async def test_text_is_dragged_into_the_prompt(browsing: Browsing) -> None:
    dropped = """() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.setData("text/plain", "dragged");
      return ["dragenter", "dragover", "drop"].map((kind) => {
        const event = new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer });
        return document.getElementById("prompt").dispatchEvent(event);
      });
    }"""
    async with look(browsing) as (page, _):
        assert await page.evaluate(dropped) == [True] * 3, "the browser does what it does elsewhere"
        await wait_frames(page, 5)
        await expect(page.locator("#view-ask")).to_be_visible()
        await expect(page.locator("#publish-error")).to_be_hidden()
