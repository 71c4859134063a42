"""Ray's exported metrics, logs and spans of a running application."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families

from deployments.auth.private_files import sessions_folder
from tests.e2e.live import APP, Live, completion, eventually, eventually_equal
from tests.prometheus import Promtool, Scrape, dashboard_queries, relabelled, scrape_rules, series_in
from tests.served_engine import ENGINE

_KEPT = re.compile(r"ray_(loraretriever|serve_deployment_replica)_")
# vLLM does not report its steps, and finds no prompt again that is shorter than its blocks of 128 tokens.
_NATIVE_ONLY = ("loraretriever_steps_total", "loraretriever_prefix_cache_hit_tokens_total")
_OURS = re.compile(r"(# (HELP|TYPE) )?ray_loraretriever_")


def scraped() -> str:
    """Return Ray's metrics of this machine, in Prometheus' format."""
    [node] = ray.nodes()
    return httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=120).text


def series() -> Scrape:
    return {name: value for name, value in series_in(scraped(), _KEPT).items() if f'application="{APP}"' in name}


def num_refused() -> float:
    """Return the number of requests that no adapter matched, the only refusals here."""
    counted = series().items()
    return sum(value for name, value in counted if "ray_loraretriever_requests_total" in name and '"422"' in name)


def queries() -> list[str]:
    """Return the dashboard's queries that have an answer with this engine."""
    missing = () if ENGINE == "native" else _NATIVE_ONLY
    return [expr for _, expr in dashboard_queries() if not any(name in expr for name in missing)]


def names_asked_for() -> set[str]:
    """Return the metrics without which a query has no answer."""
    exprs = [expr for expr in queries() if "or vector(0)" not in expr]
    return {name for expr in exprs for name in re.findall(r"ray_\w+", expr)}


def logs() -> Path:
    """Return the folder of this Ray session's logs. Its name is a label of every metric."""
    session = re.search(r'SessionName="([^"]+)"', scraped())
    assert session is not None
    return sessions_folder(os.environ, os.geteuid()) / session[1] / "logs"


def use(live: Live, topic: str) -> None:
    """Cause one of everything that is reported."""
    live.publish(live.folder("watched", 901, topic))
    on_trial = {"path": str(live.folder("watched", 902, topic)), "share": 1.0, "shadow": True}
    assert live.call("POST", "/v1/loras", json=on_trial).status_code == 201
    for _ in range(3):  # so one of the two workers gets a prompt again
        assert live.ask("watched").status_code == 200
        assert live.ask("auto", f"Explain {topic}, please.").status_code == 200
    assert live.ask("nobody").status_code == 404
    assert live.call("DELETE", "/v1/loras/watched").status_code == 200
    never = completion("auto", "x", 2) | {"lora": {"min_score": 1.0, "fallback": "error"}}
    assert live.call("POST", "/v1/completions", json=never).status_code == 422
    ignored = completion("auto", topic, 4) | {"reasoning_effort": "low"}
    assert live.call("POST", "/v1/completions", json=ignored).headers["x-ignored-fields"] == "reasoning_effort"


def test_every_query_of_the_dashboard_has_an_answer(live: Live, promtool: Promtool) -> None:
    seen: Scrape = {}

    def look_back() -> Scrape:
        """Return the last sample of every series, as Prometheus does: Ray's export drops gauges between reports."""
        seen.update(series())
        return dict(seen)

    before = num_refused()
    use(live, "lighthouses")
    eventually_equal(lambda: num_refused() - before, 1)
    eventually_equal(lambda: names_asked_for() - {name.partition("{")[0] for name in look_back()}, set())
    first = look_back()
    use(live, "lighthouses")
    eventually_equal(lambda: num_refused() - before, 2)
    text = scraped()
    promtool.check_metrics("\n".join(line for line in text.splitlines() if _OURS.match(line)) + "\n")
    eventually_equal(
        lambda: promtool.unanswered(queries(), first, look_back()), ""
    )  # replicas report at different times


def test_the_rules_of_a_scrape_make_series_fewer_and_never_equal(live: Live) -> None:
    eventually(lambda: "ray_loraretriever_bank_rows" in scraped())
    samples = [sample for family in text_string_to_metric_families(scraped()) for sample in family.samples]
    rules = scrape_rules()
    found = [relabelled({"__name__": sample.name, **sample.labels}, rules) for sample in samples]
    kept = [frozenset(labels.items()) for labels in found if labels is not None]
    assert len(set(kept)) == len(kept) < 0.8 * len(samples)
    ours = [dict(labels) for labels in kept if dict(labels)["__name__"].startswith("ray_loraretriever_")]
    assert ours and not any({"WorkerId", "SessionName"} & labels.keys() for labels in ours)


def test_every_healthy_replica_has_a_start_with_the_same_label(live: Live) -> None:
    """The alert about restarts matches the two."""
    replica = re.compile(r'ray_serve_deployment_replica_(healthy|starts_total)\{.*replica="(\w+)"')
    seen: dict[str, set[str]] = {"healthy": set(), "starts_total": set()}

    def matches() -> bool:
        for name in series():  # Ray's export drops gauges between reports
            if found := replica.match(name):
                seen[found[1]].add(found[2])
        return len(seen["healthy"]) >= 6 and seen["healthy"] <= seen["starts_total"]

    eventually(matches)


def test_a_request_can_be_followed_through_the_logs(live: Live) -> None:
    request_id = f"followed-{secrets.token_hex(4)}"
    response = httpx.post(
        f"{live.url}/v1/completions", json=completion("auto", "x", 4), headers={"x-request-id": request_id}, timeout=60
    )
    assert response.status_code == 200 and set(response.headers.get_list("x-request-id", split_commas=True)) == {
        request_id
    }

    serve_logs = logs() / "serve"

    def lines(deployment: str) -> list[dict[str, Any]]:
        files = serve_logs.glob(f"replica_{APP}_{deployment}_*.log")
        found = [line for file in files for line in file.read_text().splitlines() if request_id in line]
        return [json.loads(line) for line in found]

    eventually(lambda: lines("Ingress") and lines("Worker"))
    [asked], [worked] = lines("Ingress"), lines("Worker")
    assert asked["request_id"] == worked["request_id"] == request_id
    assert [line["deployment"] for line in (asked, worked)] == [f"{APP}_Ingress", f"{APP}_Worker"]
    assert (asked["status"], asked["endpoint"], asked["new_tokens"]) == (200, "/v1/completions", 4)
    assert asked["total_s"] >= asked["first_token_s"] >= asked["plan_s"] > 0


def test_an_answer_to_a_wrong_request_is_no_error_in_the_logs(live: Live) -> None:
    """a key could otherwise fill the logs, and hide the errors that matter"""
    name, request_id = f"missing-{secrets.token_hex(4)}", f"refused-{secrets.token_hex(4)}"
    row = {"name": name, "digest": "0" * 64, "weight": 1.0}
    plan = {"strategy": "selection", "adapters": [row], "generation": 0}
    bodies = [
        completion(name, "x", 4),
        completion("auto", "x", 4) | {"lora": {"adapters": [{"name": name}]}},
        completion("auto", "x", 4) | {"lora": {"plan": plan}},
        completion("auto", "x", 4) | {"structured_outputs": {"regex": f"({name}"}},
    ]
    statuses = [live.call("POST", "/v1/completions", json=body).status_code for body in bodies]
    assert [*statuses, live.call("GET", f"/v1/loras/{name}").status_code] == [404, 404, 409, 400, 404]
    last = completion("auto", "x", 4)
    assert live.call("POST", "/v1/completions", json=last, headers={"x-request-id": request_id}).status_code == 200
    files = [path for path in logs().rglob("*") if path.is_file()]

    def lines(text: str) -> list[str]:
        found = [line for path in files for line in path.read_text(errors="replace").splitlines() if text in line]
        return [line for line in found if "Traceback" in line or "ERROR" in line or text == request_id]

    eventually(lambda: lines(request_id))
    assert lines(name) == []


def test_no_log_holds_a_prompt(live: Live, url: str) -> None:
    secret = f"secret-{secrets.token_hex(8)}"
    chat = {"model": "auto", "messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    ids = []
    for address in (url, live.url):
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/chat/completions", chat | {"stream": True}),
            ("/v1/chat/completions", chat | {"temperature": secret}),
            ("/v1/chat/completions", {"messages": [{"role": secret, "content": secret}]}),
            ("/v1/completions", {"prompt": secret, "max_tokens": 2, "lora": {"query": secret, "explain": True}}),
            ("/v1/completions", {"prompt": secret * 1000, "model": "auto"}),
            ("/v1/route", {"prompt": [secret]}),
            ("/v1/pool/map", {"prompt": secret}),
        ):
            ids.append(httpx.post(f"{address}{path}", json=body, timeout=60).headers["x-request-id"].partition(",")[0])

    folder = logs()

    def text(of: Path) -> str:
        return "\n".join(path.read_text(errors="replace") for path in of.rglob("*") if path.is_file())

    def has_all_ids() -> bool:
        said = text(folder / "serve")
        return all(request_id in said for request_id in ids)

    eventually(has_all_ids)
    assert secret not in text(folder)


def test_a_traced_request_has_spans_from_the_proxy_to_the_engine(live: Live) -> None:
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    response = httpx.post(f"{live.url}/v1/completions", json=completion("auto", "x", 4), headers=headers, timeout=60)
    assert response.status_code == 200

    folder = logs() / "serve" / "spans"

    def spans() -> dict[str, dict[str, Any]]:
        text = "\n".join(path.read_text() for path in folder.glob("*"))
        found = [json.loads(part) for part in re.split(r"(?<=^\})\n", text, flags=re.MULTILINE) if part.strip()]
        return {span["name"]: span for span in found if span["context"]["trace_id"] == f"0x{trace_id}"}

    served = ("Ingress __call__", "Retriever route", "Worker stream")
    parts = ("worker.queue", "worker.prefill", "worker.decode")
    wanted = {
        "plan",
        "retriever.encode",
        "retriever.search",
        *parts,
        *(f"replica_handle_request {name}" for name in served),
    }
    eventually(lambda: wanted <= set(spans()))
    found = spans()
    by_id = {span["context"]["span_id"]: span["name"] for span in found.values()}

    def way(name: str) -> list[str]:
        """Return the names from a span to the outermost one."""
        parent = found[name]["parent_id"]
        return [name, *(way(by_id[parent]) if parent in by_id else [])]

    at_door = "replica_handle_request Ingress __call__"
    assert way("plan")[1] == at_door
    assert way("replica_handle_request Retriever route")[2:4] == ["plan", at_door]
    for name in parts:
        assert way(name)[1] == "replica_handle_request Worker stream" and at_door in way(name)
    for name in ("retriever.encode", "retriever.search"):
        assert way(name)[1] == "replica_handle_request Retriever route"
