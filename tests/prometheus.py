"""Debian's promtool, and its checks that need no server: rules, metrics, and queries over given series."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

MONITORING = Path(__file__).parents[1] / "k8s" / "monitoring"
_PACKAGE = "promtool"  # Debian's
_MINUTES = 5
Scrape = dict[str, float]
"""Series as PromQL writes them, with their values."""


@dataclass(frozen=True)
class Promtool:
    """The program, in its own working folder."""

    executable: str
    folder: Path

    def check_metrics(self, text: str) -> None:
        """Fail if names, types or help texts break Prometheus' rules, except Ray's labels, which have capitals."""
        self._run(["check", "metrics"], re.sub(r"(?<=[{,])[A-Z]\w*(?==)", lambda label: label[0].lower(), text))

    def check_rules(self, rules: dict[str, Any]) -> None:
        self._run(["check", "rules", "--lint=all", "--lint-fatal", self._write("rules.yaml", rules)])

    def check_scrape(self, rules: Sequence[dict[str, Any]]) -> None:
        """Fail if Prometheus does not take these `metric_relabel_configs`."""
        config = {"scrape_configs": [{"job_name": "ray", "metric_relabel_configs": list(rules)}]}
        self._run(["check", "config", "--syntax-only", self._write("prometheus.yaml", config)])

    def test_rules(self, rules: dict[str, Any], tests: Sequence[dict[str, Any]]) -> None:
        """Fail if an alert fires wrongly, or does not fire when it should."""
        files = [self._write("rules.yaml", rules)]
        case = {"rule_files": files, "evaluation_interval": "1m", "tests": list(tests)}
        self._run(["test", "rules", self._write("test.yaml", case)])

    def unanswered(self, expressions: Sequence[str], first: Scrape, second: Scrape) -> str:
        """Return promtool's output on expressions without a result over two scrapes a minute apart, or "".

        Counters that appear between the scrapes count from 0: a replica may answer its first prompt there.
        """
        series = [
            {"series": name, "values": f"{_value(first, name, missing=_at_start(name))} {_value(second, name)}"}
            for name in sorted(first | second)
        ]
        asked = [
            {
                "expr": f"count(({expr}) > -Inf) > bool 0",
                "eval_time": "1m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
            for expr in expressions
        ]
        test = {"interval": "1m", "input_series": series, "promql_expr_test": asked}
        return self._said(["test", "rules", self._write("test.yaml", {"evaluation_interval": "1m", "tests": [test]})])

    def _run(self, args: Sequence[str], sent: str = "") -> None:
        said = self._said(args, sent)
        assert not said, said

    def _said(self, args: Sequence[str], sent: str = "") -> str:
        """Return promtool's output on failure."""
        done = subprocess.run([self.executable, *args], input=sent, capture_output=True, text=True, timeout=60)
        return f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}" if done.returncode else ""

    def _write(self, name: str, content: dict[str, Any]) -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content, width=10_000))
        return str(path)


@pytest.fixture
def promtool(tmp_path: Path) -> Promtool:
    """Return the system's promtool. Without it skip the test, or fail if CI_REQUIRES_PROMTOOL is set."""
    executable = shutil.which(_PACKAGE)
    if executable is None:
        missing = f"there is no promtool: install Debian's package {_PACKAGE}"
        if os.environ.get("CI_REQUIRES_PROMTOOL"):
            pytest.fail(missing)
        pytest.skip(missing)
    return Promtool(executable, tmp_path)


def rules() -> dict[str, Any]:
    """Return the alerts as Prometheus reads them."""
    manifest = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    assert manifest["kind"] == "PrometheusRule"
    spec: dict[str, Any] = manifest["spec"]
    return spec


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Return (title of a panel, its queries), with Grafana's variables replaced."""
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$__rate_interval", f"{_MINUTES}m")
            expr = expr.replace("$namespace", ".*").replace("$application", ".*")
            assert "$" not in expr
            yield panel["title"], expr


def scrape_rules() -> list[dict[str, Any]]:
    """Return what the PodMonitor does with scraped series, as a configuration of Prometheus names it."""
    [endpoint] = yaml.safe_load((MONITORING / "pod-monitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return [{names.get(name, name): value for name, value in rule.items()} for rule in endpoint["metricRelabelings"]]


def relabelled(labels: dict[str, str], rules: Sequence[dict[str, Any]]) -> dict[str, str] | None:
    """Return the labels of a series after these rules, its name among them; None if they drop it."""
    for rule in rules:
        if re.fullmatch(rule["regex"], ";".join(labels.get(name, "") for name in rule["source_labels"])):
            if rule.get("action") == "drop":
                return None
            assert rule["replacement"] == ""
            labels = {name: value for name, value in labels.items() if name != rule["target_label"]}
    return labels


def series_in(text: str, keep: re.Pattern[str]) -> Scrape:
    """Return the samples of a scrape whose name matches."""
    found: Scrape = {}
    kept = "\n".join(line for line in text.splitlines() if line.startswith("#") or keep.match(line))  # others take time
    for family in text_string_to_metric_families(f"{kept}\n"):
        for sample in family.samples:
            if keep.match(sample.name):
                labels = ",".join(f"{name}={json.dumps(value)}" for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def _at_start(name: str) -> str:
    """Return the value before the first count; a gauge has none."""
    return "0" if name.partition("{")[0].endswith(("_total", "_bucket", "_sum", "_count")) else "_"


def _value(scrape: Scrape, name: str, missing: str = "_") -> str:
    return repr(float(scrape[name])) if name in scrape else missing
