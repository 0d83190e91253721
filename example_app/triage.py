"""The typed graph: clean, then read for sentiment and topic side by side, then decide."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from example_app.sentiment import VALENCES, Scorer, Sentiment
from example_app.text import CleanText, Message, clean
from example_app.topics import EXAMPLES, Classifier, Team, Topics
from fastapi_graph import Graph, InputNode, deployment

URGENT = {"asap", "down", "emergency", "immediately", "now", "outage", "today", "urgent"}


class Triage(BaseModel):
    """Who looks after a message, how soon, and why."""

    team: Team | Literal["general"]
    priority: Literal["low", "normal", "high"]
    sentiment: Sentiment
    topics: Topics


@deployment
def decide(text: CleanText, sentiment: Sentiment, topics: Topics, vip: bool) -> Triage:
    """Weigh what the models found."""
    points = (sentiment.score < -0.3) + (sentiment.score < -0.7) + vip
    points += not URGENT.isdisjoint(text.words)
    priority: Literal["low", "normal", "high"] = "normal"
    if points >= 2:
        priority = "high"
    elif points == 0 and sentiment.score > 0.3:
        priority = "low"
    return Triage(team=topics.team(), priority=priority, sentiment=sentiment, topics=topics)


with InputNode(Message) as message:
    scorer = Scorer.bind(VALENCES)
    classifier = Classifier.bind(EXAMPLES)
    text = clean.bind(message.text)
    dag = decide.bind(text, scorer.score.bind(text), classifier.classify.bind(text), message.vip)

graph = Graph(dag, name="triage")
