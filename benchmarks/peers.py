"""QuaDMix's rank-and-sample as it is done today: numpy, pandas, polars and DuckDB, each in its own idiom.

Every engine takes plain arrays and one θ and returns int32 copies [n], by Eq. 1 to 3 to the letter (``ties="paper"``,
every document sorted). ``u`` is given, since the hash is the same for all: its cost is in our times and not in theirs.
``lexsort`` is the plain form and the reference; of the others each is the fastest of the forms tried, which for all
but DuckDB is one sort per domain on a single key.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from synthetic import SCORERS, Documents

from quadmix_plugin import Parameters

Copies = NDArray[np.int32]
Uniform = NDArray[np.float64]


def lexsort(table: Documents, u: Uniform, theta: Parameters) -> Copies:
    """One full sort by (domain, q̄), cumulated tokens, tie groups closed at their last document."""
    merged = _merge(table, theta)
    order = np.lexsort((merged, table.domain_ids))
    domain, merged, mass = table.domain_ids[order], merged[order], np.cumsum(table.tokens[order])
    last = np.flatnonzero(np.append((domain[1:] != domain[:-1]) | (merged[1:] != merged[:-1]), True))
    mass = np.repeat(mass[last], np.diff(last, prepend=-1))
    total = np.bincount(table.domain_ids, weights=table.tokens, minlength=theta.n_domains)
    rank = (mass - (np.cumsum(total) - total)[domain]) / total[domain]
    inside = rank <= theta.omega[domain]
    return _draw(table, u, theta, order[inside], rank[inside])


def numpy(table: Documents, u: Uniform, theta: Parameters) -> Copies:
    """The same, one domain after the other."""
    merged = _merge(table, theta)
    by_domain = np.argsort(table.domain_ids.astype(np.uint8), kind="stable")  # 8 bits: a radix sort
    sizes = np.bincount(table.domain_ids, minlength=theta.n_domains)
    rows, ranks = [], []
    for m, part in enumerate(np.split(by_domain, np.cumsum(sizes)[:-1])):
        order = part[np.argsort(merged[part])]
        values, mass = merged[order], np.cumsum(table.tokens[order])
        last = np.flatnonzero(np.append(values[1:] != values[:-1], True))[: len(values)]
        rank = np.repeat(mass[last] / mass[-1:], np.diff(last, prepend=-1))
        inside = np.searchsorted(rank, theta.omega[m], side="right")
        rows.append(order[:inside])
        ranks.append(rank[:inside])
    return _draw(table, u, theta, np.concatenate(rows), np.concatenate(ranks))


def pandas(table: Documents, u: Uniform, theta: Parameters) -> Copies:
    """groupby, then per domain: sort, cumsum, backward fill over ties."""
    import pandas as pd

    frame = pd.DataFrame(
        {"domain": table.domain_ids.astype(np.uint8), "merged": _merge(table, theta), "tokens": table.tokens}
    )
    inside = []
    for domain, documents in frame.groupby("domain"):
        ordered = documents.sort_values("merged")
        mass = ordered["tokens"].cumsum()
        last = ordered["merged"] != ordered["merged"].shift(-1)
        rank = mass.where(last).bfill() / mass.iloc[-1]
        inside.append(rank[rank <= theta.omega[int(str(domain))]])
    rank = pd.concat(inside)
    return _draw(table, u, theta, rank.index.to_numpy(), rank.to_numpy())


def polars(table: Documents, u: Uniform, theta: Parameters) -> Copies:
    """partition_by, then one lazy query per domain, all collected together."""
    import polars as pl

    # Tokens stay Int64: polars sums Int32 over a group in Int32, which wraps without an error.
    scores = {name: np.ascontiguousarray(table.normalised[:, n]) for n, name in enumerate(SCORERS)}
    frame = pl.DataFrame({"domain": table.domain_ids, "tokens": table.tokens, "u": u, **scores}).with_row_index("row")
    queries = []
    for (m,), part in frame.partition_by("domain", as_dict=True, include_key=False).items():
        omega, lam, eta, epsilon = (float(x[m]) for x in (theta.omega, theta.lam, theta.eta, theta.epsilon))
        weighted = [float(a) * pl.col(name).cast(pl.Float64) for a, name in zip(theta.alpha[m], SCORERS, strict=True)]
        merged, rank, value = weighted[0] + weighted[1] + weighted[2], pl.col("rank"), pl.col("value")
        last = (pl.col("merged") != pl.col("merged").shift(-1)).fill_null(True)
        queries.append(
            part.lazy()
            .select("row", "u", "tokens", merged=merged)
            .sort("merged")
            .with_columns(mass=pl.col("tokens").cum_sum(), total=pl.col("tokens").sum(), last=last)
            .select("row", "u", rank=pl.when("last").then("mass").backward_fill() / pl.col("total"))
            .filter((rank <= omega) | (pl.col("u") < epsilon))
            .with_columns(
                value=pl.when(rank <= omega).then((2 / (1 + (lam * (rank - omega)).exp())) ** eta).otherwise(0)
            )
            .with_columns(value=value + epsilon)
            .select("row", copies=value.floor().cast(pl.Int32) + (pl.col("u") < value - value.floor()).cast(pl.Int32))
        )
    selected = pl.concat(pl.collect_all(queries))
    return _scatter(len(u), selected["row"].to_numpy(), selected["copies"].to_numpy())


_SQL = """
WITH merged AS (
    SELECT row, domain, tokens, u, alpha_a * a::DOUBLE + alpha_b * b::DOUBLE + alpha_c * c::DOUBLE AS merged
    FROM documents JOIN theta USING (domain)
), ranked AS (
    SELECT row, domain, u, (sum(tokens) OVER (PARTITION BY domain ORDER BY merged RANGE UNBOUNDED PRECEDING))::DOUBLE
        / (sum(tokens) OVER (PARTITION BY domain))::DOUBLE AS rank
    FROM merged
), expected AS (
    SELECT row, u, CASE WHEN rank <= omega THEN pow(2 / (1 + exp(lam * (rank - omega))), eta) ELSE 0 END + epsilon AS S
    FROM ranked JOIN theta USING (domain)
    WHERE rank <= omega OR u < epsilon
)
SELECT row, (floor(S)::INT + (u < S - floor(S))::INT)::INT AS copies FROM expected
"""


def duckdb(table: Documents, u: Uniform, theta: Parameters) -> Copies:
    """One SQL query; a window sum over RANGE counts the whole tie group."""
    import duckdb as db
    import pyarrow as pa

    scores = {name: np.ascontiguousarray(table.normalised[:, n]) for n, name in enumerate(SCORERS)}
    rows = np.arange(len(u), dtype=np.int32)
    documents = {"row": rows, "domain": table.domain_ids.astype(np.uint8), "tokens": table.tokens, "u": u, **scores}
    weights = {f"alpha_{name}": theta.alpha[:, n].copy() for n, name in enumerate(SCORERS)}
    numbers = {name: getattr(theta, name) for name in ("lam", "omega", "eta", "epsilon")}
    with db.connect() as connection:
        connection.execute("SET preserve_insertion_order = false")
        connection.register("documents", pa.table(documents))
        connection.register(
            "theta", pa.table({"domain": np.arange(theta.n_domains, dtype=np.uint8), **weights, **numbers})
        )
        selected = connection.sql(_SQL).fetchnumpy()
    return _scatter(len(u), selected["row"], selected["copies"])


PEERS: dict[str, Callable[[Documents, Uniform, Parameters], Copies]] = {
    "lexsort": lexsort,
    "numpy": numpy,
    "pandas": pandas,
    "polars": polars,
    "duckdb": duckdb,
}


def _merge(table: Documents, theta: Parameters) -> NDArray[np.float64]:
    """Eq. 1, over scorers in order, in float64: every engine gets the same q̄ to the last bit."""
    merged = np.zeros(len(table.domain_ids))
    for n in range(theta.n_scorers):
        merged += theta.alpha[:, n].take(table.domain_ids) * table.normalised[:, n]
    return merged


def _draw(table: Documents, u: Uniform, theta: Parameters, inside: NDArray[np.int64], rank: Uniform) -> Copies:
    """Eq. 3 and the draw, the power only for the documents ``inside`` the window; ε < 1, as in Algorithm 1."""
    copies = (u < theta.epsilon.take(table.domain_ids)).astype(np.int32)
    m = table.domain_ids[inside]
    value = (2 * expit(theta.lam[m] * (theta.omega[m] - rank))) ** theta.eta[m] + theta.epsilon[m]
    whole = np.floor(value)
    copies[inside] = whole + (u[inside] < value - whole)
    return copies


def _scatter(n: int, rows: NDArray[np.integer], copies: Copies) -> Copies:
    result = np.zeros(n, np.int32)
    result[rows] = copies
    return result
