"""Looks for known advisories of the installed packages, by pip-audit; those in ``audit_ignored.txt`` are left out.

A line of that file is an advisory's id, the date when it was written down, and the reason why it does not matter here::

    GHSA-xxxx-xxxx-xxxx 2026-11-27 only on Windows

After 90 days a line is an error, so that each is looked at again. Exit codes: 0 nothing known, 1 advisories, or no
answer from the network, 2 a line that is too old or has no reason.
"""

import datetime as dt
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from packaging.version import Version

IGNORED = Path(__file__).with_name("audit_ignored.txt")
MOST_DAYS = 90


def ignored(text: str, today: dt.date) -> list[str]:
    """The ids in a list of advisories; blank lines and those that begin with # are none.

    Raises:
        ValueError: a line without date or reason, of the future, or older than 90 days.
    """
    ids = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(maxsplit=2)
        if len(words) < 3:
            raise ValueError(f"line {number}: {line!r}: give id, date and reason")
        age = (today - dt.date.fromisoformat(words[1])).days
        if not 0 <= age <= MOST_DAYS:
            raise ValueError(f"line {number}: {words[0]} is {age} days old; look at it again, and give the new date")
        ids.append(words[0])
    return ids


def installed() -> list[str]:
    """``name==version`` of every package of this environment but our own; a build's own label (+cpu) is left out."""
    found = {each.name: Version(each.version).public for each in distributions()}
    return sorted(f"{name}=={version}" for name, version in found.items() if name != "quadmix-plugin")


def main(arguments: list[str]) -> int:
    """Runs pip-audit over this environment, with further arguments such as ``-s osv``; its exit code."""
    try:
        ids = ignored(IGNORED.read_text(encoding="utf-8"), dt.datetime.now(dt.UTC).date())
    except ValueError as error:
        print(f"error: {IGNORED}: {error}", file=sys.stderr)
        return 2
    options = [option for name in ids for option in ("--ignore-vuln", name)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(installed()))
        file.flush()
        # Strict, since a package of which nothing could be learnt is otherwise one without advisories.
        command = [sys.executable, "-m", "pip_audit", "--strict", "--no-deps", "--disable-pip", "-r", file.name]
        options += ["--progress-spinner", "off", *arguments]
        return subprocess.run([*command, *options], check=False).returncode  # noqa: S603 - no shell, words of ours


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
