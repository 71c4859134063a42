"""The dashboard and the alerts use only metrics that the code reports, and alerts fire when they should."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from deployments.observability.request_metrics import ChangeMetrics, RequestMetrics
from deployments.observability.retriever_metrics import RetrieverMetrics
from deployments.observability.worker_metrics import WorkerMetrics
from tests.deployments.metric_fakes import FakeMetrics
from tests.docs.pages import blocks_of
from tests.prometheus import MONITORING, Promtool, dashboard_queries, relabelled, rules, scrape_rules

DOCS = MONITORING.parents[1] / "docs"
PAGE = DOCS / "reference" / "metrics.md"
_OURS = re.compile(r"ray_(loraretriever_\w+)")
_SERVES = {
    "ray_serve_deployment_replica_starts_total",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_status",
}
_UNITS = re.compile(
    r"_(total|seconds|bytes|rows|tokens|adapters|generation|plans|cosine|ratio|kernels|threads)$"
)  # `_total` counts the thing named before it


def reported() -> FakeMetrics:
    """Return every metric of every deployment."""
    kinds = FakeMetrics()
    for figures in (RequestMetrics, ChangeMetrics, RetrieverMetrics):
        figures(kinds)
    WorkerMetrics(16, kinds)
    return kinds


def expressions() -> list[str]:
    alerts = [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    return alerts + [expr for _, expr in dashboard_queries()]


def test_names_end_in_their_unit() -> None:
    assert [name for name in reported().metrics if not _UNITS.search(name)] == []
    assert all(name.startswith("loraretriever_") for name in reported().metrics)


def test_every_metric_in_use_is_reported() -> None:
    metrics = reported().metrics
    for expr in expressions():
        for name in _OURS.findall(expr):
            ends = {"_bucket": "histogram", "_count": "histogram", "_total": "counter"}
            kind = next((kind for end, kind in ends.items() if name.endswith(end)), "gauge")
            assert metrics[name.removesuffix("_bucket").removesuffix("_count")].kind == kind, expr
        assert set(re.findall(r"ray_serve_\w+", expr)) <= _SERVES


def test_the_dashboard_shows_every_metric() -> None:
    asked = {name.removesuffix("_bucket") for _, expr in dashboard_queries() for name in _OURS.findall(expr)}
    drawn_as_clients_see_them = {"loraretriever_engine_requests_total"}
    lacking = set(reported().metrics) - asked - drawn_as_clients_see_them
    assert not lacking, "draw them in k8s/monitoring/dashboard.json"


def test_the_reference_lists_every_metric() -> None:
    named = set(re.findall(r"`(?:ray_)?(loraretriever_\w+)", PAGE.read_text()))
    assert named == set(reported().metrics), "run python -m docs.generate, and list each class of metrics in `reported`"


def test_the_rules_are_sound(promtool: Promtool) -> None:
    promtool.check_rules(rules())


def test_the_rules_of_a_scrape_drop_no_metric_in_use_and_keep_processes_apart(promtool: Promtool) -> None:
    found = scrape_rules()
    promtool.check_scrape(found)
    [block] = [block for block in blocks_of(DOCS / "how-to" / "monitor.md") if block.language == "yaml"]
    assert yaml.safe_load(block.text) == {"metric_relabel_configs": found}
    for name in {name for expr in expressions() for name in re.findall(r"ray_\w+", expr)}:
        of_process = {"__name__": name, "WorkerId": "1f", "SessionName": "s", "replica": "r"}
        kept = {"__name__": name, "replica": "r"} if _OURS.match(name) else of_process
        assert relabelled(of_process, found) == kept
    assert relabelled({"__name__": "ray_grpc_server_req_new_total"}, found) is None


def replicas(application: str, deployment: str, num: int, starts: str, healthy: str) -> dict[str, str]:
    """Return the series that Ray has for each of this many replicas: its start, and whether it is healthy."""
    series: dict[str, str] = {}
    for n in range(num):
        labels = f'{{application="{application}",deployment="{deployment}",replica="{n} {starts}"}}'
        series[f"ray_serve_deployment_replica_starts_total{labels}"] = starts
        series[f"ray_serve_deployment_replica_healthy{labels}"] = healthy
    return series


# What makes each alert fire for the application `a` after 30 minutes: series, their values minute by minute.
FIRING: dict[str, dict[str, str]] = {
    "LoraRetrieverQueueWait": {
        'ray_loraretriever_queue_seconds_bucket{application="a",le="5.0"}': "0+1x30",
        'ray_loraretriever_queue_seconds_bucket{application="a",le="10.0"}': "0+60x30",
        'ray_loraretriever_queue_seconds_bucket{application="a",le="+Inf"}': "0+60x30",
    },
    "LoraRetrieverErrors": {
        'ray_loraretriever_requests_total{application="a",status="200"}': "0+60x30",
        'ray_loraretriever_requests_total{application="a",status="503"}': "0+6x30",
    },
    "LoraRetrieverWorkerWedged": {'ray_loraretriever_step_age_seconds{application="a",replica="r"}': "0+60x30"},
    "LoraRetrieverKernelsOff": {'ray_loraretriever_missing_kernels{application="a",replica="r"}': "4x30"},
    # A Worker ends a minute after its start, and is replaced.
    "LoraRetrieverReplicaRestarts": {
        name: values
        for minute in range(1, 40)
        for name, values in replicas("a", "Worker", 1, f"_x{minute} 1x40", f"_x{minute} 1 stale").items()
    },
    "LoraRetrieverDown": {
        'ray_serve_deployment_replica_healthy{application="a",deployment="Worker",replica="r"}': "1x20 0x20"
    },
    "LoraRetrieverColdLoads": {
        'ray_loraretriever_adapter_hits_total{application="a",level="bank"}': "0+10x30",
        'ray_loraretriever_adapter_hits_total{application="a",level="store"}': "0+20x30",
    },
    "LoraRetrieverLoadsFail": {'ray_loraretriever_cold_load_failures_total{application="a"}': "0+1x30"},
    "LoraRetrieverRetrieverBehind": {
        'ray_loraretriever_catalogue_generation{application="a",replica="r"}': "7x30",
        'ray_loraretriever_catalogue_generation{application="a",replica="s"}': "8x30",
    },
    "LoraRetrieverStoreUnavailable": {
        'ray_loraretriever_catalogue_read_age_seconds{application="a",replica="r"}': "61x30"
    },
    "LoraRetrieverAbstentions": {
        'ray_loraretriever_routes_total{application="a",outcome="chosen"}': "0+10x40",
        'ray_loraretriever_routes_total{application="a",outcome="abstained"}': "0+10x40",
    },
    "LoraRetrieverTrafficDrifts": {
        'ray_loraretriever_best_confidence_ratio_bucket{application="a",le="0.25"}': "0+7x40",
        'ray_loraretriever_best_confidence_ratio_bucket{application="a",le="+Inf"}': "0+10x40",
    },
    "LoraRetrieverPreemptions": {'ray_loraretriever_preemptions_total{application="a",replica="r"}': "0+60x30"},
}
# The same in a server that is well.
QUIET = {
    'ray_loraretriever_queue_seconds_bucket{application="b",le="5.0"}': "0+60x40",
    'ray_loraretriever_queue_seconds_bucket{application="b",le="+Inf"}': "0+60x40",
    'ray_loraretriever_requests_total{application="b",status="200"}': "0+60x40",
    'ray_loraretriever_requests_total{application="b",status="503"}': "0+1x40",
    'ray_loraretriever_step_age_seconds{application="b",replica="r"}': "1x40",
    'ray_loraretriever_missing_kernels{application="b",replica="r"}': "0x40",
    # Ingresses were added. A deploy replaced all Workers. Retrievers ended before a gap in the scrapes.
    **replicas("b", "Ingress", 20, starts="_x22 1x20", healthy="_x23 1x20"),
    **replicas("b", "Worker", 8, starts="1x40", healthy="1x23 stale"),
    **replicas("b", "Worker", 8, starts="_x22 1x20", healthy="_x23 1x20"),
    **replicas("b", "Retriever", 8, starts="1x3 _x14 1x25", healthy="1x2 stale"),
    **replicas("b", "Retriever", 1, starts="1x40", healthy="1x40"),
    'ray_serve_deployment_replica_healthy{application="b",deployment="Ingress",replica="r"}': "1x40",
    'ray_serve_deployment_replica_healthy{application="b",deployment="Worker",replica="old"}': "1x10 0x2 _x28",
    'ray_serve_deployment_replica_healthy{application="b",deployment="Worker",replica="new"}': "_x12 1x28",
    # Workers that were scaled to zero.
    'ray_serve_deployment_replica_healthy{application="b",deployment="Worker-idle",replica="r"}': "1x20 _x20",
    'ray_serve_deployment_status{application="b",deployment="Worker-idle"}': "6x40",
    # A base model that was taken out of `models`.
    'ray_serve_deployment_replica_healthy{application="b",deployment="Worker-gone",replica="r"}': "1x10 _x30",
    'ray_serve_deployment_status{application="b",deployment="Worker-gone"}': "6x10 3x30",
    'ray_loraretriever_adapter_hits_total{application="b",level="bank"}': "0+20x40",
    'ray_loraretriever_adapter_hits_total{application="b",level="store"}': "0+10x40",
    'ray_loraretriever_cold_load_failures_total{application="b"}': "2x40",
    # Something is published every minute. The second replica is always sampled a generation earlier.
    'ray_loraretriever_catalogue_generation{application="b",replica="r"}': "8+1x40",
    'ray_loraretriever_catalogue_generation{application="b",replica="s"}': "7+1x40",
    # A new RayCluster with another store starts beside the old one.
    'ray_loraretriever_catalogue_generation{application="b",ray_io_cluster="old",replica="o"}': "500x40",
    'ray_loraretriever_catalogue_generation{application="b",ray_io_cluster="new",replica="n"}': "_x10 40x30",
    'ray_loraretriever_catalogue_read_age_seconds{application="b",replica="r"}': "3x40",
    'ray_loraretriever_routes_total{application="b",outcome="chosen"}': "0+10x40",
    'ray_loraretriever_routes_total{application="b",outcome="abstained"}': "0+1x40",
    'ray_loraretriever_best_confidence_ratio_bucket{application="b",le="0.25"}': "0+5x40",
    'ray_loraretriever_best_confidence_ratio_bucket{application="b",le="+Inf"}': "0+10x40",
    'ray_loraretriever_preemptions_total{application="b",replica="r"}': "5x40",
}


# More ways in which an alert fires: (alert, its series).
ALSO_FIRING: list[tuple[str, dict[str, str]]] = [
    # The first failure of a replica: the counter appears with it.
    (
        "LoraRetrieverLoadsFail",
        {'ray_loraretriever_cold_load_failures_total{application="a",replica="r"}': "_x27 40x13"},
    ),
    (
        "LoraRetrieverStoreUnavailable",
        {'ray_loraretriever_errors_total{application="a",code="store_unavailable"}': "_x27 3x13"},
    ),
    (
        "LoraRetrieverStoreUnavailable",
        {'ray_loraretriever_errors_total{application="a",code="store_damaged"}': "0+1x40"},
    ),
    # One of two replicas stops at generation 20 while the other goes on.
    (
        "LoraRetrieverRetrieverBehind",
        {
            'ray_loraretriever_catalogue_generation{application="a",replica="r"}': "8+1x40",
            'ray_loraretriever_catalogue_generation{application="a",replica="s"}': "7+1x13 20x26",
        },
    ),
    # All replicas are gone, and so are their series.
    (
        "LoraRetrieverDown",
        {'ray_serve_deployment_replica_healthy{application="a",deployment="Ingress",replica="r"}': "1x20 _x20"},
    ),
    # No worker can start any more.
    (
        "LoraRetrieverDown",
        {
            'ray_serve_deployment_replica_healthy{application="a",deployment="Worker-m",replica="r"}': "1x5 _x35",
            'ray_serve_deployment_status{application="a",deployment="Worker-m"}': "6x5 2x35",
        },
    ),
]


def test_an_alert_fires_if_no_deployment_is_scraped_at_all(promtool: Promtool) -> None:
    check = {"expr": 'count(ALERTS{alertstate="firing",alertname="LoraRetrieverDown"})', "eval_time": "30m"}
    check |= {"exp_samples": [{"labels": "{}", "value": 1}]}
    other = [{"series": "up", "values": "1x40"}]
    promtool.test_rules(rules(), [{"interval": "1m", "input_series": other, "promql_expr_test": [check]}])


def test_an_installation_that_is_gone_counts_as_down_for_a_day(promtool: Promtool) -> None:
    series = 'ray_serve_deployment_replica_healthy{{application="{}",deployment="Ingress",replica="r"}}'
    held = [{"series": series.format(name), "values": values} for name, values in (("a", "1x20"), ("b", "1x1600"))]
    firing = 'count by (application) (ALERTS{alertstate="firing",alertname="LoraRetrieverDown"})'
    gone = [{"labels": '{application="a"}', "value": 1}]
    checks: list[Any] = [
        {"expr": firing, "eval_time": at, "exp_samples": expected}
        for at, expected in (("2h", gone), ("24h", gone), ("25h", []))
    ]
    promtool.test_rules(rules(), [{"interval": "1m", "input_series": held, "promql_expr_test": checks}])


def test_every_alert_fires_where_it_should_and_nowhere_else(promtool: Promtool) -> None:
    alerts = {rule["alert"] for group in rules()["groups"] for rule in group["rules"] if "alert" in rule}
    assert set(FIRING) == alerts
    tests: list[dict[str, Any]] = []
    for firing, series in (*FIRING.items(), *ALSO_FIRING, ("", {})):
        checks = [
            {"expr": f'count(ALERTS{{alertstate="firing",alertname="{name}"}}) or vector(0)', "eval_time": "30m"}
            | {"exp_samples": [{"labels": "{}", "value": int(name == firing)}]}
            for name in sorted(alerts)
        ]
        held = [{"series": name, "values": values} for name, values in (QUIET | series).items()]
        tests.append({"interval": "1m", "input_series": held, "promql_expr_test": checks, "name": firing})
    promtool.test_rules(rules(), tests)


def test_an_alert_fires_for_one_installation_whatever_another_of_the_same_name_does(promtool: Promtool) -> None:
    tests: list[dict[str, Any]] = []
    for alert, series in (*FIRING.items(), *ALSO_FIRING):
        well = {name.replace('"b"', '"a"').replace("{", '{namespace="staging",'): QUIET[name] for name in QUIET}
        ill = {name.replace("{", '{namespace="prod",'): values for name, values in series.items()}
        firing = f'ALERTS{{alertstate="firing",alertname="{alert}"}}'
        check = {"expr": f"count by (namespace) ({firing})", "eval_time": "30m"}
        check |= {"exp_samples": [{"labels": '{namespace="prod"}', "value": 1}]}
        held = [{"series": name, "values": values} for name, values in (well | ill).items()]
        tests.append({"interval": "1m", "input_series": held, "promql_expr_test": [check], "name": alert})
    promtool.test_rules(rules(), tests)


def test_the_dashboard_shows_the_chosen_installation_only() -> None:
    boards = json.loads((MONITORING / "dashboard.json").read_text())
    assert [variable["name"] for variable in boards["templating"]["list"]] == ["datasource", "namespace", "application"]
    asked = [target["expr"] for panel in boards["panels"] for target in panel.get("targets", [])]
    series = [found for expr in asked for found in re.findall(r"ray_\w+(?:\{[^}]*\})?", expr)]
    assert len(series) > 60 and all('namespace=~"$namespace"' in found for found in series)


def test_recorded_histograms_answer_like_those_that_they_copy(promtool: Promtool) -> None:
    queries = {
        f"histogram_quantile(0.5, sum by (le) ({name}_bucket))": 0.75
        for name in ("gen_ai_server_time_to_first_token_seconds", "ray_loraretriever_first_token_seconds")
    } | {"gen_ai_server_time_to_first_token_seconds_count": 4}
    series = {
        f'ray_loraretriever_first_token_seconds_{part},strategy="{strategy}"}}': count
        for strategy in ("none", "mixture")
        for part, count in (('bucket{le="0.5"', 0), ('bucket{le="1"', 2), ('bucket{le="+Inf"', 2), ('count{x=""', 2))
    }
    checks: list[Any] = [
        {"expr": f"sum({query})", "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": value}]}
        for query, value in queries.items()
    ]
    held: list[Any] = [{"series": name, "values": f"{value}x3"} for name, value in series.items()]
    promtool.test_rules(rules(), [{"interval": "1m", "input_series": held, "promql_expr_test": checks}])


def test_rates_of_recorded_histograms_stay_right_when_a_replica_ends(promtool: Promtool) -> None:
    ended, stays = "100000+60x10 _x30", "100000+60x40"
    recorded = {
        rule["record"]: rule["expr"] for group in rules()["groups"] for rule in group["rules"] if "record" in rule
    }
    held: list[Any] = [
        {"series": f'{name}{{application="a",replica="{replica}",le="+Inf"}}', "values": values}
        for name in {found for expr in recorded.values() for found in re.findall(r"ray_\w+", expr)}
        for replica, values in (("r", ended), ("s", stays))
    ]
    assert len(held) == 12
    checks: list[Any] = [
        {"expr": f"sum(rate({name}[5m]))", "eval_time": at, "exp_samples": [{"labels": "{}", "value": value}]}
        for name in recorded
        for at, value in (("9m", 2), ("17m", 1))
    ]
    promtool.test_rules(rules(), [{"interval": "1m", "input_series": held, "promql_expr_test": checks}])
