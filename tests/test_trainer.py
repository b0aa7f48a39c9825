"""Training: the same bits twice, learning on real text, clear errors, and resumable stages around it."""

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from nemo_curator.tasks import DocumentBatch
from tokenizers import processors
from torch.nn import functional

from quadmix_plugin import models, sample_parameters
from quadmix_plugin.corpus import list_files
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.parameters import ParameterSpace
from quadmix_plugin.proxy import training
from quadmix_plugin.proxy.model import Decoder
from quadmix_plugin.proxy.parts import measured, merge_parts, part_path
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.selection import ProxyTable
from quadmix_plugin.proxy.trainer import TorchTrainer
from quadmix_plugin.proxy.validation import Row, choose_rows, evaluate, read_rows, tokenise_rows, validation_sets
from quadmix_plugin.stages.pretrain_selections import PretrainSelections, pretrain_tasks
from quadmix_plugin.stages.train_proxies import TrainProxies, proxy_tasks
from quadmix_plugin.store import RunDirectory

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
TINY: dict[str, Any] = {"shape_options": {"width": 32, "ffn": 64, "heads": 2, "context": 64}}


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(str(QUICKSTART / "models" / "tokenizer"))


@pytest.fixture(scope="module")
def rows():
    return read_rows(list_files(str(QUICKSTART / "validation.jsonl")), "prompt", "response", "task")


@pytest.fixture(scope="module")
def validation(rows, tokenizer):
    return tokenise_rows(choose_rows(rows, 40), tokenizer, 0, 64)


@pytest.fixture(scope="module")
def corpus():
    return pq.read_table(QUICKSTART / "corpus.parquet", columns=["doc_id", "text", "true_domain"]).slice(0, 500)


@pytest.fixture(scope="module")
def pool_prefix(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    encodings = tokenizer.encode_batch(corpus["text"].to_pylist(), add_special_tokens=False)
    write_documents((e.ids for e in encodings), folder / "p.bin", folder / "p.idx", 4096, 0)
    return str(folder / "p")


@pytest.fixture(scope="module")
def pieces(pool_prefix):
    return cut_pieces(TokenPool.open([pool_prefix]), None, None, 64, 12_800, 1)[:]


@pytest.fixture(scope="module")
def learnt(pool_prefix, validation):
    pieces = cut_pieces(TokenPool.open([pool_prefix]), None, None, 128, 100_000, 1)
    return TorchTrainer(batch_size=2).train(pieces, validation_sets(validation, "search"), 0, 4096)


def test_real_text_is_learnt_below_the_unigram_entropy(learnt):
    assert learnt.curve[-1].train_loss < learnt.unigram_entropy - 0.2
    assert learnt.curve[0].train_loss > learnt.unigram_entropy
    assert learnt.tokens_seen == learnt.curve[-1].tokens_seen == 782 * 128
    assert set(learnt.losses) == {"arc_easy", "hellaswag", "mmlu", "openbookqa"}


def test_the_same_seed_gives_the_same_bits_whatever_the_threads(pieces, validation, monkeypatch):
    sets = validation_sets(validation, "search")
    inside = []
    monkeypatch.setattr(training, "evaluate", lambda *given: inside.append(torch.get_num_threads()) or evaluate(*given))
    before = torch.get_num_threads()
    results = []
    try:
        for threads, seed in ((1, 0), (2, 0), (2, 1)):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            results.append(TorchTrainer(**TINY).train(pieces[:100], sets, seed, 4096))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert set(inside) == {1}
    same, again, other = results
    assert same.losses == again.losses
    assert same.curve == again.curve
    assert all(torch.equal(a, b) for a, b in zip(same.model.parameters(), again.model.parameters(), strict=True))
    assert same.losses != other.losses


def test_measuring_in_between_changes_nothing_and_is_told_at_the_shares_asked(pieces, validation):
    sets = validation_sets(validation, "search")
    plain = TorchTrainer(**TINY).train(pieces[:100], sets, 0, 4096)
    watched = TorchTrainer(**TINY).train(pieces[:100], sets, 0, 4096, eval_at=(0.5, 0.1, 0.25))
    known = [point for point in watched.curve if point.losses]
    assert [(p.share, p.step, p.tokens_seen) for p in known] == [
        (share, step, step * 4 * 64) for share, step in ((0.1, 2), (0.25, 6), (0.5, 12), (1.0, 25))
    ]
    assert plain.losses == watched.losses == known[-1].losses
    assert [point.losses for point in plain.curve[:-1]] == [{}] * 19
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True))


def test_every_share_asked_is_told_of_a_short_training(pieces, validation):
    sets = validation_sets(validation, "search")
    short = TorchTrainer(**TINY).train(pieces[:16], sets, 0, 4096, eval_at=(0.1, 0.25, 0.5))
    assert [point.share for point in short.curve if point.losses] == [0.1, 0.25, 0.5, 1.0]


def test_training_ends_where_it_is_told_to_stop(pieces, validation):
    sets, asked = validation_sets(validation, "search"), []

    def stop(share, losses):
        asked.append((share, losses))
        return share == at

    at = 1.0  # never asked there
    whole = TorchTrainer(**TINY).train(pieces[:100], sets, 0, 4096, eval_at=(0.1, 0.25, 0.5), stop=stop)
    assert (whole.share, [share for share, _ in asked]) == (1.0, [0.1, 0.25, 0.5])
    asked, at = [], 0.25
    stopped = TorchTrainer(**TINY).train(pieces[:100], sets, 0, 4096, eval_at=(0.1, 0.25, 0.5), stop=stop)
    assert [share for share, _ in asked] == [0.1, 0.25]
    assert (stopped.share, stopped.tokens_seen) == (0.25, 6 * 4 * 64)
    assert stopped.curve == tuple(point for point in whole.curve if point.share <= 0.25)
    assert stopped.losses == asked[-1][1] == stopped.curve[-1].losses
    assert stopped.losses != whole.losses


@pytest.mark.parametrize(("steps", "rate", "learnt"), [(149, 4e-3, None), (160, 1e-9, False), (160, 4e-3, True)])
def test_whether_a_model_learnt_is_told_after_enough_steps(validation, steps, rate, learnt):
    generator = np.random.default_rng(0)  # ids of uneven frequency, each followed by the next one
    data = (generator.geometric(0.05, (steps, 1)) + np.arange(17)) % 50
    sizes = {"width": 16, "ffn": 32, "heads": 1, "layers": 1, "context": 16}
    trainer = TorchTrainer(shape_options=sizes, batch_size=1, learning_rate=rate, dtype="float32")
    short = [dataclasses.replace(each, ids=each.ids[:1, :17] % 50, lengths=np.array([17]), starts=np.array([9]))
             for each in validation_sets(validation, "search")[:1]]  # fmt: skip
    assert trainer.train(data, short, 0, 50).learnt is learnt


@pytest.mark.parametrize(("mask_prompt", "trim"), [(True, False), (False, False), (False, True)])
def test_bits_per_byte_are_those_of_the_predicted_text(rows, pieces, mask_prompt, trim):
    tokenizer = models.load_tokenizer(str(QUICKSTART / "models" / "tokenizer"))
    if trim:  # as that of GPT-NeoX: the offsets of a token leave its space out
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chosen = [dataclasses.replace(row, response=f"« {row.response}") for row in choose_rows(rows, 16)]
    table = tokenise_rows(chosen, tokenizer, 0, 32, mask_prompt)
    assert 0 < sum(table["truncated"].to_pylist()) < table.num_rows
    sets = validation_sets(table, "search")
    result = TorchTrainer(**TINY).train(pieces[:16], sets, 0, 4096)
    found = measured(result, sets)["bits_per_byte"]
    assert set(found) == {each.task for each in sets}
    for task, bits_per_byte in found.items():
        nats = n_bytes = 0
        for row in table.to_pylist():
            if (row["task"], row["part"]) == (task, "search"):
                ids = torch.tensor(row["ids"])
                with torch.no_grad():
                    each = functional.cross_entropy(result.model(ids[None, :-1])[0], ids[1:], reduction="none")
                nats += float(each[row["start"] - 1 :].sum())
                n_bytes += len(tokenizer.decode(row["ids"][row["start"] :]).encode())
        assert bits_per_byte == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)


def test_low_precision_stays_close_to_float32(pieces, validation):
    sets = validation_sets(validation, "search")
    exact, low = (
        TorchTrainer(**TINY, dtype=dtype).train(pieces, sets, 0, 4096).losses for dtype in ("float32", "bfloat16")
    )
    assert exact != low
    assert all(exact[task] == pytest.approx(low[task], abs=0.03) for task in exact)


def test_the_loss_is_the_mean_over_response_tokens(validation, learnt):
    table = validation.filter(pa.array([part == "report" for part in validation["part"].to_pylist()]))
    for each in validation_sets(validation, "report"):
        total = count = 0
        for row in table.to_pylist():
            if row["task"] == each.task:
                ids = torch.tensor(row["ids"])
                with torch.no_grad():
                    nats = functional.cross_entropy(learnt.model(ids[None, :-1])[0], ids[1:], reduction="none")
                total += float(nats[row["start"] - 1 :].sum())
                count += len(row["ids"]) - row["start"]
        assert count == each.n_targets
        assert evaluate(learnt.model, each) == pytest.approx(total / count, abs=1e-4)


def test_rows_are_split_by_content_and_cut_from_the_left(rows, tokenizer):
    parts = np.array([row.part for row in rows])
    assert 0.4 < (parts == "search").mean() < 0.6
    assert [row.part for row in rows[::-1]] == parts[::-1].tolist()
    row = Row("t", "one two three four five six seven eight", "the answer")
    full, cut, whole = (
        tokenise_rows([row], tokenizer, 0, context, mask).to_pylist()[0]
        for context, mask in ((64, True), (8, True), (64, False))
    )
    assert tokenizer.decode(full["ids"]) == row.prompt + " " + row.response
    assert tokenizer.decode(full["ids"][full["start"] :]) == " the answer"
    assert cut["ids"] == [0, *full["ids"][-8:]]
    assert (cut["truncated"], full["truncated"], whole["start"]) == (True, False, 1)


def test_faulty_validation_data_is_named(tmp_path, tokenizer, rows):
    with pytest.raises(InputError, match="no rows"):
        tokenise_rows([], tokenizer, 0, 64)
    for line, reason in (('{"prompt": "a"}', "response"), ('{"prompt": "a", "response": " "}', "empty")):
        path = tmp_path / "v.jsonl"
        path.write_text(line + "\n")
        with pytest.raises(InputError, match=rf"v\.jsonl: row 1.*{reason}"):
            read_rows(list_files(str(path)), "prompt", "response", None)
    one_part = [row for row in rows if row.part == "search"][:5]
    with pytest.raises(InputError, match="none of them in the part 'report'"):
        validation_sets(tokenise_rows(one_part, tokenizer, 0, 64), "report")


def test_bad_training_data_and_divergence_are_errors(pieces, validation):
    sets = validation_sets(validation, "search")
    for data, vocabulary, reason in (
        (np.full_like(pieces[:50], 7), 4096, "distinct"),
        (pieces[:50], 100, "vocabulary"),
        (pieces[:3], 4096, "batch"),
    ):
        with pytest.raises(InputError, match=reason):
            TorchTrainer(**TINY).train(data, sets, 0, vocabulary)
    with pytest.raises(InputError, match="no sets"):
        TorchTrainer(**TINY).train(pieces[:50], [], 0, 4096)
    with pytest.raises(QuadmixError, match=r"diverged.*learning_rate"):
        TorchTrainer(**TINY, learning_rate=1e30).train(pieces[:80], sets, 0, 4096)


@pytest.fixture
def work(run_dir, corpus, pool_prefix, validation):
    """A TrainProxies stage over 500 real documents, and two θ to train; the last one selects almost nothing."""
    domains, domain_ids = np.unique(corpus["true_domain"].to_pylist(), return_inverse=True)
    lengths = TokenPool.open([pool_prefix]).lengths
    scores = np.random.default_rng(0).random((len(lengths), 2)).astype(np.float32)
    ids = corpus["doc_id"].combine_chunks()
    ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids
    table = ProxyTable(ids, domain_ids.astype(np.int64), lengths - 1, scores, tuple(domains.tolist()), ("a", "b"))
    step = run_dir.step("proxies", "key")
    step.write_table("proxies/table.parquet", table.to_arrow())
    step.write_table("proxies/validation.parquet", validation)
    thetas = sample_parameters(2, 2, len(domains), 0, space=ParameterSpace(omega_max=1.0))
    none = sample_parameters(1, 2, len(domains), 0, space=ParameterSpace(omega_max=1e-9, epsilon_max=0))
    vectors = [theta.to_vector().tolist() for theta in (*thetas, *none)]
    rows = {
        "proxy": pa.array([0, 1, 2], pa.int32()),
        "kind": ["draw"] * 3,
        "seed": [0, 0, 0],
        "stream": [0, 1, 2],
        "theta": vectors,
    }
    paths = {name: str(step.path(f"proxies/{name}.parquet")) for name in ("table", "validation")}
    stage = TrainProxies(step, paths["table"], [pool_prefix], paths["validation"], 8000, 4096, options=TINY)
    return stage, proxy_tasks(pa.table(rows))


def test_the_stage_trains_records_and_resumes(work):
    stage, tasks = work
    first = [stage.process(task).data.to_pylist()[0] for task in tasks]
    paths = [part_path(i) for i in range(3)]
    losses, curves, failures = merge_parts(stage.step, paths, ["proxy"])
    assert list(failures) == [paths[2]]
    assert "fewer than a batch" in failures[paths[2]]
    assert losses["proxy"].to_pylist() == [0, 1] == sorted(set(curves["proxy"].to_pylist()))
    assert losses["loss_mmlu"][0] != losses["loss_mmlu"][1]
    assert stage.step.read_json(paths[2])["attempts"] == 1  # the same again would fail again
    part = stage.step.read_json(paths[0])
    assert part["tokens_seen"] == 8000
    assert sum(part["domain_tokens"].values()) == part["selected_tokens"] >= part["unique_tokens"]
    before = {path: stage.step.path(path).stat().st_mtime_ns for path in paths}
    assert [stage.process(task).data.to_pylist()[0] for task in tasks] == first
    assert {path: stage.step.path(path).stat().st_mtime_ns for path in paths} == before
    stage.step.path(paths[0]).unlink()
    stage.teardown()
    stage = dataclasses.replace(stage, session="another")
    stage = pickle.loads(pickle.dumps(stage))  # noqa: S301 - as an executor sends it to a worker
    again = stage.process(tasks[0]).data.to_pylist()[0]
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first[0].items() if k != "seconds"}


def test_labels_and_pool_of_different_runs_are_refused(work, pool_prefix):
    stage, tasks = work
    stage.pool = [pool_prefix, pool_prefix]
    with pytest.raises(InputError, match="one tokenizer"):
        stage.process(tasks[0])


def test_a_truncated_pool_is_refused_before_any_proxy_is_trained(work, pool_prefix, tmp_path):
    stage, tasks = work
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{pool_prefix}{suffix}", tmp_path / f"short{suffix}")
    with open(tmp_path / "short.bin", "r+b") as stream:
        stream.truncate(1000)
    stage.pool = [str(tmp_path / "short")]
    with pytest.raises(InputError, match=r"short\.bin: 1000 bytes, short\.idx says"):
        stage.process(tasks[0])
    assert stage.step.entry(part_path(0)) is None


def test_the_comparison_saves_a_model_that_loads_and_has_the_stated_loss(work, pool_prefix):
    from transformers import AutoModelForCausalLM

    step = work[0].step
    tokenizer = str(QUICKSTART / "models" / "tokenizer")
    stage = PretrainSelections(
        step, work[0].validation, "unused", 8000, 4096, 0, tokenizer, trainer="torch", options=TINY
    )
    row = {
        "selector": "random",
        "seed": 1,
        "prefixes": [pool_prefix],
        "documents": [],
        "selected_tokens": 20,
        "unique_tokens": 10,
        "part": "a/1.json",
        "model": "a/m",
        "folder": "a/training",
    }
    found = stage.process(pretrain_tasks(pa.Table.from_pylist([row]))[0]).data.to_pylist()[0]
    _, curves, failures = merge_parts(step, ["a/1.json"], ["selector", "seed"])
    assert not failures
    assert {"selector", "seed", "step", "share", "tokens_seen", "train_loss", "loss_mmlu"} <= set(curves.column_names)
    folder = step.root / "a/m"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in loaded.parameters()) > 100_000
    model = Decoder(TorchTrainer(**TINY).model_shape(4096))
    model.load_state_dict(loaded.state_dict())
    for each in validation_sets(pq.read_table(work[0].validation), "report"):
        assert evaluate(model, each) == pytest.approx(found[f"loss_{each.task}"], abs=1e-5)


@pytest.mark.slow
def test_worker_processes_give_the_same_bits_as_this_process(work, dask_executor, tmp_path):
    from nemo_curator.pipeline import Pipeline

    from quadmix_plugin.executors import InlineExecutor

    stage, tasks = work
    found = []
    for name, executor in (("inline", InlineExecutor()), ("dask", dask_executor)):
        step = RunDirectory.open(tmp_path / name).step("proxies", "key")
        pipeline = Pipeline(name=name, stages=[dataclasses.replace(stage, step=step)])
        rows = [task.data.to_pylist()[0] for task in pipeline.run(executor, initial_tasks=tasks[:2]) or []]
        found.append(sorted([{k: v for k, v in r.items() if k != "seconds"} for r in rows], key=lambda r: r["proxy"]))
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_a_batch_made_with_pandas_is_read_alike(work):
    stage, tasks = work
    frame = DocumentBatch(dataset_name="x", data=tasks[0].data.to_pandas())
    assert stage.process(frame).data.to_pylist()[0]["proxy"] == 0
