"""Makes preference pairs of a model's own answers, the best and the worst of several to a prompt.

    python recipes/make_pairs/make_pairs.py --model MODEL --prompts FILE --rule FILE.py

Answers and scores are kept beside the pairs, in OUTPUT.answers.jsonl and OUTPUT.scores.jsonl. A run
that was cut off goes on where it was, and the same answers can be ranked in another way.
"""

import argparse
import hashlib
import itertools
import json
import operator
from collections import Counter
from pathlib import Path

import rankings
from answers import sampler
from tqdm.auto import tqdm

# The smallest of a family that leads the benchmarks of reward models (arXiv 2507.01352).
REWARD_MODEL = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"


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
        from datasets import load_dataset

        values = load_dataset(source, split=split)[column]
    prompts = {}
    for value in values:
        turns = [{"role": "user", "content": value}] if isinstance(value, str) else list(value)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if turns and turns[-1]["content"]:
            prompts[json.dumps(turns)] = turns
    return list(prompts.values())[: count or None]


def fingerprint(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def append(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def begin_or_resume(path, made_with):
    """The rows that the file holds already, behind a first line that says what they were made with.

    Raises SystemExit if the file was made with something else.
    """
    path.touch()
    whole, _, cut_off = path.read_text(encoding="utf-8").rpartition("\n")
    if not whole:
        path.write_text("", encoding="utf-8")
        append(path, [made_with])
        return []
    if cut_off:  # a line that was not written to its end
        path.write_text(whole + "\n", encoding="utf-8")
    first, *rows = [json.loads(line) for line in whole.split("\n")]
    if first != made_with:
        changed = [name for name in made_with if first.get(name) != made_with[name]]
        raise SystemExit(
            f"{path} was made with another {', '.join(changed)}: "
            "delete it, or choose another --output."
        )
    return rows


def sample_answers(prompts, path, batch_size, seed, **how):
    """A list of answers to each prompt. `path` holds those of a run before, and gets the others.

    how: what the sampler takes besides its batches.
    """
    weights = Path(how["model"]).glob("*.safetensors")  # none where the model is a Hub id
    written = max((file.stat().st_mtime for file in weights), default=None)
    digest = fingerprint(prompts)
    made_with = {**how, "seed": seed, "prompts": digest, "date of the weights": written}
    rows = begin_or_resume(path, made_with)
    sample, at_once = sampler(batch_size)
    batches = {
        seed + start: prompts[start : start + at_once]
        for start in range(len(rows), len(prompts), at_once)
    }
    if batches:
        progress = tqdm(total=len(prompts), initial=len(rows), desc="prompts answered")
        for found in sample(batches=batches, **how):
            append(path, found)
            rows += found
            progress.update(len(found))
    return rows


def score_answers(prompts, answers, path, options):
    """A list of scores for each prompt. `path` keeps what a judge or a reward model said."""
    if options.rule:
        rank, scores = rankings.by_rule(options.rule), []
    else:
        models = {
            "reward model": options.reward_model,
            "judge": options.judge,
            "judge's name": options.judge_model,
        }
        scores = begin_or_resume(path, {**models, "answers": fingerprint(answers)})
    if options.judge:
        rank = rankings.by_judge(options.judge, options.judge_model)
    elif options.reward_model and len(scores) < len(answers):
        rank = rankings.by_reward_model(options.reward_model)
    places = range(len(scores), len(answers))
    for place in tqdm(places, initial=len(scores), total=len(answers), desc="prompts ranked"):
        scores.append(rank(prompts[place], [answer["text"] for answer in answers[place]]))
        if not options.rule:
            append(path, scores[-1:])
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
    couples = [(scores[a] - scores[b], a, b) for a, b in itertools.product(finished, said)]
    couples.sort(key=operator.itemgetter(0), reverse=True)
    if not finished:
        raise ValueError("no answer ended within --max-new-tokens")
    if couples[0][0] <= 0:
        raise ValueError("no finished answer is better than another")
    if couples[0][0] < gap:
        raise ValueError("the best is less than --gap better than the worst")
    for points, chosen, rejected in couples:
        if points <= 0 or points < gap:
            break
        shorter, longer = sorted(answers[place]["tokens"] for place in (chosen, rejected))
        if not length_ratio or longer <= length_ratio * shorter:
            return chosen, rejected
    raise ValueError("no two of them are of like length")


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
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="1: as the model is; less: tamer (%(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=8,
        help="prompts at once, with all their answers (%(default)s)",
    )
    add(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16; auto: what the machine is good at",
    )
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
    answers = sample_answers(
        prompts,
        options.output.with_suffix(".answers.jsonl"),
        options.batch_size,
        options.seed,
        model=options.model,
        answers=options.answers,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        dtype=options.dtype,
    )
    scores = score_answers(prompts, answers, options.output.with_suffix(".scores.jsonl"), options)
    pairs, reasons = [], Counter()
    for turns, given, points in zip(prompts, answers, scores, strict=True):
        try:
            chosen, rejected = choose_pair(given, points, options.gap, options.length_ratio)
        except ValueError as reason:
            reasons[str(reason)] += 1
            continue
        pair = {
            "prompt": turns,
            "chosen": given[chosen]["text"],
            "rejected": given[rejected]["text"],
        }
        pairs.append({**pair, "chosen_score": points[chosen], "rejected_score": points[rejected]})
    options.output.unlink(missing_ok=True)
    append(options.output, pairs)
    print(
        f"{len(pairs)} pairs in {options.output}, of {len(prompts)} prompts. The others gave none:"
    )
    for reason, count in reasons.most_common():
        print(f"{count:8,} {reason}")


if __name__ == "__main__":
    main()
