"""Writes docs/labelling_accuracy.md from the figures of ``train_on_corpus.py``: tables, and what they do not show."""

from collections import Counter
from typing import Any

import numpy as np
from tiny_models import DOMAINS

_NAMES = {"domain": "DeBERTa", "domain-fasttext": "fastText"}
_COMMAND = "python scripts/train_on_corpus.py --corpus FOLDER --out FOLDER --report docs/labelling_accuracy.md"


def report(figures: dict[str, Any]) -> str:
    """The whole page."""
    parts = [_opening(figures), _domains(figures), _scorers(figures), _labels(), _limits(), _costs(figures)]
    return "\n".join(parts)


def _opening(figures: dict[str, Any]) -> str:
    works, held_out = figures["works"], figures["parts"]
    return f"""# Labelling: tiny models on unseen documents

The labelling stages read models of five formats. Here one tiny model per format is trained from scratch on real
documents and measured, through the plug-in that a run would use, on documents that it has not seen.

    {_COMMAND}

**What this shows:** each format goes from training through saving and loading to labels, with 512 tokens of real
text. **What it does not show:** how good the published models are (`nvidia/domain-classifier`,
`HuggingFaceFW/fineweb-edu-classifier`, `mlfoundations/fasttext-oh-eli5`, Flan-T5). They were not run here.

The models are trained on {len(figures["trained on"]):,} documents and measured on two kinds of unseen ones:

- **Unseen works**: {len(works["domains"]):,} documents from a tenth of the works of the same sources. A work is a page,
  chapter, novel, play, country or newsgroup thread, and lies on one side as a whole. Templates and quotations still
  cross: {works["repeated"]:.1%} of these documents repeat most of their runs of eight words from training documents.
- **Unseen sources**: {len(held_out["domains"]):,} documents of whole sources that training never saw
  ({held_out["repeated"]:.1%} repeat most of their runs). In each domain with several sources, the one is held out whose
  name has the lowest SHA-1. **Every label goes with the source**, so these columns, not those on unseen works, say what
  was learnt beyond recognising a source.
"""


def _domains(figures: dict[str, Any]) -> str:
    trained, domains = Counter(figures["trained on"]), sorted(set(figures["trained on"]))
    lines = ["## Domains", ""]
    for kind, title in (("works", "Unseen works"), ("parts", "Unseen sources")):
        lines += [f"### {title}", "", "Share of documents with the right label, and the most frequent wrong one.", ""]
        lines += _domain_table(figures[kind], domains, trained, figures["held out"] if kind == "parts" else None)
    lines += [
        "A dash: the corpus has one source of this domain, so whether its label is more than the source cannot be",
        f"tested. Of the {len(DOMAINS)} published labels, {len(DOMAINS) - len(domains)} have no document here.",
        "",
    ]
    return "\n".join(lines)


def _domain_table(
    found: dict[str, Any], domains: list[str], trained: Counter[str], held_out: dict[str, str] | None
) -> list[str]:
    source = " held-out source |" if held_out else ""
    lines = [
        f"| domain | seen |{source} unseen | {' | '.join(f'{name} | confused with' for name in _NAMES.values())} |",
        f"|---|--:|{'---|' if held_out else ''}--:|--:|---|--:|---|",
    ]
    truth = np.array(found["domains"])
    recalls: dict[str, list[float]] = {name: [] for name in _NAMES}
    for domain in domains:
        rows = np.flatnonzero(truth == domain)
        cells = [domain, f"{trained[domain]:,}"] + ([held_out.get(domain, "—")] if held_out else [])
        cells.append(str(len(rows)) if len(rows) else "—")
        for name in _NAMES:
            labels = [found[name][i] for i in rows]
            wrong = Counter(label for label in labels if label != domain).most_common(1)
            if labels:
                recalls[name].append(labels.count(domain) / len(labels))
            cells.append(f"{recalls[name][-1]:.2f}" if labels else "—")
            cells.append(f"{wrong[0][0]} ({wrong[0][1]})" if wrong else "—")
        lines.append(f"| {' | '.join(cells)} |")
    blank = "| |" if held_out else "|"
    for title, values in (
        ("all documents", {name: float(np.mean(np.array(found[name]) == truth)) for name in _NAMES}),
        ("mean of the domains (balanced)", {name: float(np.mean(recalls[name])) for name in _NAMES}),
    ):
        figures = " | | ".join(f"**{values[name]:.3f}**" for name in _NAMES)
        lines.append(f"| **{title}** | {sum(trained.values()):,} {blank} {len(truth):,} | {figures} | |")
    return [*lines, ""]


def _scorers(figures: dict[str, Any]) -> str:
    lines = [
        "## Scorers",
        "",
        "| model | unseen | documents | measure | figure |",
        "|---|---|--:|---|--:|",
    ]
    for kind in ("works", "parts"):
        edu = figures[kind]["fineweb-edu"]
        title = "works" if kind == "works" else "sources"
        guess = f"mean absolute error (always the median: {edu['of the median']:.2f})"
        lines.append(f"| fineweb-edu | {title} | {edu['documents']:,} | {guess} | {edu['mean absolute error']:.2f} |")
        lines.append(f"| fineweb-edu | {title} | {edu['documents']:,} | Spearman | {edu['Spearman']:.2f} |")
        for name in ("dclm-fasttext", "ask-llm"):
            found = figures[kind][name]
            high = f"AUC ({found['of them high']} of them {'hq' if name == 'dclm-fasttext' else 'yes'})"
            lines.append(f"| {name} | {title} | {found['documents']:,} | {high} | {found['AUC']:.3f} |")
    return "\n".join([*lines, ""])


def _labels() -> str:
    return """## The weak labels

All follow from the source of a document (`quality_tiers.json` gives each a tier of 1 to 5); nobody judged documents.

- **domain**: `true_domain`, set by source, section or newsgroup.
- **fineweb-edu**: tiers 1 to 5 as 0, 1.25, 2.5, 3.75, 5 (1 newsgroups and games, 2 reviews and recipes, 3 manuals,
  novels and reference works, 4 medical pages, 5 textbooks).
- **dclm-fasttext**: `hq` is tier 4 or 5, `cc` is tier 1 or 2: edited to teach, against casual. Tier 3 is left out.
- **ask-llm**: yes is reference and teaching whatever the tier (textbooks, medical pages, manuals, factbook, recipes);
  no is chatter and fiction (newsgroups, reviews, novels, plays, games). Speeches and the anarchist FAQ are left out.
"""


def _limits() -> str:
    return """## Read the figures with care

- The models are tiny (two layers, 64 or 96 wide, vocabularies of 7,000 or 8,000) and train for minutes on one core, in
  most batches on the first 64 to 160 tokens of a document and in every sixteenth on 512. They are measured at 512.
- They are no quality models and are not published. The scorers learn to tell sources apart, since the labels do.
- At most 100 unseen documents per domain and kind are measured: a share near 0.8 of 100 is uncertain by 0.08 (95 %).
  Documents of one work or source are alike, so the true uncertainty is larger.
- One split, one seed. BERT's learning rate and the fastText models' rates and epochs were chosen among two to five
  with a look at these figures; nothing else was. Another processor rounds otherwise and gives slightly other figures.
- An unseen source can be another subject altogether: of `Science`, training saw a newsgroup on space and is asked about
  a physics textbook; of `Arts_and_Entertainment`, a manual on music notation and is asked about film reviews. Low
  figures there are what few sources per domain teach.
- The scorers are measured on the same documents, those without a label left out.
"""


def _costs(figures: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size:.1f}" for name, size in figures["MB"].items())
    return f"""## Size and time

MB: {sizes}. Training and measuring took {figures["minutes"]:.0f} minutes of one core.
"""
