"""Prints what lm_eval has left in a folder, a row for each model, and draws it beside the folder.

python recipes/evaluate/table.py [FOLDER]
"""

import argparse
import json
from pathlib import Path

import pandas as pd

# The first of them that a task has is the leaderboard's.
METRICS = ["prompt_level_strict_acc,none", "acc_norm,none", "acc,none", "exact_match,strict-match"]

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("folder", nargs="?", type=Path, default=Path("dpo_run/evaluation"))
folder = parser.parse_args().folder
scores = {}
for path in sorted(
    folder.glob("*/results_*.json"), key=lambda path: path.name
):  # of a task, the newest
    found = json.loads(path.read_text())
    parts = {part for parts in found["group_subtasks"].values() for part in parts}  # as mmlu has 57
    for task in found["results"].keys() - parts:
        results = found["results"][task]
        metric = next(name for name in [*METRICS, *results] if isinstance(results.get(name), float))
        scores.setdefault(path.parent.name, {})[task] = 100 * results[metric]
table = pd.DataFrame(scores).T
table["average"] = table.mean(axis=1, skipna=False)
print(table.round(1).to_string())
table.T.plot.bar(rot=30, ylabel="%", figsize=(9, 4)).figure.savefig(
    folder.with_suffix(".png"), bbox_inches="tight"
)
