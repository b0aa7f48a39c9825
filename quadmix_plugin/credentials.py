"""Finds credentials in a recipe, so that none is copied into a run's files, its report or an error message.

A recipe is written out whole with every run. Names, passwords and tokens are therefore taken from the environment and
from the file systems' own configuration only.
"""

import re
from collections.abc import Iterator
from typing import Any

from quadmix_plugin.errors import RecipeError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)")
_ANY_USER = ("http", "https", "ftp")  # there a name alone may be a token; elsewhere it is a name
_COLON_IS_NO_PASSWORD = ("github", "git", "file")  # github://owner:repository@branch/path
_PASSWORD = re.compile(r"^[^@]*:(?!\d*$)|:[^@]*@")
_SECRET_IN_QUERY = re.compile(r"^(?:sig|key)$|signature|token|secret|passw|credential|api_?key|access_?key", re.I)
_SECRET_KEY = re.compile(
    r"(?:(?:hf|hub|access|auth|api|bearer|session|security|refresh)_?)?token|storage_options|"
    r"(?:\w+_)?(?:password|passwd|secret|secret_?key|secret_access_key|access_?key|access_key_id|api_?key|credentials?)",
    re.I,
)
_REMEDY = (
    "a recipe is copied into every run; leave it out, and give it by the environment (AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, HF_TOKEN, ~/.netrc, ~/.config/fsspec)"
)


def refuse_credentials(content: Any, place: object) -> None:
    """Refuses a recipe's content that holds a password or token, whose value the message does not repeat.

    Raises:
        RecipeError: a URL with a password, a user of the web or a signature in it, or a key that is named as a secret.
    """
    for keys, value in _texts(content, ()):
        where = f"{place}: {'.'.join(keys)}" if keys else f"{place}"
        if any(map(_has_credentials, value.split("::"))):
            raise RecipeError(f"{where}: a {value.partition('://')[0][:40]} URL with credentials in it; {_REMEDY}")
        if any(map(_SECRET_KEY.fullmatch, keys)):
            raise RecipeError(f"{where}: named as a secret; {_REMEDY}")


def _texts(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _texts(each, (*keys, str(key)))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, keys)


def _has_credentials(url: str) -> bool:
    """Whether one URL has; of a chain (``zip://…::s3://…``) each part is asked."""
    found = _URL.match(url)
    if found is None:
        return False
    scheme, authority = found[1].lower(), found[2]
    if scheme in _ANY_USER and "@" in authority:
        return True
    if scheme not in _COLON_IS_NO_PASSWORD and not authority.startswith("[") and _PASSWORD.search(authority):
        return True  # also the secret of an AWS key, which may have a / before its @
    fields = re.split("[&;]", url.partition("?")[2])
    return any(_SECRET_IN_QUERY.search(field.partition("=")[0]) for field in fields if "=" in field)
