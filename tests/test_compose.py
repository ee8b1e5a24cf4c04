"""The compose files: valid by the Compose Specification, a GPU where one is promised, limits that fit the server's."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.settings import Settings

ROOT = Path(__file__).parents[1]
GPU, CPU = ROOT / "docker-compose.yml", ROOT / "docker-compose.cpu.yml"
SHARED = ROOT / "docker" / "services.yml"
MONITORING = {"prometheus", "grafana"}
# The Compose Specification's own schema, as a linter among the development tools carries it.
SCHEMA = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def service(path: Path, name: str) -> dict[str, Any]:
    """A service with `extends` resolved; the files extend without overriding, so a plain merge is Compose's."""
    definition = dict(load(path)["services"][name])
    base = definition.pop("extends", None)
    if base is None:
        return definition
    inherited = service(path.parent / base["file"], base["service"])
    assert not inherited.keys() & definition.keys()
    return inherited | definition


def gpu_devices(definition: dict[str, Any]) -> list[dict[str, Any]]:
    return definition.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])


def seconds(duration: str) -> int:
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(number + unit for number, unit in parts) == duration
    return sum(int(number) * units[unit] for number, unit in parts)


@pytest.mark.parametrize("path", [GPU, CPU, SHARED], ids=lambda path: path.name)
def test_a_file_follows_the_compose_specification(path: Path) -> None:
    jsonschema.validate(load(path), SCHEMA)


def test_the_schema_would_object_to_a_reservation_without_capabilities() -> None:
    broken = load(GPU)
    del broken["services"]["server"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"]
    with pytest.raises(jsonschema.ValidationError, match="capabilities"):
        jsonschema.validate(broken, SCHEMA)


@pytest.mark.parametrize("name", ["server", "train"])
def test_the_gpu_is_reserved_on_a_gpu_host_and_nowhere_else(name: str) -> None:
    assert gpu_devices(service(GPU, name)) == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert gpu_devices(service(CPU, name)) == []


def test_the_variants_differ_in_the_gpu_and_the_image_alone() -> None:
    assert load(GPU)["services"].keys() == load(CPU)["services"].keys()
    for name in load(GPU)["services"]:
        gpu, cpu = service(GPU, name), service(CPU, name)
        assert gpu.keys() - cpu.keys() <= {"deploy"}
        assert {key for key in cpu if cpu[key] != gpu[key]} == ({"image"} if "build" in cpu else set())


@pytest.mark.parametrize("path", [GPU, CPU], ids=lambda path: path.name)
def test_no_service_has_more_rights_than_it_needs(path: Path) -> None:
    for name in load(path)["services"]:
        definition = service(path, name)
        assert definition["read_only"] is True
        assert definition["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in definition["security_opt"]
        assert not definition.keys() & {"privileged", "cap_add", "user", "pid"}
        assert all(port.startswith("127.0.0.1:") for port in definition.get("ports", []))


def test_stopping_waits_longer_than_the_server_drains() -> None:
    drain = Settings().drain_delay + Settings().drain_timeout
    assert seconds(service(GPU, "server")["stop_grace_period"]) >= drain + 10


def test_the_trainer_writes_where_the_server_reads() -> None:
    server, train = service(GPU, "server"), service(GPU, "train")
    assert [f"{train['volumes'][0]}:ro"] == server["volumes"]
    assert f"{service(GPU, 'prepare')['volumes'][0]}:ro" == train["volumes"][1]
    assert train["profiles"] == ["train"]
    assert "profiles" not in server
    volume = server["volumes"][0]
    assert re.fullmatch(r"\$\{QUILL_MODELS:-models\}:/models:ro", volume)
    assert load(GPU)["volumes"].keys() == load(CPU)["volumes"].keys() == {"models", "data", *MONITORING}


def test_every_variable_handed_to_the_server_is_a_setting() -> None:
    names = set(service(GPU, "server")["environment"]) - {"OMP_WAIT_POLICY"}  # for libgomp, which reads it itself
    assert names
    assert {name.removeprefix("QUILL_").lower() for name in names} <= Settings.model_fields.keys()


def test_the_base_image_is_the_dockerfiles() -> None:
    default = re.search(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default is not None
    assert service(GPU, "server")["build"]["args"]["BASE_IMAGE"] == f"${{BASE_IMAGE:-{default[1]}}}"
    for name in load(GPU)["services"].keys() - MONITORING:
        assert service(GPU, name)["build"] == service(GPU, "server")["build"]
