"""deploy/: the dashboard and the alerts ask for metrics that a server has, and the services find their files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import client_for, make_app
from tests.server.fake_engine import FakeEngine, says
from tests.test_compose import GPU, MONITORING, ROOT, SHARED, load, service

DEPLOY = ROOT / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "quill.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}

# Metric names, with the labels that are asked for behind them.
_METRIC = re.compile(r"\b((?:vllm|quill):\w+|process_\w+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


def alerts() -> list[dict[str, Any]]:
    groups = load(DEPLOY / "prometheus" / "alerts.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    found = [target["expr"] for panel in PANELS for target in panel["targets"]]
    found += [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    found += [rule["expr"] for rule in alerts()]
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    watch = page.partition("## What to watch")[2].partition("\n## ")[0]
    return found + re.findall(r"`([^`]+:[^`]+)`", watch)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_every_expression_asks_for_metrics_and_labels_that_exist() -> None:
    engine = FakeEngine()
    engine.script = says("abc")
    async with client_for(make_app(engine)) as client:
        await client.post("/generate", json={"prompt": "a"})
        text = (await client.get("/metrics")).text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = 0
    for expression in expressions():
        for name, matchers in _METRIC.findall(expression):
            asked += 1
            assert name in labels, expression
            # Prometheus itself adds job and instance.
            assert set(_LABEL.findall(matchers)) <= labels[name] | {"job", "instance"}, expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            names = {name for name, _ in _METRIC.findall(expression)}
            assert set(re.split(r",\s*", grouped)) <= set.union(*(labels[name] for name in names)), expression
    assert asked > 40


def test_every_expression_is_balanced_and_uses_known_variables() -> None:
    for expression in expressions():
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
        assert set(re.findall(r"\$(\w+)", expression)) <= VARIABLES, expression


def test_panels_have_names_units_and_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_alerts_tell_what_is_wrong_and_how_bad() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        assert re.fullmatch(r"\d+m", rule["for"])


def test_images_are_pinned_and_started_only_when_asked_for() -> None:
    for name in MONITORING:
        definition = service(GPU, name)
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", definition["image"])
        assert definition["profiles"] == ["monitoring"]


def mounts(name: str) -> dict[str, Path]:
    """Folders of the repository by where the service finds them; read-only, all of them."""
    found = {}
    for volume in load(SHARED)["services"][name]["volumes"]:
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert mode == ["ro"]
            found[target] = (SHARED.parent / source).resolve()
    return found


def test_the_services_find_their_files_and_each_other() -> None:
    prometheus, grafana = mounts("prometheus"), mounts("grafana")
    config = load(prometheus["/etc/prometheus"] / "prometheus.yml")
    assert all((prometheus["/etc/prometheus"] / name).is_file() for name in config["rule_files"])
    [job] = config["scrape_configs"]
    assert job["job_name"] == "quill"  # as the alerts and the dashboard call it
    assert job["static_configs"][0]["targets"] == ["server:8000"]
    assert "server" in load(GPU)["services"]
    provisioning = grafana["/etc/grafana/provisioning"]
    [provider] = load(provisioning / "dashboards" / "quill.yml")["providers"]
    assert (grafana[provider["options"]["path"]] / "quill.json").is_file()
    [source] = load(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert yaml.safe_load(service(GPU, "prometheus")["ports"][0].rpartition(":")[2]) == 9090
