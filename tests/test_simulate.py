"""The simulation of GPUs counts what a real step does, and the tables from it are today's."""

import contextlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks import simulate
from rehearsal.notebook import NOTEBOOK, ROOT, alone

HALF, BRAIN = torch.float16, torch.bfloat16
SMALL = dict(
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=4,
    num_key_value_heads=1,
    vocab_size=32,
)


class RealMachine(simulate.Machine):
    """On real tensors PEFT and TRL are still told that autocast is on and Triton there, or they
    would do something else.
    """

    def stand_ins(self, dtype):
        plain = super().stand_ins(dtype)
        told = {
            name: plain[name]
            for name in ("torch.is_autocast_enabled", "trl.trainer.utils._use_triton")
        }
        # The same as TRL's own, which is in place and passes PyTorch's counter unseen.
        return told | {
            "trl.kernels.chunked_logprob._addmm_fp32": lambda out, a, b: out.add_(
                a.float() @ b.float()
            )
        }


FEW_PAIRS = [(20, 30, 30)] * 2


@pytest.fixture(scope="module", params=[None, 2], ids=["kept", "checkpointed"])
def checkpointed(request):
    return request.param


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "stock"])
def step(request, checkpointed):
    """The same small step on imagined tensors and on real ones: both machines, the operations that
    PyTorch's own counter saw, those of attention, and the least.
    """
    shared = request.param
    how = dict(layers=3, dtype=BRAIN, share=shared, remember=shared)
    if checkpointed:
        how["layers_to_checkpoint"] = lambda *_: checkpointed
    small = dict(LAYERS=3, HIDDEN=64, LAYER=64 * (2.5 * 64 + 3 * 160))
    counter = FlopCounterMode(display=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "SHAPE", {**simulate.SHAPE, **SMALL})
        for name, value in small.items():
            patch.setattr(simulate, name, value)
        imagined = simulate.simulate([FEW_PAIRS], **how)
        least = simulate.least(FEW_PAIRS)
        patch.setattr(simulate, "fake", counter)
        patch.setattr(simulate, "Machine", RealMachine)
        real = simulate.simulate([FEW_PAIRS], **how)
    # Two products forward and five backward, half of each masked: its kernel on a CPU is not
    # counted.
    attention = 4 * 2 * 50**2 * 64 * (3 * (1 + 2.5 + 1) + (checkpointed or 0))
    return SimpleNamespace(
        imagined=imagined,
        real=real,
        counted=counter.get_total_flops(),
        attention=attention,
        least=least,
    )


def test_an_imagined_steps_operations_are_a_real_ones(step):
    """To the last one, by PyTorch's own counter on real tensors."""
    assert step.real.counts["products"] == step.counted
    assert step.imagined.counts["products"] == step.counted + step.attention


def test_no_step_does_with_less_than_the_bound(step):
    assert step.imagined.counts["products"] > step.least


def test_an_imagined_steps_bytes_are_a_real_ones(step):
    assert step.imagined.peak == pytest.approx(step.real.peak, rel=0.01)


def test_a_remembered_reference_is_not_computed_again():
    """A pair that comes back takes only forward and backward of the policy: a third less, or a
    little less than that, as the adapter's own products are the policy's.
    """
    pairs = [(20, 30, 30), (10, 40, 20)]

    def products(visits, remember):
        batches = [pairs] * visits
        return simulate.simulate(batches, 1, BRAIN, remember=remember).counts["products"]

    once, twice = products(1, True), products(2, True)
    assert products(1, False) == once
    assert products(2, False) == 2 * once
    reference = 2 * once - twice
    assert 0.3 < reference / once < 1 / 3


@pytest.mark.parametrize("checkpointed_layers", [0, 4])
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["before Ampere", "Ampere"])
def test_the_arithmetic_of_memory(dtype, checkpointed_layers):
    """What the notebook predicts for a batch, against all bytes alive above the weights, with four
    of the 7B's layers, where the reference is computed beside the policy's activations.
    """
    asked, batch = [], [(60, 200, 300), (150, 120, 90), (90, 250, 250)]

    def layers_to_checkpoint(*size):
        asked.append(size)
        return checkpointed_layers

    weights = simulate.simulate([], 4, dtype, layers_to_checkpoint).peak
    alive = simulate.simulate([batch], 4, dtype, layers_to_checkpoint).peak
    config = MistralConfig(**{**simulate.SHAPE, "num_hidden_layers": 4})
    with torch.device("meta"):
        skeleton = MistralForCausalLM(config)
    widths = alone("skeleton")["layer_widths"](skeleton, repeat_keys=dtype == HALF)
    predicted = alone("memory")["step_memory"](widths, *asked[0], checkpointed_layers)
    # With all layers checkpointed it forgets that one matrix is there in 16 bits: a fiftieth of a
    # whole run.
    forgotten = 0
    if checkpointed_layers == 4:
        forgotten = 2 * config.hidden_size * config.intermediate_size
    assert alive - weights <= predicted + forgotten
    assert predicted <= 1.12 * (alive - weights)


def test_what_trls_head_keeps_on_a_cpu():
    """Eight tiles of float32, as the notebook's plan has it: bytes alive at the most, forward and
    backward, on real tensors.
    """
    tokens, words = 512, 1000
    hidden, head = torch.randn(tokens, 8, requires_grad=True), torch.randn(words, 8)
    labels = torch.zeros(tokens).long()
    with simulate.Machine() as machine:
        scored = ChunkedLogProbFunction.apply(hidden, head, None, labels, 1.0, words, None, 1.0, ())
        scored[0].sum().backward()
    assert machine.peak == pytest.approx(8 * 4 * tokens * words, rel=0.15)


def test_a_step_whose_dtypes_differ_is_refused(monkeypatch):
    """Without autocast, where the adapter meets 16 bits: FakeTensorMode does not mind, and CUDA
    refuses.
    """
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(AssertionError, match="CUDA refuses"):
        simulate.simulate([[(3, 4, 5)]], 1, BRAIN)


# The bound, on one pair by hand.


def test_the_bound_has_each_distinct_token_once(monkeypatch):
    """Of a pair without attention and head, three passes: two products of a number and a token
    each, for every number of a layer.
    """
    monkeypatch.setattr(simulate, "HIDDEN", 0)
    assert simulate.least_of_policy([(7, 2, 3)]) == 2 * 32 * 2 * simulate.LAYER * 11
    assert simulate.least_of_reference([(7, 2, 3)]) == 1 * 32 * 2 * simulate.LAYER * 11


def test_the_bound_counts_attention_as_it_is_masked(monkeypatch):
    monkeypatch.setattr(simulate, "LAYER", 0)
    monkeypatch.setattr(simulate, "SHAPE", {**simulate.SHAPE, "vocab_size": 0})
    prompt, chosen, rejected = 40, 20, 30
    sequence = (prompt + chosen) ** 2 / 2
    behind_the_prompt = (prompt + rejected) ** 2 / 2 - prompt**2 / 2
    one_pass = 32 * 4 * 4096 * (sequence + behind_the_prompt)
    pairs = [(prompt, chosen, rejected)]
    assert simulate.least_of_reference(pairs) == pytest.approx(one_pass)
    assert simulate.least_of_policy(pairs) == pytest.approx(3.5 * one_pass)


def test_pairs_that_would_be_remembered_are_not_counted_as_new():
    with pytest.raises(AssertionError):
        simulate.count([np.array([(3, 4, 5)]), np.array([(3, 4, 5)])], BRAIN, 0)


# The tables.


@pytest.fixture(scope="module")
def plans():
    """The rows of the table of GPUs, as the notebook plans today."""
    rows = []
    for card, (_, dtype) in simulate.CARDS.items():
        nb = simulate.plan_for(card)
        split = nb["split"]
        precision = "fp16" if dtype == HALF else "bf16"
        cut = f"{split.pairs_at_once} × {nb['pairs_per_step'] // split.pairs_at_once}"
        layers = split.checkpointed_layers.mean()
        memory = (nb["fixed_bytes"] + split.most_bytes) / 1e9
        rows.append((card, precision, cut, f"{layers:.1f}", f"{memory:.1f}"))
    return rows


def text_of(place):
    if place == "title":
        return next(cell.source for cell in NOTEBOOK.cells if cell.id == "title")
    text = (ROOT / "README.md").read_text()
    return text.split("## What each machine runs")[1].split("\n## ")[0]


@pytest.mark.parametrize("place", ["README", "title"])
def test_the_table_of_gpus_is_the_plan(place, plans):
    row = r"^\| (.+?) \| (fp16|bf16) \| (\d+ × \d+) \| ([\d.]+) \| ([\d.]+) GB \|$"
    text = text_of(place)
    assert re.findall(row, text, re.MULTILINE) == plans
    of_gpus = [line for line in text.splitlines() if re.match(r"\| .* GB \|", line)]
    assert len(of_gpus) == len(plans)  # no row that looks otherwise


@pytest.fixture(scope="module")
def simulated():
    """The committed figures."""
    return json.loads((ROOT / "benchmarks" / "simulated.json").read_text())


def test_what_was_simulated_is_todays_plans(simulated, plans):
    assert len(simulated["cards"]) == len(plans)
    for card, (name, _, split, layers, memory) in zip(simulated["cards"], plans, strict=True):
        assert card["name"] == name
        assert card["split"] == split
        assert f"{card['predicted_gb']:.1f}" == memory
        assert card["layers_checkpointed"] == pytest.approx(float(layers), abs=0.05)


def test_what_was_simulated_takes_no_more_memory_than_predicted(simulated):
    for card in simulated["cards"]:
        assert card["simulated_gb"] <= card["predicted_gb"] <= 1.12 * card["simulated_gb"], card


def test_what_was_simulated_is_little_more_work_than_the_least(simulated):
    for card in simulated["cards"]:
        assert 1 <= card["operations_over_bound"] <= 1.05, card


WITH_DEQUANTISING = dict(zip(simulate.CARDS, (1.24, 1.15, 1.10, 1.06, 1.06), strict=True))


def test_what_was_simulated_with_dequantising_is_little_more_work_than_the_least(simulated):
    for card in simulated["cards"]:
        with_it = card["with_dequantising_over_bound"]
        assert card["operations_over_bound"] < with_it <= WITH_DEQUANTISING[card["name"]]


def over_bound(simulated):
    return {way["name"]: way["operations_over_bound"] for way in simulated["ways"]}


def test_the_table_of_ways_has_the_cards_figures(simulated):
    ways = over_bound(simulated)
    for card in simulated["cards"]:
        assert ways.pop(f"this notebook, {card['name']}") == card["operations_over_bound"]
    assert [*ways] == ["recipe of 2024", "stock TRL", "stock TRL without checkpointing"]


def test_stock_trl_does_twice_the_work_and_more(simulated):
    ways = over_bound(simulated)
    kept = ways["stock TRL without checkpointing"]
    assert ways["recipe of 2024"] == ways["stock TRL"] > kept > 2


def test_a_small_set_takes_little_more_work_than_the_least(simulated):
    """Which has the reference of each pair once."""
    assert 1 <= simulated["small_set"]["notebook"] <= 1.05


def test_a_small_set_takes_stock_trl_three_and_a_half_times_the_work(simulated):
    small_set = simulated["small_set"]
    assert small_set["stock"] >= 3.5 * small_set["notebook"]
    assert small_set["stock"] > small_set["stock_precomputed"] > small_set["notebook"]


def rows_of(text):
    """The cells of all tables in a text, without those of numbers that are not simulated."""
    return [[*map(str.strip, line.strip("| ").split("|"))] for line in text.splitlines()]


def simulated_rows(simulated):
    """The rows of the tables in benchmarks/README.md."""
    rows = []
    for card in simulated["cards"]:
        rows.append(
            [
                card["name"],
                card["split"],
                f"{card['layers_checkpointed']:.2f}",
                f"{card['predicted_gb']:.1f}",
                f"{card['simulated_gb']:.1f}",
                f"{card['operations_over_bound']:.3f}",
                f"{card['with_dequantising_over_bound']:.3f}",
            ]
        )
    for way in simulated["ways"]:
        rows.append(
            [
                way["name"],
                f"{way['operations_over_bound']:.3f}",
                f"{way['batches_per_step']:.0f}",
                f"{way['kernels_per_step']:,}",
                f"{way['waits_per_step']}",
            ]
        )
    small_set = simulated["small_set"]
    rows.append(["stock TRL", f"{small_set['stock']:.2f}"])
    precomputed = f"{small_set['stock_precomputed']:.2f}"
    rows.append(["stock TRL with `precompute_ref_log_probs`", precomputed])
    rows.append(["this notebook", f"{small_set['notebook']:.2f}"])
    return rows


def test_the_benchmarks_tables_are_what_was_simulated(simulated):
    found = rows_of((ROOT / "benchmarks" / "README.md").read_text())
    for row in simulated_rows(simulated):
        assert row in found


def test_the_readmes_table_of_speed_is_what_was_simulated(simulated):
    """Of the default run, and of the small set."""
    text = (ROOT / "README.md").read_text().partition("\n## Speed")[2].partition("\n## ")[0]
    found = {name: figures for name, *figures in rows_of(text) if figures}
    ways, small_set = over_bound(simulated), simulated["small_set"]
    ours = [way for name, way in ways.items() if name.startswith("this notebook")]
    expected = {
        "stock TRL, and the recipe of 2024": [ways["stock TRL"], small_set["stock"]],
        "this notebook, on any of the cards above": [min(ours), max(ours), small_set["notebook"]],
        "stock TRL without gradient checkpointing": [ways["stock TRL without checkpointing"]],
        "stock TRL with `precompute_ref_log_probs`": [small_set["stock_precomputed"]],
    }
    for name, figures in expected.items():
        written = re.findall(r"\d\.\d\d", " ".join(found[name]))
        assert written == [f"{figure:.2f}" for figure in figures], name
