"""The command of Megatron-LM's own script names every number of the shape and of the schedule, once.

Its parser is not installed here: what it takes was looked up on its branch core_r0.16.0.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from quadmix_plugin.pretraining.megatron_lm import command
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer

TOKENS, SEED, VOCABULARY = 10**9, 3, 50_432
LARGE = {"shape": "530m", "batch_size": 512, "learning_rate": 3e-4}
GROUPED = {
    "shape": "tiny",
    "shape_options": {"kv_heads": 2, "tied": True, "rope_theta": 5e5, "norm_eps": 1e-6},
    "batch_size": 24,
    "micro_batch_size": 5,
    "schedule": "wsd",
    "decay": 0.2,
    "warmup": 0.01,
    "final_learning_rate": 0.0,
    "betas": (0.8, 0.99),
    "grad_clip": 0.5,
    "weight_decay": 0.0,
    "save_every": 70,
    "eval_every": 90,
    "log_every": 7,
}


def script(options, vocabulary=VOCABULARY):
    trainer = MegatronTrainer(**options)
    return command(trainer, trainer.model_shape(vocabulary), TOKENS, SEED)


def arguments(text):
    """What the script gives to pretrain_gpt.py: option → values; every option stands once."""
    words = shlex.split(text.partition('pretrain_gpt.py"')[2].replace("\\\n", " "))
    names = [word for word in words if word.startswith("--")]
    assert len(set(names)) == len(names)
    following = dict(zip(words, [*words[1:], "--"], strict=True))
    return {name: True if following[name].startswith("--") else following[name] for name in names}


def agrees(found, **expected):
    return {name: found.get(f"--{name.replace('_', '-')}") for name in expected} == expected


def test_530m_as_the_recipe_has_it():
    found = arguments(script(LARGE))
    assert agrees(
        found,
        num_layers="20",
        hidden_size="1280",
        ffn_hidden_size="3520",
        num_attention_heads="20",
        kv_channels="64",
        seq_length="2048",
        max_position_embeddings="2048",
        position_embedding_type="rope",
        rotary_base="10000",
        normalization="RMSNorm",
        norm_epsilon="1e-05",
        attention_dropout="0",
        hidden_dropout="0",
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        group_query_attention=None,
        num_query_groups=None,
        make_vocab_size_divisible_by="1",
    )
    updates = -(-TOKENS // (512 * 2048))
    assert agrees(
        found,
        train_iters=str(updates),
        lr_decay_iters=str(updates),
        lr_warmup_iters=str(round(0.05 * updates)),
        lr="0.0003",
        min_lr="3e-05",
        lr_decay_style="cosine",
        lr_wsd_decay_iters=None,
        global_batch_size="512",
        weight_decay="0.1",
        clip_grad="1",
        adam_beta1="0.9",
        adam_beta2="0.95",
        seed=str(1 + SEED),
        bf16=True,
        use_distributed_optimizer=True,
        save_interval="500",
        log_interval="10",
        eval_interval=str(updates // 20),
    )


def test_grouped_and_tied_with_every_option_changed():
    found = arguments(script(GROUPED))
    assert agrees(
        found,
        num_layers="4",
        hidden_size="128",
        num_attention_heads="4",
        kv_channels="32",
        group_query_attention=True,
        num_query_groups="2",
        untie_embeddings_and_output_weights=None,
        rotary_base="500000",
        norm_epsilon="1e-06",
        seq_length="128",
    )
    updates = -(-TOKENS // (24 * 128))
    assert agrees(
        found,
        train_iters=str(updates),
        lr_warmup_iters=str(round(0.01 * updates)),
        lr_decay_style="WSD",
        lr_wsd_decay_style="linear",
        lr_wsd_decay_iters=str(round(0.2 * updates)),
        lr="0.004",
        min_lr="0",
        adam_beta1="0.8",
        adam_beta2="0.99",
        clip_grad="0.5",
        weight_decay="0",
        save_interval="70",
        eval_interval="90",
        log_interval="7",
    )


@pytest.mark.parametrize(("schedule", "lowest"), [("cosine", "0.0004"), ("linear", "0.0004"), ("constant", "0.004")])
def test_schedules_have_the_names_of_megatron_lm(schedule, lowest):
    found = arguments(script({"shape": "tiny", "schedule": schedule}))
    assert agrees(found, lr_decay_style=schedule, lr="0.004", min_lr=lowest)


@pytest.mark.parametrize(
    ("batch", "most", "gpus"), [(512, 0, 8), (24, 5, 8), (48, 4, 8), (12, 4, 6), (4, 0, 4), (7, 3, 7), (1, 9, 1)]
)
def test_a_batch_divides_among_gpus_and_passes(batch, most, gpus):
    """Megatron-LM refuses another."""
    text = script({"shape": "tiny", "batch_size": batch, "micro_batch_size": most})
    assert f'--nproc-per-node "${{GPUS:-{gpus}}}"' in text
    found = arguments(text)
    micro = int(found["--micro-batch-size"])
    assert found["--global-batch-size"] == str(batch)
    assert batch % (micro * gpus) == 0
    assert 1 <= micro <= (most or batch)


def test_every_pass_fits_where_the_vocabulary_is_large():
    """Its logits take 2 GiB at most, as in the trainer."""
    micro = int(arguments(script(LARGE))["--micro-batch-size"])
    assert micro * 2048 * VOCABULARY * 4 <= 2 << 30 < 2 * micro * 2048 * VOCABULARY * 4
    assert arguments(script(LARGE, vocabulary=300_000))["--micro-batch-size"] == "1"


@pytest.mark.parametrize("options", [LARGE, GROUPED], ids=["530m", "grouped"])
def test_the_script_runs_from_anywhere_in_the_run_directory(options, tmp_path):
    """A torchrun in its place says how it was called."""
    run, tools = tmp_path / "a run", tmp_path / "tools"
    for folder in (run / "pretrain", tools):
        folder.mkdir(parents=True)
    path = run / "pretrain" / "megatron_lm.sh"
    path.write_text(script(options), encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    fake = tools / "torchrun"
    fake.write_text('#!/bin/sh\npwd\nfor word in "$@"; do echo "$word"; done\n', encoding="utf-8")
    fake.chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "MEGATRON_LM": "/opt/my megatron", "NNODES": "4"}
    done = subprocess.run(["bash", str(path)], check=True, cwd="/", env=environment, capture_output=True, text=True)
    place, *words = done.stdout.splitlines()
    assert Path(place) == run
    assert words[:4] == ["--nnodes", "4", "--nproc-per-node", "8"]
    assert "/opt/my megatron/pretrain_gpt.py" in words
    assert words[words.index("--per-split-data-args-path") + 1] == "tokens/blend.json"
    without = subprocess.run(["bash", str(path)], check=False, env={"PATH": environment["PATH"]}, capture_output=True)
    assert without.returncode != 0
    assert b"MEGATRON_LM" in without.stderr
