"""What can be known to be wrong before any work starts: checked whole, so that no run fails hours later."""

from collections.abc import Sequence
from glob import glob

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.local_tasks import read_questions
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.benchmarks import harness_settings
from quadmix_plugin.pipelines.context import Run, trainer_options
from quadmix_plugin.pipelines.done import step_is_done
from quadmix_plugin.pipelines.label import label_stages
from quadmix_plugin.pipelines.normalise import frozen_normaliser
from quadmix_plugin.pipelines.proxy_rounds import require_first_round
from quadmix_plugin.pipelines.select import frozen_rank_map
from quadmix_plugin.proxy.training import tokens_per_batch
from quadmix_plugin.proxy.validation import Row, choose_rows, read_rows, tokenise_rows, validation_sets
from quadmix_plugin.stages import DomainClassify, QualityScore
from quadmix_plugin.stages.export_tokens import end_of_document
from quadmix_plugin.stages.merge_rank import load_theta
from quadmix_plugin.stages.train_proxies import trainer_resources

_RESERVED = "objective"
"""The report's name for the weighted mean of the tasks."""


def check_before_work(run: Run, steps: Sequence[str], *, fetch: bool = True) -> None:
    """Checks tokenizer, labelling models, validation rows, objective and given parameters for what is not done.

    Without ``fetch`` labelling models and benchmarks that are not on this machine are left unchecked.

    Raises:
        RecipeError: a key that does not fit the others, or the data that it names.
        InputError: validation rows that cannot be used, a model that cannot be fetched or is damaged.
    """
    todo = [name for name in steps if name != "report" and not step_is_done(run, name)]
    if not todo:
        return
    _ = run.corpus_files
    recipe = run.recipe
    tokenizer = load_tokenizer(recipe.tokenizer.model, recipe.tokenizer.revision)
    try:
        eod = end_of_document(tokenizer, recipe.tokenizer.eod, recipe.tokenizer.model)
    except InputError as error:
        raise RecipeError(f"tokenizer.eod: {error}") from error
    if "label" in todo:
        _check_labelling_models(run, fetch)
    if {"proxies", "search"} & set(todo):
        _check_number_of_proxies(run)
    if "normalise" in todo:
        frozen_normaliser(run)
    if "select" in todo:
        _check_given_parameters(run)
    if "compare" in todo:
        _check_files_of_selectors(run)
    if {"evaluate", "compare"} & set(todo) and not recipe.evaluate.is_empty:
        _check_benchmarks(run, fetch)
    if {"proxies", "search", "pretrain", "compare"} & set(todo):
        rows = _validation_rows(run)
        for name in ("proxy", "pretrain"):
            context = _context(run, name)
            table = tokenise_rows(rows, tokenizer, eod, context, recipe.validation.mask_prompt)
            for part in ("search", "report"):
                validation_sets(table, part)


def _check_labelling_models(run: Run, fetch: bool) -> None:
    for stage in label_stages(run):
        if isinstance(stage, DomainClassify | QualityScore):
            stage.check(fetch=fetch)


def _check_benchmarks(run: Run, fetch: bool) -> None:
    """The questions are read before hours of training; without ``fetch`` those of the harness are left alone."""
    settings = harness_settings(run)
    try:
        if fetch:
            settings.check()
        else:
            settings.check_names()
            for task in settings.local:
                read_questions(task)
    except InputError as error:
        raise RecipeError(str(error)) from error


def _check_files_of_selectors(run: Run) -> None:
    """The files that compared selectors read; what else they need is known when the corpus is labelled."""
    for name, options in run.recipe.compare.selectors.items():
        for key in ("theta", "mixture", "target"):
            path = options.get(key)
            if isinstance(path, str) and "://" not in path and not glob(path):
                raise RecipeError(
                    f"compare.selectors.{name}.{key}: {path}: no such file; give one, or leave the key out"
                )
        if isinstance(path := options.get("theta"), str):
            load_theta(path)


def _check_given_parameters(run: Run) -> None:
    """select.theta and rank.frozen, which belong together and to these scorers."""
    path, rank = run.recipe.select.theta, run.recipe.rank
    if path is None:
        if rank.frozen:
            raise RecipeError("rank.frozen: ranks of an earlier run belong to its parameters; give select.theta too")
        return
    theta = load_theta(path)
    if theta.scorers != run.scorers:
        raise RecipeError(
            f"select.theta: {path} was made for the scorers {', '.join(theta.scorers)}; scorers has "
            f"{', '.join(run.scorers)}"
        )
    if rank.frozen:
        frozen_rank_map(run, theta)


def _context(run: Run, name: str) -> int:
    """The context of a section's model, whose shape and device are checked by that."""
    section = getattr(run.recipe, name)
    try:
        trainer_resources(section.trainer, trainer_options(run, section.trainer, section.options))
        trainer = registry.create("trainers", section.trainer, section.options)
        context, batch = trainer.context, tokens_per_batch(trainer)
    except InputError as error:
        raise RecipeError(f"{name}.options: {error}") from error
    if -(-section.tokens // context) * context < batch:
        raise RecipeError(
            f"{name}.tokens: {section.tokens:,} are fewer than one batch of {batch:,}; raise it, or lower "
            f"{name}.options.batch_size"
        )
    return context


def _check_number_of_proxies(run: Run) -> None:
    """The regressor must be able to learn from what is left of the proxies when one fold is held back."""
    settings, number = run.recipe.search, run.recipe.proxy.number
    regressor = registry.create("regressors", settings.regressor, settings.options, "search.options")
    fewest = getattr(regressor, "fewest_rows", 2)
    left = number - -(-number // settings.folds)
    if number < settings.folds or left < fewest:
        raise RecipeError(
            f"proxy.number: {number} proxies leave {max(left, 0)} to fit on in a {settings.folds}-fold "
            f"cross-validation; {settings.regressor} needs {fewest}, so train more proxies"
        )
    require_first_round(run)


def _validation_rows(run: Run) -> list[Row]:
    section = run.recipe.validation
    rows = read_rows(run.validation_files, section.prompt, section.response, section.task)
    tasks = {row.task for row in rows}
    if unknown := sorted(set(run.recipe.search.objective) - tasks):
        raise RecipeError(
            f"search.objective: no validation rows of {', '.join(unknown)}; tasks are {', '.join(sorted(tasks))}"
        )
    if _RESERVED in tasks:
        raise InputError(f"validation: a task is named {_RESERVED!r}, the name of the weighted mean; rename it")
    return choose_rows(rows, section.rows_per_task)
