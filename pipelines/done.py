"""Whether a step is finished as the recipe asks: some of what it asks is in no key, so it may be asked for later."""

from quadmix_plugin.pipelines import compare, evaluate, export
from quadmix_plugin.pipelines.context import Run


def step_is_done(run: Run, name: str) -> bool:
    """Whether a step is finished as the recipe asks.

    A comparison may be finished and be of other selections, an evaluation of other tasks, an export finished without
    the text.
    """
    if not run.step(name).is_done:
        return False
    if name == "compare":
        return compare.is_done(run, compare.contestants_of(run))
    if name == "evaluate":
        return evaluate.is_done(run)
    return name != "export" or export.is_done(run)
