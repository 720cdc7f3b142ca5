"""Says what share of a model's answers keeps a rule. They are sampled as make_pairs.py does it.

    python recipes/make_pairs/share.py --model dpo_run/merged --prompts FILE --rule FILE.py

An answer that was not ended within --max-new-tokens keeps none. OUTPUT holds all, to be read.
"""

import argparse
from pathlib import Path
from statistics import mean

from make_pairs import read_prompts, sample_answers
from rankings import by_rule
from scipy.stats import binomtest


def share(kept, answers):
    """A share in words with its 95 % interval, by Wilson's score."""
    low, high = binomtest(kept, answers).proportion_ci(method="wilson")
    return f"{kept / answers:.0%} of {answers} (95% interval {low:.0%} to {high:.0%})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a chat model's Hub id or folder")
    parser.add_argument(
        "--prompts",
        required=True,
        help="as of make_pairs.py; none of those that pairs were made of",
    )
    parser.add_argument(
        "--rule", nargs="+", required=True, metavar="FILE.py", help="one or several"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=512, help="of an answer (%(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="(%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts at once (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="as of make_pairs.py")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("share.jsonl"), help="(%(default)s)")
    options = parser.parse_args()

    prompts = read_prompts(options.prompts)
    how = dict(
        model=options.model, max_new_tokens=options.max_new_tokens, temperature=options.temperature
    )
    given = sample_answers(
        prompts,
        options.output,
        options.batch_size,
        options.seed,
        answers=1,
        dtype=options.dtype,
        **how,
    )
    answers = [found[0] for found in given]
    finished = [answer["finished"] for answer in answers]
    print(f"finished: {share(sum(finished), len(answers))}")
    print(f"tokens: {mean(answer['tokens'] for answer in answers):.0f} on average")
    for rule in options.rule:
        rank = by_rule(rule)
        scores = [
            rank(turns, [answer["text"]])[0] for turns, answer in zip(prompts, answers, strict=True)
        ]
        kept = [score > 0 and ended for score, ended in zip(scores, finished, strict=True)]
        print(f"{Path(rule).stem}: {share(sum(kept), len(kept))}")


if __name__ == "__main__":
    main()
