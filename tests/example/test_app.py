"""The example app, as its own developers would test it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from example_app import app, triage, tutorial
from example_app.auth import customer
from example_app.sentiment import VALENCES, Scorer, Sentiment
from example_app.text import CleanText, clean
from example_app.topics import EXAMPLES, Classifier
from fastapi_graph import Graph, GraphNotStartedError

KEY = {"x-api-key": "dev-key"}
NEUTRAL = Sentiment(score=0, words=[])


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def test_own_routes_and_lifespan(client: TestClient) -> None:
    health = client.get("/health").json()
    assert health["pid"] == os.getpid()
    assert health["uptime_s"] >= 0
    assert set(health["deployments"]) == {"clean", "SentimentModel", "TopicModel", "decide"}
    assert set(health["deployments"].values()) == {"running"}
    assert client.get("/me", headers=KEY).json() == {"customer": "developer"}


def test_deployments_stop_with_the_app() -> None:
    with TestClient(app):
        pass
    assert {row.state for row in triage.graph.status()} == {"stopped"}


@pytest.mark.parametrize("path", ["/my-dag", "/my-dag/"])
def test_tutorial_needs_no_key(client: TestClient, path: str) -> None:
    answer = client.post(path, json=["5", [1, 2], "sum"], follow_redirects=False)
    assert answer.status_code == 200
    assert answer.json() == "sum(['(1 * (5 + 1.5))', '(2 * (5 + 1.5))'])"


def test_tutorial_input_that_lacks_an_index(client: TestClient) -> None:
    answer = client.post("/my-dag", json=["5", [1, 2]])
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", 2]


@pytest.mark.parametrize(
    "text, team, priority, words",
    [
        ("I was charged twice. This is <b>NOT</b> acceptable!!", "billing", "normal", 1),
        ("Really great support, thank you", "general", "low", 2),
        ("The app crashes, I am FURIOUS, fix it now!", "technical", "high", 2),
        ("Where is my parcel?", "delivery", "normal", 0),
    ],
)
def test_triage(client: TestClient, text: str, team: str, priority: str, words: int) -> None:
    found = client.post("/triage", json={"text": text}, headers=KEY).json()
    assert (found["team"], found["priority"]) == (team, priority)
    assert len(found["sentiment"]["words"]) == words
    assert sum(found["topics"]["probabilities"].values()) == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize("vip, priority", [(True, "high"), (False, "normal")])
def test_triage_of_a_vip(client: TestClient, vip: bool, priority: str) -> None:
    asked = {"text": "My parcel is late", "vip": vip}
    assert client.post("/triage", json=asked, headers=KEY).json()["priority"] == priority


@pytest.mark.parametrize("method, path", [("GET", "/me"), ("POST", "/sentiment")])
@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}])
def test_key_is_needed(client: TestClient, method: str, path: str, headers: dict[str, str]) -> None:
    body = None if method == "GET" else {"text": "hello"}
    assert client.request(method, path, headers=headers, json=body).status_code == 401


@pytest.mark.parametrize("body", [{"text": "hello"}, {"text": ""}])
@pytest.mark.parametrize("path", ["/triage", "/triage/"])
def test_key_is_needed_for_the_graph(client: TestClient, path: str, body: dict[str, str]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 401
    assert answer.json() == {"detail": "Send a valid x-api-key header"}


def test_wrong_message(client: TestClient) -> None:
    answer = client.post("/triage", json={"text": ""}, headers=KEY)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "text"]


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_APP_KEYS", "alice:key1, bob:key2")
    with TestClient(app) as client:
        assert client.get("/me", headers={"x-api-key": "key2"}).json() == {"customer": "bob"}
        assert client.get("/me", headers=KEY).status_code == 401


def test_injected_handle(client: TestClient) -> None:
    answer = client.post("/sentiment", json={"text": "Not good, and the app is slow!"}, headers=KEY)
    assert answer.json()["words"] == ["good", "slow"]
    assert answer.json()["score"] < -0.5


def test_override_reaches_the_graph_and_the_injected_handle() -> None:
    class Fake:
        def score(self, text: CleanText) -> Sentiment:
            return Sentiment(score=-1, words=text.words)

    with triage.graph.override(triage.scorer, Fake()), TestClient(app) as client:
        found = client.post("/triage", json={"text": "Hello there"}, headers=KEY).json()
        assert found["priority"] == "high"
        assert found["sentiment"] == {"score": -1, "words": ["hello", "there"]}
        found = client.post("/sentiment", json={"text": "Hello"}, headers=KEY).json()
        assert found == {"score": -1, "words": ["hello"]}
    with TestClient(app) as client:  # and is gone after that
        found = client.post("/triage", json={"text": "Hello there"}, headers=KEY).json()
        assert found["sentiment"] == {"score": 0, "words": []}


def test_dependency_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    class Method:
        async def remote(self, text: CleanText) -> Sentiment:
            return Sentiment(score=0.5, words=text.words)

    class Handle:
        score = Method()

    provided = triage.graph.provide(triage.scorer)
    assert provided is triage.graph.provide("SentimentModel")
    monkeypatch.setitem(app.dependency_overrides, provided, Handle)
    monkeypatch.setitem(app.dependency_overrides, customer, lambda: "tester")
    with TestClient(app) as client:
        assert client.get("/me").json() == {"customer": "tester"}
        assert client.post("/sentiment", json={"text": "Hi"}).json()["score"] == 0.5
        found = client.post("/triage", json={"text": "Hi"}).json()
        assert found["sentiment"]["score"] == 0  # the graph has no dependency to override


def test_without_with_it_says_what_to_do() -> None:
    client = TestClient(app)
    with pytest.raises(GraphNotStartedError, match="with TestClient"):
        client.post("/my-dag", json=["5", [1, 2], "sum"])


def test_schemas(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    triage = schema["paths"]["/triage"]["post"]
    body = triage["requestBody"]["content"]["application/json"]["schema"]
    result = triage["responses"]["200"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/Message"}
    assert result == {"$ref": "#/components/schemas/Triage"}
    assert triage["security"] == [{"APIKeyHeader": []}]
    assert "security" not in schema["paths"]["/my-dag"]["post"]
    identifiers = [
        operation["operationId"] for path in schema["paths"].values() for operation in path.values()
    ]
    assert len(identifiers) == len(set(identifiers))


class TestDeploymentsOnTheirOwn:
    """What is decorated is called as if it were not."""

    def test_clean(self) -> None:
        found = clean("<p>WHY don\u2019t you answer? See http://x.y/z &amp; mail a@b.org!</p>")
        assert found.words == ["why", "don't", "you", "answer", "see", "mail"]
        assert found.shouted == pytest.approx(1 / 6)
        assert found.exclamations == 1

    def test_clean_without_a_word(self) -> None:
        assert clean("?!").words == []

    @pytest.mark.parametrize(
        "weaker, stronger",
        [
            ("a bad day", "a very bad day"),
            ("a slightly bad day", "a bad day"),
            ("a bad day", "a bad day!!"),
            ("a bad day", "a BAD day"),
            ("bad", "bad and awful"),
            ("not bad", "bad"),
        ],
    )
    def test_sentiment_is_worse(self, weaker: str, stronger: str) -> None:
        model = Scorer(VALENCES)
        assert model.score(clean(stronger)).score < model.score(clean(weaker)).score

    @pytest.mark.parametrize("text", ["not good", "isn't good", "never very good"])
    def test_negation(self, text: str) -> None:
        assert Scorer(VALENCES).score(clean(text)).score < 0

    def test_topic_of_each_example(self) -> None:
        model = Classifier(EXAMPLES)
        for team, texts in EXAMPLES.items():
            assert all(model.classify(clean(text)).team() == team for text in texts)

    def test_topic_without_a_known_word(self) -> None:
        assert Classifier(EXAMPLES).classify(clean("xyzzy")).team() == "general"

    @pytest.mark.parametrize(
        "score, words, vip, priority",
        [
            (0.5, ["hi"], False, "low"),
            (0.5, ["hi"], True, "normal"),
            (-0.5, ["down"], False, "high"),
            (-0.8, ["hi"], False, "high"),
            (0, ["hi"], False, "normal"),
        ],
    )
    def test_decide(self, score: float, words: list[str], vip: bool, priority: str) -> None:
        text = CleanText(words=words, shouted=0, exclamations=0)
        topics = Classifier(EXAMPLES).classify(text)
        sentiment = Sentiment(score=score, words=[])
        assert triage.decide(text, sentiment, topics, vip).priority == priority


def test_tutorial_can_be_run_by_the_command_line() -> None:
    ingress = Graph(tutorial.serve_dag).ingress
    assert (ingress.route_prefix, ingress.num_workers) == ("/my-dag", 2)
