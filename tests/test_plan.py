"""The order of training and the split of its steps: the plan fits, and is what is trained."""

import shutil
import types
from functools import partial

import numpy as np
import pytest
import torch
from architectures import DENSE, PLANNED, build, skeleton_of
from batches import inputs
from peft import LoraConfig, get_peft_model
from trainers import CURVES, build_trainer
from transformers import MistralConfig

from rehearsal.notebook import alone, run_cells

SKELETON, MEMORY = alone("skeleton"), alone("memory")
why_prompts_cannot_be_shared = SKELETON["why_prompts_cannot_be_shared"]
step_memory = MEMORY["step_memory"]


# The order of training.

SHARED_TOKENS = np.random.default_rng(0).integers(5, 500, 50)


def draw(tokens=SHARED_TOKENS, steps=20, pairs_per_step=7, seed=0):
    return alone("training-order")["training_order"](range(50), tokens, steps, pairs_per_step, seed)


def in_steps(order, size=7):
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_inside_a_step_the_longest_pair_comes_first():
    order = draw()
    assert len(order) == 140
    for step in in_steps(order):
        assert [*SHARED_TOKENS[step]] == sorted(SHARED_TOKENS[step], reverse=True)


def test_lengths_say_how_a_step_goes_and_not_what_is_in_it():
    others = draw(tokens=SHARED_TOKENS[::-1])
    assert others != draw()
    assert [*map(sorted, in_steps(others))] == [*map(sorted, in_steps(draw()))]


def test_a_longer_training_begins_as_a_shorter_one():
    assert draw(steps=1) == draw()[:7]


def test_the_order_is_the_seeds():
    assert draw(seed=1) != draw() == draw(seed=0)


def test_each_epoch_holds_every_pair_once_in_an_order_of_its_own():
    order = draw(pairs_per_step=1, steps=100)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]


# The plan, beside the batches that are trained.


def leave_room(patch, nb, room_bytes):
    """Leaves as much memory as the plan on a CPU needs to have this room for batches."""
    free = (nb["fixed_bytes"] + 1.001 * room_bytes) / nb["SHARE_OF_CPU"]
    patch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=free))


KINDS = [(True, True), (True, False), (False, True), (False, False)]
NAMES = ["shared", "shared, little memory", "plain", "plain, little memory"]


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def planned(request, models, pairs_file, tmp_path_factory):
    """The namespace of a run that has built its trainer, in much memory or in little."""
    share_prompt, much_memory = request.param
    parameters = dict(
        base_model=models["qwen"],
        dataset_id=pairs_file,
        output_dir=str(tmp_path_factory.mktemp("planned") / "run"),
        share_prompt=share_prompt,
        eval_pairs=6,
    )
    with pytest.MonkeyPatch.context() as patch:
        if not much_memory:
            nb = run_cells("install", "room", **parameters)
            tokens = 2 * nb["longest_tokens"]
            needed = step_memory(nb["widths"], tokens, tokens, 2, number_bytes=4)
            leave_room(patch, nb, needed.max())
        nb = build_trainer(**parameters)
    return nb | dict(much_memory=much_memory)


def batches_of(nb):
    """The rows of each batch, in the order of training."""
    size = nb["split"].pairs_at_once
    return [[nb["rows"][place] for place in batch] for batch in in_steps(nb["order"], size)]


def test_the_trainers_batches_are_the_plans(planned):
    trainer = planned["trainer"]
    found = [*trainer.get_train_dataloader()]
    assert len(found) == len(planned["split"].linear_tokens)
    for batch, rows in zip(found, batches_of(planned), strict=True):
        assert torch.equal(batch["input_ids"], trainer.data_collator(rows)["input_ids"])


def test_a_steps_batches_hold_its_pairs(planned):
    args, size = planned["trainer"].args, planned["split"].pairs_at_once
    assert args.per_device_train_batch_size == size
    assert args.gradient_accumulation_steps * size == 8


def test_all_batches_of_an_evaluation_weigh_the_same(planned):
    size = planned["trainer"].args.per_device_eval_batch_size
    assert size == np.gcd(planned["split"].pairs_at_once, len(planned["held_out"]))


def test_layers_are_checkpointed_only_in_little_memory(planned):
    assert planned["trainer"].args.activation_checkpointing == (not planned["much_memory"])
    assert planned["split"].checkpointed_layers.any() == (not planned["much_memory"])


def test_the_plan_counts_the_tokens_that_are_computed(planned):
    split = planned["split"]
    dataloader = planned["trainer"].get_train_dataloader()
    for place, (batch, rows) in enumerate(zip(dataloader, batches_of(planned), strict=True)):
        tokens = batch["input_ids"].numel()
        if planned["share_prompt"]:
            tokens = -len(rows)
            for row in rows:
                tokens += sum(map(len, (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])))
        assert split.linear_tokens[place] == tokens
        attention = split.attention_tokens[place]
        assert batch["attention_mask"].sum() <= attention <= batch["input_ids"].numel()


def test_the_batch_that_needs_most_is_tried_first_and_leaves_no_gradient(planned):
    nb, computed = planned, []
    trainer, split = nb["trainer"], nb["split"]
    run_cells("run-prompts-once", "longest", nb)
    embeddings = trainer.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    nb["try_largest_batch"](trainer, nb["rows"], nb["order"], split)
    hook.remove()
    largest = split.linear_tokens[split.step_bytes.argmax()]
    assert computed == 2 * [largest]  # of the reference and of the policy
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


# However many layers are checkpointed.


@pytest.fixture(scope="module")
def trainings(models, pairs_file, tmp_path_factory):
    """{name: training} in much memory, in less, and one that goes on in still less after half of
    its steps. A training: namespace, and what it asked layers for, with the answers.
    """
    folder, done = tmp_path_factory.mktemp("trainings"), {}
    sources = dict(base_model=models["qwen"], dataset_id=pairs_file, load_in_4bit=False)

    def run(name, output):
        nb, asked = build_trainer(**sources, output_dir=str(folder / output)), []
        plain = nb["layers_of_batch"]

        def watched(*size):
            layers = int(plain(*size))
            asked.append((*size, layers))
            return layers

        nb["layers_of_batch"] = watched
        run_cells("run-prompts-once", "train", nb)
        done[name] = nb, asked

    with pytest.MonkeyPatch.context() as patch:
        run("no layers", "much")
        nb, _ = done["no layers"]
        sizes = nb["split"].linear_tokens, nb["split"].attention_tokens
        with_one_layer = step_memory(nb["widths"], *sizes, 1, number_bytes=4)
        leave_room(patch, nb, np.median(with_one_layer))
        run("some layers", "less")
        shutil.rmtree(folder / "less" / "checkpoint-4")
        with_all_layers = step_memory(nb["widths"], *sizes, 2, number_bytes=4)
        leave_room(patch, nb, with_all_layers.max())
        run("goes on", "less")
    return done


CHECKPOINTED = {"no layers": {0}, "some layers": {1, 2}, "goes on": {2}}


@pytest.mark.parametrize("name, layers", CHECKPOINTED.items())
def test_each_batch_has_the_layers_checkpointed_that_were_planned(trainings, name, layers):
    nb, asked = trainings[name]
    _, *batches = asked  # the largest was tried before
    split = nb["split"]
    assert len(batches) == (2 if name == "goes on" else 8)
    planned = split.linear_tokens, split.attention_tokens, split.checkpointed_layers
    planned = [*zip(*planned, strict=True)][-len(batches) :]
    for batch, plan in zip(batches, planned, strict=True):
        assert batch[0] == plan[0] and batch[1] <= plan[1]
        assert batch[2] in layers and batch[2] <= plan[2]


@pytest.mark.parametrize("name", ["some layers", "goes on"])
def test_training_is_the_same_however_many_layers_are_checkpointed(trainings, name):
    """To the last bit, losses and evaluations and the adapter; also where a machine with less
    memory goes on.
    """

    def history_and_adapter(name):
        trainer = trainings[name][0]["trainer"]
        history = []
        for entry in trainer.state.log_history:
            history.append([entry.get(metric) for metric in CURVES])
        return history, [x for x in trainer.model.parameters() if x.requires_grad]

    history, adapter = history_and_adapter(name)
    expected_history, expected_adapter = history_and_adapter("no layers")
    assert history == expected_history
    assert all(map(torch.equal, adapter, expected_adapter))


# The choice of a split.

SIZES = [1, 2, 4, 8, 16]
ROOMS = np.array([3, 4, 5, 6, 8, 10, 14, 16, 20, 30, 60, 200]) * 1e9
LENGTHS = np.random.default_rng(0).integers(50, 1500, 320)
ALL_LAYERS = np.arange(33)[:, None]


@pytest.fixture(scope="module")
def widths():
    """Of the 7B's layers."""
    return SKELETON["layer_widths"](skeleton_of(MistralConfig(vocab_size=32002)), LENGTHS.max())


@pytest.fixture(
    scope="module",
    params=[(True, False), (True, True), (False, False)],
    ids=["shared", "shared, all layers alike", "plain"],
)
def plans(request, widths):
    """(how, {room: its splits}) of 320 pairs."""
    share, alike = request.param
    how = dict(share=share, all_layers_alike=alike)
    arguments = widths, LENGTHS * 3 // 2, LENGTHS, SIZES
    return how, {room: MEMORY["plan_splits"](*arguments, room, **how) for room in ROOMS}


def test_attention_is_planned_with_its_padding(plans):
    """Of shared prompts each half of a batch has its own."""
    how, of_rooms = plans
    for size, split in zip(SIZES, of_rooms[ROOMS[0]], strict=True):
        half = size // 2 if how["share"] and size > 1 else size
        padded = half * LENGTHS.reshape(-1, half).max(axis=1)
        assert [*split.attention_tokens] == [*2 * padded.reshape(-1, size // half).sum(axis=1)]


def fewest_layers(widths, split, room, how):
    """The fewest layers of each batch that have to be checkpointed to fit, by trying all numbers;
    None if a batch does not fit.
    """
    sizes = split.linear_tokens, split.attention_tokens
    fits = step_memory(widths, *sizes, ALL_LAYERS) <= room
    if not fits[32].all():
        return None
    fewest = fits.argmax(axis=0)
    together = how["all_layers_alike"] or not how["share"]
    return np.full_like(fewest, 32) if together and fewest.any() else fewest


def test_as_few_layers_are_checkpointed_as_fit(plans, widths):
    how, of_rooms = plans
    for room, splits in of_rooms.items():
        for split in splits:
            fewest = fewest_layers(widths, split, room, how)
            if fewest is not None:
                assert [*split.checkpointed_layers] == [*fewest]


def test_the_split_with_the_least_work_of_those_that_fit_is_chosen(plans, widths):
    """If none fits, one pair, so that what is needed is the least."""
    how, of_rooms = plans
    for room, splits in of_rooms.items():
        works = {}
        for size, split in zip(SIZES, splits, strict=True):
            fewest = fewest_layers(widths, split, room, how)
            if fewest is not None:
                passes = 3 + fewest / 32
                works[size] = ((split.linear_tokens + 130) * passes).sum()
                assert split.work == pytest.approx(works[size])
        best = min(works, key=works.get, default=1)
        assert MEMORY["best_split"](splits, room).pairs_at_once == best


def test_other_rooms_take_other_splits(widths):
    chosen = set()
    for room in ROOMS:
        splits = MEMORY["plan_splits"](widths, LENGTHS * 3 // 2, LENGTHS, SIZES, room)
        chosen.add(MEMORY["best_split"](splits, room).pairs_at_once)
    assert len(chosen) > 2


def test_a_step_that_does_not_come_out_even_among_processes_is_refused():
    of_a_process = alone("memory-budget")["share_of_a_process"]
    assert of_a_process(16, 4) == 4
    with pytest.raises(ValueError, match="divisible by 3"):
        of_a_process(8, 3)


# The arithmetic of memory. Of a 4-bit base's step: see test_simulate.py.


@pytest.fixture
def unlike_layers():
    width = partial(SKELETON["LayerWidths"], attention=0, hidden=1)
    return [width(linear=10), width(linear=100)]


def test_what_checkpointing_spares_is_what_the_first_layers_take_and_no_average(unlike_layers):
    needed = partial(step_memory, unlike_layers, 1, 0, number_bytes=1)
    head, backward = 6, 100
    assert [needed(n) - head - backward for n in range(3)] == [110, 101, 2]


def test_the_first_layers_are_checkpointed_first(unlike_layers):
    fewest = partial(MEMORY["layers_to_checkpoint"], unlike_layers, 1, 0, number_bytes=1)
    rooms = {216: 0, 215: 1, 207: 1, 206: 2, 5: 2}
    assert {room: fewest(room_bytes=room) for room in rooms} == rooms


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16-bit", "4-bit"])
def test_the_arithmetic_of_the_weights(prepare, load_in_4bit):
    nb = prepare("chatml", load_in_4bit=load_in_4bit)
    adapter = nb["adapter_size"]
    workspace = 131072 * nb["config"].vocab_size
    weights = nb["fixed_bytes"] - 16 * adapter - workspace
    measured = nb["model"].get_memory_footprint() - 4 * adapter
    assert weights == pytest.approx(measured, rel=0.05 if load_in_4bit else 1e-3)


def test_the_plan_knows_of_windows_that_are_shorter_than_the_pairs(prepare):
    """Their attention takes a mask, for which keys are repeated."""
    nb = prepare()
    nb["skeleton"] = skeleton_of(DENSE["mistral, window of 7"])
    run_cells("room", "room", nb)
    found = [layer.attention for layer in nb["widths"]]
    nb["skeleton"] = skeleton_of(DENSE["mistral"])
    run_cells("room", "room", nb)
    assert found > [layer.attention for layer in nb["widths"]]


def bytes_kept(forward, model):
    """Bytes of all that autograd keeps of a forward pass, but for the model's own."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, or its place would be taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    for tensor in [*model.parameters(), *model.buffers()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


CHECKPOINTED_TOO = [("qwen 3", 2), ("qwen 3", 6)]


@pytest.mark.parametrize(
    "name, checkpointed", [*[(name, 0) for name in PLANNED], *CHECKPOINTED_TOO]
)
def test_the_arithmetic_of_activations(name, checkpointed):
    """Of a 16-bit base, against all that autograd keeps in a forward pass."""
    (config, least, most), asked = PLANNED[name], []
    shapes = [(60, 200, 300), (150, 120, 90), (90, 250, 250)]
    skeleton = skeleton_of(config)
    widths = SKELETON["layer_widths"](skeleton, longest_sequence=360, in_4bit=False)
    base = build(config, torch.bfloat16)
    size = dict(linear_tokens=6 * 360, attention_tokens=6 * 360)

    def layers_to_checkpoint(*sizes):
        asked.append(sizes)
        return checkpointed

    if not why_prompts_cannot_be_shared(skeleton):
        alone("run-prompts-once")["run_prompts_once"](base, layers_to_checkpoint)
    targets = ["in_proj"] if name == "mamba 2" else "all-linear"
    lora = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    with torch.autocast("cpu", torch.bfloat16):
        measured = bytes_kept(lambda: model(**inputs(shapes)), model)
    if asked:
        size = dict(zip(("linear_tokens", "attention_tokens"), asked[0], strict=True))
    largest = max(step_memory([layer], **size) for layer in widths)
    head = 6 * size["linear_tokens"] * widths[0].hidden * 2
    of_backward = (largest - head) / 2 + 2 * size["linear_tokens"] * 256
    needed = step_memory(widths, **size, checkpointed=checkpointed) - of_backward
    assert (0.7 if checkpointed == 6 else least) < measured / needed < most
