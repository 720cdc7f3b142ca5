"""A rule for make_pairs.py: an answer that names an example."""

import re

WORDS = re.compile(r"\b(examples?|for instance|such as|including)\b|\be\.g\.", re.IGNORECASE)


def score(prompt, answer):
    """1 for an answer that says that it names an example, else 0."""
    return int(bool(WORDS.search(answer)))
