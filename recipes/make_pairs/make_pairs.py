"""Makes preference pairs of a model's own answers, the best and the worst of several to a prompt.

    python recipes/make_pairs/make_pairs.py --model MODEL --prompts FILE --rule FILE.py

Answers and scores are kept beside the pairs, in OUTPUT.answers.jsonl and OUTPUT.scores.jsonl. A run
that was cut off goes on where it was, and the same answers can be ranked in another way.
"""

import argparse
from collections import Counter
from pathlib import Path

import rankings
from answers import sampler
from prompts import read_prompts
from resume import append, begin_or_resume, fingerprint
from tqdm.auto import tqdm

# The smallest of a family that leads the benchmarks of reward models (arXiv 2507.01352).
REWARD_MODEL = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"


def sample_answers(prompts, path, batch_size, seed, **how):
    """A list of answers to each prompt. `path` holds those of a run before, and gets the others.

    how: what the sampler takes besides its batches.
    """
    weights = Path(how["model"]).glob("*.safetensors")  # none where the model is a Hub id
    written = max((file.stat().st_mtime for file in weights), default=None)
    made_with = {**how, "seed": seed, "prompts": fingerprint(prompts)}
    made_with["date of the weights"] = written
    rows = begin_or_resume(path, made_with)
    if len(rows) == len(prompts):
        return rows
    sample, at_once = sampler(batch_size)
    batches = {}
    for start in range(len(rows), len(prompts), at_once):
        batches[seed + start] = prompts[start : start + at_once]
    for found in tqdm(sample(batches=batches, **how), "batches answered", len(batches)):
        append(path, found)
        rows += found
    return rows


def score_answers(prompts, answers, path, options):
    """A list of scores for each prompt. `path` keeps what a judge or a reward model said."""
    scores = []
    if not options.rule:
        made_with = {"reward model": options.reward_model, "judge": options.judge}
        made_with["judge's name"] = options.judge_model
        made_with["answers"] = fingerprint(answers)
        scores = begin_or_resume(path, made_with)
    if len(scores) == len(answers):
        return scores
    if options.rule:
        rank = rankings.by_rule(options.rule)
    elif options.judge:
        rank = rankings.by_judge(options.judge, options.judge_model)
    else:
        rank = rankings.by_reward_model(options.reward_model)
    for place in tqdm(range(len(scores), len(answers)), "prompts ranked"):
        texts = [answer["text"] for answer in answers[place]]
        scores.append(rank(prompts[place], texts))
        if not options.rule:
            append(path, [scores[place]])
    return scores


def choose_pair(answers, scores, gap=0, length_ratio=0):
    """The places of the chosen and the rejected answer: of those that may be, the furthest apart.

    Training teaches where a chosen answer ends, so it has to be finished; a rejected one need not.
    gap: points by which the one has to beat the other. length_ratio: tokens of the longer by those
    of the shorter, at most; 0 for any.
    Raises ValueError(reason) where there is no such pair.
    """
    said = [place for place, answer in enumerate(answers) if answer["text"]]
    finished = [place for place in said if answers[place]["finished"]]
    if not finished:
        raise ValueError("no answer ended within --max-new-tokens")
    widest = max(scores[place] for place in finished) - min(scores[place] for place in said)
    if widest <= 0:
        raise ValueError("no finished answer is better than another")
    if widest < gap:
        raise ValueError("the best is less than --gap better than the worst")
    pair, pair_gap = None, 0
    for chosen in finished:
        for rejected in said:
            points = scores[chosen] - scores[rejected]
            shorter, longer = sorted(answers[place]["tokens"] for place in (chosen, rejected))
            alike = not length_ratio or longer <= length_ratio * shorter
            if alike and points >= gap and points > pair_gap:
                pair, pair_gap = (chosen, rejected), points
    if not pair:
        raise ValueError("no two of them are of like length")
    return pair


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument_group("what is asked").add_argument
    add("--model", required=True, help="a chat model's Hub id, or a folder such as dpo_run/merged")
    add("--prompts", required=True, help=".txt, a prompt a line; .jsonl; or a data set's Hub id")
    add("--column", default="prompt", help="of .jsonl or data set: texts or messages (%(default)s)")
    add("--split", default="train", help="of the data set (%(default)s)")
    add("--count", type=int, default=0, help="prompts at most; 0 for all")
    add = parser.add_argument_group("how answers are sampled").add_argument
    add("--answers", type=int, default=6, help="to each prompt (%(default)s)")
    add("--max-new-tokens", type=int, default=512, help="of an answer (%(default)s)")
    add("--temperature", type=float, default=0.8, help="below 1: tamer than it is (%(default)s)")
    add("--batch-size", type=int, default=8, help="prompts at once (%(default)s)")
    add("--dtype", default="auto", help="float32, bfloat16, float16; auto: what the machine has")
    add("--seed", type=int, default=42)
    ranked = parser.add_argument_group("how they are ranked, by one of three")
    add = ranked.add_mutually_exclusive_group(required=True).add_argument
    add("--rule", metavar="FILE.py", help="with score(prompt, answer), a number for two texts")
    add("--reward-model", nargs="?", const=REWARD_MODEL, help=f"Hub id or folder; {REWARD_MODEL}")
    add("--judge", metavar="ADDRESS", help="OpenAI-compatible, such as http://localhost:8000/v1")
    ranked.add_argument("--judge-model", default="", help="the judge's name at that address")
    add = parser.add_argument_group("what is kept").add_argument
    add("--gap", type=float, default=0, help="points between best and worst at least; 0 for any")
    add("--length-ratio", type=float, default=0, help="longer by shorter answer at most; 0 for any")
    add("--output", type=Path, default=Path("pairs.jsonl"), help="(%(default)s)")
    return parser.parse_args()


def main():
    options = parse_options()
    prompts = read_prompts(options.prompts, options.column, options.split, options.count)
    how = dict(
        model=options.model,
        answers=options.answers,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        dtype=options.dtype,
    )
    answers_file = options.output.with_suffix(".answers.jsonl")
    scores_file = options.output.with_suffix(".scores.jsonl")
    answers = sample_answers(prompts, answers_file, options.batch_size, options.seed, **how)
    scores = score_answers(prompts, answers, scores_file, options)
    pairs, reasons = [], Counter()
    for turns, given, points in zip(prompts, answers, scores, strict=True):
        try:
            chosen, rejected = choose_pair(given, points, options.gap, options.length_ratio)
        except ValueError as reason:
            reasons[str(reason)] += 1
            continue
        texts = {"chosen": given[chosen]["text"], "rejected": given[rejected]["text"]}
        scored = {"chosen_score": points[chosen], "rejected_score": points[rejected]}
        pairs.append({"prompt": turns, **texts, **scored})
    options.output.unlink(missing_ok=True)
    append(options.output, pairs)
    print(f"{len(pairs)} pairs in {options.output}, of {len(prompts)} prompts. The rest gave none:")
    for reason, count in reasons.most_common():
        print(f"{count:8,} {reason}")


if __name__ == "__main__":
    main()
