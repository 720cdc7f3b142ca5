"""Prompts that are run once change nothing, and are run once only on bases where they can be."""

import copy
import random
import sys
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from architectures import DENSE, FIELDS, HYBRIDS, OTHERS, build, skeleton_of
from batches import SHAPES, collated, distinct_tokens, inputs
from trainers import (
    CURVES,
    batch_of,
    curves,
    gradient,
    perturb,
    stock_curves,
    stock_trainer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import sdpa_attention
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import disable_dropout_in_model

from rehearsal.notebook import alone, run_cell, run_cells

SKELETON = alone("skeleton")

# What a model computes, beside stock TRL.


def watch_attention(patch):
    """(queries, mask) of each call of transformers' attention from now on, in a list that grows."""
    calls, plain = [], sdpa_attention.sdpa_attention_forward

    def watched(module, query, key, value, mask, *args, **options):
        calls.append((query, mask))
        return plain(module, query, key, value, mask, *args, **options)

    patch.setattr(sdpa_attention, "sdpa_attention_forward", watched)
    return calls


def count_runs(layers):
    """How often each layer is computed from now on: {place: times}, which grows."""
    runs = Counter()
    for place, layer in enumerate(layers):
        linear = [x for x in layer.modules() if isinstance(x, torch.nn.Linear | Conv1D)]
        linear[0].register_forward_pre_hook(lambda *_, place=place: runs.update([place]))
    return runs


@dataclass
class OneBatch:
    """A batch that went through both models."""

    shapes: list
    expected: dict  # stock TRL's outputs
    found: dict
    without_gradients: torch.Tensor  # the same log-probabilities under no_grad
    attention: list  # (sequences, length) of each call of attention
    masked: bool  # attention took a mask
    embedded: list  # tokens of each forward pass
    asked: list  # the sizes for which checkpointed layers were asked for


@dataclass
class SideBySide:
    """A model of which other layers are checkpointed in each batch, and stock TRL's."""

    checkpointed: dict  # {distinct tokens: layers}
    batches: list = field(default_factory=list)
    gradients: list = field(default_factory=list)  # (found, expected) of each parameter
    runs: Counter = None  # how often each layer was computed


@pytest.fixture(scope="module", params=DENSE)
def side_by_side(request):
    config = DENSE[request.param]
    stock, model = build(config).train(), build(config).train()
    disable_dropout_in_model(stock)
    disable_dropout_in_model(model)
    batches = [SHAPES[:2], SHAPES, SHAPES[3:5]]
    done = SideBySide(dict(zip(map(distinct_tokens, batches), [1, 3, 0], strict=True)))
    asked, embedded = [], []

    def layers_to_checkpoint(*size):
        asked.append(size)
        return done.checkpointed[size[0]]

    with pytest.MonkeyPatch.context() as patch:
        calls = watch_attention(patch)
        alone("run-prompts-once")["run_prompts_once"](model, layers_to_checkpoint)
        model.activation_checkpointing_enable()
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: embedded.append(args[0].numel())
        )
        done.runs = count_runs(SKELETON["decoder_layers"](model))
        for shapes in batches:
            expected, found = stock(**inputs(shapes)), model(**inputs(shapes))
            calls.clear()
            with torch.no_grad():  # as of the reference
                without_gradients = model(**inputs(shapes)).log_probs
            done.batches.append(
                OneBatch(
                    shapes,
                    expected,
                    found,
                    without_gradients,
                    attention=[(len(query), query.shape[2]) for query, _ in calls],
                    masked=any(mask is not None for _, mask in calls),
                    embedded=[*embedded],
                    asked=[*asked],
                )
            )
            expected.log_probs.square().sum().backward()
            found.log_probs.square().sum().backward()
            asked.clear()
            embedded.clear()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            done.gradients.append((ours.grad, theirs.grad))
    return done


@pytest.mark.newest
def test_values_are_stock_trls(side_by_side):
    for batch in side_by_side.batches:
        assert torch.equal(batch.found.label_mask, batch.expected.label_mask)
        for name in FIELDS:
            assert torch.allclose(batch.found[name], batch.expected[name], atol=1e-5), name


@pytest.mark.newest
def test_gradients_are_stock_trls(side_by_side):
    largest = max(theirs.abs().max().item() for _, theirs in side_by_side.gradients)
    for ours, theirs in side_by_side.gradients:
        # One that is 0 but for rounding, as of a key's bias, rounds as the others do.
        bound = 1e-5 * theirs.abs().max().item() + 1e-7 * largest
        assert torch.allclose(ours, theirs, rtol=0, atol=bound)


def test_the_references_values_are_the_policys(side_by_side):
    """No layer is checkpointed where there are no gradients, and that changes nothing."""
    for batch in side_by_side.batches:
        assert torch.equal(batch.without_gradients, batch.found.log_probs)


def test_each_distinct_token_is_computed_once(side_by_side):
    for batch in side_by_side.batches:
        assert batch.embedded == 2 * [distinct_tokens(batch.shapes)]


def test_each_batch_has_as_many_layers_checkpointed_as_it_needs(side_by_side):
    """A layer runs twice for each batch, and once more for each that has it checkpointed."""
    needed = side_by_side.checkpointed.values()
    for place in range(4):
        again = sum(place < layers for layers in needed)
        assert side_by_side.runs[place] == 2 * len(needed) + again


def test_layers_are_asked_for_by_the_sizes_of_a_batch_and_only_for_gradients(side_by_side):
    for batch in side_by_side.batches:
        attention = sum(sequences * length for sequences, length in batch.attention) / 4
        assert batch.asked == [(distinct_tokens(batch.shapes), attention)]


def test_attention_computes_less_padding_than_stock_trl(side_by_side):
    for batch in side_by_side.batches:
        rows, length = batch.expected.log_probs.shape
        of_stock = 4 * rows * (length + 1) ** 2
        computed = sum(sequences * tokens**2 for sequences, tokens in batch.attention)
        assert computed < (0.7 if batch.shapes == SHAPES else 1) * of_stock


def test_attention_takes_a_mask_only_for_a_window(side_by_side, request):
    name = request.node.callspec.params["side_by_side"]
    masked = any(batch.masked for batch in side_by_side.batches)
    assert masked == ("window" in name)


# Which bases can.


def measured_error(config, dtype, shapes=SHAPES, spoil=None, shared=None):
    """`sharing_error` of a model in this precision, changed by `spoil`, by the cell's functions."""
    shared = shared or alone("run-prompts-once")
    model = build(config, dtype).eval()
    if spoil:
        spoil(model)
    shared["run_prompts_once"](model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return shared["sharing_error"](model, [collated(shapes), collated(shapes[:1])])


SHORT_PAIRS = [(6, 5, 6), (3, 7, 7)]
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", DENSE)
def test_dense_bases_share_by_what_they_are_made_of(name):
    assert SKELETON["why_prompts_cannot_be_shared"](skeleton_of(DENSE[name])) == ""


@pytest.mark.newest
@pytest.mark.parametrize("name", DENSE)
def test_each_layer_of_dense_bases_has_a_switch_for_checkpointing(name):
    assert len(SKELETON["checkpointable_layers"](skeleton_of(DENSE[name]))) == 4


@pytest.mark.parametrize("name", DENSE)
def test_dense_bases_share_by_the_numbers(name):
    """Of short pairs too, in each precision that a card may choose."""
    for dtype in PRECISIONS:
        for shapes in (SHAPES, SHORT_PAIRS):
            error = measured_error(DENSE[name], dtype, shapes)
            assert error.exact and 0 < error.rounding < 0.5, error


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_do_not_share_by_what_they_are_made_of(name):
    config, culprit = HYBRIDS[name]
    assert culprit in SKELETON["why_prompts_cannot_be_shared"](skeleton_of(config))


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_do_not_share_by_the_numbers(name):
    """The check of the numbers sees it without the modules, in bf16 as well."""
    for dtype in (torch.float32, torch.bfloat16):
        for shapes in (SHAPES, SHORT_PAIRS):
            assert not measured_error(HYBRIDS[name][0], dtype, shapes).exact


@pytest.mark.parametrize("name", OTHERS)
def test_bases_of_other_kinds_do_not_share(name):
    config, culprit = OTHERS[name]
    assert culprit in SKELETON["why_prompts_cannot_be_shared"](skeleton_of(config))


# What the check of the numbers says.


def overflow(model):
    model.lm_head.weight.data.fill_(torch.inf)


@pytest.mark.parametrize(
    "dtype, message",
    [
        (torch.float16, "MistralForCausalLM gives no numbers in float16: .* bfloat16"),
        (torch.float32, "no numbers in float32: choose another base.$"),
    ],
    ids=["float16", "float32"],
)
def test_a_base_that_overflows_is_told(dtype, message):
    with pytest.raises(FloatingPointError, match=message):
        measured_error(DENSE["mistral"], dtype, spoil=overflow)


def test_a_base_that_does_not_run_on_a_shared_row_is_told():
    with pytest.raises(NotImplementedError, match="BloomForCausalLM cannot .* share_prompt to F"):
        measured_error(OTHERS["bloom"][0], torch.float32)


def test_want_of_memory_is_not_taken_for_a_base_that_cannot(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        measured_error(DENSE["mistral"], torch.float32)


def look_closely(model):
    """Sharpens attention, or these weights would hardly care for what stands where."""
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 1000


@pytest.mark.parametrize("fault", [None, "positions", "window", "padding"])
def test_the_check_sees_faults_that_have_nothing_to_do_with_the_other_answer(fault):
    """In bf16."""
    shared = alone("run-prompts-once")
    plain_layout = shared["lay_out"]

    def lay_out(*batch):
        cells, groups, places = plain_layout(*batch)
        return cells, [group.roll(1, 0) for group in groups], places

    def no_window(length, window, device):
        return torch.ones(length, length).tril().bool()

    def spoil(model):
        look_closely(model)
        plain_forward = model.forward

        def forward(*arguments, position_ids=None, **options):
            if position_ids is not None:
                position_ids = torch.arange(position_ids.numel())[None]
            return plain_forward(*arguments, position_ids=position_ids, **options)

        if fault == "positions":
            model.forward = forward

    if fault == "padding":
        shared["lay_out"] = lay_out
    if fault == "window":
        shared["window_mask"] = no_window
    windowed = DENSE["mistral, window of 7"]
    error = measured_error(windowed, torch.bfloat16, spoil=spoil, shared=shared)
    assert error.exact == (fault is None)


# What the libraries bring.


@pytest.mark.newest
@pytest.mark.parametrize(
    "missing", ["integrations.sdpa_attention", "masking_utils", "modeling_layers"]
)
def test_only_sharing_prompts_needs_names_of_libraries_that_may_go(missing, monkeypatch):
    """The cell runs all the same, and says where the fault is."""
    monkeypatch.setitem(sys.modules, f"transformers.{missing}", None)
    shared = alone("run-prompts-once")
    with pytest.raises(ImportError, match="transformers 5.24 and TRL 1.16.* share_prompt to False"):
        shared["run_prompts_once"](build(DENSE["mistral"]))


@pytest.mark.newest
@torch.no_grad()
@pytest.mark.parametrize("before_ampere", [True, False])
def test_grouped_heads_before_ampere_never_reach_the_kernel_that_holds_all_scores(
    before_ampere, monkeypatch
):
    """With shared prompts, without, and in generation; without padding there is no mask."""
    grouped, plain = set(), torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, enable_gqa=False, **options):
        grouped.add(enable_gqa)
        return plain(query, key, *args, enable_gqa=enable_gqa, **options)

    kept = sdpa_attention.use_gqa_in_sdpa
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", kept)  # put back afterwards
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    if before_ampere:
        alone("memory")["repeat_grouped_keys"]()
    model = build(DENSE["mistral"])
    for share in (False, True):
        if share:
            alone("run-prompts-once")["run_prompts_once"](model)
        model(**inputs())
        model(**inputs([(6, 5, 5)]))
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert (True in grouped) == (not before_ampere)


DROPPING = [("granite", 0.1), ("seed-oss", 0.1), ("llama", 0.0)]


@pytest.mark.parametrize("name, dropout", DROPPING)
def test_attention_dropout_is_switched_off(name, dropout):
    config = copy.deepcopy(DENSE[name])
    config.attention_dropout = dropout
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, model(ids).logits) == (dropout == 0)
    assert SKELETON["switch_off_attention_dropout"](model) == (dropout > 0)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.attention_dropout == dropout  # the merged model's config is the base's


# Other ways to call a model whose prompts are run once.


@torch.no_grad()
def test_in_half_precision_the_two_ways_differ_by_less_than_rounding():
    """Under bf16 autocast, by no more than bf16 differs from float32."""
    exact = build(DENSE["llama"])(**inputs()).log_probs
    model = build(DENSE["llama"]).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs()).log_probs
        alone("run-prompts-once")["run_prompts_once"](model)
        shared = model(**inputs()).log_probs
    assert (shared - plain).abs().max() <= (plain - exact).abs().max()


@pytest.fixture
def windowed():
    return build(DENSE["mistral, window of 7"])


@torch.no_grad()
def test_calls_without_labels_go_the_usual_way(windowed):
    """With padding on either side."""
    batch, padded_left = inputs(), torch.tensor([[0, 0, 1, 1, 1, 1]])
    calls = [
        (batch["input_ids"], batch["attention_mask"]),
        (batch["input_ids"][:1, :6], padded_left),
    ]
    expected = [windowed(ids, attention_mask=mask).logits for ids, mask in calls]
    alone("run-prompts-once")["run_prompts_once"](windowed)
    for (ids, mask), logits in zip(calls, expected, strict=True):
        assert torch.equal(windowed(ids, attention_mask=mask).logits, logits)


@torch.no_grad()
def test_run_prompts_once_may_be_called_again(windowed):
    """As when its cell is run again."""
    run_prompts_once = alone("run-prompts-once")["run_prompts_once"]
    run_prompts_once(windowed)
    once = windowed(**inputs()).log_probs
    run_prompts_once(windowed)
    assert torch.equal(windowed(**inputs()).log_probs, once)


def test_pairs_whose_prompts_differ_are_refused(windowed):
    alone("run-prompts-once")["run_prompts_once"](windowed)
    batch = inputs()
    batch["input_ids"][0, 1] += 1
    with pytest.raises(AssertionError, match="same prompt"):
        windowed(**batch)


# Whole trainings.

LOSSES = ["sigmoid", "ipo", "sigmoid_norm", "apo_zero", "robust", "sigmoid+sft"]
RUNS = [
    *[(loss, True, False) for loss in LOSSES],
    ("sigmoid", False, False),
    ("sigmoid", True, True),
]


def mixed_inside_steps(order, pairs_per_step):
    rng, mixed = random.Random(3), []
    for start in range(0, len(order), pairs_per_step):
        mixed += rng.sample(order[start : start + pairs_per_step], pairs_per_step)
    return mixed


def curves_of_cells(nb):
    """Those of the notebook's own training, from the cells after its trainer on."""
    if nb["sharing"]:
        run_cells("run-prompts-once", "share-prompts", nb)
    return curves(nb["trainer"])


@pytest.mark.newest
@pytest.mark.parametrize("loss_type, share_prompt, load_in_4bit", RUNS)
def test_losses_are_stock_trls(prepare, loss_type, share_prompt, load_in_4bit):
    """The same pairs in the same steps, but at stock TRL in random order inside of each step."""
    settings = dict(loss_type=loss_type, share_prompt=share_prompt, load_in_4bit=load_in_4bit)
    nb = prepare(beta=0.3, learning_rate=1e-2, eval_pairs=2, **settings)
    order = nb["order"]
    if loss_type != "sigmoid+sft":  # whose likelihood depends on which pairs share a batch
        order = mixed_inside_steps(order, 8)
    expected = stock_curves(nb, order)
    found = curves_of_cells(nb)
    # A reward is beta times the small difference of two large sums, and rounds as those do.
    nats = 4 * torch.finfo(torch.float32).eps * max(map(abs, expected["logps/chosen"]))
    for name in CURVES:
        allowed = 0.3 * nats if name.startswith("rewards") else nats
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=allowed), name
    assert max(found["rewards/margins"]) > 0.1  # it has learnt


@pytest.fixture
def hybrid(models, tmp_path):
    """Writes a base that cannot share prompts, with a tokenizer; returns its folder."""

    def write(name):
        tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
        config = copy.deepcopy(HYBRIDS[name][0])
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        config.max_position_embeddings = 512
        build(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return write


@pytest.mark.parametrize("name", ["qwen 3.5", "lfm 2"])
def test_a_base_that_cannot_share_is_trained_as_stock_trl_does(prepare, hybrid, capsys, name):
    """A sentence says that it cannot, and the plan counts what its padded sequences take."""
    nb = prepare(hybrid(name), load_in_4bit=False, beta=0.3, learning_rate=1e-2, eval_pairs=2)
    said = capsys.readouterr().out
    assert HYBRIDS[name][1] in said.partition("Prompts are computed twice: ")[2].partition("\n")[0]
    pairs_at_once, planned = nb["split"].pairs_at_once, []
    for start in range(0, 32, pairs_at_once):
        pairs = nb["order"][start : start + pairs_at_once]
        planned.append(2 * nb["longest_tokens"][pairs].max() * pairs_at_once)
    assert [*nb["split"].linear_tokens] == planned
    expected, found = stock_curves(nb, nb["order"]), curves_of_cells(nb)
    for name in CURVES:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_log_probs_and_gradients_of_a_hybrid_are_stock_trls(prepare, hybrid, name, precision):
    changes = dict(lora_targets="q_proj, v_proj") if name == "falcon h1" else {}
    nb = prepare(hybrid(name), precision, load_in_4bit=False, eval_pairs=2, **changes)
    assert not nb["sharing"] and nb["training_args"].bf16 == (precision == torch.bfloat16)
    answer_log_probs = alone("run-prompts-once")["answer_log_probs"]
    log_probs, found = [], []
    for trainer in (nb["trainer"], stock_trainer(nb, nb["order"])):
        perturb(trainer.model)
        with trainer.accelerator.autocast():
            log_probs.append(answer_log_probs(trainer.model, batch_of(trainer)))
        found.append(gradient(trainer))
    assert log_probs[0].isfinite().all() and torch.equal(*log_probs)
    ours, theirs = found
    assert ours.keys() == theirs.keys() != set()
    for parameter, values in theirs.items():
        assert values.abs().max() > 0
        assert torch.equal(ours[parameter], values), parameter


# Several processes.


def test_what_one_process_cannot_share_none_does(prepare):
    nb = run_cells("run-prompts-once", "run-prompts-once", prepare())
    nb["gather_object"] = lambda found: [
        *found,
        False,
    ]  # another process found that it is not exact
    with pytest.raises(ValueError, match="share_prompt"):
        run_cell("share-prompts", nb)


def test_layers_that_are_sharded_are_checkpointed_all_or_none(prepare):
    """So that nothing is chosen for each batch."""
    nb, asked = run_cells("run-prompts-once", "run-prompts-once", prepare()), []
    plain = nb["run_prompts_once"]

    def watched(model, layers_to_checkpoint):
        asked.append(layers_to_checkpoint)
        plain(model, layers_to_checkpoint)

    nb.update(sharded=True, run_prompts_once=watched)
    run_cell("room", nb)
    assert nb["all_layers_alike"]
    run_cell("share-prompts", nb)
    assert asked == [None]
