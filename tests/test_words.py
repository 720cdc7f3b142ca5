"""What the notebook says about the pairs before training, and about the run after it."""

import random

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from rows import kept_pairs, read
from standins import TEXT
from transformers import AutoTokenizer

from benchmarks import rules
from rehearsal.notebook import alone, run_cell, run_cells

WORDS = sorted({word.lower() for word in TEXT.split() if word.isalpha()})


def made_up(kind, count=120):
    """Pairs whose chosen answers differ from the rejected ones in nothing but `kind`."""
    rng = random.Random(0)

    def draw(words):
        return " ".join(rng.sample(WORDS, words))

    for i in range(count):
        question, chosen, rejected = f"{i} {draw(8)}", draw(9), draw(9)
        if kind == "length":
            rejected = draw(rng.randint(2, 5))
        elif kind == "first token":
            chosen = f"certainly {chosen}"
            rejected = f"sorry {rejected}"
        elif kind == "words of the prompt":
            chosen = " ".join(rng.sample(question.split()[1:], 8))
        elif kind == "nearly the same":
            chosen = draw(25)
            rejected = f"{chosen} of" if i % 2 else rejected
        elif kind == "both orders" and i % 3 == 0:
            yield {"question": question, "chosen": rejected, "rejected": chosen}
        yield {"question": question, "chosen": chosen, "rejected": rejected}


def audit(nb, train, held_out):
    """Runs the audit of pairs of token ids, of which some are held out."""
    nb["rows"] = Dataset.from_list([*train, *held_out])
    nb["train"] = list(range(len(train)))
    nb["held_out"] = list(range(len(train), len(train) + len(held_out)))
    return run_cells("audit-rules", "audit", nb)


def audit_texts(models, pairs):
    """The namespace after the audit of pairs of texts, the last 40 of them held out."""
    nb = read(models["qwen"], *pairs)
    ids = kept_pairs(nb)
    return audit(nb, ids[:-40], ids[-40:])


RULES = {  # by what the chosen answers have: the rule, and the one for pairs turned round
    "length": ("the longer answer", "the shorter answer"),
    "first token": ("the likelier first token", "the likelier first token"),  # learnt either way
    "words of the prompt": ("more words of the prompt", "fewer words of the prompt"),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", RULES)
def test_a_shallow_rule_is_found_and_warned_of(models, kind, turned, capsys):
    pairs = list(made_up(kind))
    if turned:  # the rule is true of the rejected answers
        pairs = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    nb = audit_texts(models, pairs)
    assert nb["rule"] == RULES[kind][turned]
    assert nb["shallow"] > 0.9 and "WARNING" in capsys.readouterr().out


def test_pairs_that_nothing_shallow_decides_are_not_warned_of(models, capsys):
    nb = audit_texts(models, made_up("nothing"))
    printed = capsys.readouterr().out
    assert 0.2 < nb["shallow"] < 0.8 and "WARNING" not in printed
    assert "\n0% of the pairs have answers" in printed and "contradict another one: 0\n" in printed


@pytest.mark.parametrize(
    "kind, counted",
    [
        ("both orders", "contradict another one: 80\n"),
        ("nearly the same", "\n50% of the pairs have answers"),
    ],
)
def test_what_the_audit_counts(models, kind, counted, capsys):
    audit_texts(models, made_up(kind))
    assert counted in capsys.readouterr().out


def ids(chosen, rejected, prompt=(1,)):
    return {"prompt_ids": list(prompt), "chosen_ids": list(chosen), "rejected_ids": list(rejected)}


@pytest.fixture(scope="module")
def tokenizer(models):
    return AutoTokenizer.from_pretrained(models["qwen"])


def test_marks_at_the_start(tokenizer):
    mark = alone("audit-rules")["shallow_rules"]([], tokenizer)
    mark = mark["a mark at the start", "no mark at the start"]
    texts = ("- a list", "**Bold**", "A word", "3 bees")
    assert [mark([], tokenizer(text).input_ids) for text in texts] == [True, True, False, False]


def test_the_rule_is_found_on_training_pairs_only(tokenizer):
    """On held-out ones another would look better, whose choice would be made by looking at them."""
    train = [ids([50 + i % 2, 60, 61, 62], [52, 60, 61, 62]) for i in range(40)]
    held_out = [ids([60, 61, 62], [60, 61]) for _ in range(20)]
    nb = audit({"tokenizer": tokenizer}, train, held_out)
    assert nb["rule"] == "the likelier first token" and nb["shallow"] == 0.5
    assert nb["audit"]["held out"].max() == 1.0


def test_beginnings_are_counted_on_training_pairs_only(tokenizer):
    train = [ids([50, 60], [51, 60]) for _ in range(30)]
    held_out = [ids([51, 60], [50, 60]) for _ in range(40)]
    nb = audit({"tokenizer": tokenizer}, train, held_out)
    assert list(nb["audit"].loc["the likelier first token"]) == [1.0, 0.0]


@pytest.mark.parametrize("longer, warned", [(32, False), (33, True)])
def test_a_warning_begins_above_four_in_five(tokenizer, longer, warned, capsys):
    long, short = [50, 60, 61, 62], [50, 60]
    train = [ids(long, short) for _ in range(20)]
    held_out = [ids(long, short)] * longer + [ids(short, long)] * (40 - longer)
    nb = audit({"tokenizer": tokenizer}, train, held_out)
    assert nb["shallow"] == longer / 40 and ("WARNING" in capsys.readouterr().out) == warned


LIKELIHOODS = {  # log-probabilities of (chosen, rejected) in the held-out pairs, the best rule, its share
    "likelier in sum": ([(-10, -20)] * 9 + [(-20, -10)], [(5, 5)] * 10, "in sum", 0.9),
    "less likely in sum": ([(-20, -10)] * 9 + [(-10, -20)], [(5, 5)] * 10, "in sum", 0.9),
    "likelier per token": ([(-10, -9)] * 10, [(10, 3)] * 10, "per token", 1.0),
    "less likely per token": ([(-9, -10)] * 10, [(3, 10)] * 10, "per token", 1.0),
}


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_the_rule_of_likelihood_either_way_round(kind):
    logps, lengths, how, share = LIKELIHOODS[kind]
    ranks = {"in sum": 0.5, "per token": 0.5, how: 0.1 if "less" in kind else 0.95}
    nb = alone("audit-rules") | {"answer_tokens": np.array(lengths)}
    nb["audit"] = pd.DataFrame({"training": [0.6], "held out": [0.6]}, ["the longer answer"])
    nb["run"] = {"base_ranks": ranks, "logps": {"base": logps}}
    run_cell("likelihood", nb)
    likelier = "less likely" if "less" in kind else "likelier"
    assert nb["rule"] == f"the answer {likelier} for the base, {how}"
    assert nb["shallow"] == pytest.approx(share)


# Two pairs, whose answers have (2, 4) and (5, 5) tokens.
LENGTHS = np.array([(2, 4), (5, 5)])
LOGPS = {
    "base": [(-10, -16), (-20, -10)],  # per token: -5, -4 and -4, -2
    "trained": [(-8, -40), (-20, -15)],  # moved by 2, -24 and 0, -5: margins 26 and 5
    "base unquantised": [(-11, -16), (-20, -30)],
    "merged": [(-11, -16), (-25, -30)],  # moved by 0, 0 and -5, 0: margins 0 and -5
}


@pytest.fixture(scope="module")
def scores():
    return alone("score-table")["score_table"](LOGPS, LENGTHS, beta=0.1)


def test_each_model_is_scored_beside_its_own_base(scores):
    assert scores["reward margin"]["trained"] == pytest.approx((2.6 + 0.5) / 2)
    assert scores["reward margin"]["merged"] == pytest.approx((0 - 0.5) / 2)
    assert list(scores["reward accuracy"][["trained", "merged"]]) == [1.0, 0.0]
    losses = [np.log(1 + np.exp(-margin)) for margin in (2.6, 0.5, 0.0, -0.5)]
    assert scores["sigmoid loss"]["trained"] == pytest.approx(np.mean(losses[:2]))
    assert scores["sigmoid loss"]["merged"] == pytest.approx(np.mean(losses[2:]))


def test_which_answer_is_likelier_goes_per_token(scores):
    expected = {"base": 0.0, "trained": 0.5, "base unquantised": 0.5, "merged": 0.5}
    assert dict(scores["chosen likelier per token"]) == expected


def test_answers_that_are_as_likely_are_not_likelier():
    table = alone("score-table")["score_table"]({"base": [(-2, -4)]}, np.array([(1, 2)]), 0.1)
    assert table["chosen likelier per token"]["base"] == 0


def test_words_of_the_prompt_are_a_share_of_the_answers_words():
    """Or long answers would have more of them."""
    rules = alone("audit-rules")["shallow_rules"]([], None)
    rule = rules["more words of the prompt", "fewer words of the prompt"]
    assert rule([1, 2, 3], [1, 1, 2, 7, 8]) == 2 / 4


def test_a_base_has_no_rewards(scores):
    bases = scores.loc[["base", "base unquantised"]]
    assert bases[["sigmoid loss", "reward accuracy", "reward margin"]].isna().all(axis=None)


SENTENCES = {  # a function of the words, its arguments, and what it says
    "loss fell": ("loss", [[0.69, 0.5, 0.4]], "from 0.690 to 0.400."),
    "loss rose again": ("loss", [[0.69, 0.5, 0.6]], "lowest at step 10: stop there"),
    "loss stayed": ("loss", [[0.69, 0.689, 0.688]], "nothing was learnt"),
    "loss only rose": ("loss", [[0.69, 0.8, 1.2]], "nothing was learnt"),
    "another loss": ("loss", [[25, 20, 19.9]], "from 25.000 to 19.900."),
    "ranked right": (
        "ranking",
        [0.9, 128, 0.55],
        "128 held-out pairs 90% are ranked right (95% interval 83% to 94%), by the best trivial "
        "rule alone 55%.",
    ),
    "a rule does as well": ("ranking", [0.9, 128, 0.88], "may be all that was learnt"),
    "few pairs": ("ranking", [0.62, 16, 0.9], "may be chance"),
    "little learnt": ("ranking", [0.58, 128, 0.3], "may be chance"),
    "all right": ("ranking", [1.0, 16, 0.55], "81% to 100%"),
    "likelier": ("reward", [0.1, 1.5], "is +0.10: they became more likely."),
    "less likely": ("reward", [-0.5, 1.5], "is -0.50: they became less likely."),
    "much less likely": ("reward", [-1.6, 1.5], "more than the gap grew: raise beta"),
    "as long": ("length", [{"a": "x" * 10}, {"a": "x" * 11}], "are 1.1 times as long as before."),
    "longer": ("length", [{"a": "x"}, {"a": "xx"}], "2.0 times as long as before: length may be"),
    "other questions": ("length", [{"a": "x", "b": "xx"}, {"a": "x", "c": "x"}], "are 1.0 times"),
    "merged": ("merge", [1.5, 1.48], "1.50, and 1.48 after the merge."),
    "merged with a loss": ("merge", [1.5, 0.7], "part of it needs the 4-bit base"),
    "nothing to lose": ("merge", [-0.1, -0.12], "-0.10, and -0.12 after the merge."),
}


@pytest.mark.parametrize("kind", SENTENCES)
def test_sentence(kind):
    name, arguments, says = SENTENCES[kind]
    if name == "loss":
        arguments = [pd.Series(arguments[0], [0, 10, 20])]
    assert says in alone("words")[f"{name}_sentence"](*arguments)


def test_answers_stand_under_before_and_after(capsys):
    answers = {"before": {"Why?": "old"}, "after": {"Why?": "new"}, "NOT_ASKED": "-"}
    run_cell("after", answers | {"questions": ["Why?", "New?"]})
    words = "Why? BEFORE old AFTER new New? BEFORE - AFTER -"
    assert capsys.readouterr().out.split() == words.split()


def run_of(right):
    """A run with ten held-out pairs, of which the longer answer is the chosen one in the first six.
    The trained model ranks those right that are named.
    """
    longer, shorter = ([5], [6, 7, 8], [9]), ([5], [9], [6, 7, 8])
    held_out = [longer] * 6 + [shorter] * 4
    lengths = [(len(chosen), len(rejected)) for _, chosen, rejected in held_out]
    notebook = alone("audit-rules") | dict(
        train_ids=[longer] * 8,
        held_out_ids=held_out,
        held_out=list(range(10)),
        lengths=pd.DataFrame(lengths, columns=["chosen", "rejected"]),
        tokenizer=Letters(),
    )
    base = [(-1.0, -1.0)] * 10
    trained = [(0.0, -1.0) if pair in right else (-1.0, 0.0) for pair in range(10)]
    logps = {"base": base, "trained": trained, "base unquantised": base, "merged": trained}
    ranks = {"in sum": 0.5, "per token": 0.5}
    return dict(parameters={"beta": 0.1}, logps=logps, base_ranks=ranks), notebook


class Letters:
    """A tokenizer whose every token is a letter."""

    def decode(self, ids):
        return "x" * len(ids)


@pytest.mark.parametrize(
    "right, where_right, where_wrong",
    [
        (range(6), "100% (61% to 100%) of 6", "0% (0% to 49%) of 4"),
        ((0, 1, 6, 7, 8), "33% (10% to 70%) of 6", "75% (30% to 95%) of 4"),
    ],
    ids=["as the rule", "in its own way"],
)
def test_pairs_that_a_rule_ranks_right_and_wrong_are_looked_at_apart(
    right, where_right, where_wrong
):
    table = rules.table_of_rules(*run_of(right))
    row = table.loc["the longer answer"]
    assert row["training pairs"] == "100%" and row["held out"] == "60%"
    assert row["trained, where the rule is right"] == where_right
    assert row["trained, where it is wrong or ties"] == where_wrong
    assert table.loc["a mark at the start", "of these ties"] == "100%"
    # A longer answer has fewer words of the prompt here, so that no rule is right in the last four.
    assert table.loc["none of them", "trained, where it is wrong or ties"] == where_wrong
