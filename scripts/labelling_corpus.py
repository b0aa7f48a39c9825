"""A folder of real documents with true domains, the weak labels made from them, and which of them training never sees.

The folder holds ``corpus.parquet`` (``id``, ``text``, ``url``, ``source``, ``true_domain``) and
``quality_tiers.json`` (a tier of 1 to 5 for each prefix of a source). Every label goes with the source; nobody judged
a document.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

_NEWSGROUPS, _WESNOTH, _FACTBOOK, _PYTHON = "20newsgroups", "debian/wesnoth", "cia-factbook", "debian/python"
_INFORMING = (
    "openstax/", "medquad/", _FACTBOOK, _PYTHON, "debian/linux-doc", "debian/apache2-doc", "debian/gnucash-docs",
    "debian/lilypond-doc", "public-domain-recipes",
)  # fmt: skip
_CHATTER = (
    _NEWSGROUPS, _WESNOTH, "nltk/movie_reviews", "nltk/shakespeare", "debian/r-cran-janeaustenr", "debian/crawl-common",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents [n] in the order of their ids.

    Args:
        ids: of the documents.
        texts: the documents.
        parts: what is held out as a whole: a source; of the newsgroups each group; the campaigns of one game together.
        works: what a random split keeps on one side: page, chapter, novel, play, country, or thread of a newsgroup.
        domains: the true domains.
        tiers: 1 to 5, by source.
        informing: 1 for reference and teaching, 0 for chatter and fiction, -1 for neither, by source.
    """

    ids: NDArray[np.object_]
    texts: list[str]
    parts: NDArray[np.object_]
    works: NDArray[np.object_]
    domains: NDArray[np.object_]
    tiers: NDArray[np.int8]
    informing: NDArray[np.int8]

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        """The whole corpus of a folder."""
        table = pq.read_table(folder / "corpus.parquet").sort_by("id")
        ids, texts, urls, sources, domains = (
            table[name].to_pylist() for name in ("id", "text", "url", "source", "true_domain")
        )
        tiers = json.loads((folder / "quality_tiers.json").read_text(encoding="utf-8"))
        rows = list(zip(sources, urls, texts, strict=True))
        return cls(
            _array(ids),
            texts,
            _array([part_of(source, url) for source, url, _ in rows]),
            _array([work_of(*row) for row in rows]),
            _array(domains),
            np.array([_tier(source, tiers) for source in sources], np.int8),
            np.array([_informing(source) for source in sources], np.int8),
        )

    def take(self, rows: NDArray[np.int64]) -> "Corpus":
        """These rows."""
        return Corpus(
            self.ids[rows],
            [self.texts[i] for i in rows],
            self.parts[rows],
            self.works[rows],
            self.domains[rows],
            self.tiers[rows],
            self.informing[rows],
        )

    @property
    def education(self) -> NDArray[np.float32]:
        """Tiers 1 to 5 as 0 to 5, in steps of 1.25: float32 [n]."""
        return ((self.tiers - 1) * 1.25).astype(np.float32)

    @property
    def high(self) -> NDArray[np.int8]:
        """1 for the tiers 4 and 5, 0 for 1 and 2, -1 for 3: int8 [n]."""
        return np.select([self.tiers >= 4, self.tiers <= 2], [1, 0], -1).astype(np.int8)


@dataclass(frozen=True)
class Split:
    """Rows to train on, and two kinds of unseen rows: of other works of the same parts, and of whole parts."""

    train: NDArray[np.int64]
    works: NDArray[np.int64]
    parts: NDArray[np.int64]


def split(corpus: Corpus, *, per_part: int, per_domain: int) -> Split:
    """Holds out whole parts (``held_out_parts``) and a tenth of the works of the others, by hashes of their names.

    Args:
        corpus: the documents.
        per_part: most documents that training takes of one part; the first by a hash of their ids.
        per_domain: most unseen documents of each kind that a domain is measured on, likewise.
    """
    held_out = np.isin(corpus.parts, list(held_out_parts(corpus).values()))
    tenth = np.array([_share(work) < 0.1 for work in corpus.works])
    shared = np.isin(corpus.works, corpus.works[held_out])  # threads that were posted to several newsgroups
    order = np.argsort([_share(name) for name in corpus.ids], kind="stable")
    return Split(
        _first(order[~(shared | tenth)[order]], corpus.parts, per_part),
        _first(order[(tenth & ~shared)[order]], corpus.domains, per_domain),
        _first(order[held_out[order]], corpus.domains, per_domain),
    )


def held_out_parts(corpus: Corpus) -> dict[str, str]:
    """In each domain with several parts, the part whose name has the lowest SHA-1: chosen by no result."""
    parts = {domain: sorted(set(corpus.parts[corpus.domains == domain]), key=_share) for domain in set(corpus.domains)}
    return {domain: parts[domain][0] for domain in sorted(parts) if len(parts[domain]) > 1}


def repeated(seen: list[str], unseen: list[str]) -> float:
    """Share of the unseen texts most of whose runs of eight words occur in the seen ones too."""
    known = {run for text in seen for run in _runs(text)}
    shares = [np.mean([run in known for run in runs]) for runs in map(_runs, unseen) if runs]
    return float(np.mean(np.array(shares) > 0.5))


def part_of(source: str, url: str) -> str:
    """The part that a document belongs to."""
    if source == _NEWSGROUPS:
        return url.rpartition("/")[0]
    return _WESNOTH if source.startswith(_WESNOTH) else source


def work_of(source: str, url: str, text: str) -> str:
    """The work that a document is a piece of."""
    if source == _NEWSGROUPS:  # the first line is the subject, without "Re:"
        return "thread " + " ".join(text.partition("\n")[0].lower().split())
    work = re.sub(r"#[\d.]+$", "", url)
    if source == _FACTBOOK:  # one file per country, cut into sections of several domains
        return work.rpartition("/")[0]
    if source.startswith(_PYTHON):  # the package holds its pages twice
        return source + "/" + work.rpartition("_sources/")[2]
    return work


def _runs(text: str) -> list[int]:
    words = text.lower().split()
    return [hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)]


def _tier(source: str, tiers: dict[str, int]) -> int:
    return tiers[max((prefix for prefix in tiers if source.startswith(prefix)), key=len)]


def _informing(source: str) -> int:
    if source.startswith(_INFORMING):
        return 1
    return 0 if source.startswith(_CHATTER) else -1


def _first(rows: NDArray[np.int64], groups: NDArray[np.object_], most: int) -> NDArray[np.int64]:
    """The first ``most`` rows of each group, in the order of the corpus."""
    chosen = [rows[groups[rows] == group][:most] for group in set(groups[rows])]
    return np.sort(np.concatenate(chosen))


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:8], "big") / 2**64


def _array(values: list[str]) -> NDArray[np.object_]:
    return np.array(values, dtype=object)
