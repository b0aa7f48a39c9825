"""The search for θ* against the paper's procedure, on losses that are known; and what fitting and searching cost.

python benchmarks/search.py worlds --proxies 512 --seeds 10
python benchmarks/search.py cost
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from known_loss import KnownLoss, theta_space

from quadmix_plugin import registry
from quadmix_plugin.search.evaluation import cross_validate
from quadmix_plugin.search.gain import Prediction
from quadmix_plugin.search.proposals import SearchSettings, propose
from quadmix_plugin.search.regressors import LightGBM


def worlds(proxies: int, seeds: range, ratio: float, draws: int, regressor: str) -> None:
    """True loss by way of searching, a row per known loss; how often the default wins and its interval holds."""
    make, space = registry.load("regressors", regressor), theta_space()
    names = ("trust_region", "draws", "paper")
    print(f"| loss | {' | '.join(names)} | best proxy | predicted, 95 % | wall s |\n|{'---|' * 7}")
    won = held = 0
    gains = []
    for seed in seeds:
        truth = KnownLoss.of(seed)
        thetas, losses, _ = truth.proxies(proxies, ratio, seed)
        begun = time.perf_counter()
        found = propose(space, thetas, {"y": losses}, make, settings=SearchSettings(draws=draws, seed=seed))
        seconds = time.perf_counter() - begun
        judged = cross_validate(make, space.features(thetas), {"y": losses}, repeats=1)["y"]
        error = float(np.sqrt(np.mean((judged.real - judged.mean_predicted) ** 2)))
        real = {name: float(truth(found.ways[name].point[None])[0]) for name in names}
        stated = Prediction(found.best.losses["y"], error, found.best.sd["y"], judged.mean_predicted.min())
        won += real["trust_region"] < real["paper"]
        held += stated.low <= real["trust_region"] <= stated.high
        sd = float(truth(thetas).std())
        gains.append((real["paper"] - real["trust_region"]) / sd)
        best = float(truth(found.best_proxy.point[None])[0])
        values = " | ".join(f"{real[name]:.3f}" for name in names)
        interval = f"{stated.loss:.3f} ({stated.low:.3f}–{stated.high:.3f})"
        print(f"| {seed} | {values} | {best:.3f} | {interval} | {seconds:.1f} |", flush=True)
    print(
        f"\ndefault better than the paper's in {won} of {len(seeds)}, median gain {np.median(gains):.2f} sd across θ;"
    )
    print(f"true loss inside the stated interval in {held} of {len(seeds)}")


def cost(rows: int, draws: int) -> None:
    """Core-seconds of fitting trees and predicting all draws, and wall seconds of the whole default search."""
    truth, space = KnownLoss.of(0), theta_space()
    thetas, losses, _ = truth.proxies(rows, 2.5, 0)
    x = space.features(thetas)
    candidates = np.concatenate([space.features(points) for _, points in space.draw(draws, 1)])
    for name, model in (
        ("lightgbm", LightGBM()),
        ("lightgbm-published", registry.load("regressors", "lightgbm-published")()),
    ):
        begun = time.process_time()
        model.fit(x, losses)
        model.predict(candidates)
        seconds = time.process_time() - begun
        print(f"{name}: fit of {x.shape[0]} × {x.shape[1]} and {draws:,} predictions: {seconds:.1f} core-s")
    for name in ("lightgbm", "gp", "auto"):
        wall, core = time.perf_counter(), time.process_time()
        propose(space, thetas, {"y": losses}, registry.load("regressors", name), settings=SearchSettings(draws=draws))
        wall, core = time.perf_counter() - wall, time.process_time() - core
        print(f"{name}: whole search, fit included: {wall:.1f} s wall, {core:.1f} core-s", flush=True)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("worlds", "cost"))
    parser.add_argument("--proxies", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--signal-to-noise", type=float, default=2.5)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--regressor", default="gp")
    given = parser.parse_args()
    if given.part == "worlds":
        worlds(
            given.proxies,
            range(given.first_seed, given.first_seed + given.seeds),
            given.signal_to_noise,
            given.draws,
            given.regressor,
        )
    else:
        cost(3000, given.draws)


if __name__ == "__main__":
    main()
