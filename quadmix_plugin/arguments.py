"""Checks of the arrays that a caller gives: what is wrong, in how many documents, where first, what to do."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters


def as_floats(values: ArrayLike, name: str) -> NDArray[Any]:
    """float32 and float64 as they are, other numbers as float64; an error for what is no array of numbers."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name}: not an array ({error}); give rows of one length") from error
    if array.dtype in (np.float32, np.float64):
        return array
    if array.size and array.dtype.kind not in "iufO":
        raise InputError(f"{name}: type {array.dtype}; give numbers")
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}; give numbers") from error


def require_drawable(theta: Parameters, thin: float = 1.0) -> None:
    """Raises InputError where θ can give a document more copies than int32 holds, or ``thin`` is no factor."""
    if not 0 < thin < np.inf:
        raise InputError(f"thin={thin}; give a factor above 0")
    with np.errstate(over="ignore"):
        most = (2.0**theta.eta + theta.epsilon) * thin
    if (bad := ~(most < np.iinfo(np.int32).max)).any():
        m = int(np.argmax(bad))
        raise InputError(
            f"eta[{m}] = {theta.eta[m]:.6g} and epsilon[{m}] = {theta.epsilon[m]:.6g} give up to {most[m]:.4g} copies "
            f"of a document, more than int32 holds; give smaller ones"
        )


def require_finite(values: NDArray[Any], name: str) -> NDArray[Any]:
    """``values`` itself, or an error that counts and shows what is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite only if all its terms are; it may overflow though all are.
        if values.size == 0 or np.isfinite(values.sum(dtype=np.float64)):
            return values
    bad = ~np.isfinite(values)
    bad = bad.any(axis=1) if bad.ndim == 2 else bad
    if bad.any():
        rows = np.flatnonzero(bad)
        raise InputError(
            f"{name}: {rows.size} of {values.shape[0]} documents have a score that is not finite (first rows "
            f"{rows[:5].tolist()}); drop them or repair the scorer"
        )
    return values


def require_domain_ids(domain_ids: ArrayLike, n_domains: int | None = None) -> NDArray[np.int64]:
    """``domain_ids`` as int64, or an error when they are not integers in [0, n_domains)."""
    ids = np.asarray(domain_ids)
    if ids.dtype.kind not in "iu" and ids.size:
        raise InputError(f"domain_ids: type {ids.dtype}; give integers, the domain's position in the parameters")
    ids = ids.astype(np.int64, copy=False)
    if ids.size and (ids.min() < 0 or (n_domains is not None and ids.max() >= n_domains)):
        outside = (ids < 0) | (ids >= n_domains) if n_domains is not None else ids < 0
        limit = (
            "from 0" if n_domains is None else f"from 0 to {n_domains - 1}, as the parameters have {n_domains} domains"
        )
        raise InputError(
            f"domain_ids: {int(outside.sum())} outside the range, first {ids[outside][0]}; give positions {limit}"
        )
    return ids


def require_tokens(tokens: ArrayLike) -> NDArray[np.int64]:
    """Token counts as int64, or an error when they are not positive integers."""
    counts = np.asarray(tokens)
    if counts.dtype.kind not in "iu" and counts.size:
        raise InputError(f"tokens: type {counts.dtype}; give integers")
    if counts.size and counts.dtype == np.uint64 and counts.max() > np.iinfo(np.int64).max:
        raise InputError(f"tokens: {counts.max()} is beyond int64; give token counts")
    if counts.size and counts.min() <= 0:
        bad = counts <= 0
        raise InputError(f"tokens: {int(bad.sum())} documents have {counts[bad][0]} tokens; drop empty documents first")
    return counts.astype(np.int64, copy=False)


def require_one_length(**arrays: NDArray[Any]) -> None:
    """Raises InputError when the arrays are not one-dimensional and of one length; names and shapes are shown."""
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        listed = [f"{name} {array.shape}" for name, array in arrays.items()]
        named = ", ".join(listed[:-1]) + f" and {listed[-1]}" if len(listed) > 1 else listed[0]
        raise InputError(f"{named} must be one-dimensional and of one length")
