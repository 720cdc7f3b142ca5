"""What makes training fast, and that it changes nothing: the prompt run once, the order of the pairs, the plan."""

import copy
import functools
import json
import math
import random
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from notebook import NOTEBOOK, ROOT, functions, run_cell, run_cells
from peft import LoraConfig, get_peft_model
from test_machine import fake_cuda
from trainers import SMALL, gradient, perturb
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

TINY = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
GROUPED = dict(TINY, num_key_value_heads=2)
MODELS = {
    "mistral": MistralConfig(**GROUPED, sliding_window=None),
    "mistral, window of 7": MistralConfig(**GROUPED, sliding_window=7),
    "llama": LlamaConfig(**GROUPED),
    "llama, one head a key": LlamaConfig(**TINY),
    "qwen 2": Qwen2Config(**GROUPED),
    "qwen 2, window of 5 in half of the layers": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "qwen 3": Qwen3Config(**GROUPED, head_dim=16),
    "gemma 3, window of 5 in some layers": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=5),
}
# Lengths of prompt, chosen and rejected: alike, far apart, answers of one token, a prompt of one, one longer than windows.
SHAPES = [(6, 5, 5), (3, 1, 1), (1, 12, 1), (9, 1, 14), (25, 4, 7), (2, 9, 3)]
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def pairs(shapes, seed=0):
    rng = random.Random(seed)
    draw = lambda n: [rng.randrange(3, 97) for _ in range(n)]  # noqa: E731
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(draw, shape), strict=True)) for shape in shapes]


def inputs(rows):
    """What `DPOTrainer` calls the model with."""
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    return dict(batch, labels=labels, fused_lm_head=True, use_cache=False)


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_every_row_as_if_it_were_alone(name, dtype):
    """Log-probabilities of a batch that shares prompts, against each sequence by itself through the stock model."""
    model, rows = build(MODELS[name], dtype), pairs(SHAPES)
    with torch.no_grad():
        alone = []
        for answer in ("chosen_ids", "rejected_ids"):
            for row in rows:
                ids = torch.tensor([row["prompt_ids"] + row[answer]])
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                alone.append(logps[len(row["prompt_ids"]) - 1 :])
        stock = model(**inputs(rows))
        functions()["run_prompts_once"](model)
        seen = []
        model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
        shared = model(**inputs(rows))
    assert seen == [sum(p + c + r - 1 for p, c, r in SHAPES)]  # each distinct token once and nothing else
    for i, expected in enumerate(alone):
        found = shared.log_probs[i][shared.log_probs[i] != 0]
        assert found.shape == expected.shape and torch.allclose(found.double(), expected.double(), atol=1e-5, rtol=0)
    for field in FIELDS:
        assert shared[field].shape == stock[field].shape
        assert torch.allclose(shared[field].double(), stock[field].double(), atol=1e-5), field
    assert torch.equal(shared.label_mask, stock.label_mask)


@pytest.mark.parametrize("name", ["mistral", "mistral, window of 7"])
def test_before_ampere(name, monkeypatch):
    """There the mask is written out, for the sake of PyTorch's choice of kernels; the result is the same."""
    batch = inputs(pairs(SHAPES))
    stock = build(MODELS[name])(**batch).log_probs
    model = build(MODELS[name])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    nb = functions()
    masks, plain = [], nb["sdpa_attention_forward"]

    def spy(module, query, key, value, mask, **options):
        masks.append(mask)
        return plain(module, query, key, value, mask, **options)

    nb["sdpa_attention_forward"] = spy
    nb["run_prompts_once"](model)
    monkeypatch.undo()
    assert torch.allclose(model(**batch).log_probs, stock, atol=1e-5)
    assert len(masks) == 4 and all(mask.dtype == torch.bool for mask in masks)


def test_half_precision():
    """Under bf16 autocast the two ways differ by rounding only: no more than bf16 differs from float32."""
    batch = inputs(pairs(SHAPES))
    exact = build(MODELS["llama"])(**batch).log_probs
    model = build(MODELS["llama"], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**batch).log_probs
        functions()["run_prompts_once"](model)
        shared = model(**batch).log_probs
    assert (shared - plain).abs().max() <= (plain - exact).abs().max()


def test_experts_with_a_balancing_loss_are_run_the_plain_way(models, pairs_file, tmp_path, capsys):
    """TRL then asks for router logits, and weighs them by an attention mask of its own rows."""
    from transformers import AutoTokenizer, MixtralConfig

    tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
    shape = {**GROUPED, "vocab_size": len(tokenizer), "num_local_experts": 2}
    AutoModelForCausalLM.from_config(MixtralConfig(**shape)).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    parameters = {**SMALL, "dataset_id": pairs_file, "output_dir": str(tmp_path / "run"), "load_in_4bit": False}
    nb = run_cells("parameters", "load-model", {"sys": sys}, base_model=str(tmp_path / "mixtral"), **parameters)
    run_cells("lora", "trainer", nb)
    run_cells("run-prompts-once", "longest", nb)
    assert "MixtralForCausalLM cannot do otherwise: the loss that balances its experts" in capsys.readouterr().out
    nb["trainer"].train()
    assert nb["trainer"].state.global_step == 4


def test_it_can_be_undone_and_done_twice():
    model, batch = build(MODELS["mistral, window of 7"]), inputs(pairs(SHAPES))
    run_prompts_once = functions()["run_prompts_once"]
    with torch.no_grad():
        stock = model(**batch).log_probs
        plain = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        undo = run_prompts_once(model)
        once = model(**batch).log_probs
        run_prompts_once(model)  # as when the cell is run again
        assert torch.equal(model(**batch).log_probs, once)
        # Every other call goes the usual way, padding on the left included.
        assert torch.equal(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, plain)
        ids, mask = batch["input_ids"][:1, :6], torch.tensor([[0, 0, 1, 1, 1, 1]])
        padded = model(ids, attention_mask=mask).logits
        undo()
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(ids, attention_mask=mask).logits, padded)
        assert torch.equal(model(**batch).log_probs, stock)


def test_prompts_that_differ_are_refused():
    model, rows = build(MODELS["llama"]), pairs(SHAPES)
    functions()["run_prompts_once"](model)
    batch = inputs(rows)
    batch["input_ids"][0, 1] += 1
    with pytest.raises(AssertionError, match="must begin with the same prompt"):
        model(**batch)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16-bit", "4-bit"])
def test_loss_metrics_and_gradient_with_and_without(prepare, capsys, load_in_4bit, checkpointing):
    found = []
    for share_prompt in (False, True):
        nb = prepare("chatml", load_in_4bit=load_in_4bit, share_prompt=share_prompt)
        nb["training_args"].gradient_checkpointing = checkpointing
        trainer = nb["trainer"]
        perturb(trainer.model)
        run_cells("run-prompts-once", "share-prompt", nb)
        assert ("Prompts are run once" in capsys.readouterr().out) == share_prompt == nb["share_prompt"]
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.train_dataset = nb["tokenized"]
        grads = gradient(trainer)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        found.append((grads, metrics, trainer.evaluate()))
    (grads, metrics, evaluation), (shared_grads, shared_metrics, shared_evaluation) = found
    for name, value in grads.items():
        assert torch.allclose(value, shared_grads[name], rtol=0, atol=1e-5 * max(value.abs().max().item(), 1e-3)), name
    assert metrics == pytest.approx(shared_metrics, rel=1e-5, abs=1e-6)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_entropy", "eval_logps/chosen"):
        assert evaluation[name] == pytest.approx(shared_evaluation[name], rel=1e-5, abs=1e-6)


# TRL weights its other metrics by the tokens of each batch, so they depend on which pairs share one.
METRICS = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen")


def curves(trainer):
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {metric: [entry[metric] for entry in history] for metric in METRICS}


def test_twenty_steps_as_stock_trl(prepare):
    """The same pairs in the same steps: stock TRL in random order inside each step, and ours with and without sharing."""
    settings = dict(load_in_4bit=False, max_steps=20, pairs_per_step=8, learning_rate=1e-2)
    runs = []
    for share_prompt in (True, False):
        nb = prepare(share_prompt=share_prompt, **settings)
        run_cells("run-prompts-once", "longest", nb)
        assert nb["share_prompt"] == share_prompt
        nb["trainer"].train()
        runs.append(curves(nb["trainer"]))

    nb = prepare(**settings)
    run_cell("order", nb)
    ours = nb["training_args"]
    arguments = DPOConfig(
        output_dir=ours.output_dir,
        max_steps=20,
        warmup_steps=1,
        learning_rate=ours.learning_rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        max_length=512,
        report_to="none",
        seed=42,
    )
    assert arguments.gradient_checkpointing  # TRL's default
    run_cells("load-model", "check-4bit", nb)
    nb["set_seed"](42)
    stock = DPOTrainer(
        model=nb["model"],
        args=arguments,
        train_dataset=nb["train_dataset"],
        processing_class=nb["tokenizer"],
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    order = nb["training_order"](nb["row_lengths"], 8, 20, 42)
    rng = random.Random(3)
    stock.train_dataset = stock.train_dataset.select(
        [i for step in range(0, 160, 8) for i in rng.sample(order[step : step + 8], 8)]
    )
    stock.train()
    expected = curves(stock)
    assert len(expected["loss"]) == 20 and expected["loss"][-1] < 0.8 * expected["loss"][0]  # it has learnt
    for found in runs:
        for metric in METRICS:
            # A margin is the small difference of large sums: relative to the largest of the run.
            scale = max(map(abs, expected[metric]))
            assert found[metric] == pytest.approx(expected[metric], rel=1e-4, abs=1e-4 * scale), metric


def test_a_model_that_cannot_is_run_the_plain_way(prepare, tmp_path, models, capsys):
    """Bloom biases its attention by where a token stands in its row, and does not call transformers' interface for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    models = {**models, "bloom": str(tmp_path / "bloom")}
    nb = {"sys": sys}
    parameters = {**SMALL, "output_dir": str(tmp_path / "run"), "base_model": models["bloom"], "load_in_4bit": False}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(dict(question=f"Is {i}?", chosen="Yes.", rejected="No, " * i)) + "\n" for i in range(40))
    )
    run_cells("parameters", "check-4bit", nb, dataset_id=str(tmp_path / "pairs.jsonl"), **parameters)
    run_cells("lora", "check-trainer", nb)
    forward = nb["trainer"].model.get_base_model().forward
    run_cells("run-prompts-once", "longest", nb)
    twice = max(2 * (len(row["prompt_ids"]) + len(row["rejected_ids"])) for row in nb["tokenized"])
    assert max(nb["row_lengths"]) == twice  # sorted by what is really run
    assert "Prompts are run twice, since BloomForCausalLM cannot do otherwise: " in capsys.readouterr().out
    assert nb["trainer"].model.get_base_model().forward == forward
    nb["trainer"].train()
    assert nb["trainer"].state.log_history[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_result_that_moves_is_run_the_plain_way(prepare, monkeypatch, capsys):
    """Attention that ignores where tokens belong, as a model with one of its own would have."""
    nb = prepare()
    plain = nb["sdpa_attention_forward"]
    monkeypatch.setitem(nb, "sdpa_attention_forward", lambda *args, **kw: (plain(*args, **kw)[0] * 0.5, None))
    run_cells("run-prompts-once", "share-prompt", nb)
    assert "cannot do otherwise: it moves an answer's log-probability by" in capsys.readouterr().out
    assert not nb["share_prompt"]


def test_a_plan_that_counted_on_sharing_is_not_trained(prepare, monkeypatch):
    nb = prepare()
    plain = nb["sdpa_attention_forward"]
    monkeypatch.setitem(nb, "sdpa_attention_forward", lambda *args, **kw: (plain(*args, **kw)[0] * 0.5, None))
    nb["plan"] = lambda *args: (1, True, 0)
    with pytest.raises(AssertionError, match="set share_prompt to False and run all cells again"):
        run_cells("run-prompts-once", "share-prompt", nb)


def test_off_skips_the_cell(prepare, capsys):
    nb = prepare(share_prompt=False)
    forward = nb["trainer"].model.get_base_model().forward
    capsys.readouterr()
    run_cells("run-prompts-once", "share-prompt", nb)
    assert capsys.readouterr().out == "" and nb["trainer"].model.get_base_model().forward == forward


# The order of training.


@pytest.mark.parametrize("seed", range(5))
def test_order_of_training(seed):
    rng, order = random.Random(seed), functions()["training_order"]
    count, size, steps = rng.randint(20, 60), rng.choice([1, 4, 7, 16]), rng.randint(5, 20)
    lengths = [rng.randint(5, 500) for _ in range(count)]
    found = order(lengths, size, steps, seed)
    assert len(found) == size * steps
    blocks = [found[i : i + size] for i in range(0, len(found), size)]
    for block in blocks:
        assert [lengths[i] for i in block] == sorted((lengths[i] for i in block), reverse=True)
    # What is in a step does not depend on lengths, nor on how many steps follow.
    other = order([1] * count, size, steps, seed)
    assert [Counter(block) for block in blocks] == [Counter(other[i : i + size]) for i in range(0, len(other), size)]
    assert order(lengths, size, steps + 9, seed)[: len(found)] == found
    assert order(lengths, size, steps, seed + 1) != found or count == 1
    # Every epoch is a shuffle of its own that holds every row once; a step may hold the end of one and the start of the next.
    epochs = [other[i : i + count] for i in range(0, len(other) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs if size == 1)
    seen = Counter(found)
    assert max(seen.values()) - min(seen.get(i, 0) for i in range(count)) <= 1
    if len(epochs) > 1:
        assert epochs[0] != epochs[1]


def test_the_trainer_follows_the_order(prepare):
    nb = prepare("qwen", max_steps=3)
    run_cells("order", "order", nb)
    run_cells("order", "order", nb)  # run again, it does the same
    assert len(nb["trainer"].train_dataset) == 3 * 8
    expected = nb["training_order"](nb["row_lengths"], 8, 3, 42)
    batches = list(nb["trainer"].get_train_dataloader())
    rows = [nb["tokenized"][i] for i in expected]
    for number, batch in enumerate(batches):
        for row, ids in zip(rows[4 * number :], batch["input_ids"][:4], strict=False):
            whole = row["prompt_ids"] + row["chosen_ids"]
            assert ids[: len(whole)].tolist() == whole
    assert len(batches) == 6


# The plan.

GB = 10**9
CARDS = {  # as in the table of the title cell: name -> (bytes of memory that torch reports, compute capability)
    "T4, 16 GB": (15.8 * GB, (7, 5)),
    "L4 or RTX 4090, 24 GB": (23.7 * GB, (8, 9)),
    "A100, 40 GB": (42.3 * GB, (8, 0)),
    "A100 or H100, 80 GB": (85.0 * GB, (9, 0)),
    "H200, 141 GB": (150.0 * GB, (9, 0)),
}


def planned(card, config=None, processes=1, sharded=False, **parameters):
    """The plan's cells on a card, for the 7B base or another and pairs that fill max_length."""
    nb = functions(**parameters)
    memory, capability = card
    nb.update(processes=types.SimpleNamespace(num_processes=processes), sharded=sharded)
    nb.update(on_gpu=True, memory=memory, capability=capability, dtype=nb["precision"](capability))
    nb["config"] = config or MistralConfig(vocab_size=32002)
    with torch.device("meta"):
        nb["skeleton"] = AutoModelForCausalLM.from_config(nb["config"])
    nb["parameter_count"] = nb["skeleton"].num_parameters()
    nb["sizes"] = [(2 * nb["max_length"] - 21, nb["max_length"])] * 100
    return run_cells("memory", "plan", nb)


def test_the_table_of_the_title_is_the_plan():
    table = NOTEBOOK.cells[0].source
    rows = re.findall(r"^\| (.*) \| (fp16|bf16) \| (\d+) × (\d+) \| (on|off) \| ([\d.]+) GB \|$", table, re.MULTILINE)
    assert [row[0] for row in rows] == list(CARDS)
    for name, precision, batch, accumulation, checkpointing, gigabytes in rows:
        nb = planned(CARDS[name])
        assert str(nb["dtype"]) == {"fp16": "torch.float16", "bf16": "torch.bfloat16"}[precision]
        assert (nb["batch_size"], nb["accumulation"]) == (int(batch), int(accumulation))
        assert nb["checkpointing"] == (checkpointing == "on") and f"{nb['predicted'] / GB:.1f}" == gigabytes
    readme = (ROOT / "README.md").read_text()
    assert all(
        "| " + " | ".join([*row[:2], f"{row[2]} × {row[3]}", row[4], f"{row[5]} GB |"]) in readme for row in rows
    )


SHAPES_OF_TABLE = {
    "7B": MistralConfig(vocab_size=32002),
    "32B": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    "70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}


def test_the_table_of_more_gpus_is_the_plan():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| (\d+B) \| (\d) × (\d+) GB.* \| (plain|FSDP) \| (\d+) × (\d+) × (\d) \| (on|off) \| ([\d.]+) GB \|$",
        readme,
        re.M,
    )
    assert len(rows) == 6
    cards = {"16": "T4, 16 GB", "24": "L4 or RTX 4090, 24 GB", "80": "A100 or H100, 80 GB"}
    for model, gpus, memory, engine, batch, accumulation, processes, checkpointing, gigabytes in rows:
        card = CARDS[cards[memory]] if memory in cards else (47.7 * GB, (8, 9))
        nb = planned(card, SHAPES_OF_TABLE[model], int(gpus), engine == "FSDP")
        assert (nb["batch_size"], nb["accumulation"], gpus) == (int(batch), int(accumulation), processes)
        assert nb["checkpointing"] == (checkpointing == "on") and f"{nb['predicted'] / GB:.1f}" == gigabytes


def test_fsdp_gets_an_optimizer_for_split_tensors():
    """bitsandbytes' have no rule for them: the first step would fail, on a GPU only."""
    for sharded, name in ((False, "paged_adamw_32bit"), (True, "adamw_torch")):
        nb = functions()
        nb.update(on_gpu=True, sharded=sharded, trained=True)
        run_cell("training-config", nb)
        assert nb["optimizer"] == name


def test_processes_plan_with_the_least_that_one_has(monkeypatch):
    nb = functions()
    fake_cuda(monkeypatch, ["A"], capability=(9, 0), memory=80e9)
    nb["gather_object"] = lambda found: [*found, (16e9, (7, 5))]
    run_cell("machine", nb)
    assert nb["memory"] == 16e9 and nb["dtype"] == torch.float16


def test_what_one_process_cannot_share_none_does(prepare, capsys):
    nb = prepare()
    nb["gather_object"] = lambda found: [*found, math.inf]
    run_cells("run-prompts-once", "share-prompt", nb)
    assert nb["share_prompt"] is False and "Prompts are run twice" in capsys.readouterr().out


def test_fsdp_wants_the_weights_on_each_gpu_first():
    with pytest.raises(AssertionError, match="takes all of the weights at first, 39.5 GB, and has 23.7 GB: choose"):
        planned(CARDS["L4 or RTX 4090, 24 GB"], SHAPES_OF_TABLE["70B"], 8, True)


def test_the_arithmetic_of_the_weights_is_what_they_take():
    """The 7B shape, in 16 bits from its shapes alone, and the 4-bit size of a small one from its real layers."""
    nb = planned(CARDS["A100, 40 GB"], load_in_4bit=False)
    assert nb["weight_size"] == 2 * nb["parameter_count"] == 2 * 7_241_748_480


def test_the_arithmetic_of_4_bit_weights(prepare):
    nb = prepare("chatml")
    saved = nb["weight_size"]
    in_16_bits = nb["model"].get_memory_footprint()
    unquantised = sum(p.numel() * (p.element_size() - 2) for p in nb["model"].parameters() if p.dtype == torch.float32)
    adapters = sum(p.numel() * 2 for p in nb["trainable"])
    assert saved == pytest.approx(in_16_bits - unquantised - adapters, rel=0.05)


@pytest.mark.parametrize("share_prompt", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", ["mistral", "mistral in 4 bits", "llama", "qwen 2", "qwen 3"])
def test_the_arithmetic_of_activations(name, checkpointing, share_prompt, tmp_path, monkeypatch):
    """Against every byte that autograd keeps in a bf16 forward pass with a float32 adapter."""
    width = dict(hidden_size=256, intermediate_size=896, num_hidden_layers=6, num_attention_heads=8, head_dim=32)
    in_4bit = name.endswith("in 4 bits")
    config = type(MODELS[name.removesuffix(" in 4 bits")])(vocab_size=64, num_key_value_heads=2, **width)
    nb = functions()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if in_4bit:
        model.save_pretrained(tmp_path)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=nf4)
        # PEFT asks whether autocast is on for CUDA, as it is in a run on a GPU. It alone is told so, and not autocast.
        on_a_gpu = types.SimpleNamespace(**{**vars(torch), "is_autocast_enabled": lambda: True})
        monkeypatch.setattr("peft.tuners.lora.bnb.torch", on_a_gpu)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    if checkpointing:
        model.gradient_checkpointing_enable()
    if share_prompt:
        nb["run_prompts_once"](model.get_base_model())
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, or its place would be taken by another
        return x

    shapes = [(60, 200, 300), (150, 120, 90), (90, 250, 250)]
    rows = [{name: [i % 60 for i in ids] for name, ids in row.items()} for row in pairs(shapes)]
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(**inputs(rows))
    measured = sum(storage.nbytes() for place, storage in kept.items() if place not in own)
    cells = 2 * 3 * max(p + max(c, r) for p, c, r in shapes)
    tokens = sum(p + c + r - 1 for p, c, r in shapes) if share_prompt else cells
    # The rest of step_memory is for the backward pass: gradients, and with checkpointing one layer computed again.
    needed = functools.partial(nb["step_memory"], config, in_4bit, tokens, cells)
    one_layer = (needed(False) - tokens * 12 * 256) / 7
    expected = needed(checkpointing) - (2 if checkpointing else 1) * one_layer
    if checkpointing:  # of the ends, the gradient is made later
        assert 0.6 < measured / expected <= 1
    else:
        assert 0.9 < measured / expected < 1.15


@pytest.mark.parametrize("pairs_per_step", [1, 2, 3, 6, 7, 16, 30])
@pytest.mark.parametrize("memory", [None, 12 * GB, 24 * GB, 40 * GB, 140 * GB])
def test_the_plan_fits_and_nothing_larger_would(memory, pairs_per_step):
    nb, config = functions(), MistralConfig(vocab_size=32002)
    sizes = [(random.Random(i).randint(100, 2900), 1500) for i in range(200)]
    needed = functools.partial(nb["step_memory"], config, True)
    batch, checkpointing, predicted = nb["plan"](memory, 6 * GB, needed, sizes, pairs_per_step, True)
    assert pairs_per_step % batch == 0
    if memory is None:
        assert batch <= 4 and not checkpointing and predicted is None
        return
    longest = sorted((tokens for tokens, _ in sizes), reverse=True)
    need = lambda b, c: 6 * GB + needed(sum(longest[:b]), 2 * b * 1500, c)  # noqa: E731
    assert predicted == need(batch, checkpointing) <= memory
    larger = [b for b in range(batch + 1, pairs_per_step + 1) if pairs_per_step % b == 0]
    assert all(need(b, checkpointing) > memory for b in larger)
    assert not checkpointing or need(1, False) > memory


def test_a_plan_that_cannot_be_says_what_would_fit():
    with pytest.raises(
        ValueError, match="The longest pair needs .* GB may be used: lower max_length to (\\d+)"
    ) as error:
        planned((7.9 * GB, (7, 5)))
    length = int(re.search(r"max_length to (\d+)", str(error.value))[1])
    assert 100 < length < 1536
    assert planned((7.9 * GB, (7, 5)), max_length=length)["batch_size"] == 1
    with pytest.raises(ValueError, match="choose load_in_4bit, a smaller base_model or a larger GPU"):
        planned((6 * GB, (7, 5)))


@pytest.mark.parametrize("cell", ["longest", "train"])
def test_memory_that_runs_out_is_one_sentence(prepare, monkeypatch, cell):
    nb = prepare()
    run_cells("run-prompts-once", "longest", nb)

    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(nb["trainer"].model.get_base_model(), "forward", run_out)
    nb["predicted"] = 20e9
    with pytest.raises(MemoryError, match="set gpu_memory to 23.5, restart the runtime and run all cells") as e:
        run_cell(cell, nb)
    assert e.value.__suppress_context__  # no trace of the library's own error above it


def test_benchmark_runs(tmp_path):
    """The whole of benchmarks/speed.py on the mix that takes seconds."""
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--mixes", "all short", "--steps", "2"]
    command += ["--variants", "recipe", "stock", "notebook", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "speed-cpu.json").read_text())
    stock, ours = (found["results"]["all short"][name][0] for name in ("stock", "notebook"))
    assert ours["tokens_per_real_token"] < 0.8 < 1 < stock["tokens_per_real_token"]
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    assert (
        "notebook / recipe" in done.stdout
        and "notebook / stock" in done.stdout
        and Path(tmp_path, "speed-cpu.png").stat().st_size > 5000
    )


@pytest.mark.parametrize("name", CARDS)
def test_the_remedy_leads_to_a_smaller_plan(name):
    """Each time memory runs out the advice is followed, until the smallest plan is left."""
    nb, plans = planned(CARDS[name]), []
    while (nb["batch_size"], nb["checkpointing"]) != (1, True):
        plans.append((nb["predicted"], nb["batch_size"], nb["checkpointing"]))
        remedy = functions(**{k: nb[k] for k in ("batch_size", "checkpointing", "predicted")})["remedy"]()
        nb = planned((1e9 * float(re.search(r"gpu_memory to ([\d.]+),", remedy)[1]), CARDS[name][1]))
        assert nb["predicted"] < plans[-1][0]
    remedy = functions(**{k: nb[k] for k in ("batch_size", "checkpointing", "predicted")})["remedy"]()
    assert "set max_length to 1228 and output_dir to a new folder, restart" in remedy


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_arguments_follow_the_plan(prepare, checkpointing):
    nb = prepare()
    nb.update(checkpointing=checkpointing, batch_size=2, accumulation=4)
    run_cell("training-config", nb)
    found = nb["training_args"]
    assert found.gradient_checkpointing == checkpointing and found.gradient_accumulation_steps == 4
    assert found.per_device_train_batch_size == found.per_device_eval_batch_size == 2


def test_the_arithmetic_knows_a_width_without_a_name():
    bloom = BloomConfig(hidden_size=64, n_layer=2, n_head=4)
    alike = MistralConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    step_memory = functions()["step_memory"]
    assert step_memory(bloom, True, 100, 120, False) == step_memory(alike, True, 100, 120, False)
