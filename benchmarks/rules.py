"""What a finished run ranks right, beside what trivial rules do.

    python benchmarks/rules.py dpo_run [another_run] [--picture FILE]

It needs the run's tokenizer and pairs, and no GPU.

A rule that ranks most pairs right may be all that a model has learnt. So the held-out pairs that a
rule ranks right are looked at by themselves, and those that it does not. A coin ranks half of
either right; a model that has learnt the rule and nothing else, all of the first and none of the
second. One that has learnt something else ranks clearly more than half of the second right; that
may be another rule, so the pairs that none of the rules ranks right are looked at too.

The two likelihoods of the base are not independent of what is measured: a margin is how far the
trained model has moved away from them.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

sys.path.insert(0, str(Path(__file__).parents[1]))
from rehearsal import behaviour  # noqa: E402
from rehearsal.notebook import run_cells  # noqa: E402


def read_run(folder):
    """The record of a finished run, and the notebook's names after its audit of the same pairs.

    The notebook takes it for a run to go on with, and raises ValueError if base or pairs are not
    what they were.
    """
    os.environ.pop("WANDB_API_KEY", None)  # the notebook would begin a run there
    with tempfile.TemporaryDirectory() as other, open(os.devnull, "w") as nowhere:
        shutil.copy(folder / "run.json", other)
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        parameters = {**run["parameters"], "output_dir": other, "push_to_hub": False}
        with contextlib.redirect_stdout(nowhere):
            notebook = run_cells("install", "audit", **parameters)
    if len(notebook["held_out"]) != len(run["logps"]["base"]):
        raise ValueError(f"The pairs of {folder} are read into others than they were.")
    return run, notebook


def gaps_of_rules(run, notebook):
    """{rule: (share of the training pairs, gaps of the held-out pairs)}, the best rule first.

    A gap is above 0 where the rule prefers the chosen answer. A rule that ranks less than half of
    the training pairs right is turned round.
    """
    share_ranked = notebook["share_ranked"]
    rules = notebook["shallow_rules"](notebook["train_ids"], notebook["tokenizer"])
    found = {}
    for names, rule in rules.items():
        both = []
        for pairs in (notebook["train_ids"], notebook["held_out_ids"]):
            both.append(np.array([rule(p, c) - rule(p, r) for p, c, r in pairs], dtype=float))
        found[names] = share_ranked(both[0]), both[1]
    tokens = notebook["lengths"].loc[notebook["held_out"], ["chosen", "rejected"]].to_numpy()
    in_sum = np.array(run["logps"]["base"])
    for how, logps in {"in sum": in_sum, "per token": in_sum / tokens}.items():
        likelier = f"the answer likelier for the base, {how}"
        less_likely = f"the answer less likely for the base, {how}"
        found[likelier, less_likely] = run["base_ranks"][how], logps[:, 0] - logps[:, 1]
    turned = {}
    for (rule, opposite), (training, held_out) in found.items():
        if training < 0.5:
            turned[opposite] = 1 - training, -held_out
        else:
            turned[rule] = training, held_out
    return dict(sorted(turned.items(), key=lambda entry: entry[1][0], reverse=True))


def margins(run, name):
    """The margin of each held-out pair, in nats, of the model "trained" or "merged"."""
    base = {"trained": "base", "merged": "base unquantised"}[name]
    moved = np.subtract(run["logps"][name], run["logps"][base])
    return run["parameters"]["beta"] * (moved[:, 0] - moved[:, 1])


def interval(right):
    """(share, low, high) of an array of booleans, with Wilson's 95% interval."""
    low, high = behaviour.interval(int(right.sum()), len(right))
    return right.mean(), low, high


def in_words(right):
    if not len(right):
        return "–"
    return "{:.0%} ({:.0%} to {:.0%}) of {}".format(*interval(right), len(right))


def table_of_rules(run, notebook):
    """A row for each rule, the best on training pairs first; a tie counts half."""
    trained = margins(run, "trained") > 0
    table = {}
    by_none = np.full(len(trained), True)
    for rule, (training, gaps) in gaps_of_rules(run, notebook).items():
        by_none &= gaps <= 0
        table[rule] = {
            "training pairs": f"{training:.0%}",
            "held out": f"{notebook['share_ranked'](gaps):.0%}",
            "of these ties": f"{(gaps == 0).mean():.0%}",
            "trained, where the rule is right": in_words(trained[gaps > 0]),
            "trained, where it is wrong or ties": in_words(trained[gaps <= 0]),
        }
    table["none of them"] = {"trained, where it is wrong or ties": in_words(trained[by_none])}
    return pd.DataFrame.from_dict(table, orient="index").fillna("")


def draw_curve(axes, run, color, label, shift):
    """The share of held-out pairs that is ranked right along the way, with its interval.

    shift: to the right, so that the intervals of two runs stand beside each other.
    """
    pairs = len(run["logps"]["base"])
    steps = []
    shares = []
    for entry in run["history"]:
        if "eval_loss" in entry and entry["step"]:
            right = round(entry["eval_rewards/accuracies"] * pairs)
            steps.append(entry["step"] + shift)
            shares.append(interval(np.arange(pairs) < right))
    share, low, high = np.transpose(shares)
    axes.errorbar(steps, share, [share - low, high - share], color=color, capsize=3, label=label)
    axes.set(xlabel="step", title="held-out pairs ranked right", ylim=(0, 1))


def draw(runs, picture):
    """The curves of one or two runs, and what rules and models rank right at the end.

    runs: {what it is called: (run, notebook)}.
    """
    names = ["merged", "trained"]
    for run, notebook in runs.values():
        names += [rule for rule in gaps_of_rules(run, notebook) if rule not in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 3))
    height = 0.8 / len(runs)
    for number, (label, (run, notebook)) in enumerate(runs.items()):
        color = f"C{number}"
        draw_curve(left, run, color, label, shift=0.4 * number)
        rules = gaps_of_rules(run, notebook)
        for place, name in enumerate(names):
            above = place + (number - (len(runs) - 1) / 2) * height
            style = dict(height=0.9 * height, color=color, alpha=0.75)
            if name in rules:
                right.barh(above, notebook["share_ranked"](rules[name][1]), **style)
            elif name in ("trained", "merged"):
                share, low, high = interval(margins(run, name) > 0)
                error = [[share - low], [high - share]]
                right.barh(above, share, xerr=error, capsize=3, **style)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.axvline(0.5, color="black", linestyle=":")
    right.set(xlim=(0, 1), title="at the end, by models and by rules")
    left.axhline(0.5, color="black", linestyle=":")
    left.legend(loc="lower right")
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_formatter(PercentFormatter(1))
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="output_dir of finished runs")
    parser.add_argument("--picture", type=Path, help="also draw curves and rules into this file")
    arguments = parser.parse_args()
    runs = {}
    for folder in arguments.folders:
        run, notebook = read_run(folder)
        runs[f"seed {run['parameters']['seed']}"] = run, notebook
        print(folder)
        for name in ("trained", "merged"):
            of_pairs = margins(run, name)
            loss = np.log1p(np.exp(-of_pairs)).mean()
            print(
                f"{name}: {in_words(of_pairs > 0)} right, sigmoid loss {loss:.3f}, "
                f"margin {of_pairs.mean():.3f} nats"
            )
        print(table_of_rules(run, notebook).to_markdown(), "\n")
    if arguments.picture:
        draw(runs, arguments.picture)
