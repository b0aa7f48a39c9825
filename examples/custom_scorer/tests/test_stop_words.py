"""The scorer alone, as installed: known shares, and texts that nobody hopes for. quadmix-plugin is not needed."""
# ruff: noqa: S101

import numpy as np
import pytest
from quadmix_heuristics.stop_words import StopWords

ODD = ["", " \n\t", "...", "\x00", "\ud800 the", "中文文本", "😀 😀", "a" * 100_000, "the " * 10_000]


def score(*texts: str, **options) -> list[float]:
    scorer = StopWords(**options)
    scorer.setup("cpu")
    return scorer.score(texts).tolist()


def test_the_score_is_the_share_of_listed_words() -> None:
    (found,) = score("The cat and the dog, that have to be with us.", min_words=1)
    assert found == np.float32(8 / 11)


def test_case_and_punctuation_do_not_matter() -> None:
    assert len(set(score("the end of it", "THE END OF IT!", "(The) end;\nof\tit", min_words=1))) == 1


def test_only_whole_words_count() -> None:
    assert score("theory often android withal", min_words=1) == [0.0]


def test_prose_is_above_a_list_of_keywords() -> None:
    prose, keywords = score("It was the best of times, and that is to be said. " * 9, "cheap shoes buy online " * 30)
    assert keywords == 0.0
    assert prose > 0.3


def test_a_short_text_is_scored_as_if_it_had_min_words() -> None:
    assert score("of the", "of the " * 10) == [np.float32(2 / 50), np.float32(20 / 50)]
    assert score("of the", "of the", min_words=2) == [1.0, 1.0]


def test_another_list_in_any_case() -> None:
    assert score("der Hund und the cat", words=("Der", "und"), min_words=1) == [np.float32(2 / 5)]


def test_an_empty_text_scores_zero_and_nothing_is_nan() -> None:
    for min_words in (1, 50):
        scores = StopWords(min_words=min_words).score(ODD)
        assert scores.dtype == np.float32
        assert scores.shape == (len(ODD),)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert scores[:3].tolist() == [0.0, 0.0, 0.0]
        assert scores[-1] == 1.0
    assert StopWords().score([]).shape == (0,)


def test_a_score_depends_on_its_text_alone() -> None:
    assert score(*ODD) == [score(text)[0] for text in ODD]


@pytest.mark.parametrize("options", [{"words": ()}, {"min_words": 0}, {"min_words": -1}])
def test_options_without_sense_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="give at least one of each"):
        StopWords(**options)
