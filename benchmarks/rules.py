"""What a finished run ranks right, beside what each trivial rule does.

    python benchmarks/rules.py dpo_run          # needs the run's base model and pairs, and no GPU

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

import numpy as np
import pandas as pd
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


def share(right, pairs):
    """A share in words, with Wilson's 95% interval."""
    if not pairs:
        return "–"
    low, high = binomtest(int(right), pairs).proportion_ci(method="wilson")
    return f"{right / pairs:.0%} ({low:.0%} to {high:.0%})"


def table_of_rules(run, notebook):
    """A row for each rule, the best on training pairs first."""
    models = {name: margins(run, name) > 0 for name in ("trained", "merged")}
    rows = {}
    for rule, (training, gaps) in gaps_of_rules(run, notebook).items():
        missed = gaps <= 0
        row = {
            "training pairs": f"{training:.0%}",
            "held out": share(np.floor((gaps > 0).sum() + 0.5 * (gaps == 0).sum()), len(gaps)),
            "not ranked right": int(missed.sum()),
        }
        for name, right in models.items():
            row[f"of these {name}"] = share(right[missed].sum(), int(missed.sum()))
        rows[rule] = training, row
    best_first = sorted(rows, key=lambda rule: rows[rule][0], reverse=True)
    return pd.DataFrame({rule: rows[rule][1] for rule in best_first}).T


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="output_dir of a finished run")
    run, notebook = read_run(parser.parse_args().folder)
    for name in ("trained", "merged"):
        of_pairs = margins(run, name)
        loss = np.log1p(np.exp(-of_pairs)).mean()
        right = share((of_pairs > 0).sum(), len(of_pairs))
        print(f"{name}: {right} right, loss {loss:.3f}, margin {of_pairs.mean():.3f} nats")
    print(table_of_rules(run, notebook).to_markdown())
