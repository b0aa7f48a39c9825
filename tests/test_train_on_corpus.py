"""Training on the labelled corpus never sees what it is measured on: no document, no work, no held-out source."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "data" / "corpus"

pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="needs ../shared/data/corpus")


@pytest.fixture(scope="module")
def corpus_module():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("labelling_corpus")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def corpus(corpus_module):
    return corpus_module.Corpus.read(CORPUS)


@pytest.fixture(scope="module")
def sides(corpus_module, corpus):
    rows = corpus_module.split(corpus, per_part=400, per_domain=100)
    return {name: corpus.take(getattr(rows, name)) for name in ("train", "works", "parts")}


def test_no_document_text_or_work_is_on_two_sides(sides):
    for column in ("ids", "texts", "works"):
        train, works, parts = (set(getattr(sides[name], column)) for name in ("train", "works", "parts"))
        assert not train & works
        assert not train & parts
        assert not works & parts


def test_held_out_parts_are_whole_and_every_domain_stays_in_training(corpus_module, corpus, sides):
    held_out = corpus_module.held_out_parts(corpus)
    assert set(sides["parts"].parts) == set(held_out.values())
    assert not set(sides["train"].parts) & set(held_out.values())
    assert not set(sides["works"].parts) & set(held_out.values())
    assert set(sides["train"].domains) == set(sides["works"].domains) == set(corpus.domains)


def test_pieces_of_one_work_share_its_name(corpus_module):
    work_of = corpus_module.work_of
    news = "20newsgroups"
    assert work_of(news, "news:rec.autos/1", "Old Ford\n\nBuy") == work_of(news, "news:rec.bikes/2", "old  ford\nNo")
    assert work_of(news, "news:rec.autos/1", "Old Ford\n") != work_of(news, "news:rec.autos/3", "New Ford\n")
    country = "cia-factbook/africa/gh.json"
    assert {work_of("cia-factbook", f"{country}/{s}", "") for s in ("Economy#2", "Government#0")} == {country}
    assert work_of("nltk/shakespeare", "nltk/othello.xml#11.1", "") == "nltk/othello.xml"
    python = "debian/python3.11-doc"
    pages = (f"{python}/{place}/_sources/library/bisect.rst.txt#2" for place in ("devhelp", "html"))
    assert len({work_of(python, page, "") for page in pages}) == 1


def test_weak_labels_follow_the_tiers(corpus, sides):
    assert dict(zip(corpus.tiers.tolist(), corpus.education.tolist(), strict=True)) == {
        1: 0.0, 2: 1.25, 3: 2.5, 4: 3.75, 5: 5.0,
    }  # fmt: skip
    assert dict(zip(corpus.tiers.tolist(), corpus.high.tolist(), strict=True)) == {1: 0, 2: 0, 3: -1, 4: 1, 5: 1}
    for side in sides.values():  # else an AUC has no meaning
        assert {0, 1} <= set(side.informing.tolist())
        assert {0, 1} <= set(side.high.tolist())
