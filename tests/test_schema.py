"""The score table: what it takes from labels/, and what it refuses with which words."""

import math

import numpy as np
import pyarrow as pa
import pytest

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import ScoreTable, require_unique, score_column


def labels(**change) -> pa.Table:
    columns = {
        "doc_id": pa.array([10, 11, 12, 13]),
        "domain": pa.array(["Science", "Arts", "Science", "Arts"]),
        "tokens": pa.array([5, 6, 7, 8]),
        "score_edu": pa.array([0.5, 0.25, 0.125, 1.0], pa.float32()),
        "score_web": pa.array([1.0, 2.0, 3.0, 4.0], pa.float32()),
    }
    merged = {name: change.get(name, values) for name, values in columns.items()}
    return pa.table({name: values for name, values in merged.items() if values is not None})


def test_columns_arrive_in_their_places() -> None:
    table = ScoreTable.from_labels(labels(), ["web", "edu"])
    assert table.n == 4
    assert table.domains == ("Arts", "Science")
    assert table.domain_ids.tolist() == [1, 0, 1, 0]
    assert table.tokens.tolist() == [5, 6, 7, 8]
    assert table.scores.dtype == np.float32
    assert table.scores[:, 0].tolist() == [1, 2, 3, 4]
    assert table.scores[:, 1].tolist() == [0.5, 0.25, 0.125, 1]
    assert table.domain_tokens.tolist() == [14, 12]
    assert table.doc_ids.to_pylist() == [10, 11, 12, 13]
    assert score_column("edu") == "score_edu"


def test_the_domains_of_parameters_fix_the_positions() -> None:
    table = ScoreTable.from_labels(labels(), ["edu"], domains=["Science", "Games", "Arts"])
    assert table.domain_ids.tolist() == [0, 2, 0, 2]
    assert table.domain_tokens.tolist() == [12, 0, 14]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_domains_read_alike_from_every_arrow_type(kind: pa.DataType) -> None:
    domain = pa.array(["Science", "Arts", "Science", "Arts"]).cast(kind)
    assert ScoreTable.from_labels(labels(domain=domain), ["edu"]).domain_ids.tolist() == [1, 0, 1, 0]


def test_chunks_make_no_difference() -> None:
    whole = labels()
    table = ScoreTable.from_labels(pa.concat_tables([whole[:1], whole[1:1], whole[1:]]), ["edu"])
    assert table.doc_ids.to_pylist() == [10, 11, 12, 13]
    assert table.domain_ids.tolist() == [1, 0, 1, 0]


def test_an_empty_table_has_no_documents() -> None:
    for empty in (labels()[:0], pa.table({name: [] for name in labels().column_names})):
        table = ScoreTable.from_labels(empty, ["edu", "web"])
        assert table.n == 0
        assert table.scores.shape == (0, 2)
        assert table.domains == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score_edu": None}, "labels: no column score_edu; found doc_id, domain, tokens, score_web; label the corpus"),
        ({"doc_id": None, "tokens": None}, "labels: no column doc_id, tokens; found domain"),
        (
            {"domain": pa.array(["a", None, None, "b"])},
            "labels: column 'domain' is missing in 2 rows; label the corpus",
        ),
        ({"score_edu": pa.array([1.0, None, 1.0, 1.0])}, "labels: column 'score_edu' is missing in 1 rows"),
        ({"doc_id": pa.array([None] * 4)}, "labels: column 'doc_id' is missing in 4 rows"),
        (
            {"score_edu": pa.array([math.nan, 1, math.inf, -math.inf])},
            r"labels: score_edu is not finite for 3 documents, first \[10, 12, 13\]; repair the scorer or drop them",
        ),
        ({"tokens": pa.array([0, -1, 3, 4])}, "labels: 2 documents without tokens; drop empty documents first"),
        ({"tokens": pa.array([1.0, math.nan, 1, 1])}, "labels: column 'tokens' is of type double; give integers"),
        ({"score_edu": pa.array(["1"] * 4)}, "labels: column 'score_edu' is of type string; give numbers"),
        ({"doc_id": pa.array([1.0, 2, 3, 4])}, "labels: column 'doc_id' is of type double; give integers or strings"),
        (
            {"doc_id": pa.array(["a", "b", "a", "b"])},
            "doc_id: 2 ids occur more than once, such as a, b; every document needs its own id .remove",
        ),
    ],
)
def test_bad_labels_are_refused_with_place_value_and_remedy(change: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ScoreTable.from_labels(labels(**change), ["edu"])


def test_a_domain_outside_the_parameters_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"labels: domains Arts are not among those of the parameters \(Games, Science\)"
    ):
        ScoreTable.from_labels(labels(), ["edu"], domains=["Games", "Science"])


def test_five_examples_of_many_duplicates_are_shown() -> None:
    ids = pa.chunked_array([[i for i in range(100)], [i for i in range(50, 100)], [7, 7]])
    with pytest.raises(InputError, match="doc_id: 51 ids occur more than once, such as 7, 50, 51, 52, 53; every"):
        require_unique(ids)
    require_unique(pa.chunked_array([list(range(100)), list(range(100, 200))]))
