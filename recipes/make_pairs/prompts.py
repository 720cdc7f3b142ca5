"""Reads the prompts that a model is to answer."""

import json

from datasets import load_dataset


def read_prompts(source, column="prompt", split="train", count=0):
    """The prompts, each a list of {"role", "content"} that ends with a user's turn, none twice.

    source: a text file with a prompt on each line; or a .jsonl file or a data set's Hub id, of
    which `column` is read: texts, or lists of messages, whose last answer is left out.
    count: how many at most, 0 for all.
    """
    if source.endswith(".txt"):
        values = [line.strip() for line in open(source, encoding="utf-8")]
    elif source.endswith(".jsonl"):
        values = [json.loads(line)[column] for line in open(source, encoding="utf-8")]
    else:
        values = load_dataset(source, split=split)[column]
    prompts = {}
    for value in values:
        turns = value
        if isinstance(value, str):
            turns = [{"role": "user", "content": value}]
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if turns and turns[-1]["content"]:
            prompts[json.dumps(turns)] = turns
    distinct = list(prompts.values())
    return distinct[:count] if count else distinct
