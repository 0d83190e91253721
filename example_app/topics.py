"""What a message is about: naive Bayes over words, trained when the service starts."""

from __future__ import annotations

import math
from collections import Counter
from typing import Literal

from pydantic import BaseModel

from example_app.text import CleanText, clean
from fastapi_graph import deployment

Team = Literal["billing", "delivery", "technical"]

EXAMPLES: dict[Team, list[str]] = {
    "billing": [
        "I was charged twice for the same order",
        "Please refund the payment to my credit card",
        "The invoice shows the wrong amount",
        "Why did the price of my subscription go up?",
        "Cancel my subscription and give me my money back",
        "My card was declined at the checkout, the bank says all is fine",
    ],
    "delivery": [
        "Where is my parcel? The tracking has not moved for a week",
        "The package arrived damaged and one item is missing",
        "I want to change the delivery address of my order",
        "The courier left the box outside in the rain",
        "My order was sent to the wrong address",
        "When will the shipment arrive?",
    ],
    "technical": [
        "The app crashes when I open the settings",
        "I cannot log in, the password reset email never comes",
        "The website shows an error and the page is blank",
        "Since the update everything is slow and freezes",
        "How do I connect the device to the wifi?",
        "The site is down, the server gives error 500",
    ],
}
COMMON = {"a", "all", "an", "and", "at", "do", "for", "i", "in", "is", "it", "my"}
COMMON |= {"of", "on", "one", "the", "this", "to", "was", "when"}
_SURE = 0.5


class Topics(BaseModel):
    probabilities: dict[Team, float]

    def team(self) -> Team | Literal["general"]:
        """Return the likeliest team, or nobody's if none is likelier than all others."""
        likeliest = max(self.probabilities, key=self.probabilities.__getitem__)
        return likeliest if self.probabilities[likeliest] >= _SURE else "general"


class TopicModel:
    """Multinomial naive Bayes with Laplace smoothing.

    Args:
        examples: Messages of each team, to learn from.
        smoothing: How often each word counts as seen, beyond how often it was.
    """

    def __init__(self, examples: dict[Team, list[str]], smoothing: float = 1.0) -> None:
        counts = {
            team: Counter(word for text in texts for word in _telling(clean(text)))
            for team, texts in examples.items()
        }
        vocabulary = set().union(*counts.values())
        number = sum(map(len, examples.values()))
        self.priors = {team: math.log(len(texts) / number) for team, texts in examples.items()}
        self.likelihoods: dict[Team, dict[str, float]] = {}
        for team, seen in counts.items():
            whole = seen.total() + smoothing * len(vocabulary)
            self.likelihoods[team] = {
                word: math.log((seen[word] + smoothing) / whole) for word in vocabulary
            }

    def classify(self, text: CleanText) -> Topics:
        """Return how probable each team is; without a known word, as often as in the examples."""
        words = _telling(text)
        logs = {
            team: prior + sum(self.likelihoods[team].get(word, 0.0) for word in words)
            for team, prior in self.priors.items()
        }
        highest = max(logs.values())
        odds = {team: math.exp(log - highest) for team, log in logs.items()}
        whole = sum(odds.values())
        return Topics(probabilities={team: round(odd / whole, 4) for team, odd in odds.items()})


def _telling(text: CleanText) -> list[str]:
    return [word for word in text.words if word not in COMMON]


Classifier = deployment(TopicModel)
