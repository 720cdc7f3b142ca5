"""A rule for make_pairs.py: two sentences, neither more nor fewer."""

import re


def score(prompt, answer):
    """1 for exactly two sentences on one line that end in a full stop, else 0."""
    sentences = re.split(r"(?<=[.!?])\s+", answer)
    return int(len(sentences) == 2 and answer.endswith(".") and "\n" not in answer)
