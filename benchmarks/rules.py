"""What a finished run ranks right, beside what each trivial rule does.

    python benchmarks/rules.py dpo_run [another_run] [--picture FILE]

It needs the run's base model and pairs, and no GPU.

A rule that ranks most pairs right may be all that a model has learnt. So the held-out pairs that a
rule does not rank right are looked at by themselves: what the trained model ranks right of those,
it does not have from that rule.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parents[1]))
from rehearsal.notebook import run_cells  # noqa: E402


def read_run(folder):
    """The record of a finished run, and the notebook's names after its audit of the same pairs."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as empty, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere):
            parameters = {**run["parameters"], "output_dir": empty, "push_to_hub": False}
            notebook = run_cells("install", "audit", **parameters)
    return run, notebook


def gaps_of_rules(run, notebook):
    """{rule: (share of the training pairs, gaps of the held-out pairs)}.

    A gap is above 0 where the rule prefers the chosen answer. A rule that ranks less than half of
    the training pairs right is turned round.
    """
    share_ranked = notebook["share_ranked"]
    gaps = {}
    for names, rule in notebook["shallow_rules"](
        notebook["train_ids"], notebook["tokenizer"]
    ).items():
        both = []
        for pairs in (notebook["train_ids"], notebook["held_out_ids"]):
            both.append(np.array([rule(p, c) - rule(p, r) for p, c, r in pairs], dtype=float))
        gaps[names] = share_ranked(both[0]), both[1]
    tokens = notebook["lengths"].loc[notebook["held_out"], ["chosen", "rejected"]].to_numpy()
    in_sum = np.array(run["logps"]["base"])
    for how, logps in {"in sum": in_sum, "per token": in_sum / tokens}.items():
        names = (
            f"the answer likelier for the base, {how}",
            f"the answer less likely for the base, {how}",
        )
        gaps[names] = run["base_ranks"][how], logps[:, 0] - logps[:, 1]
    turned = {}
    for (rule, opposite), (training, held_out) in gaps.items():
        if training < 0.5:
            turned[opposite] = 1 - training, -held_out
        else:
            turned[rule] = training, held_out
    return turned


def margins(run, name):
    """The margin of each held-out pair, in nats, of the model "trained" or "merged"."""
    base = {"trained": "base", "merged": "base unquantised"}[name]
    moved = np.subtract(run["logps"][name], run["logps"][base])
    return run["parameters"]["beta"] * (moved[:, 0] - moved[:, 1])


def interval(right, pairs):
    """(share, low, high): a share with Wilson's 95% interval."""
    low, high = binomtest(int(right), pairs).proportion_ci(method="wilson")
    return right / pairs, low, high


def in_words(right, pairs):
    if not pairs:
        return "–"
    return "{:.0%} ({:.0%} to {:.0%})".format(*interval(right, pairs))


def count_right(gaps):
    """How many gaps are above 0; a tie counts half, and halves are rounded down."""
    return int((gaps > 0).sum() + 0.5 * (gaps == 0).sum())


def table_of_rules(run, notebook):
    """A row for each rule, the best on training pairs first."""
    rules = gaps_of_rules(run, notebook)
    table = {}
    for rule in sorted(rules, key=lambda name: rules[name][0], reverse=True):
        training, gaps = rules[rule]
        missed = gaps <= 0
        row = {
            "training pairs": f"{training:.0%}",
            "held out": in_words(count_right(gaps), len(gaps)),
            "not ranked right": int(missed.sum()),
        }
        for name in ("trained", "merged"):
            right = margins(run, name) > 0
            row[f"of these {name}"] = in_words(right[missed].sum(), int(missed.sum()))
        table[rule] = row
    return pd.DataFrame.from_dict(table, orient="index")


def draw_curves(axes, run, color, label, shift):
    """The share of held-out pairs that is ranked right along the way, with its interval.

    shift: to the right, so that the intervals of two runs stand beside each other.
    """
    pairs = len(run["logps"]["base"])
    steps = []
    shares = []
    for entry in run["history"]:
        if "eval_loss" in entry and entry["step"]:
            steps.append(entry["step"] + shift)
            shares.append(interval(round(entry["eval_rewards/accuracies"] * pairs), pairs))
    share, low, high = np.transpose(shares)
    axes.errorbar(steps, share, [share - low, high - share], color=color, capsize=3, label=label)
    axes.set(xlabel="step", ylabel="ranked right", title="trained, along the way", ylim=(0.4, 1))


def draw_bars(axes, bars, offset, color):
    """Horizontal bars with intervals. bars: {name: (share, low, high)}."""
    share, low, high = np.transpose(list(bars.values()))
    places = np.arange(len(bars)) + offset
    error = [share - low, high - share]
    axes.barh(places, share, 0.35, xerr=error, color=color, alpha=0.75, capsize=3)
    axes.set_yticks(range(len(bars)), bars)
    axes.set(xlim=(0, 1), title="held-out pairs ranked right, at the end")


def draw(runs, picture):
    """The curves of some runs, and what rules and models rank right. runs: [(run, notebook), …]."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 3))
    first = gaps_of_rules(*runs[0])
    for number, (run, notebook) in enumerate(runs):
        color = f"C{number}"
        draw_curves(left, run, color, f"seed {run['parameters']['seed']}", shift=0.3 * number)
        bars = {}
        for name in ("trained", "merged"):
            bars[name] = interval((margins(run, name) > 0).sum(), len(run["logps"]["base"]))
        rules = gaps_of_rules(run, notebook)
        for rule in sorted(first, key=lambda name: first[name][0], reverse=True):
            bars[rule] = (np.nan, np.nan, np.nan)  # turned round in this run
            if rule in rules:
                _, gaps = rules[rule]
                bars[rule] = interval(count_right(gaps), len(gaps))
        draw_bars(right, bars, 0.38 * number - 0.19 * (len(runs) - 1), color)
    right.invert_yaxis()
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
    runs = [read_run(folder) for folder in arguments.folders]
    for folder, (run, notebook) in zip(arguments.folders, runs, strict=True):
        print(folder)
        for name in ("trained", "merged"):
            of_pairs = margins(run, name)
            loss = np.log1p(np.exp(-of_pairs)).mean()
            right = in_words((of_pairs > 0).sum(), len(of_pairs))
            print(f"{name}: {right} right, loss {loss:.3f}, margin {of_pairs.mean():.3f} nats")
        print(table_of_rules(run, notebook).to_markdown(), "\n")
    if arguments.picture:
        draw(runs, arguments.picture)
