"""A rule for make_pairs.py: a brief answer in whole sentences."""

import re


def score(prompt, answer):
    """1 for at most three sentences that end in a full stop and hold no list, else 0."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", answer) if part]
    has_list = re.search(r"^\s*([-*•]|\d+[.)])\s", answer, re.MULTILINE)
    return int(len(sentences) <= 3 and answer.endswith(".") and not has_list)
