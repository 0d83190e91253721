"""What a message looks like when it comes in, and when it has been cleaned."""

from __future__ import annotations

import html
import re
import unicodedata

from pydantic import BaseModel, Field

from fastapi_graph import deployment

_MARKUP = re.compile(r"<[^<>]*>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w+")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


class Message(BaseModel):
    """A message of a customer."""

    text: str = Field(min_length=1, max_length=10_000, examples=["I was charged twice!"])
    vip: bool = False


class CleanText(BaseModel):
    """A message without markup, links and addresses."""

    words: list[str]
    shouted: float = Field(description="Share of the longer words that are all capitals.")
    exclamations: int


@deployment
def clean(text: str) -> CleanText:
    """Take out markup and addresses, and split into lower-case words."""
    text = _MARKUP.sub(" ", html.unescape(unicodedata.normalize("NFKC", text)))
    text = _ADDRESS.sub(" ", text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    words = _WORD.findall(text)
    longer = [word for word in words if len(word) > 2]
    return CleanText(
        words=[word.lower() for word in words],
        shouted=sum(word.isupper() for word in longer) / max(len(longer), 1),
        exclamations=text.count("!"),
    )
