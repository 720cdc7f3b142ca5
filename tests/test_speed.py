"""What makes training fast, and that it changes nothing: prompts run once, layers checkpointed as needed, the plan."""

import copy
import random
import shutil
import sys
import types
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig
from transformers.integrations import sdpa_attention
from transformers.pytorch_utils import Conv1D
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from rehearsal.notebook import alone, run_cell

SKELETON, MEMORY = alone("skeleton"), alone("memory")
TINY = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
)
GROUPED = dict(TINY, num_key_value_heads=2)
PADDED = dict(GROUPED, pad_token_id=0)
GPT = dict(vocab_size=97, n_embd=32, n_layer=4, n_head=4)
HALF_WINDOWS = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
WINDOWS = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2)
BY_LAYER = dict(
    WINDOWS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97, num_kv_shared_layers=1
)
MODELS = {
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=None),
    "mistral, window of 7": transformers.MistralConfig(**GROUPED, sliding_window=7),
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, one head a key": transformers.LlamaConfig(**TINY),
    "qwen 2": transformers.Qwen2Config(**GROUPED),
    "qwen 2, window of 5 in half of the layers": transformers.Qwen2Config(
        **GROUPED, **HALF_WINDOWS
    ),
    "qwen 3": transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma 3, window of 5 in some layers": transformers.Gemma3TextConfig(
        **GROUPED, head_dim=8, **WINDOWS
    ),
}
MORE_MODELS = {
    "apertus": transformers.ApertusConfig(**GROUPED),
    "cohere": transformers.CohereConfig(**GROUPED),
    "cohere 2, window": transformers.Cohere2Config(**GROUPED, **WINDOWS),
    "ernie 4.5": transformers.Ernie4_5Config(**GROUPED, head_dim=8),
    "exaone 4, window": transformers.Exaone4Config(**GROUPED, **WINDOWS),
    "gemma": transformers.GemmaConfig(**GROUPED, head_dim=8),
    "gemma 3n, window": transformers.Gemma3nTextConfig(
        **GROUPED
        | BY_LAYER
        | dict(intermediate_size=[64] * 4, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
        head_dim=8,
        laurel_rank=4,
    ),
    "gemma 4, window": transformers.Gemma4TextConfig(
        **GROUPED, **BY_LAYER, head_dim=8, global_head_dim=16
    ),
    "glm": transformers.GlmConfig(**PADDED, head_dim=8),
    "glm 4": transformers.Glm4Config(**PADDED, head_dim=8),
    "gpt-2": transformers.GPT2Config(**GPT),
    "gpt-j": transformers.GPTJConfig(**GPT, rotary_dim=4),
    "gpt-neox": transformers.GPTNeoXConfig(**TINY),
    "granite": transformers.GraniteConfig(**GROUPED),
    "granite 4, dense": transformers.GraniteMoeHybridConfig(
        **GROUPED,
        layer_types=["full_attention"] * 4,
        num_local_experts=0,
        shared_intermediate_size=64,
        mamba_n_heads=4,
        mamba_d_head=16,
    ),
    "helium": transformers.HeliumConfig(**GROUPED, head_dim=8),
    "hunyuan": transformers.HunYuanDenseV1Config(**GROUPED, head_dim=8),
    "lfm 2, all attention": transformers.Lfm2Config(**GROUPED, layer_types=["full_attention"] * 4),
    "ministral 3": transformers.Ministral3Config(**GROUPED, head_dim=8),
    "nanochat": transformers.NanoChatConfig(**GROUPED),
    "olmo": transformers.OlmoConfig(**GROUPED),
    "olmo 2": transformers.Olmo2Config(**GROUPED),
    "olmo 3, window": transformers.Olmo3Config(**GROUPED, **WINDOWS),
    "opt": transformers.OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32),
    "phi": transformers.PhiConfig(**GROUPED),
    "phi 3": transformers.Phi3Config(**PADDED),
    "seed-oss": transformers.SeedOssConfig(**GROUPED, head_dim=8),
    "smollm 3": transformers.SmolLM3Config(**PADDED),
    "starcoder 2, window": transformers.Starcoder2Config(**GROUPED, sliding_window=5),
}
MODELS |= MORE_MODELS
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16)
DELTA = dict(
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
# Bases whose layers are not all attention, and what is said to be the reason.
HYBRIDS = {
    "qwen 3.5": (
        transformers.Qwen3_5TextConfig(**GROUPED, **DELTA, head_dim=16),
        "Qwen3_5GatedDeltaNet",
    ),
    "lfm 2": (
        transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"] * 2),
        "Conv1d",
    ),
    "bamba": (
        transformers.BambaConfig(**GROUPED, **MAMBA, mamba_expand=2, attn_layer_indices=[1, 3]),
        "BambaMixer",
    ),
    "zamba 2": (
        transformers.Zamba2Config(
            **TINY,
            layers_block_type=["mamba", "hybrid"] * 2,
            mamba_d_state=16,
            n_mamba_heads=4,
            mamba_ngroups=1,
            num_mem_blocks=1,
            adapter_rank=4,
        ),
        "Zamba2MambaMixer",
    ),
    "olmo hybrid": (transformers.OlmoHybridConfig(**PADDED, **DELTA), "OlmoHybridGatedDeltaNet"),
    "falcon h1": (transformers.FalconH1Config(**GROUPED, **MAMBA, mamba_d_ssm=64), "FalconH1Mixer"),
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


def skeleton_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    config = MODELS[config] if isinstance(config, str) else config
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    SKELETON["switch_off_attention_dropout"](model)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_stock_trls(name, monkeypatch):
    """Batch by batch with other layers checkpointed, each distinct token once, without a padded cell too many."""
    stock, model = build(name), build(name)
    batches = {tokens_of(shapes): shapes for shapes in (SHAPES[:2], SHAPES, SHAPES[3:5])}
    needed = dict(zip(batches, [1, 3, 0], strict=True))
    asked, calls, ran, seen = [], [], Counter(), []

    def watched(*args, plain=sdpa_attention.sdpa_attention_forward, **options):
        calls.append(args)
        return plain(*args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", watched)
    alone("run-prompts-once")["run_prompts_once"](
        model, lambda *size: asked.append(size) or needed[size[0]]
    )
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].numel())
    )
    layers = SKELETON["decoder_layers"](model)
    for i, layer in enumerate(layers):
        inside = next(x for x in layer.modules() if isinstance(x, (torch.nn.Linear, Conv1D)))
        inside.register_forward_pre_hook(lambda *_, i=i: ran.update([i]))
    for x in (stock, model):
        SKELETON["switch_off_attention_dropout"](x)
        disable_dropout_in_model(x)
    model.train().activation_checkpointing_enable()
    stock.train()
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
    grads = [
        (ours.grad, theirs.grad)
        for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True)
    ]
    grads = [grad for grad in grads if grad[1] is not None]
    largest = max(theirs.abs().max().item() for _, theirs in grads)
    for (
        ours,
        theirs,
    ) in grads:  # one that is 0 but for rounding, as of a key's bias, rounds as the others do
        bound = 1e-5 * theirs.abs().max().item() + 1e-7 * largest
        assert torch.allclose(ours, theirs, rtol=0, atol=bound)
    assert seen == [tokens for tokens in batches for _ in range(2)]
    assert [ran[i] for i in range(4)] == [
        6 + sum(i < number for number in needed.values()) for i in range(4)
    ]
    assert any(args[4] is not None for args in calls) == ("window" in name)


@pytest.mark.parametrize("name", MODELS)
def test_dense_bases_share(name):
    """By what they are made of, and by the numbers: of short pairs too, in each precision that a card may choose."""
    assert not SKELETON["why_prompts_cannot_be_shared"](skeleton_of(MODELS[name]))
    assert len(SKELETON["checkpointable_layers"](skeleton_of(MODELS[name]))) == 4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shapes in (SHAPES, [(6, 5, 6), (3, 7, 7)]):
            error = measured_error(MODELS[name], dtype, shapes)
            assert error.exact and error.rounding > 0, error
            assert error.rounding < 0.5, error


def measured_error(config, dtype, shapes=SHAPES, spoil=None):
    """`sharing_error` of a model in this precision, changed by `spoil`."""
    shared = alone("run-prompts-once")
    model = build(config, dtype).eval()
    if spoil:
        spoil(model)
    shared["run_prompts_once"](model)
    collate = DataCollatorForPreference(pad_token_id=0)
    batches = [collate(pairs(shapes)), collate(pairs(shapes[:1]))]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return shared["sharing_error"](model, batches)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_do_not_share(name):
    """By what they are made of, and by the numbers alone, in bf16 as well."""
    config, culprit = HYBRIDS[name]
    assert culprit in SKELETON["why_prompts_cannot_be_shared"](skeleton_of(config))
    for dtype in (torch.float32, torch.bfloat16):
        for shapes in (SHAPES, [(6, 5, 6), (3, 7, 7)]):
            assert not measured_error(config, dtype, shapes).exact


OTHERS = {
    "bloom": (
        transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        "BloomAttention",
    ),
    "experts": (transformers.Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=2), "experts"),
    "gpt-neo": (
        transformers.GPTNeoConfig(**GPT, num_layers=4, attention_types=[[["global", "local"], 2]]),
        "GPTNeoAttention",
    ),
    "mamba 2": (
        transformers.Mamba2Config(vocab_size=97, hidden_size=32, num_heads=4, head_dim=16),
        "Mamba2Mixer",
    ),
    "scores are capped": (
        transformers.Gemma2Config(**GROUPED, head_dim=8),
        "scaled_dot_product_attention",
    ),
    "both directions": (
        transformers.Gemma3TextConfig(**GROUPED, use_bidirectional_attention=True),
        "not causal",
    ),
    "window in the mask": (transformers.PhimoeConfig(**GROUPED, sliding_window=5), "window"),
    "recurrent": (
        transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
        "Rwkv",
    ),
    "no state, no attention": (
        transformers.MiniMaxConfig(
            **GROUPED, layer_types=["linear_attention", "full_attention"] * 2
        ),
        "MiniMaxLightningAttention",
    ),
    "chooses what it sees": (
        transformers.DeepseekV32Config(**GROUPED, mlp_layer_types=["dense"] * 4),
        "Indexer",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_cannot_share(name):
    config, culprit = OTHERS[name]
    assert culprit in SKELETON["why_prompts_cannot_be_shared"](skeleton_of(config))


def test_three_outcomes_of_the_check(monkeypatch):
    """No numbers, no memory, and a base that cannot: three sentences."""

    def overflow(model):
        model.lm_head.weight.data.fill_(torch.inf)

    with pytest.raises(
        FloatingPointError, match="MistralForCausalLM gives no numbers in float16: .* bfloat16"
    ):
        measured_error(MODELS["mistral"], torch.float16, spoil=overflow)
    with pytest.raises(FloatingPointError, match="no numbers in float32: choose another base.$"):
        measured_error(MODELS["mistral"], torch.float32, spoil=overflow)
    with pytest.raises(
        NotImplementedError, match="BloomForCausalLM cannot .* share_prompt to False"
    ):
        measured_error(OTHERS["bloom"][0], torch.float32)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        measured_error(MODELS["mistral"], torch.float32)


@pytest.mark.parametrize("fault", ["positions", "window", "padding"])
def test_the_check_sees_other_faults(fault, monkeypatch):
    """Those that have nothing to do with the other answer, in bf16."""
    shared, kept = alone("run-prompts-once"), alone("run-prompts-once")
    plain, masked = kept["lay_out"], kept["window_mask"]

    def spoiled(ids, real, answer):
        row = plain(ids, real, answer)
        if fault == "positions":
            row.positions = torch.arange(len(row.positions))
        if fault == "padding":
            row.groups = [group.roll(1, 0) for group in row.groups]
        return row

    shared["lay_out"] = spoiled
    if fault == "window":
        shared["window_mask"] = lambda length, window, device: (
            torch.ones(length, length).tril().bool()
        )
    monkeypatch.setitem(globals(), "alone", lambda _: shared)

    def look_closely(model):  # or these weights would hardly care for what stands where
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 1000

    assert not measured_error(
        MODELS["mistral, window of 7"], torch.bfloat16, spoil=look_closely
    ).exact
    shared.update(lay_out=plain, window_mask=masked)
    assert measured_error(MODELS["mistral, window of 7"], torch.bfloat16, spoil=look_closely).exact


@pytest.mark.parametrize(
    "missing", ["integrations.sdpa_attention", "masking_utils", "modeling_layers"]
)
def test_names_that_are_gone(missing, monkeypatch):
    """The cell runs all the same; only sharing prompts needs them, and it says so."""
    monkeypatch.setitem(sys.modules, f"transformers.{missing}", None)
    shared = alone("run-prompts-once")
    with pytest.raises(ImportError, match="transformers 5.24 and TRL 1.16.* share_prompt to False"):
        shared["run_prompts_once"](build("mistral"))


@torch.no_grad()
@pytest.mark.parametrize("before_ampere", [True, False])
def test_grouped_heads_before_ampere(before_ampere, monkeypatch):
    """They never get to the kernel that holds all scores: with shared prompts, without, and in generation."""
    kinds = set()

    def watched(
        query,
        key,
        *args,
        enable_gqa=False,
        plain=torch.nn.functional.scaled_dot_product_attention,
        **options,
    ):
        kinds.add((enable_gqa, query.shape[1] == key.shape[1]))
        return plain(query, key, *args, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(
        sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa
    )  # put back afterwards
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    if before_ampere:
        alone("memory")["repeat_grouped_keys"]()
    model = build("mistral")
    model(**inputs())
    model(**inputs([(6, 5, 5)]))  # without padding there is no mask
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    alone("run-prompts-once")["run_prompts_once"](model)
    model(**inputs())
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert any(grouped for grouped, _ in kinds) == (not before_ampere)


@pytest.mark.parametrize("name, dropout", [("granite", 0.1), ("seed-oss", 0.1), ("llama", 0.0)])
def test_attention_dropout_is_switched_off(name, dropout):
    config = copy.deepcopy(MODELS[name])
    config.attention_dropout = dropout
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(model(ids).logits, model(ids).logits) == (not dropout)
    assert SKELETON["switch_off_attention_dropout"](model) == bool(dropout)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.attention_dropout == dropout
    assert not SKELETON["switch_off_attention_dropout"](model)


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
    # A reward is beta times the small difference of two large sums, and rounds as those do.
    nats = 4 * torch.finfo(torch.float32).eps * max(map(abs, expected["logps/chosen"]))
    for name in METRICS:
        allowed = 0.3 * nats if name.startswith("rewards") else nats
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=allowed), name
    assert nb["training_args"].loss_type == loss_type.split("+") and nb["training_args"].beta == 0.3
    assert (
        loss_type != "robust" or nb["training_args"].label_smoothing > 0
    )  # else it is the same as sigmoid
    assert max(found["rewards/margins"]) > 0.1  # it has learnt


@pytest.mark.parametrize("name", ["qwen 3.5", "lfm 2"])
def test_a_base_that_cannot_trains_without(prepare, models, tmp_path, capsys, name):
    """The plan knows it, a sentence says it, and what is trained is what stock TRL trains."""
    tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
    config, culprit = copy.deepcopy(HYBRIDS[name][0]), HYBRIDS[name][1]
    config.update(
        dict(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=512,
        )
    )
    build(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    nb = prepare(
        str(tmp_path / "base"), load_in_4bit=False, beta=0.3, learning_rate=1e-2, eval_pairs=2
    )
    assert culprit in capsys.readouterr().out and not nb["shares"]
    at_once, split = nb["at_once"], nb["split"]
    padded = [
        2 * nb["longest"][nb["order"][i : i + at_once]].max() * at_once
        for i in range(0, 32, at_once)
    ]
    assert [*split.linear_tokens] == padded
    expected, found = stock_curves(nb, nb["order"]), curves(nb["trainer"])
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_several_processes(prepare):
    """What one of them cannot share none does; layers that are sharded are checkpointed all or none."""
    nb, asked = prepare(), []
    nb["gather_object"] = lambda found: [
        *found,
        False,
    ]  # another process found that it is not exact
    with pytest.raises(AssertionError, match="share_prompt"):
        nb["share_prompts"](nb["trainer"])
    plain = nb["run_prompts_once"]
    nb.update(sharded=True, gather_object=list)
    nb["run_prompts_once"] = lambda model, needed: asked.append(needed) or plain(model, needed)
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

    def spy(widths, *size, **options):
        seen.append((*size, plain(widths, *size, **options)))
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
        split = nb["split"]
        planned = [*zip(split.linear_tokens, split.attention_tokens, strict=True)][-len(seen) :]
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
        sizes = split.linear_tokens, split.attention_tokens
        needed = nb["step_memory"](nb["widths"], *sizes, len(found), number_bytes=4)
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
            shares=True,
        )
        return run_cell("order", {**drawn, "once": once, "longest": once[::-1], **changes})["order"]

    found, other = order(), order(shares=False)
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
        tokens = 2 * nb["longest"]
        least = nb["step_memory"](nb["widths"], tokens, tokens, 2, number_bytes=4).max()
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
    planned = nb["split"].linear_tokens, nb["split"].attention_tokens
    for batch, part, tokens, cells in zip(
        trainer.get_train_dataloader(), parts, *planned, strict=True
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
    assert seen == [planned[0][nb["needs"].argmax()]] * 2  # of the reference and of the policy
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("share, alike", [(True, False), (True, True), (False, False)])
def test_the_plan_is_the_least_work_that_fits(share, alike):
    sizes, chosen = [1, 2, 4, 8, 16], set()
    lengths = np.random.default_rng(0).integers(50, 1500, 320)
    widths = SKELETON["layer_widths"](skeleton_of(MistralConfig(vocab_size=32002)), lengths.max())
    plan = partial(
        MEMORY["plan_splits"],
        widths,
        lengths * 3 // 2,
        lengths,
        share=share,
        all_layers_alike=alike,
    )
    for room in np.array([3, 4, 5, 6, 8, 10, 14, 16, 20, 30, 60, 200]) * 1e9:
        works, splits = {}, plan(sizes, room)
        for size, split in zip(sizes, splits, strict=True):
            tokens, cells, again = (
                split.linear_tokens,
                split.attention_tokens,
                split.checkpointed_layers,
            )
            groups = lengths.reshape(-1, size)
            padded = size * groups.max(axis=1)
            assert [*cells] == [*(padded + groups.sum(axis=1) if share else 2 * padded)]
            fits = MEMORY["step_memory"](widths, tokens, cells, np.arange(33)[:, None]) <= room
            fewest = fits.argmax(axis=0)
            if (alike or not share) and fewest.any():
                fewest[:] = 32
            if fits[32].all():
                works[size] = ((tokens + 130) * (3 + fewest / 32)).sum()
                assert [*again] == [*fewest] and split.work == pytest.approx(works[size])
        chosen.add(MEMORY["best_split"](splits, room).pairs_at_once)
        best = min(
            works, key=works.get, default=1
        )  # if none fits, one pair, so that what is needed is the least
        assert MEMORY["best_split"](splits, room).pairs_at_once == best
    assert len(chosen) > 2 or not share


def test_layers_that_are_not_alike():
    """The first are checkpointed first, so what is spared is what they take, and not an average."""
    narrow, wide = (
        SKELETON["LayerWidths"](attention=0, linear=n, scores=0, hidden=1) for n in (10, 100)
    )
    needed = partial(MEMORY["step_memory"], [narrow, wide], 1, 0, number_bytes=1)
    assert [needed(n) for n in range(3)] == [6 + 110 + 100, 6 + 101 + 100, 6 + 2 + 100]
    fewest = partial(MEMORY["layers_to_checkpoint"], [narrow, wide], 1, 0, number_bytes=1)
    assert [fewest(room_bytes=room) for room in (216, 215, 207, 206, 5)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16-bit", "4-bit"])
def test_the_arithmetic_of_the_weights(prepare, load_in_4bit):
    nb = prepare("chatml", load_in_4bit=load_in_4bit)
    weights = nb["model"].get_memory_footprint() - 4 * nb["adapter_size"]
    assert nb["fixed"] - nb["own"] - 16 * nb["adapter_size"] == pytest.approx(
        weights, rel=0.05 if load_in_4bit else 1e-3
    )


WIDE = dict(
    vocab_size=97,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=6,
    num_attention_heads=8,
)
WIDE_GROUPED = dict(WIDE, num_key_value_heads=2)
WIDE_BY_LAYER = dict(
    WIDE_GROUPED,
    sliding_window=50,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=97,
    num_kv_shared_layers=3,
    head_dim=32,
)
PLANNED = {
    "mistral": (
        transformers.MistralConfig(**WIDE_GROUPED, head_dim=64, sliding_window=None),
        0.95,
        1.1,
    ),
    "mistral, window": (transformers.MistralConfig(**WIDE_GROUPED, sliding_window=50), 0.95, 1.1),
    "qwen 3": (transformers.Qwen3Config(**WIDE_GROUPED, head_dim=32), 0.95, 1.1),
    "qwen 3, wide heads": (transformers.Qwen3Config(**WIDE_GROUPED, head_dim=64), 0.95, 1.1),
    "phi 3, fused": (transformers.Phi3Config(**WIDE_GROUPED, pad_token_id=0), 0.85, 1.1),
    "glm 4, four norms": (
        transformers.Glm4Config(**WIDE_GROUPED, pad_token_id=0, head_dim=32),
        0.95,
        1.1,
    ),
    "granite 4, dense": (
        transformers.GraniteMoeHybridConfig(
            **WIDE_GROUPED,
            layer_types=["full_attention"] * 6,
            num_local_experts=0,
            shared_intermediate_size=896,
            mamba_n_heads=8,
            mamba_d_head=64,
        ),
        0.95,
        1.1,
    ),
    "gemma 4": (transformers.Gemma4TextConfig(**WIDE_BY_LAYER, global_head_dim=64), 0.95, 1.1),
    "gemma 3n": (
        transformers.Gemma3nTextConfig(
            **WIDE_BY_LAYER | dict(intermediate_size=[896] * 6),
            laurel_rank=16,
            activation_sparsity_pattern=[0.95] * 2 + [0.0] * 4,
        ),
        0.95,
        1.1,
    ),
    # Of these the plan says too much rather than too little.
    "gpt-neo": (
        transformers.GPTNeoConfig(
            **dict(vocab_size=97, hidden_size=256, num_layers=6, num_heads=8),
            attention_types=[[["global", "local"], 3]],
        ),
        0.5,
        1.1,
    ),
    "gemma 2, scores kept": (transformers.Gemma2Config(**WIDE_GROUPED, head_dim=32), 0.5, 1.1),
    "mamba 2": (
        transformers.Mamba2Config(
            **dict(
                vocab_size=97, hidden_size=256, num_hidden_layers=6, state_size=64, chunk_size=64
            ),
            num_heads=8,
            head_dim=64,
            n_groups=1,
        ),
        0.5,
        1.1,
    ),
}


@pytest.mark.parametrize(
    "name, checkpointed", [*((name, 0) for name in PLANNED), ("qwen 3", 2), ("qwen 3", 6)]
)
def test_the_arithmetic_of_activations(name, checkpointed):
    """Of a 16-bit base, against all that autograd keeps in a forward pass. A 4-bit base: see test_simulate.py."""
    (config, least, most), asked = PLANNED[name], []
    shapes = [(60, 200, 300), (150, 120, 90), (90, 250, 250)]
    skeleton = skeleton_of(config)
    widths = SKELETON["layer_widths"](skeleton, 350, in_4bit=False)
    model = build(config, torch.bfloat16)
    size = dict(linear_tokens=6 * 360, attention_tokens=6 * 360, score_pairs=6 * 360**2)
    if not SKELETON["why_prompts_cannot_be_shared"](skeleton):
        alone("run-prompts-once")["run_prompts_once"](
            model, lambda *size: asked.append(size) or checkpointed
        )
    targets = ["in_proj"] if name == "mamba 2" else "all-linear"
    model = get_peft_model(
        model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    ).train()
    if checkpointed:
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

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(**inputs(shapes))
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    if asked:
        size = dict(zip(("linear_tokens", "attention_tokens"), asked[0], strict=True))
    largest = max(MEMORY["step_memory"]([layer], **size) for layer in widths)
    head = 6 * size["linear_tokens"] * widths[0].hidden * 2
    of_backward = (largest - head) / 2 + 2 * size["linear_tokens"] * 256
    needed = MEMORY["step_memory"](widths, **size, checkpointed=checkpointed) - of_backward
    assert (0.7 if checkpointed == 6 else least) < measured / needed < most
