"""QuaDMix: quality-diversity balanced data selection for language model pretraining (arXiv 2504.16511).

The names below are the stable Python interface; everything is loaded on first use, so that importing the
package costs nothing and needs neither torch nor a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quadmix_plugin.parameters import Parameters, sample_parameters
    from quadmix_plugin.ranking import merge_quality, quality_rank
    from quadmix_plugin.sampling import count_copies, draw_copies, sampling_value

__version__ = "0.1.0"

_HOME = {
    "Parameters": "parameters",
    "sample_parameters": "parameters",
    "merge_quality": "ranking",
    "quality_rank": "ranking",
    "sampling_value": "sampling",
    "draw_copies": "sampling",
    "count_copies": "sampling",
}

__all__ = [
    "Parameters",
    "count_copies",
    "draw_copies",
    "merge_quality",
    "quality_rank",
    "sample_parameters",
    "sampling_value",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
