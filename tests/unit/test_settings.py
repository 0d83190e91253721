"""Settings: keyword, then environment, then default; what is wrong is named."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fastapi_graph import Graph, GraphSettings, SettingsError, deployment

VALUES = {
    "backend": ("inprocess", "other", "other"),
    "serialize": (False, "1", True),
    "request_timeout_s": (None, "2.5", 2.5),
    "over_capacity_status": (503, "429", 429),
    "max_body_size": (None, "1024", 1024),
    "log_format": ("text", "json", "json"),
    "ray_address": (None, "10.0.0.1:6379", "10.0.0.1:6379"),
    "namespace": ("fastapi_graph", "team", "team"),
    "lifetime": ("app", "detached", "detached"),
    "version": (None, "2026-11", "2026-11"),
    "owner": (None, "search team", "search team"),
    "update_strategy": ("rolling", "recreate", "recreate"),
    "update_timeout_s": (600.0, "60", 60.0),
    "lease_s": (6.0, "20", 20.0),
    "orphan_timeout_s": (60.0, "5", 5.0),
    "replica_wait_s": (30.0, "3", 3.0),
    "transport": ("auto", "direct", "direct"),
    "shared_memory": (True, "0", False),
    "port_range": (None, "[7000, 7999]", (7000, 7999)),
    "max_message_size": (256 << 20, "2097152", 2 << 20),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in GraphSettings.model_fields:
        monkeypatch.delenv(f"FASTAPI_GRAPH_{name.upper()}", raising=False)


def test_every_setting_is_tested() -> None:
    assert set(VALUES) == set(GraphSettings.model_fields)


@pytest.mark.parametrize("name", VALUES)
def test_default_environment_keyword(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default, text, value = VALUES[name]
    assert getattr(GraphSettings(), name) == default
    monkeypatch.setenv(f"FASTAPI_GRAPH_{name.upper()}", text)
    assert getattr(GraphSettings(), name) == value
    assert getattr(GraphSettings(**{name: default}), name) == default


@pytest.mark.parametrize("text, value", [("1", True), ("true", True), ("0", False), ("no", False)])
def test_booleans_in_the_environment(
    text: str, value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTAPI_GRAPH_SERIALIZE", text)
    assert GraphSettings().serialize is value


BAD = [
    ("serialize", "perhaps"),
    ("request_timeout_s", "soon"),
    ("request_timeout_s", "0"),
    ("request_timeout_s", "-1"),
    ("max_body_size", "-1"),
    ("over_capacity_status", "500"),
    ("log_format", "xml"),
    ("max_body_size", "1 MB"),
]


@pytest.mark.parametrize("name, value", BAD)
def test_a_bad_value_in_the_environment(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"FASTAPI_GRAPH_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        GraphSettings()
    assert f"{variable}={value!r}" in str(caught.value)


@pytest.mark.parametrize("name, value", BAD)
def test_a_bad_keyword(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        GraphSettings(**{name: value})
    assert f"keyword {name}={value!r}" in str(caught.value)
    assert "FASTAPI_GRAPH" not in str(caught.value)


def test_every_bad_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_GRAPH_MAX_BODY_SIZE", "huge")
    with pytest.raises(SettingsError) as caught:
        GraphSettings(serialize="perhaps")
    assert "keyword serialize='perhaps'" in str(caught.value)
    assert "FASTAPI_GRAPH_MAX_BODY_SIZE='huge'" in str(caught.value)


def test_an_unknown_keyword() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting backnd; there are: backend, seri"):
        GraphSettings(backnd="inprocess")


def test_an_unrelated_variable_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTAPI_GRAPH_UNRELATED", "1")
    assert GraphSettings() == GraphSettings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        GraphSettings().backend = "other"  # type: ignore[misc]


def test_settings_errors_are_value_errors() -> None:
    assert issubclass(SettingsError, ValueError)


@deployment
def answer() -> int:
    return 42


def test_an_unknown_backend_by_keyword_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"'inproces'.*FASTAPI_GRAPH_BACKEND.*inprocess"):
        Graph(answer.bind(), settings=GraphSettings(backend="inproces"))
    monkeypatch.setenv("FASTAPI_GRAPH_BACKEND", "cluster")
    with pytest.raises(SettingsError, match=r"'cluster'.*inprocess"):
        Graph(answer.bind())
    Graph(answer.bind(), settings=GraphSettings(backend="inprocess"))
