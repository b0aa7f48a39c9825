"""Names that attack paths, shells, terminals and pages, and a small run over a corpus that is made of them."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from small_run import MODELS, write_small_recipe

from quadmix_plugin import sample_parameters
from quadmix_plugin.parameters import ParameterSpace

TRAVERSALS = [
    *(
        "../../x",
        "../" * 12 + "tmp/x",
        "/etc/passwd",
        "//etc/passwd",
        "/",
        ".",
        "..",
        "...",
        "./x",
        "x/../../y",
        "x/..",
    ),
    *("..\\..\\x", "C:\\Windows\\x", "C:/Windows/x", "\\\\host\\share\\x", "CON", "NUL.txt", "aux.parquet", "x:stream"),
    *("%2e%2e%2fx", "%2e%2e/x", "..%2fx", "..%c0%afx", "%00", "..%00/x", "\u2025/x", "．．/x", "．．／x", "․․/x"),
    *("x\0.parquet", "\0", "x\n../y", "x\r\ny", "\t../x", " ../x", "../x ", "~/x", "~root/x", "$HOME/x", "${HOME}"),
    *("`touch x`", "$(touch x)", "x;touch y", "x|touch y", "x&touch y", "-rf", "--out=/", "*", "?", "[a-z]", "{a,b}"),
    *("file:///etc/passwd", "s3://bucket/x", "memory://x", "x::y", "recipe.yaml", "manifest/label/_SUCCESS.json"),
    *("link/x", "label/part.parquet", "/proc/self/environ", "/dev/full", "x" * 5000, "a/" * 500 + "x", "\u202e../x"),
]
"""As document ids, domains and values of columns."""

FILES = [
    *("..%2f..%2fx", "..\\..\\x", "C:\\x", "%2e%2e", "CON", "x:y", "a\nb", "a\rb", "~", "$HOME", "`touch x`", " x "),
    *("$(touch x)", "x;touch y", "x|y", "x&y", "-rf", "'x'", '"x"', "<b>x", "\u202ex", "．．", "文", "e\u0301", "...x"),
    *("\x1b[31mx", "x" * 200, "%00", "a=b", "domain=a", "x.parquet", "x\\0", "s3:x", "#x", "x?y", "x@y", "{x}"),
]
"""As names of files; a name can hold neither ``/`` nor NUL."""

PAYLOADS = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "<svg onload=document.title='owned'>",
    "<svg><script>document.title='owned'</script></svg>",
    "</title><script>document.title='owned'</script>",
    "</style><script>document.title='owned'</script>",
    "</text></svg><script>document.title='owned'</script>",
    "--><script>document.title='owned'</script><!--",
    "]]><script>document.title='owned'</script>",
    "<![CDATA[<script>document.title='owned'</script>]]>",
    "<iframe srcdoc=\"<script>top.document.title='owned'</script>\">",
    "<iframe src=javascript:document.title='owned'>",
    "<object data=javascript:document.title='owned'>",
    "<embed src=javascript:document.title='owned'>",
    "<a href=javascript:document.title='owned'>x</a>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content=0;url=https://evil.example/>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<form action=https://evil.example/><input autofocus onfocus=document.title='owned'>",
    "<body onload=document.title='owned'>",
    "<details open ontoggle=document.title='owned'>",
    "<video><source onerror=document.title='owned'></video>",
    "<audio src=x onerror=document.title='owned'>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=document.title='owned'>",
    "<style>@import 'https://evil.example/x.css';</style>",
    "<style>*{background:url(https://evil.example/x)}</style>",
    "\" onmouseover=\"document.title='owned'",
    "' onmouseover='document.title=1",
    "` onmouseover=document.title=1",
    '"><script>document.title=1</script>',
    "'><img src=x onerror=document.title=1>",
    "x' style='position:fixed;inset:0",
    'x" tabindex=1 onfocus="document.title=1" autofocus="',
    "&lt;script&gt;document.title=1&lt;/script&gt;",
    "&#60;script&#62;document.title=1&#60;/script&#62;",
    "\\u003cscript\\u003edocument.title=1\\u003c/script\\u003e",
    "%3Cscript%3Edocument.title=1%3C/script%3E",
    "<scr\0ipt>document.title=1</scr\0ipt>",
    "<scr<script>ipt>document.title=1</scr</script>ipt>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<ScRiPt/x>document.title=1</ScRiPt>",
    "<\nscript>document.title=1</script>",
    "＜script＞document.title=1＜/script＞",
    "+ADw-script+AD4-document.title=1+ADw-/script+AD4-",
    "{{ 7 * 7 }}{{ self.__init__.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "${7*7}#{7*7}<%= 7*7 %>",
    "$\\alpha$ \\href{javascript:document.title=1}{x} $\\frac{1}{$",
    "javascript:document.title='owned'",
    "data:text/html,<script>document.title=1</script>",
    "<!DOCTYPE html [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>&x;",
    "\u202e<script>document.title=1</script>",
    "\x1b]0;owned\x07\x1b[2J",
]
"""As whatever a page or a terminal shows."""

HARMLESS = [f"domain {sorted(PAYLOADS).index(payload):02d}" for payload in PAYLOADS]
"""In the same order as ``PAYLOADS`` when sorted."""


def write_corpus_recipe(folder: Path, ids: list[str], domains: list[str], texts: list[str], **sections) -> Path:
    """A recipe whose labels are columns of the corpus and whose parameters are given; a document per id.

    Domains and texts are used in turn. Nothing is trained, so that a run takes seconds.
    """
    rows = range(len(ids))
    chosen = [domains[i % len(domains)] for i in rows]
    path = write_small_recipe(folder, corpus={"path": "mine", "documents_per_shard": 50})
    (folder / "mine").mkdir()
    table = {"doc_id": ids, "text": [texts[i % len(texts)] for i in rows], "domain": chosen}
    pq.write_table(pa.table({**table, "s": [float(i) for i in rows]}), folder / "mine" / "corpus.parquet")
    names = tuple(sorted(set(chosen)))
    space = ParameterSpace(omega_max=1.0)
    theta = sample_parameters(1, 1, len(names), seed=8, space=space, domains=names, scorers=("s",))[0]
    theta.save(folder / "theta.json")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["tokenizer"] = {"model": str(MODELS / "tokenizer")}
    recipe["domain"] = {"classifier": "column", "column": "domain"}
    recipe["scorers"] = {"s": {"scorer": "column", "column": "s"}}
    recipe["rank"] = {"merge_small_domains": 0, "ties": "mid"}
    recipe["select"] = {"theta": "theta.json"}
    recipe["export"] = {"text": True}
    recipe["compare"] = {"selectors": {"random": {}}}
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def contents(root: Path, *but: Path) -> dict[str, str]:
    """Every file, link and folder below ``root`` and a hash of what it holds, without those below ``but``."""
    found = {}
    for path in sorted(root.rglob("*")):
        if not any(path.is_relative_to(each) for each in but):
            content = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
            raw = content.encode() if isinstance(content, str) else content
            found[str(path.relative_to(root))] = hashlib.sha256(raw).hexdigest()
    return found
