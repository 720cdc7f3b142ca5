"""What the notebook says about the pairs before training, and about the run after it."""

import json
import random

import pandas as pd
import pytest
from standins import TEXT
from trainers import SMALL

from rehearsal.notebook import alone, run_cells

WORDS = sorted({word.lower() for word in TEXT.split() if word.isalpha()})
RIGHT = dict(
    losses=[0.69, 0.5, 0.4],
    right=0.9,
    pairs=128,
    shallow=0.55,
    chosen=0.1,
    margins=(1.5, 1.48),
    longer=1.1,
)


def made_up(kind, count=120):
    """Pairs whose chosen answers differ from the rejected ones in nothing but `kind`."""
    rng = random.Random(0)
    draw = lambda n: " ".join(rng.sample(WORDS, n))  # noqa: E731
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


def audit(models, tmp_path, pairs):
    """The namespace after the audit of pairs."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    parameters = dict(
        SMALL, base_model=models["qwen"], output_dir=str(tmp_path / "run"), eval_pairs=40
    )
    return run_cells("install", "audit", dataset_id=str(path), **parameters)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["length", "first token", "words of the prompt"])
def test_a_shallow_rule_is_found_and_warned_of(models, tmp_path, kind, turned):
    pairs = list(made_up(kind))
    if turned:  # the rule is true of the rejected answers
        pairs = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    nb = audit(models, tmp_path, pairs)
    assert kind in nb["rule"] and nb["shallow"] > 0.9 and "WARNING" in nb["audit"][-1]
    if kind == "length":
        assert f"Chosen longer: {0 if turned else 100}%" in nb["audit"][0]


def test_pairs_that_nothing_shallow_decides_are_not_warned_of(models, tmp_path):
    nb = audit(models, tmp_path, made_up("nothing"))
    assert 0.2 < nb["shallow"] < 0.8 and len(nb["audit"]) == 2
    assert "nearly the same: 0%" in nb["audit"][0] and "both orders: 0" in nb["audit"][0]
    mark = nb["COUNTS"]["a mark at the start"]
    starts = [
        mark([], nb["tokenizer"](text).input_ids)
        for text in ("- a list", "**Bold**", "A word", "3 bees")
    ]
    assert starts == [True, True, False, False]


@pytest.mark.parametrize(
    "kind, counted", [("both orders", "both orders: 80"), ("nearly the same", "the same: 50%")]
)
def test_what_the_audit_counts(models, tmp_path, kind, counted):
    assert counted in audit(models, tmp_path, made_up(kind))["audit"][0]


def in_words(**changes):
    made = RIGHT | changes
    return alone("words")["in_words"](**made | {"losses": pd.Series(made["losses"], [0, 10, 20])})


@pytest.mark.parametrize(
    "sentence, changes, says",
    [
        (0, {}, "0.690 to 0.400."),
        (0, dict(losses=[0.69, 0.5, 0.6]), "lowest at step 10: stop there"),
        (0, dict(losses=[0.69, 0.689, 0.688]), "nothing was learnt"),
        (0, dict(losses=[0.69, 0.8, 1.2]), "nothing was learnt"),
        (0, dict(losses=[25, 20, 19.9]), "25.000 to 19.900."),  # of another loss_type
        (
            1,
            {},
            "128 held-out pairs 90% are ranked right (95% interval 83% to 94%), by the best shallow rule alone 55%.",
        ),
        (1, dict(shallow=0.88), "may be all that was learnt"),
        (1, dict(right=0.62, pairs=16, shallow=0.9), "may be chance"),
        (1, dict(right=0.58, shallow=0.3), "may be chance"),
        (1, dict(right=1.0, pairs=16), "81% to 100%"),
        (2, {}, "is +0.10: they became more likely."),
        (2, dict(chosen=-0.5), "is -0.50: they became less likely."),
        (2, dict(chosen=-1.6), "more than the gap grew: raise beta"),
        (3, {}, "1.1 times as long."),
        (3, dict(longer=2), "length may be what was learnt"),
        (4, {}, "1.50, and 1.48 after the merge."),
        (4, dict(margins=(1.5, 0.7)), "part of it needs the 4-bit base"),
        (4, dict(margins=(-0.1, -0.12)), "-0.10, and -0.12 after the merge."),
    ],
)
def test_words(sentence, changes, says):
    words = in_words(**changes)
    assert len(words) == 5 and says in words[sentence]
    words[sentence] = in_words()[sentence]
    assert words == in_words()  # the others say what they said
