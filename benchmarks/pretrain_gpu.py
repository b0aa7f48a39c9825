"""Pretraining on GPUs: tokens/s, MFU and memory of 530m, and the loss of a tiny shape on a GPU against the CPU's.

    python benchmarks/pretrain_gpu.py                 # NOT YET RUN ON A GPU: no figure of it exists
    python benchmarks/pretrain_gpu.py --gpus 8        # data parallel, by torchrun
    python benchmarks/pretrain_gpu.py --rehearse      # all parts, tiny, on a CPU; figures mean nothing

The data are random ids with the frequencies of text (Zipf), in a vocabulary of 50,432; the loss is looked at for the
tiny shape only, which trains on the quickstart corpus from the same weights on the same batches. Speed is the median
over lines of ``metrics.jsonl`` but the first two. Needs torch, megatron-core and the project's own source.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the project need not be installed on a borrowed machine

from quadmix_plugin.corpus import list_files
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pretraining.job import PretrainJob
from quadmix_plugin.pretraining.metrics import FILE, read
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.proxy.validation import choose_rows, read_rows, tokenise_rows

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
TOKENIZER = QUICKSTART / "models" / "tokenizer"
EOD, TINY_UPDATES = 0, 60


def main() -> None:
    """Runs both parts and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="sequences of 2048 per update and GPU")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    name = "a CPU" if given.rehearse else f"{given.gpus} × {torch.cuda.get_device_name(0)}"
    print(f"torch {torch.__version__}, {name}")
    with TemporaryDirectory() as folder:
        place = Path(folder)
        for layers in ("local",) if given.rehearse else ("local", "transformer_engine"):
            try:
                speed(place / layers, given, layers)
            except Exception as error:  # TransformerEngine need not be there
                print(f"{layers}: {type(error).__name__}: {error}")
        agreement(place, given.rehearse)


def speed(place: Path, given: argparse.Namespace, layers: str) -> None:
    """530m on random ids."""
    shape, vocabulary, context = ("proxy-tiny", 50_432, 128) if given.rehearse else ("530m", 50_432, 2048)
    batch = 4 if given.rehearse else given.batch * given.gpus
    options = {
        "shape": shape, "batch_size": batch, "micro_batch_size": given.micro_batch, "learning_rate": 3e-4,
        "log_every": 5, "save_every": given.updates, "layers": layers, "gpus": 0 if given.rehearse else given.gpus,
        "device": "cpu" if given.rehearse else "auto",
    }  # fmt: skip
    rng = np.random.default_rng(1)
    documents = [np.minimum(rng.zipf(1.2, 1000), vocabulary - 1) for _ in range(max(batch * context // 1000, 50))]
    job = make_job(place, documents, vocabulary, given.updates * batch * context, options)
    MegatronTrainer(**options).pretrain(job)
    lines = read(job.place / FILE)[2:]
    found = {key: [line[key] for line in lines if key in line] for key in ("tokens_per_second", "mfu", "memory_gib")}
    said = ", ".join(f"{key} {median(values):.4g}" for key, values in found.items() if values)
    print(f"{shape}, {layers} layers, {batch} × {context} tokens an update: {said}")


def agreement(place: Path, rehearse: bool) -> None:
    """The tiny shape on both devices."""
    tokenizer = load_tokenizer(str(TOKENIZER))
    texts = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"]).slice(0, 400)["text"].to_pylist()
    documents = [np.array(each.ids) for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    curves = []
    for device, dtype in (("cpu", "float32"), *(() if rehearse else (("cuda", "float32"), ("cuda", "bfloat16")))):
        options = {"shape": "tiny", "device": device, "dtype": dtype, "log_every": 10, "save_every": 1000}
        job = make_job(place / f"{device}-{dtype}", documents, 4096, TINY_UPDATES * 4 * 128, options)
        MegatronTrainer(**options).pretrain(job)
        curves.append([line["loss"] for line in read(job.place / FILE)])
        apart = max(abs(a - b) for a, b in zip(curves[0], curves[-1], strict=True))
        print(
            f"tiny on {device} in {dtype}: loss {curves[-1][0]:.4f} to {curves[-1][-1]:.4f}, {apart:.2g} from the CPU's"
        )


def make_job(place: Path, documents: list[Any], vocabulary: int, tokens: int, options: dict[str, Any]) -> PretrainJob:
    """Token files and a job over them."""
    place.mkdir(parents=True)
    for name, some in (("train", documents), ("validation", documents[:20])):
        write_documents(some, place / f"{name}.bin", place / f"{name}.idx", vocabulary, EOD)
        table = {"doc_id": list(range(len(some))), "copy": [0] * len(some), "tokens": [len(ids) + 1 for ids in some]}
        pq.write_table(pa.table(table), place / f"{name}.documents.parquet")
    rows = choose_rows(read_rows(list_files(str(QUICKSTART / "validation.jsonl")), "prompt", "response", "task"), 20)
    pq.write_table(tokenise_rows(rows, load_tokenizer(str(TOKENIZER)), EOD, 128), place / "answers.parquet")
    total = sum(len(ids) + 1 for ids in documents)
    return PretrainJob(
        root=str(place / "run"), step="pretrain", key="key", selector="benchmark", seed=1,
        prefixes=(str(place / "train"),), documents=(str(place / "train.documents.parquet"),), tokens=tokens,
        selected_tokens=total, unique_tokens=total, validation_tokens=str(place / "validation"),
        validation=str(place / "answers.parquet"), vocabulary=vocabulary, eod=EOD, tokenizer=str(TOKENIZER),
        trainer="megatron", part="part.json", model="model", folder="training", options=options,
    )  # fmt: skip


if __name__ == "__main__":
    main()
