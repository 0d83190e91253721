"""How a message sounds: a lexicon, with rules for negations and intensities.

The rules and their numbers are VADER's (Hutto and Gilbert, 2014); the lexicon is a small one
of our own, for the words of a support desk.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, Field

from example_app.text import CleanText
from fastapi_graph import deployment

VALENCES: dict[str, float] = {
    **dict.fromkeys(("awful", "horrible", "terrible", "worst", "scam", "hate"), -3.1),
    **dict.fromkeys(("angry", "furious", "ridiculous", "unacceptable", "useless"), -2.6),
    **dict.fromkeys(("bad", "disappointed", "annoying", "annoyed", "rude", "wrong"), -2.2),
    **dict.fromkeys(("broken", "crash", "crashes", "damaged", "fail", "failed", "lost"), -1.9),
    **dict.fromkeys(("complaint", "error", "late", "missing", "problem", "slow", "stuck"), -1.4),
    **dict.fromkeys(("acceptable", "fine", "ok", "okay", "works"), 1.1),
    **dict.fromkeys(("easy", "fast", "glad", "helpful", "nice", "quick", "thanks"), 1.9),
    **dict.fromkeys(("good", "friendly", "happy", "pleased", "thank"), 2.1),
    **dict.fromkeys(("awesome", "excellent", "fantastic", "great", "love", "perfect"), 3.1),
}
NEGATIONS = {"not", "no", "never", "hardly", "neither", "nor", "without", "cannot"}
INTENSITIES = {
    **dict.fromkeys(("absolutely", "completely", "extremely", "really", "so", "very"), 0.293),
    **dict.fromkeys(("barely", "kind", "partly", "slightly", "somewhat"), -0.293),
}
_REACH = 3  # words before a valence that may change it
_NEGATED = -0.74
_SHOUTED = 0.733
_EXCLAMATION = 0.292


class Sentiment(BaseModel):
    score: float = Field(ge=-1, le=1, description="From -1, very negative, to 1.")
    words: list[str] = Field(description="The words that decided it.")


class SentimentModel:
    """Scores a text by its words, with the valences it was made with."""

    def __init__(self, valences: dict[str, float]) -> None:
        self.valences = valences

    def score(self, text: CleanText) -> Sentiment:
        """Return how the text sounds."""
        found = [index for index, word in enumerate(text.words) if word in self.valences]
        total = sum(self._valence(text.words, index) for index in found)
        if total:
            emphasis = _EXCLAMATION * min(text.exclamations, 4) + _SHOUTED * text.shouted
            total += math.copysign(emphasis, total)
        score = total / math.sqrt(total * total + 15)
        return Sentiment(score=round(score, 4), words=[text.words[index] for index in found])

    def _valence(self, words: list[str], index: int) -> float:
        valence = self.valences[words[index]]
        before = words[max(index - _REACH, 0) : index]
        intensity = sum(INTENSITIES.get(word, 0.0) for word in before)
        valence += math.copysign(intensity, valence) if intensity > 0 else 0.0
        valence *= 1 + intensity if intensity < 0 else 1.0
        if any(word in NEGATIONS or word.endswith("n't") for word in before):
            valence *= _NEGATED
        return valence


Scorer = deployment(SentimentModel)
