"""What the tests of reading rows share: conversations, pairs, and the notebook's cells that read
them.
"""

from itertools import cycle

from rehearsal.notebook import run_cells

ANSWERS = ("It flies.", "A stone.")


class Record(dict):
    """The record of a run that is kept in memory only, and lets every stage begin."""

    def stage(self, name, needs=None):
        pass


def talk(*texts, system=None):
    """The messages of a conversation that a user begins, behind a system turn if there is one."""
    turns = [
        {"role": role, "content": text}
        for role, text in zip(cycle(["user", "assistant"]), texts, strict=False)
    ]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return turns


def pair(*texts, answers=ANSWERS, system=None):
    """A row with a conversation and two answers to it."""
    return {"prompt": talk(*texts, system=system), "chosen": answers[0], "rejected": answers[1]}


def read(base, *pairs):
    """The namespace after the cells that read pairs and write them through a base's template."""
    namespace = dict(
        base=base,
        base_commit=None,
        raw=list(pairs),
        max_length=3000,
        run=Record(day="2026-01-02"),
    )
    run_cells("load-pairs", "load-pairs", namespace)
    return run_cells("read-pair", "rows", namespace)


def kept_pairs(nb):
    """The pairs of token ids that were kept, as lists, in the order of their rows."""
    found = []
    for pair in nb["pairs"].values():
        found.append({name: ids.tolist() for name, ids in pair.items()})
    return found
