"""The fastText domain classifier gives fastText's own labels, and a text without any the domain ``other``."""

import copy
import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fasttext_models import labelled_lines, train

from quadmix_plugin.errors import InputError
from quadmix_plugin.stages.domain_classifiers.fasttext import FastTextDomain

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
UNKNOWN = ["nowhere seen", "", "\0", "\ud800"]


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    table = pq.read_table(QUICKSTART / "corpus.parquet", columns=["true_domain", "text"])
    return list(zip(*(column.to_pylist()[::10] for column in table.columns), strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rows) -> dict[str, Path]:
    corpus = "".join(f"__label__{domain} {' '.join(text[:500].split())}\n" for domain, text in rows[::2])
    toy = labelled_lines(3, 120, words=30)
    rare_line_end = {"minCount": 150}  # </s> occurs 120 times, a word more often
    words = "".join(f"__label__{i % 3} {f'only{i % 3} ' * 6}\n" for i in range(120))
    return train(
        tmp_path_factory.mktemp("fasttext"),
        {
            "corpus": (corpus, {"epoch": 20, "lr": 0.5, "dim": 16}, None),
            "no-line-end": (words, rare_line_end, None),
            "knows-other": (words.replace("__label__1", "__label__other"), rare_line_end, None),
            "nameless": (toy.replace("__label__1", "__label__"), {}, None),
        },
    )


@pytest.fixture(scope="module")
def classifier(trained) -> FastTextDomain:
    return _ready(trained["corpus"])


def _ready(path: Path) -> FastTextDomain:
    made = FastTextDomain(model=str(path))
    made.setup("cpu")
    return made


def _of_fasttext(path: Path, texts: list[str]) -> list[dict[str, float]]:
    """Every label of each text with its probability, the best first."""
    import fasttext

    labels, probabilities = fasttext.load_model(str(path)).predict([" ".join(text.split()) for text in texts], k=-1)
    names = [[label.removeprefix("__label__") for label in row] for row in labels]
    return [dict(zip(*pair, strict=True)) for pair in zip(names, probabilities, strict=True)]


def test_domain_is_fasttexts_best_label_and_is_learnt(classifier, trained, rows):
    held_out = rows[1::2]
    found = classifier.classify([text for _, text in held_out])
    assert found == [next(iter(row)) for row in _of_fasttext(trained["corpus"], [text for _, text in held_out])]
    most_common = Counter(domain for domain, _ in held_out).most_common(1)[0][1]
    assert sum(domain == label for (domain, _), label in zip(held_out, found, strict=True)) > 2 * most_common


def test_probabilities_are_fasttexts_by_label(classifier, trained, rows):
    texts = [text for _, text in rows[:200]]
    labels, found = classifier.probabilities(texts)
    expected = _of_fasttext(trained["corpus"], texts)
    assert labels[-1] == "other"
    assert set(labels[:-1]) == set(expected[0])
    assert found.dtype == np.float32
    by_label = np.array([[row.get(label, 0) for label in labels] for row in expected])
    np.testing.assert_array_equal(found, np.clip(by_label, 0, 1).astype(np.float32))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-3)
    assert [labels[i] for i in found.argmax(axis=1)] == classifier.classify(texts)


def test_no_probability_exceeds_one_where_fasttexts_do():
    path = QUICKSTART / "models" / "dclm-fasttext" / "model.bin"
    assert _of_fasttext(path, ["a"])[0]["cc"] > 1
    labels, found = _ready(path).probabilities(["a"])
    assert found[0, labels.index("cc")] == 1


def test_order_and_company_change_nothing(classifier, rows):
    texts = [text for _, text in rows[:50]]
    whole = classifier.classify(texts)
    assert classifier.classify(texts[::-1]) == whole[::-1]
    assert classifier.classify([*UNKNOWN, "All work and no play. " * 400_000, *texts])[-50:] == whole
    assert classifier.classify([]) == []
    assert classifier.probabilities([])[1].shape == (0, len(classifier.probabilities(texts)[0]))


@pytest.mark.parametrize(("name", "columns"), [("no-line-end", 4), ("knows-other", 3)])
def test_a_text_without_a_label_is_of_the_domain_other(trained, name, columns):
    made = _ready(trained[name])
    mixed = [*UNKNOWN, "only0", *UNKNOWN]
    n = len(UNKNOWN)
    domains = made.classify(mixed)
    assert [*domains[:n], *domains[n + 1 :]] == ["other"] * 2 * n
    assert domains[n] == made.classify(["only0"])[0] != "other"
    labels, found = made.probabilities(mixed)
    assert (len(labels), labels.count("other")) == (columns, 1)
    np.testing.assert_array_equal(found[:n], [[label == "other" for label in labels]] * n)
    np.testing.assert_array_equal(found[n], made.probabilities(["only0"])[1][0])
    assert found[n].max() < 1


def test_a_model_that_knows_the_end_of_a_line_labels_an_empty_text(classifier):
    assert classifier.classify(["", "the"])[0] in classifier.probabilities([])[0][:-1]


def test_labels_that_name_no_domain_are_refused(trained):
    with pytest.raises(InputError, match=r"nameless\.bin: labels that are empty"):
        _ready(trained["nameless"])


def test_the_file_is_the_one_that_the_options_name(trained):
    path = trained["corpus"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    options = {"model": str(path.parent), "file": path.name}
    FastTextDomain(**options, sha256=digest).setup("cpu")
    for wrong, message in [
        ({"model": str(path.parent)}, "give file: the name of the fastText model"),
        (options | {"file": "no.bin"}, "holds no.bin; give file"),
        (options | {"sha256": "0" * 64}, f"sha256 is {digest}, not 000"),
    ]:
        with pytest.raises(InputError, match=message):
            FastTextDomain(**wrong).setup("cpu")
    with pytest.raises(InputError, match="40 hex"):
        FastTextDomain(model="somebody/something", revision="main")


def test_a_copy_has_the_options_and_no_process(classifier):
    assert not classifier.uses_gpu
    for made in (copy.copy(classifier), pickle.loads(pickle.dumps(classifier))):  # noqa: S301
        assert made == classifier
        assert made._process is None
        made.setup("cpu")
        assert made.classify(["the"]) == classifier.classify(["the"])
