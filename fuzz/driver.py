"""Runs a target under atheris (libFuzzer): what leaves it other than an error of ours is a finding.

So is an input that takes more than a second of this process' own time. A finding is written to
``fuzz/findings/TARGET/`` and run again by ``python fuzz/TARGET.py FILE``; one that is mended stays as a named case in
tests/test_fuzz_cases.py. Inputs that reached new code are kept beside it and begin the next run.
"""

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

FINDINGS = Path(__file__).parent / "findings"
MOST_SECONDS = 1.0

Target = Callable[[bytes, Path], None]
"""Takes the input and a folder for files."""


Mutation = Callable[[bytes, random.Random], bytes | None]
"""Another input made of one, or None where that is of no known structure."""


class SlowError(Exception):
    """An input took too long."""


def instrumented(*packages: str) -> contextlib.AbstractContextManager:
    """Modules of these packages that are first imported herein are watched for coverage when a target is a script."""
    if Path(sys.argv[0]).resolve().parent != Path(__file__).resolve().parent:
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=list(packages))


def run(target: Target, data: bytes, folder: Path) -> None:
    """Runs one input; an error of ours is what a hostile input should get.

    Raises:
        SlowError: more than a second of CPU time; elapsed time would blame the input for a busy machine.
        Exception: whatever else leaves the target.
    """
    from quadmix_plugin.errors import QuadmixError

    began = time.process_time()
    with contextlib.suppress(QuadmixError):
        target(data, folder)
    if (seconds := time.process_time() - began) > MOST_SECONDS:
        raise SlowError(f"{len(data)} bytes took {seconds:.1f} s")


def fuzz(target: Target, seeds: Mapping[str, bytes], words: Iterable[bytes], longest: int, mutation: Mutation) -> None:
    """The command line of a target: fuzzes for ``--seconds``, or runs the files that are given.

    ``seeds`` are the inputs to begin with, ``words`` go into libFuzzer's dictionary, ``longest`` is in bytes; half of
    all inputs are made by ``mutation``, the others by libFuzzer.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("file", nargs="*", type=Path, help="inputs to run once, in place of fuzzing")
    arguments = parser.parse_args()
    place = FINDINGS / Path(sys.argv[0]).stem
    corpus, scratch, dictionary = place / "corpus", place / "scratch", place / "words.dict"
    for folder in (corpus, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    for path in arguments.file:
        run(target, path.read_bytes(), scratch)
        print(f"{path}: nothing found")
    if arguments.file:
        return
    for name, seed in seeds.items():
        with contextlib.suppress(SlowError):  # the first run of all imports what the code needs
            run(target, seed, scratch)
        (corpus / name).write_bytes(seed)
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in words), encoding="ascii")
    import atheris

    options = {
        "artifact_prefix": f"{place}/",
        "dict": dictionary,
        "max_len": longest,
        "max_total_time": arguments.seconds,
        "print_final_stats": 1,
        "report_slow_units": 1,
        "rss_limit_mb": 3072,
        "timeout": 10,
    }
    flags = [f"-{name}={value}" for name, value in options.items()]

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)  # noqa: S311
        made = mutation(data, generator) if generator.random() < 0.5 else None
        return atheris.Mutate(data, most) if made is None else made[:most]

    atheris.Setup([sys.argv[0], *flags, str(corpus)], lambda data: run(target, data, scratch), custom_mutator=mutate)
    atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else f"\\x{byte:02x}" for byte in word)
