"""Makes pairs for the notebook of comparisons: answers to a prompt and what people thought of them.

    python recipes/make_pairs/from_comparisons.py nvidia/HelpSteer3 --output pairs.jsonl

The source is a data set's Hub id, or a .json, .jsonl or .parquet file, with the columns of
HelpSteer3, PKU-SafeRLHF, UltraFeedback or arena conversations. Ties give no pair and are counted.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from datasets import load_dataset


def from_helpsteer3(row, by):
    """overall_preference goes from -3, the first answer is much better, to 3, the second is."""
    preference = row["overall_preference"]
    return row["context"], [(row["response1"], -preference), (row["response2"], preference)]


def from_safe_rlhf(row, by):
    """People were asked which is better and which is safer, and often gave different answers."""
    winner = row[f"{by}_response_id"]
    return row["prompt"], [(row["response_0"], winner == 0), (row["response_1"], winner == 1)]


def from_ultrafeedback(row, by):
    """Four completions with grades. overall_score is 10 in some rows where 1 was meant."""
    rated = [(each["response"], float(each["fine-grained_score"])) for each in row["completions"]]
    return row["instruction"], rated


def from_arena(row, by):
    """Two whole conversations; only those that differ in the last answer alone are two answers."""
    first, second = row["conversation_a"], row["conversation_b"]
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in first[:-1]]
    others = [{"role": turn["role"], "content": turn["content"]} for turn in second[:-1]]
    if turns != others:
        raise ValueError("the conversations differ before their last answer")
    winner = row["winner"]
    return turns, [
        (first[-1]["content"], winner == "model_a"),
        (second[-1]["content"], winner == "model_b"),
    ]


READERS = {
    "overall_preference": from_helpsteer3,
    "better_response_id": from_safe_rlhf,
    "completions": from_ultrafeedback,
    "conversation_a": from_arena,
}


def make_pair(turns, rated):
    """turns: a text or messages; rated: (answer, score) of each. ValueError where none has won."""
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if len(rated) < 2:
        raise ValueError("fewer than two answers")
    ranked = sorted(rated, key=lambda answer: answer[1])
    (rejected, low), (chosen, high) = ranked[0], ranked[-1]
    if low == high:
        raise ValueError("a tie")
    scores = {"chosen_score": float(high), "rejected_score": float(low)}
    return {"prompt": turns, "chosen": chosen, "rejected": rejected, **scores}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="Hub id, or a .json, .jsonl or .parquet file")
    parser.add_argument("--split", default="train", help="of a data set of the Hub (%(default)s)")
    parser.add_argument("--by", default="better", choices=["better", "safer"], help="PKU-SafeRLHF")
    parser.add_argument("--output", type=Path, default=Path("pairs.jsonl"), help="(%(default)s)")
    options = parser.parse_args()

    if Path(options.source).is_file():
        kind = "parquet" if options.source.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=options.source, split="train")
    else:
        rows = load_dataset(options.source, split=options.split)
    known = [column for column in READERS if column in rows.column_names]
    if not known:
        raise SystemExit(
            f"The columns of {options.source} are {', '.join(rows.column_names)}; "
            f"read are sets with one of {', '.join(READERS)}."
        )
    read, reasons = READERS[known[0]], Counter()
    with open(options.output, "w", encoding="utf-8") as file:
        for row in rows:
            try:
                pair = make_pair(*read(row, options.by))
            except ValueError as reason:
                reasons[str(reason)] += 1
                continue
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    print(f"{len(rows) - reasons.total()} pairs in {options.output}. The other rows gave none:")
    for reason, count in reasons.most_common():
        print(f"{count:8,} {reason}")


if __name__ == "__main__":
    main()
