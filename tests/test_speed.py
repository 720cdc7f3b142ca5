"""What makes training fast, and that it changes nothing: prompts run once, layers checkpointed as needed, the plan."""

import copy
import random
import shutil
import types
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from trainers import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from rehearsal.notebook import alone, run_cell, run_cells

TINY = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
)
GROUPED = dict(TINY, num_key_value_heads=2)
WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
MODELS = {
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral, window of 7": MistralConfig(**GROUPED, sliding_window=7),
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, one head a key": transformers.LlamaConfig(**TINY),
    "qwen 2": transformers.Qwen2Config(**GROUPED),
    "qwen 2, window of 5 in half of the layers": transformers.Qwen2Config(**GROUPED, **WINDOWS),
    "qwen 3": transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma 3, window of 5 in some layers": transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=5
    ),
}
# Lengths of prompt, chosen and rejected: alike, far apart, answers of one token, a prompt of one, one longer than windows.
SHAPES = [(6, 5, 5), (3, 1, 1), (1, 12, 1), (9, 1, 14), (25, 4, 7), (2, 9, 3)]
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def pairs(shapes):
    rng, names = random.Random(0), ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: rng.choices(range(3, 64), k=n) for name, n in zip(names, shape, strict=True)}
        for shape in shapes
    ]


def inputs(shapes=SHAPES):
    """What `DPOTrainer` calls the model with."""
    batch = DataCollatorForPreference(pad_token_id=0)(pairs(shapes))
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    return dict(batch, labels=labels, fused_lm_head=True, use_cache=False)


def tokens_of(shapes):
    """Distinct tokens of a batch that predict something."""
    return sum(p + c + r - 1 for p, c, r in shapes)


def build(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name]), dtype=torch.float32)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)], ids=["before Ampere", "Ampere"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_stock_trls(name, capability, monkeypatch):
    """Batch by batch with other layers checkpointed, each distinct token once, without a padded cell too many.

    Before Ampere attention gets as many keys as queries, for the sake of PyTorch's choice of kernels.
    """
    stock, model, copied = build(name), build(name), alone("run-prompts-once")
    batches = {tokens_of(shapes): shapes for shapes in (SHAPES[:2], SHAPES, SHAPES[3:5])}
    needed, plain = dict(zip(batches, [1, 3, 0], strict=True)), copied["sdpa_attention_forward"]
    asked, calls, ran, seen = [], [], Counter(), []
    copied["sdpa_attention_forward"] = lambda *args, **options: (
        calls.append(args) or plain(*args, **options)
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        copied["run_prompts_once"](model, lambda *size: asked.append(size) or needed[size[0]])
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: ran.update([i]))
    model.train().activation_checkpointing_enable()
    for tokens, shapes in batches.items():
        expected, found = stock(**inputs(shapes)), model(**inputs(shapes))
        calls.clear()
        with torch.no_grad():  # as of the reference
            assert torch.equal(model(**inputs(shapes)).log_probs, found.log_probs)
        sizes = [(query.shape[0], query.shape[2]) for _, query, *_ in calls]
        assert (
            asked.pop() == (tokens, sum(rows * length for rows, length in sizes) / 4) and not asked
        )
        assert all(torch.allclose(found[field], expected[field], atol=1e-5) for field in FIELDS)
        assert torch.equal(found.label_mask, expected.label_mask)
        rows, length = expected.log_probs.shape
        assert (
            sum(n * some**2 for n, some in sizes)
            < (0.7 if shapes == SHAPES else 1) * 4 * rows * (length + 1) ** 2
        )
        for output in (expected, found):
            output.log_probs.square().sum().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert torch.allclose(
            ours.grad, theirs.grad, rtol=0, atol=1e-5 * theirs.grad.abs().max().item()
        )
    assert seen == [tokens for tokens in batches for _ in range(2)]
    assert [ran[i] for i in range(4)] == [
        6 + sum(i < number for number in needed.values()) for i in range(4)
    ]
    assert {key.shape[1] for _, _, key, *_ in calls} == {
        4 if capability < (8, 0) else model.config.num_key_value_heads
    }
    assert any(mask is not None for *_, mask in calls) == ("window" in name)


@torch.no_grad()
def test_half_precision():
    """Under bf16 autocast the two ways differ by rounding only: no more than bf16 differs from float32."""
    exact, model = build("llama")(**inputs()).log_probs, build("llama").to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**inputs()).log_probs
        alone("run-prompts-once")["run_prompts_once"](model)
        shared = model(**inputs()).log_probs
    assert (shared - plain).abs().max() <= (plain - exact).abs().max()


@torch.no_grad()
def test_other_calls_go_the_usual_way():
    run_prompts_once = alone("run-prompts-once")["run_prompts_once"]
    model, batch, padded_left = (
        build("mistral, window of 7"),
        inputs(),
        torch.tensor([[0, 0, 1, 1, 1, 1]]),
    )
    calls = [
        (batch["input_ids"], batch["attention_mask"]),
        (batch["input_ids"][:1, :6], padded_left),
    ]
    expected = [model(ids, attention_mask=mask).logits for ids, mask in calls]
    run_prompts_once(model)
    once = model(**batch).log_probs
    run_prompts_once(model)  # as when the cell is run again
    assert torch.equal(model(**batch).log_probs, once)
    for (ids, mask), logits in zip(calls, expected, strict=True):
        assert torch.equal(model(ids, attention_mask=mask).logits, logits)
    batch["input_ids"][0, 1] += 1
    with pytest.raises(AssertionError, match="same prompt"):
        model(**batch)


# TRL weights its other metrics by the tokens of each batch, so they depend on which pairs share one.
METRICS = (
    "loss eval_loss grad_norm rewards/margins rewards/chosen rewards/rejected logps/chosen".split()
)


def curves(trainer):
    trainer.train()
    return {
        name: [entry[name] for entry in trainer.state.log_history if name in entry]
        for name in METRICS
    }


def stock_curves(nb, order):
    """Those of TRL's own trainer with its own tokenization, on these rows of a run and with the run's settings."""
    decode, names, data = nb["tokenizer"].decode, ("prompt", "chosen", "rejected"), []
    for part in (order, nb["held_out"]):
        texts = [{name: decode(nb["rows"][i][f"{name}_ids"]) for name in names} for i in part]
        data.append(nb["Dataset"].from_list(texts))
    trainer = DPOTrainer(
        model=nb["load_4bit"](nb["base_model"], nb["dtype"], nb["load_in_4bit"]),
        args=nb["training_args"],
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=nb["tokenizer"],
        peft_config=LoraConfig(
            r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    for parameter in trainer.model.parameters():  # of a 4-bit base TRL has the adapter in bf16
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return curves(trainer)


LOSSES = ["sigmoid", "ipo", "sigmoid_norm", "apo_zero", "robust", "sigmoid+sft"]
RUNS = [
    *((loss, True, False) for loss in LOSSES),
    ("sigmoid", False, False),
    ("sigmoid", True, True),
]


@pytest.mark.parametrize("loss_type, share_prompt, load_in_4bit", RUNS)
def test_losses_as_stock_trl(prepare, loss_type, share_prompt, load_in_4bit):
    """The same pairs in the same steps, but at stock TRL in random order inside of each step."""
    settings = dict(loss_type=loss_type, share_prompt=share_prompt, load_in_4bit=load_in_4bit)
    nb, rng = prepare(beta=0.3, learning_rate=1e-2, eval_pairs=2, **settings), random.Random(3)
    order = nb["order"]
    if loss_type != "sigmoid+sft":  # whose likelihood depends on which pairs share a batch
        order = [i for start in range(0, 32, 8) for i in rng.sample(order[start : start + 8], 8)]
    expected = stock_curves(nb, order)
    if share_prompt:
        nb["share_prompts"](nb["trainer"])
    found = curves(nb["trainer"])
    for name in (
        METRICS
    ):  # a margin is the small difference of large sums: relative to the largest of the run
        assert found[name] == pytest.approx(
            expected[name], rel=1e-4, abs=1e-4 * max(map(abs, expected[name]))
        ), name
    assert nb["training_args"].loss_type == loss_type.split("+") and nb["training_args"].beta == 0.3
    assert (
        loss_type != "robust" or nb["training_args"].label_smoothing > 0
    )  # else it is the same as sigmoid
    assert max(found["rewards/margins"]) > 0.1  # it has learnt


@pytest.mark.parametrize("kind", ["bloom", "experts"])
def test_a_base_that_cannot(prepare, models, tmp_path, kind):
    """Bloom's attention looks at where a token stands in its row; the loss that balances experts wants TRL's own rows."""
    tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
    shape = dict(
        GROUPED,
        vocab_size=len(tokenizer),
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
    )
    config = transformers.Qwen2MoeConfig(**shape, shared_expert_intermediate_size=16)
    if kind == "bloom":
        config = transformers.BloomConfig(
            vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4
        )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    nb = prepare(str(tmp_path / "base"), load_in_4bit=False)
    with pytest.raises(AssertionError, match="share_prompt") as error:
        nb["share_prompts"](nb["trainer"])
    assert error.value.__context__ is None


def test_several_processes(prepare):
    """What one of them cannot share none does; layers that are sharded are checkpointed all or none."""
    nb, asked = prepare(), []
    nb["gather_object"] = lambda found: [*found, 9.0]  # an answer of another process moved by that
    with pytest.raises(AssertionError, match="share_prompt"):
        nb["share_prompts"](nb["trainer"])
    nb.update(
        sharded=True,
        gather_object=list,
        run_prompts_once=lambda model, needed: asked.append(needed),
    )
    nb["share_prompts"](nb["trainer"])
    assert asked == [None]
    nb["processes"] = types.SimpleNamespace(num_processes=3)
    with pytest.raises(AssertionError, match="divisible by 3"):
        run_cell("split-of-a-step", nb)


def plan_with(monkeypatch, nb, room):
    """Leaves as much memory as the plan on a CPU, which takes 0.65 of it, needs to have this room for batches."""
    free = types.SimpleNamespace(available=(nb["fixed"] + 1.001 * room) / 0.65)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)


def watch(nb):
    """Tokens, cells and checkpointed layers of each batch that will be trained on."""
    seen, plain = [], nb["layers_to_checkpoint"]

    def spy(config, *size, **options):
        seen.append((*size, plain(config, *size, **options)))
        return seen[-1][-1]

    nb["layers_to_checkpoint"] = spy
    return seen


def test_training_is_the_same_however_many_layers_are_checkpointed(prepare, tmp_path, monkeypatch):
    """Losses, margins, evaluations and adapter to the last bit; also where a machine with less memory goes on."""
    found = []
    for folder, layers in (("none", {0}), ("some", {1, 2}), ("some", {2})):
        nb = prepare(load_in_4bit=False, output_dir=str(tmp_path / folder))
        trainer, seen = nb["trainer"], watch(nb)
        nb["share_prompts"](trainer)
        trainer.train(resume_from_checkpoint=nb["checkpoint"] and str(nb["checkpoint"]))
        planned = [*zip(*nb["batches"], strict=True)][-len(seen) :]
        assert {again for *_, again in seen} == layers and len(seen) == (
            2 if nb["checkpoint"] else 8
        )
        assert all(
            ran[0] == plan[0] and ran[1] <= 1.05 * plan[1]
            for ran, plan in zip(seen, planned, strict=True)
        )
        history = [[entry.get(name) for name in METRICS] for entry in trainer.state.log_history]
        found.append(
            (
                history,
                [parameter for parameter in trainer.model.parameters() if parameter.requires_grad],
            )
        )
        needed = nb["step_memory"](nb["config"], *nb["batches"][:2], len(found), **nb["kind"])
        plan_with(monkeypatch, nb, np.median(needed) if folder == "none" else needed.max())
        shutil.rmtree(tmp_path / "some" / "checkpoint-4", ignore_errors=True)
    for history, adapter in found[1:]:
        assert history == found[0][0] and all(map(torch.equal, adapter, found[0][1]))


def test_order_of_training():
    once = np.random.default_rng(0).integers(5, 500, 50)

    def order(**changes):
        drawn = dict(
            random=random,
            seed=0,
            max_steps=20,
            pairs_per_step=7,
            train=list(range(50)),
            share_prompt=True,
        )
        return run_cell("order", {**drawn, "once": once, "longest": once[::-1], **changes})["order"]

    found, other = order(), order(share_prompt=False)
    for start in range(0, 140, 7):  # lengths say how a step goes, not what is in it
        step, plain = found[start : start + 7], other[start : start + 7]
        assert [*once[step]] == sorted(once[step], reverse=True) and sorted(step) == sorted(plain)
        assert [*once[::-1][plain]] == sorted(once[::-1][plain], reverse=True)
    assert len(found) == 140 and order(max_steps=1) == found[:7] and order(seed=1) != found
    epochs = order(
        pairs_per_step=1, max_steps=100
    )  # each a shuffle of its own that holds every row once
    assert (
        sorted(epochs[:50]) == sorted(epochs[50:]) == list(range(50)) and epochs[:50] != epochs[50:]
    )


@pytest.mark.parametrize("share_prompt", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("much", [True, False], ids=["much memory", "little memory"])
def test_what_is_trained_is_what_was_planned(prepare, monkeypatch, much, share_prompt):
    nb = prepare(share_prompt=share_prompt, eval_pairs=6)
    if not much:
        least = nb["step_memory"](
            nb["config"], 2 * nb["longest"], 2 * nb["longest"], 2, **nb["kind"]
        ).max()
        plan_with(monkeypatch, nb, least)
        nb = prepare(share_prompt=share_prompt, eval_pairs=6)
    trainer, at_once, seen = nb["trainer"], nb["at_once"], []
    args, parts = (
        trainer.args,
        zip(*[map(nb["rows"].__getitem__, nb["order"])] * at_once, strict=True),
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (
        at_once,
        8 // at_once,
    )
    assert args.gradient_checkpointing == bool(nb["again"]) == (not much)
    assert args.per_device_eval_batch_size == np.gcd(
        at_once, len(nb["held_out"])
    )  # all batches weigh the same
    for batch, part, tokens, cells in zip(
        trainer.get_train_dataloader(), parts, *nb["batches"][:2], strict=True
    ):
        assert torch.equal(batch["input_ids"], trainer.data_collator(part)["input_ids"])
        once = (
            sum(len(ids) for row in part for ids in row.values() if isinstance(ids, list)) - at_once
        )
        assert tokens == (once if share_prompt else batch["input_ids"].numel())
        assert batch["attention_mask"].sum() <= cells <= batch["input_ids"].numel()
    if share_prompt:
        nb["share_prompts"](trainer)
    trainer.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    nb["try_longest"](trainer)
    assert (
        seen == [nb["batches"][0][nb["needs"].argmax()]] * 2
    )  # of the reference and of the policy
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("share, alike", [(True, False), (True, True), (False, False)])
def test_the_plan_is_the_least_work_that_fits(share, alike):
    nb, sizes, chosen = alone("memory"), [1, 2, 4, 8, 16], set()
    config, lengths = (
        MistralConfig(vocab_size=32002),
        np.random.default_rng(0).integers(50, 1500, 320),
    )
    plan = partial(nb["plan"], config, lengths * 3 // 2, lengths, share=share, alike=alike)
    for room in np.array([3, 4, 5, 6, 8, 10, 14, 16, 20, 30, 60, 200]) * 1e9:
        works = {}
        for size in sizes:
            _, tokens, cells, again = plan([size], room)
            groups = lengths.reshape(-1, size)
            padded = size * groups.max(axis=1)
            assert [*cells] == [*(padded + groups.sum(axis=1) if share else 2 * padded)]
            fits = nb["step_memory"](config, tokens, cells, np.arange(33)[:, None]) <= room
            fewest = fits.argmax(axis=0)
            if (alike or not share) and fewest.any():
                fewest[:] = 32
            if fits[32].all():
                works[size] = ((tokens + 130) * (3 + fewest / 32)).sum()
                assert [*again] == [*fewest]
        chosen.add(plan(sizes, room)[0])
        best = min(
            works, key=works.get, default=1
        )  # if none fits, one pair, so that what is needed is the least
        assert plan(sizes, room)[0] == best
    assert len(chosen) > 2 or not share


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16-bit", "4-bit"])
def test_the_arithmetic_of_the_weights(prepare, load_in_4bit):
    nb = prepare("chatml", load_in_4bit=load_in_4bit)
    weights = nb["model"].get_memory_footprint() - 4 * nb["adapter_size"]
    assert nb["fixed"] - nb["own"] - 16 * nb["adapter_size"] == pytest.approx(
        weights, rel=0.05 if load_in_4bit else 1e-3
    )


@pytest.mark.parametrize("name", ["qwen 2", "qwen 3"])
def test_the_plan_sees_whether_queries_and_keys_are_normed(name, models, pairs_file, tmp_path):
    base = shutil.copytree(models["qwen"], tmp_path / "base")
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    type(MODELS[name])(**GROUPED | dict(vocab_size=vocabulary)).save_pretrained(base)
    sources = dict(base_model=str(base), dataset_id=pairs_file, output_dir=str(tmp_path / "run"))
    nb = run_cells("install", "split-of-a-step", **SMALL | sources)
    assert nb["kind"]["normed"] == (name == "qwen 3")


@pytest.mark.parametrize("checkpointed", [0, 2, 6])
@pytest.mark.parametrize("name, head_dim", [("mistral", 64), ("qwen 3", 32), ("qwen 3", 64)])
def test_the_arithmetic_of_activations(name, head_dim, checkpointed):
    """Of a 16-bit base, against all that autograd keeps in a forward pass. A 4-bit base: see test_simulate.py."""
    width = dict(hidden_size=256, intermediate_size=896, num_hidden_layers=6, num_attention_heads=8)
    config = type(MODELS[name])(vocab_size=64, num_key_value_heads=2, head_dim=head_dim, **width)
    model, asked = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), []
    add_fused_lm_head(model, outputs=FIELDS)
    alone("run-prompts-once")["run_prompts_once"](
        model, lambda *size: asked.append(size) or checkpointed
    )
    model = get_peft_model(
        model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    own, kept = (
        {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]},
        {},
    )

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = (
            x.untyped_storage()
        )  # held, or its place would be taken by another
        return x

    shapes = [(60, 200, 300), (150, 120, 90), (90, 250, 250)]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(**inputs(shapes))
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    kind = dict(in_4bit=False, normed=name == "qwen 3")
    step_memory = partial(alone("memory")["step_memory"], config, *asked[0], **kind)
    needed = (
        step_memory(checkpointed) - (step_memory(0) - step_memory(1)) - 2 * tokens_of(shapes) * 256
    )  # of backward
    assert (0.95 if checkpointed < 6 else 0.7) < measured / needed < 1.1
