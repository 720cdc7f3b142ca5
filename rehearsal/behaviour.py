"""A behaviour before and after DPO: what a real model writes to prompts that no pair is made of.

SmolLM2-135M-Instruct is asked everyday questions, each with "Answer in two sentences, with an
example." Two rules of recipes/make_pairs check the two halves of that request. For each rule by
itself the model's own answers are ranked, the notebook trains on the pairs, and answers to held-out
questions are sampled. A second round starts from the result.
"""

import json
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.real import make_real_model

RECIPE = Path(__file__).parents[1] / "recipes" / "make_pairs"
REQUEST = " Answer in two sentences, with an example."
LENGTHS = ("one sentence", "two sentences", "three or more", "cut off at 96 tokens")
RULES = {"two_sentences": "has exactly two sentences", "example": "names an example"}
SAMPLING = ["--max-new-tokens", "96", "--temperature", "0.8", "--dtype", "bfloat16"]
PARAMETERS = dict(  # about one pass over the pairs of a round
    load_in_4bit=False,
    eval_pairs=8,
    learning_rate=5e-4,
    pairs_per_step=8,
    max_steps=14,
    warmup_steps=1,
    max_length=512,
    push_to_hub=False,
    output_dir="dpo_run",
)


def recipe(script, *options):
    """Runs a script of the recipe, which says how far it is and goes on where it was cut off."""
    words = [sys.executable, RECIPE / script, *options, *SAMPLING]
    subprocess.run([str(word) for word in words], check=True)


def make_pairs(model, rule, folder):
    """The file of the pairs that a rule makes of the model's own answers to prompts.txt.

    Both rules rank the same answers, which are kept in `folder`.
    """
    pairs = folder / f"pairs-{rule}.jsonl"
    if not pairs.exists():
        own = folder / "own.jsonl"
        asked = ["--model", model, "--prompts", RECIPE / "prompts.txt", "--seed", 1]
        sampled = ["--answers", 4, "--batch-size", 24]
        ranked = ["--rule", RECIPE / f"{rule}.py", "--output", own]
        recipe("make_pairs.py", *asked, *sampled, *ranked)
        own.rename(pairs)
    return pairs


def sample(model, prompts, file, at_once=60):
    """An answer of the model to each prompt of a file, {"text", "tokens", "finished"}."""
    rules = [RECIPE / f"{rule}.py" for rule in RULES]
    asked = ["--model", model, "--prompts", prompts, "--batch-size", at_once, "--seed", 7]
    recipe("share.py", *asked, "--rule", *rules, "--output", file)
    return read_answers(file)


def answers_file(output, rule, seed, number):
    """Where the answers to the held-out prompts are. Round 0 is before any training."""
    if number == 0:
        return output / "held-out-before.jsonl"
    return output / f"held-out-{rule}-seed{seed}-round{number}.jsonl"


def kept(rule, answers):
    """Whether each answer keeps the rule; one that was cut off keeps none."""
    score = runpy.run_path(str(RECIPE / f"{rule}.py"))["score"]
    return [bool(answer["finished"] and score("", answer["text"])) for answer in answers]


@torch.inference_mode()
def nats_per_token(model, questions, answers):
    """How unlikely a model finds answers to questions: mean negative log-likelihood of a token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    nats = 0.0
    tokens = 0
    for question, answer in zip(questions, answers, strict=True):
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + ids])
        loss = model(torch.tensor([prompt + ids]), labels=labels).loss
        nats += loss.item() * len(ids)
        tokens += len(ids)
    return nats / tokens


def train(run_notebook, environment, output, seed, rounds):
    """Yields (rule, round, model) as they come.

    What the folder `output` holds already is not done again.
    """
    (output / "base").mkdir(exist_ok=True)
    for rule in RULES:
        start = output / "model"
        own_answers = output / "base"
        for number in range(1, rounds + 1):
            pairs = make_pairs(start, rule, own_answers)
            place = output / f"{rule}-seed{seed}-round{number}"
            merged = place / "dpo_run" / "merged"
            if not (merged / "README.md").exists():
                sources = dict(base_model=start, dataset_id=pairs, new_model=place.name, seed=seed)
                run_notebook(place, environment, **sources, **PARAMETERS)
            yield rule, number, merged
            start = merged
            own_answers = place


def measure(run_notebook, environment, output, seed=1, rounds=1):
    """A list of dictionaries, one for each model.

    Of its `answers` to held-out prompts: how many keep each rule, how many are `finished`, and how
    many `tokens` they have on average. What the training cost elsewhere: `nats` per token of the
    base's answers to 40 of the questions without the request.
    """
    base = output / "model"
    if not (base / "config.json").exists():
        make_real_model(base)
    held_out = RECIPE / "held_out.txt"
    questions = [line.strip().removesuffix(REQUEST) for line in held_out.open()][:40]
    (output / "plain.txt").write_text("\n".join(questions) + "\n")
    plain = sample(base, output / "plain.txt", output / "plain.jsonl", 40)
    usual = [answer["text"] for answer in plain]
    models = [("before", 0, base), *train(run_notebook, environment, output, seed, rounds)]
    table = []
    for rule, number, model in models:
        answers = sample(model, held_out, answers_file(output, rule, seed, number))
        row = {"rule": rule, "round": number, "seed": seed, "answers": len(answers)}
        for name in RULES:
            row[name] = sum(kept(name, answers))
        row["finished"] = sum(answer["finished"] for answer in answers)
        row["tokens"] = mean(answer["tokens"] for answer in answers)
        row["nats"] = nats_per_token(model, questions, usual)
        table.append(row)
    (output / f"behaviour-seed{seed}.json").write_text(json.dumps(table, indent=1))
    return table


def interval(count, answers):
    """The 95 % interval of a share, by Wilson's score."""
    return binomtest(count, answers).proportion_ci(method="wilson")


def in_words(table):
    """The table as lines of text."""
    lines = []
    for row in table:
        name = "before" if row["round"] == 0 else f"{row['rule']}, round {row['round']}"
        shares = []
        for rule, words in RULES.items():
            low, high = interval(row[rule], row["answers"])
            shares.append(f"{words} {row[rule] / row['answers']:.0%} ({low:.0%} to {high:.0%})")
        rest = f"{row['tokens']:.0f} tokens, plain answers {row['nats']:.3f} nats per token"
        lines.append(f"{name:24} {', '.join(shares)}, {rest}")
    return "\n".join(lines)


def read_answers(file):
    """The answers of a file that share.py wrote, {"text", "tokens", "finished"} each."""
    _, *lines = file.open(encoding="utf-8")  # the first says how they were sampled
    return [json.loads(line)[0] for line in lines]


def sentences(answer):
    """How many sentences an answer has, as one of LENGTHS."""
    count = len(re.split(r"(?<=[.!?])\s+", answer["text"]))
    if not answer["finished"]:
        return LENGTHS[3]
    return LENGTHS[min(count, 3) - 1]


def answers_by_round(output, seed, rule="example"):
    """{what a model is called: its held-out answers}, before and after each round of a rule.

    Rounds that the folder `output` does not hold are left out.
    """
    models = {"before": read_answers(answers_file(output, rule, seed, 0))}
    names = {1: "after a round of DPO on its own answers", 2: "after two rounds"}
    for number, name in names.items():
        file = answers_file(output, rule, seed, number)
        if file.exists():
            models[name] = read_answers(file)
    return models


def in_lines(answer, width=54, most=8):
    """The lines of an answer; the last is an ellipsis where there is more."""
    lines = []
    for paragraph in answer["text"].splitlines():
        lines += textwrap.wrap(paragraph, width)
    if len(lines) > most or not answer["finished"]:
        lines = [*lines[: most - 1], "…"]
    return lines


def lay_out(models, places):
    """The text of the picture as (column, line, text, weight) each, and how many lines it has.

    The first of the models is in the left column, the last in the right one.
    """
    names = list(models)
    columns = {0: names[0], 1: names[-1]}
    with (RECIPE / "held_out.txt").open(encoding="utf-8") as file:
        prompts = [line.strip().removesuffix(REQUEST) for line in file]
    texts = [(column, 0, name, "bold") for column, name in columns.items()]
    line = 1.7
    for place in places:
        texts.append((0, line, prompts[place], "bold"))
        line += 1.2
        most = 0
        for column, name in columns.items():
            words = in_lines(models[name][place])
            texts += [(column, line + below, text, "normal") for below, text in enumerate(words)]
            most = max(most, len(words))
        line += most + 0.8
    return texts, line


def draw_shares(axes, models):
    """Bars of the shares of each model's answers, with their 95 % intervals."""
    groups = ["names an example", *LENGTHS]
    width = 0.8 / len(models)
    for number, (name, answers) in enumerate(models.items()):
        lengths = [sentences(answer) for answer in answers]
        counts = [sum(kept("example", answers))]
        counts += [lengths.count(length) for length in LENGTHS]
        lefts = [place + (number - (len(models) - 1) / 2) * width for place in range(len(counts))]
        shares = [count / len(answers) for count in counts]
        bounds = [interval(count, len(answers)) for count in counts]
        below = [share - bound.low for share, bound in zip(shares, bounds, strict=True)]
        above = [bound.high - share for share, bound in zip(shares, bounds, strict=True)]
        style = dict(color=f"C{number}", alpha=0.75, capsize=4, label=name)
        axes.bar(lefts, shares, 0.9 * width, yerr=[below, above], **style)
        for left, share, bound in zip(lefts, shares, bounds, strict=True):
            axes.text(left, bound.high + 0.02, f"{share:.0%}", ha="center", fontsize=10)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylim=(0, 1), ylabel="share")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper right")
    title = f"of {len(answers)} answers to held-out questions, with 95% intervals"
    axes.set_title(title, fontsize=10.5)


def draw_picture(picture, models, places=(3, 5, 7)):
    """Answers before and after in two columns, above the shares of all answers.

    models: {what it is called: its answers to the held-out prompts}, the base first and the newest
    last. places: which of the held-out prompts are shown. Of the default ones two came to name an
    example in the run that the README shows, and one did not.
    """
    texts, lines = lay_out(models, places)
    text_inches = 0.2 * lines
    inches = text_inches + 3.4
    figure = plt.figure(figsize=(9.5, inches))
    rows = figure.add_gridspec(2, 1, height_ratios=[text_inches, 2.3], hspace=0.1)
    rows.update(left=0.075, right=0.985, top=1 - 0.55 / inches, bottom=0.35 / inches)
    axes = figure.add_subplot(rows[0])
    axes.set(xlim=(0, 1), ylim=(lines, 0))
    axes.axis("off")
    for column, line, text, weight in texts:
        style = dict(va="top", fontsize=10.5, weight=weight, parse_math=False)
        axes.text(0.51 * column, line, text, **style)
    draw_shares(figure.add_subplot(rows[1]), models)
    asked = REQUEST.strip()
    figure.suptitle(f"SmolLM2-135M-Instruct, asked each time: “{asked}”", fontsize=12.5)
    figure.savefig(picture, dpi=190)
