"""The share of function words in a text: the stop-word rule of Gopher (arXiv 2112.11446, appendix A) as a score.

It tells running English text from lists, tables, code, keywords and other languages, at the cost of a regular
expression. It does not tell good text from bad: it belongs beside a model's score, not in its place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray


@dataclass
class StopWords:
    """Scores a text by the share of its words that are in a list; from 0 to 1, higher is better.

    Args:
        words: the list, in any case; by default the eight of which Gopher wants two in every document.
        min_words: a text with fewer words is scored as if it had so many, so that a snippet cannot reach 1. Gopher
            drops documents below 50.

    Raises:
        ValueError: an empty list, or ``min_words`` below 1.
    """

    name: ClassVar[str] = "stop-words"
    higher_is_better: ClassVar[bool] = True
    uses_gpu: ClassVar[bool] = False

    words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    min_words: int = 50

    def __post_init__(self) -> None:
        if not self.words or self.min_words < 1:
            raise ValueError(f"{len(self.words)} words, min_words {self.min_words}; give at least one of each")
        self._listed = frozenset(word.lower() for word in self.words)

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The share of each text, float32 [n]; 0 for an empty one."""
        return np.array([self._share(text) for text in texts], dtype=np.float32)

    def _share(self, text: str) -> float:
        found = re.findall(r"\w+", text.lower())
        return sum(word in self._listed for word in found) / max(len(found), self.min_words)
