"""fastText in its own process: same answers, and no file, document or death of either side takes the other along."""

import copy
import gc
import hashlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from fasttext_models import labelled_lines, train

from quadmix_plugin import fasttext_child
from quadmix_plugin.errors import InputError
from quadmix_plugin.fasttext_file import DamagedError, NoClassifierError, inspect
from quadmix_plugin.fasttext_process import FastTextProcess
from quadmix_plugin.stages.labelling import PluginHandle
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
MODEL = QUICKSTART / "models" / "dclm-fasttext" / "model.bin"
HUGE = "All work and no play makes Jack a dull boy.\n" * 230_000  # 10 MB
ODD = ["", "\0", "a\0b", "\ud800 lone", "__label__hq", "</s> the", "the\r\nof\u2028and", "\x85", "é" * 5000]

_ARGUMENTS = 8  # their offset: after magic and version
_DICTIONARY = _ARGUMENTS + 12 * 4 + 8


@pytest.fixture(scope="module")
def process():
    made = FastTextProcess(MODEL)
    yield made
    made.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """A model of each kind that fastText writes."""
    few, many = labelled_lines(5, 2000), labelled_lines(300, 6000, words=2100)
    pairs = {"wordNgrams": 2, "bucket": 5000, "dim": 15, "epoch": 2}
    return train(
        tmp_path_factory.mktemp("fasttext"),
        {
            "plain": (few, {"epoch": 3}, None),
            "letters": (few, {"minn": 2, "maxn": 4, "bucket": 1000}, None),
            "hs": (many, {"loss": "hs", "dim": 15}, None),
            "ova": (few, {"loss": "ova"}, None),
            "ns": (few, {"loss": "ns"}, None),
            "quantised": (many, pairs, {}),
            "pruned": (many, pairs, {"cutoff": 1000, "qnorm": True, "qout": True}),
        },
    )


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"].to_pylist()[::20]


def _in_this_process(path: Path, texts: list[str], k: int) -> list[list[tuple[str, float]]]:
    import fasttext

    lines = [" ".join(text.encode("utf-8", "replace").decode().strip().splitlines()) for text in texts]
    labels, probabilities = fasttext.load_model(str(path)).predict(lines, k=k)
    return [list(zip(*rows, strict=True)) for rows in zip(labels, probabilities, strict=True)]


def _answers(process: FastTextProcess, texts: list[str], k: int) -> list[list[tuple[str, float]]]:
    ids, probabilities = process.predict(texts, k)
    assert ids.shape == probabilities.shape == (len(texts), k)
    assert (ids.dtype, probabilities.dtype) == (np.int32, np.float32)
    assert not probabilities[ids < 0].any()
    rows = (zip(*row, strict=True) for row in zip(ids, probabilities, strict=True))
    return [[(process.labels[i], p) for i, p in row if i >= 0] for row in rows]


def _gone(pid: int) -> bool:
    """Whether a process ends within ten seconds and leaves no zombie."""
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return not psutil.pid_exists(pid)


def _changed(folder: Path, offset: int, data: bytes, source: Path = MODEL) -> Path:
    whole = bytearray(source.read_bytes())
    whole[offset : offset + len(data)] = data
    path = folder / f"changed-{offset}-{data.hex()}.bin"
    path.write_bytes(whole)
    return path


def _matrix(data: bytes) -> int:
    """The offset of the input matrix: of its flag, behind the dictionary."""
    (size,) = struct.unpack_from("<i", data, _DICTIONARY)
    at = _DICTIONARY + 28
    for _ in range(size):
        at = data.index(b"\0", at) + 10
    return at


# Answers


@pytest.mark.parametrize("k", [1, 2])
def test_answers_are_those_of_fasttext_in_this_process_to_the_bit(process, texts, k):
    mixed = [*texts[:100], *ODD, *texts[100:]]
    assert _answers(process, mixed, k) == _in_this_process(MODEL, mixed, k)


def test_models_of_every_kind_are_accepted_and_answer_as_fasttext_does(trained):
    lines = ["w1 w2 w3 w8", "w70 w71", "unknown words", ""]
    for path in trained.values():
        made = FastTextProcess(path)
        k = len(made.labels)
        assert _answers(made, lines, k) == _in_this_process(path, lines, k)
        made.close()


def test_neither_huge_documents_nor_thousands_of_small_ones_block(process):
    small = ["the of and", "zzz"] * 20_000
    ids, probabilities = process.predict([HUGE, *small, HUGE, HUGE], k=2)
    one, of_one = process.predict([HUGE, *small[:2]], k=2)
    np.testing.assert_array_equal(ids[[0, 1, 2, -2, -1]], one[[0, 1, 2, 0, 0]])
    np.testing.assert_array_equal(probabilities[[0, 40_000, -1]], of_one[[0, 2, 0]])
    assert process.predict([], k=2)[0].shape == (0, 2)


def test_threads_share_one_process(process, texts):
    whole = process.predict(texts)
    with ThreadPoolExecutor(4) as pool:
        for ids, probabilities in pool.map(lambda _: process.predict(texts), range(8)):
            np.testing.assert_array_equal(ids, whole[0])
            np.testing.assert_array_equal(probabilities, whole[1])


# Files


@pytest.mark.parametrize("name", ["model", "letters", "quantised", "pruned"])
def test_a_file_that_was_cut_anywhere_is_refused(trained, tmp_path, name):
    data = (MODEL if name == "model" else trained[name]).read_bytes()
    ends = {
        *range(4, 100, 4),
        *np.linspace(100, len(data), 40, dtype=int, endpoint=False),
        *range(len(data) - 20, len(data)),
    }
    path = tmp_path / "cut.bin"
    path.write_bytes(data)
    for end in sorted(ends, reverse=True):
        os.truncate(path, end)
        with pytest.raises(DamagedError):
            inspect(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(DamagedError, match="1 bytes too many"):
        inspect(path)


def test_every_changed_bit_of_a_size_is_found(trained, tmp_path):
    changed = bytearray(trained["letters"].read_bytes())
    matrix, output = _matrix(changed), len(changed) - 4 * 100 * 5 - 16  # five labels of dimension 100
    arguments = [_ARGUMENTS + 4 * i for i in (0, 7, 8)]  # dimension, kind of model, buckets
    sizes = [_DICTIONARY, _DICTIONARY + 4, _DICTIONARY + 8, *(matrix + 1 + 4 * i for i in range(4))]
    path = tmp_path / "flipped.bin"
    for bit in [8 * at + bit for at in (*arguments, *sizes, *(output + 4 * i for i in range(4))) for bit in range(32)]:
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises((DamagedError, NoClassifierError)):
            inspect(path)
        changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    assert sorted(inspect(path).labels) == [f"__label__{i}" for i in range(5)]


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 2e6, -2e6])
def test_a_weight_that_no_training_gives_is_found(tmp_path, weight):
    for offset in (_matrix(MODEL.read_bytes()) + 17 + 4 * 1000, MODEL.stat().st_size - 4):
        with pytest.raises(DamagedError, match="weight"):
            inspect(_changed(tmp_path, offset, np.float32(weight).tobytes()))


def test_a_file_that_crashes_fasttext_is_an_error_of_one_line(trained, tmp_path):
    path = _changed(tmp_path, _ARGUMENTS + 4 * 5, struct.pack("<i", 2), trained["plain"])  # word pairs, but no buckets
    program = "import sys, fasttext; fasttext.load_model(sys.argv[1]).predict('w1 w2')"
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -signal.SIGFPE
    with pytest.raises(InputError, match=r"damaged \(n-grams in 0 buckets\); fetch it again") as caught:
        FastTextProcess(path)
    assert "\n" not in str(caught.value)


def test_a_line_of_its_own_words_tries_a_model_whose_file_looked_sound(tmp_path, monkeypatch):
    path = _changed(tmp_path, _matrix(MODEL.read_bytes()) + 17, np.float32(np.nan).tobytes())
    monkeypatch.setattr(fasttext_child, "inspect", lambda _: inspect(MODEL))
    with pytest.raises(DamagedError, match="NaN"):
        fasttext_child.load(str(path))


def test_word_vectors_and_other_files_are_refused_with_what_they_are(tmp_path):
    vectors = _changed(tmp_path, _ARGUMENTS + 4 * 7, struct.pack("<i", 2))
    other = tmp_path / "other.bin"
    other.write_bytes(b"PK")
    for path, message in [(vectors, "not a classifier; give"), (other, "not a fastText model; give")]:
        with pytest.raises(InputError, match=message) as caught:
            FastTextProcess(path)
        assert "\n" not in str(caught.value)


def test_damage_that_only_the_digest_shows(tmp_path):
    data = MODEL.read_bytes()
    high, low = (data.index(b"__label__" + name) for name in (b"hq", b"cc"))
    path = _changed(tmp_path, high, b"__label__cc", _changed(tmp_path, low, b"__label__hq"))
    FastTextProcess(path).close()
    with pytest.raises(InputError, match="sha256 is"):
        FastTextProcess(path, hashlib.sha256(data).hexdigest())
    FastTextProcess(MODEL, hashlib.sha256(data).hexdigest()).close()


def test_the_digest_of_the_file_in_use_is_told_so_that_it_can_be_pinned():
    facts = DCLMFastText(str(MODEL.parent)).facts()
    assert (facts["file"], facts["sha256"]) == ("model.bin", hashlib.sha256(MODEL.read_bytes()).hexdigest())
    DCLMFastText(str(MODEL), sha256=facts["sha256"]).check()


# Deaths


def test_a_child_that_dies_is_an_error_of_one_line_and_stays_dead():
    made = FastTextProcess(MODEL)
    os.kill(made.pid, signal.SIGSEGV)
    with pytest.raises(
        InputError, match=r"model.bin: fastText ended .*\(signal 11, Seg.*fetch it again and give sha256"
    ):
        made.predict(["the"])
    with pytest.raises(InputError, match="has ended"):
        made.predict(["the"])
    assert _gone(made.pid)


def test_a_child_that_hangs_is_ended():
    before = {child.pid for child in psutil.Process().children()}
    made = FastTextProcess(MODEL, answer_seconds=0.2)
    os.kill(made.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match=r"hangs at a document \(for 0.2 s"):
        made.predict([HUGE])
    assert _gone(made.pid)
    with pytest.raises(InputError, match="hangs while it loads"):
        FastTextProcess(MODEL, load_seconds=0.001)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_child_that_hangs_without_a_parent_ends_itself(tmp_path):
    os.mkfifo(tmp_path / "endless")  # opening it never returns
    program = "import sys; from quadmix_plugin import fasttext_child as c; c._GRACE = 0; c.main(sys.argv[1], '1', '1')"
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "endless")], check=False, timeout=60)
    assert ended.returncode == -signal.SIGALRM


def test_memory_is_limited_while_a_file_loads_and_only_then():
    program = """
        from mmap import mmap
        from quadmix_plugin.fasttext_child import limited_memory
        with limited_memory(1 << 20):
            mmap(-1, 1 << 30)
            try:
                mmap(-1, 3 << 30)
            except OSError:
                print("limited")
        mmap(-1, 3 << 30)
    """
    program = textwrap.dedent(program)
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "limited\n"


def test_the_child_ends_with_close_and_with_its_object():
    closed, dropped = FastTextProcess(MODEL), FastTextProcess(MODEL)
    pids = [closed.pid, dropped.pid]
    closed.close()
    closed.close()
    del dropped
    gc.collect()
    assert all(_gone(pid) for pid in pids)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_child_ends_with_its_parent(end):
    program = f"""
        import sys
        from quadmix_plugin.fasttext_process import FastTextProcess
        made = FastTextProcess({str(MODEL)!r})
        print(made.pid, flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        if end:
            parent.send_signal(end)
        parent.stdin.close()
        parent.wait(60)
    assert _gone(pid)


# In a worker


_KEPT: list[PluginHandle] = []


def _label(options: dict) -> tuple[list[float], bool]:
    """Runs in a Dask worker: scores, and whether unloading the plug-in ends the child."""
    handle = PluginHandle("scorers", "dclm-fasttext", options)
    scores = handle.ready().score(["the of and", "zzz"]).tolist()
    child = handle.plugin._process.pid
    handle.unload()
    return scores, _gone(child)


def _keep(options: dict) -> tuple[int, int]:
    """Runs in a Dask worker: leaves a child behind; the pids of the worker and of the child."""
    _KEPT.append(PluginHandle("scorers", "dclm-fasttext", options))
    return os.getpid(), _KEPT[-1].ready()._process.pid


def test_a_dask_worker_has_a_child_and_neither_outlives_the_other(dask_client):
    options = {"model": str(MODEL)}
    scores, ended = dask_client.submit(_label, options, pure=False).result(60)
    assert ended
    assert scores == _label(options)[0]
    worker, child = dask_client.submit(_keep, options, pure=False).result(60)
    assert psutil.Process(child).ppid() == worker != os.getpid()
    os.kill(worker, signal.SIGKILL)
    assert _gone(child)
    dask_client.wait_for_workers(2, timeout=60)


def test_a_copy_of_a_plugin_has_its_options_and_no_process():
    scorer = DCLMFastText(model=str(MODEL))
    scorer.setup("cpu")
    for made in (copy.copy(scorer), copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):  # noqa: S301
        assert made == scorer
        assert made._process is None
        made.setup("cpu")
        assert made._process.pid != scorer._process.pid
        assert made.score(["the of"]) == scorer.score(["the of"])
