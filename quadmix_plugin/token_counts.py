"""Counts the tokens of documents, all of them or by a sample of each; pure functions over texts and a tokenizer.

The estimate tokenises windows of a document, cut at white space where tokenizers cut too, and scales by characters.
It depends on the document alone.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray

from quadmix_plugin import models

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WINDOW = 64
_SAMPLED = 160
_SAMPLED_SHARE = 0.03
_FURTHEST_SPACE = 32
"""Characters within which a window looks for white space to begin and end at."""
_CHECKED = 64


def count_tokens(tokenizer: "Tokenizer", texts: Sequence[str]) -> NDArray[np.int64]:
    """Tokens of each text without special tokens, int64 [n]; on all cores that the tokenizers library may use."""
    encodings = tokenizer.encode_batch_fast([models.encodable(text) for text in texts], add_special_tokens=False)
    return np.fromiter((len(encoding) for encoding in encodings), dtype=np.int64, count=len(texts))


def estimate_tokens(tokenizer: "Tokenizer", texts: Sequence[str]) -> NDArray[np.int64]:
    """Tokens of each text by a sample of it, int64 [n]: about 160 characters and 3 % of the rest.

    Texts of up to twice the sample are counted whole, and those of whose words the sample has none.
    """
    samples = [sample(text) for text in texts]
    counted = count_tokens(tokenizer, samples)
    whole = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    sampled = np.fromiter(map(len, samples), dtype=np.int64, count=len(texts))
    estimated = np.rint(counted * (whole / np.maximum(sampled, 1))).astype(np.int64)
    # Words that lie between the windows are words all the same.
    missed = [int(i) for i in np.flatnonzero(estimated == 0) if texts[int(i)].strip()]
    estimated[missed] = count_tokens(tokenizer, [texts[i] for i in missed])
    return estimated


def sample(text: str) -> str:
    """Windows of about 64 characters, evenly spread over the text; a short text itself."""
    wanted = int(_SAMPLED + _SAMPLED_SHARE * len(text))
    if len(text) <= 2 * wanted:
        return text
    windows = -(-wanted // _WINDOW)
    stride = len(text) / windows
    parts, end = [], 0
    for j in range(windows):
        start = max(end, _space(text, int(j * stride + (stride - _WINDOW) / 2)))
        end = _space(text, start + _WINDOW)
        parts.append(text[start:end])
    return "".join(parts)


def _space(text: str, start: int) -> int:
    """The first space or line end from ``start`` on, or ``start`` where there is none near."""
    found = [at for mark in " \n" if (at := text.find(mark, start, start + _FURTHEST_SPACE)) >= 0]
    return min(found, default=start)


def is_checked(text: str) -> bool:
    """Whether the estimate of this text is compared with the whole count: one text in 64, by its hash."""
    return xxhash.xxh64_intdigest(text[:512].encode("utf-8", "replace")) % _CHECKED == 0


def compare(estimated: NDArray[np.int64], counted: NDArray[np.int64]) -> dict[str, int]:
    """What is needed to state the error of estimates: sums that can be added over shards."""
    return {
        "documents": int(counted.size),
        "tokens": int(counted.sum()),
        "estimated": int(estimated.sum()),
        "absolute_error": int(np.abs(estimated - counted).sum()),
    }


def estimate_error(sums: Iterable[dict[str, int]]) -> dict[str, float | int | None]:
    """Error of estimates over all shards: documents compared, ``bias`` of their sum, ``mean_error`` by tokens.

    Both are shares of the counted tokens; None where no document was compared.
    """
    total: dict[str, int] = {"documents": 0, "tokens": 0, "estimated": 0, "absolute_error": 0}
    for each in sums:
        for key in total:
            total[key] += each[key]
    documents, tokens = total["documents"], total["tokens"]
    if not tokens:
        return {"documents": documents, "bias": None, "mean_error": None}
    bias = (total["estimated"] - tokens) / tokens
    return {"documents": documents, "bias": bias, "mean_error": total["absolute_error"] / tokens}
