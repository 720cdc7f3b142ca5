"""What the notebook says about the pairs before training, and about the run after it."""

import json
import random

import pandas as pd
import pytest
from notebook import alone, run_cells
from standins import TEXT
from trainers import SMALL

WORDS = sorted({word.lower() for word in TEXT.split() if word.isalpha()})
RIGHT = dict(losses=[0.69, 0.5, 0.4], right=0.9, pairs=128, shallow=0.55, chosen=0.1, margins=(1.5, 1.48), longer=1.1)


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


@pytest.fixture
def audited(models, tmp_path):
    """The namespace after the audit of the pairs of a kind."""

    def run(kind):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in made_up(kind)))
        parameters = dict(SMALL, base_model=models["qwen"], output_dir=str(tmp_path / "run"), eval_pairs=40)
        return run_cells("install", "audit", dataset_id=str(path), **parameters)

    return run


@pytest.mark.parametrize("kind", ["length", "first token", "words of the prompt"])
def test_a_shallow_rule_is_found_and_warned_of(audited, kind):
    nb = audited(kind)
    assert kind in nb["rule"] and nb["shallow"] > 0.9
    assert "WARNING" in nb["audit"][-1]
    assert ("Chosen longer: 100%" in nb["audit"][0]) == (kind == "length")


def test_a_rule_may_go_the_other_way(audited, monkeypatch):
    swapped = [dict(pair, chosen=pair["rejected"], rejected=pair["chosen"]) for pair in made_up("length")]
    monkeypatch.setitem(globals(), "made_up", lambda kind: swapped)
    nb = audited("length")
    assert "Chosen longer: 0%" in nb["audit"][0] and nb["shallow"] > 0.9


def test_pairs_that_nothing_shallow_decides_are_not_warned_of(audited):
    nb = audited("nothing")
    assert 0.2 < nb["shallow"] < 0.8 and len(nb["audit"]) == 2
    assert "nearly the same: 0%" in nb["audit"][0] and "both orders: 0" in nb["audit"][0]


def test_pairs_in_both_orders_and_answers_nearly_the_same_are_counted(audited):
    assert "both orders: 80" in audited("both orders")["audit"][0]
    assert "nearly the same: 50%" in audited("nearly the same")["audit"][0]


def test_a_mark_at_the_start(audited):
    nb = audited("nothing")
    mark = nb["COUNTS"]["a mark at the start"]
    starts = [mark([], nb["tokenizer"](text).input_ids) for text in ("- a list", "**Bold**", "A word", "3 bees")]
    assert starts == [True, True, False, False]


def in_words(**changes):
    made = {**RIGHT, **changes}
    return alone("words")["in_words"](**{**made, "losses": pd.Series(made["losses"], [10 * i for i in range(3)])})


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
            "Of 128 held-out pairs 90% are ranked right (95% interval 83% to 94%), by the best shallow rule alone 55%.",
        ),
        (1, dict(shallow=0.88), "may be all that was learnt"),
        (1, dict(right=0.62, pairs=16), "may be chance"),
        (1, dict(right=0.62, pairs=16, shallow=0.9), "may be chance"),
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
