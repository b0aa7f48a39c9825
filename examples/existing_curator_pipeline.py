"""QuaDMix inside a NeMo Curator pipeline that somebody already has.

New documents are read, filtered, labelled, ranked and sampled with what an earlier ``quadmix run`` froze: θ*, the
normaliser and the rank map. One pass, no shuffle; each document's copies depend on that document alone, so new
shards can be added at any time without changing old draws.

    python examples/existing_curator_pipeline.py --corpus new/*.parquet --run runs/quickstart --out selected/
"""

import argparse
from pathlib import Path

from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.text.filters import ScoreFilter
from nemo_curator.stages.text.filters.heuristic import WordCountFilter
from nemo_curator.stages.text.io.reader import ParquetReader
from nemo_curator.stages.text.io.writer import ParquetWriter

from quadmix_plugin.executors import DaskExecutor
from quadmix_plugin.stages import DomainClassify, MergeRank, QualityScore, SigmoidSample

MODELS = Path(__file__).parent / "quickstart" / "models"


def build(corpus: list[str], run: Path, out: Path, models: Path = MODELS, seed: int = 0) -> Pipeline:
    theta = str(run / "selection" / "theta.json")
    pipeline = Pipeline(name="select_new_documents")
    pipeline.add_stage(ParquetReader(file_paths=corpus, files_per_partition=1, fields=["doc_id", "text"]))
    pipeline.add_stage(ScoreFilter(WordCountFilter(min_words=50), text_field="text"))
    pipeline.add_stage(DomainClassify(options={"model": str(models / "domain")}))
    for scorer in ("fineweb-edu", "dclm-fasttext", "ask-llm"):
        pipeline.add_stage(QualityScore(scorer=scorer, options={"model": str(models / scorer)}))
    pipeline.add_stage(
        MergeRank(
            theta=theta,
            normaliser=str(run / "normalise" / "normaliser.json"),
            rank_map=str(run / "selection" / "rank_map.parquet"),
        )
    )
    pipeline.add_stage(SigmoidSample(theta=theta, seed=seed, expand=True))
    pipeline.add_stage(ParquetWriter(path=str(out), fields=["doc_id", "text", "domain", "sampling_value", "copies"]))
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, help="Parquet files with doc_id and text")
    parser.add_argument("--run", type=Path, required=True, help="run directory of quadmix")
    parser.add_argument("--out", type=Path, required=True, help="folder for the selected documents")
    arguments = parser.parse_args()
    with DaskExecutor() as executor:
        build(arguments.corpus, arguments.run, arguments.out).run(executor)


if __name__ == "__main__":  # Dask's workers import this file
    main()
