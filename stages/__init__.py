"""QuaDMix as NeMo Curator stages: label, rank, sample, export; one stage per file.

Each stage moves columns in and out of a Curator ``DocumentBatch`` and calls a function that is tested alone.
"""

if __name__ == "stages":
    raise ImportError("import from quadmix_plugin.stages, as in: from quadmix_plugin.stages import MergeRank")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quadmix_plugin.stages.count_tokens import CountTokens
    from quadmix_plugin.stages.domain_classify import DomainClassify
    from quadmix_plugin.stages.export_tokens import ExportTokens
    from quadmix_plugin.stages.gather_tokens import GatherTokens
    from quadmix_plugin.stages.merge_rank import FitRank, FitTail, MergeRank
    from quadmix_plugin.stages.normalise_scores import FitNormaliser, NormaliseScores
    from quadmix_plugin.stages.prepare_documents import PrepareDocuments
    from quadmix_plugin.stages.quality_score import QualityScore
    from quadmix_plugin.stages.select_documents import SelectDocuments
    from quadmix_plugin.stages.shards import ReadShards, WriteShards
    from quadmix_plugin.stages.sigmoid_sample import SigmoidSample
    from quadmix_plugin.stages.train_proxies import TrainProxies

_HOME = {
    "CountTokens": "count_tokens",
    "DomainClassify": "domain_classify",
    "ExportTokens": "export_tokens",
    "GatherTokens": "gather_tokens",
    "MergeRank": "merge_rank",
    "NormaliseScores": "normalise_scores",
    "PrepareDocuments": "prepare_documents",
    "QualityScore": "quality_score",
    "SelectDocuments": "select_documents",
    "SigmoidSample": "sigmoid_sample",
    "TrainProxies": "train_proxies",
    "FitNormaliser": "normalise_scores",
    "FitRank": "merge_rank",
    "FitTail": "merge_rank",
    "ReadShards": "shards",
    "WriteShards": "shards",
}

__all__ = [
    "CountTokens",
    "DomainClassify",
    "ExportTokens",
    "FitNormaliser",
    "FitRank",
    "FitTail",
    "GatherTokens",
    "MergeRank",
    "NormaliseScores",
    "PrepareDocuments",
    "QualityScore",
    "ReadShards",
    "SelectDocuments",
    "SigmoidSample",
    "TrainProxies",
    "WriteShards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
