"""Cells in any order, twice, from the middle, from elsewhere: what was asked takes effect, or is refused in a sentence.

What run.json, the card and the words name is what ran.
"""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from trainers import SMALL, build_trainer, read_record, train
from traitlets.config import Config
from transformers import TrainerCallback

from benchmarks import rules
from rehearsal.notebook import CELLS, run_cell, run_cells


@pytest.fixture(scope="module")
def small(models, pairs_file):
    """Parameters of a small run in float32."""
    return dict(
        SMALL, base_model=models["qwen"], dataset_id=pairs_file, load_in_4bit=False, max_steps=2
    )


@pytest.fixture
def set_up(small, tmp_path):
    """The namespace of a small run before its first stage."""
    return run_cells("install", "check-rows", **small, output_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The namespace of a small run that has gone through all its cells."""
    folder = str(tmp_path_factory.mktemp("finished") / "run")
    return run_cells("install", list(CELLS)[-1], **small, output_dir=folder)


@pytest.fixture
def trained(small, tmp_path):
    """The namespace of a small run that is trained."""
    return train(build_trainer(**small, output_dir=str(tmp_path / "run")))


STAGES = ["rows", "order", "split-of-a-step", "make-trainer", "train", "save", "merge"]
STAGES.append("write-card")
CHANGES = dict(beta=0.5, learning_rate=1e-4, max_steps=4, seed=7, max_length=256)
CHANGES |= dict(loss_type="ipo", lora_rank=8, share_prompt=False, base_model="another/model")


@pytest.mark.parametrize("cell", STAGES)
def test_a_cell_refuses_a_parameter_that_was_changed_since_the_set_up(finished, cell):
    """Also where its work is done already: raised max_steps and a run of the training cell alone."""
    finished["max_steps"] = 4
    record = read_record(finished["folder"])
    try:
        with pytest.raises(ValueError, match="max_steps is 4 now and was 2 .* run all cells again"):
            run_cell(cell, finished)
    finally:
        finished["max_steps"] = 2
    assert read_record(finished["folder"]) == record


@pytest.mark.parametrize("name", CHANGES)
def test_any_parameter_that_changes_is_refused_by_its_name(finished, name):
    before = finished[name]
    finished[name] = CHANGES[name]
    try:
        with pytest.raises(ValueError, match=f"{name} is .* now and was"):
            run_cell("make-trainer", finished)
    finally:
        finished[name] = before


def test_a_parameter_that_is_only_written_otherwise_is_the_same(finished):
    finished["learning_rate"] = "1e-3"
    try:
        run_cell("make-trainer", finished)
    finally:
        finished["learning_rate"] = 1e-3


def test_a_changed_parameter_takes_effect_when_all_cells_are_run_again(set_up):
    """Nothing was trained with the old one."""
    parameters = {name: set_up[name] for name in set_up["settings"]}
    run_cells("install", "training-args", set_up, **{**parameters, "beta": 0.5, "max_steps": 3})
    assert set_up["training_args"].beta == 0.5
    assert len(set_up["order"]) == 3 * 8
    assert read_record(set_up["folder"])["parameters"]["beta"] == 0.5


@pytest.mark.parametrize("cell", ["split-of-a-step", "make-trainer", "train", "merge"])
def test_a_cell_whose_stage_before_has_not_run_says_so(set_up, cell):
    with pytest.raises(ValueError, match="have to run first: run all cells"):
        run_cell(cell, set_up)


def test_a_training_with_more_steps_goes_on_when_all_cells_are_run_again(trained, small):
    nb = train(build_trainer(**{**small, "max_steps": 3}, output_dir=str(trained["folder"])))
    record = read_record(nb["folder"])
    assert record["trained"] == record["parameters"]["max_steps"] == 3
    assert {entry["step"] for entry in record["history"]} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="max_steps = 3"):  # and cannot be taken back
        build_trainer(**{**small, "max_steps": 2}, output_dir=str(nb["folder"]))


def test_an_unfinished_training_is_not_saved_and_an_older_one_not_merged(trained, small):
    """Trained to step 2, begun to step 4, interrupted: nothing says that there were 4 steps."""
    old = read_record(trained["folder"])
    nb = build_trainer(**{**small, "max_steps": 4}, output_dir=str(trained["folder"]))
    nb["trainer"].add_callback(Fail(at_step=3, error=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(nb)
    for cell in ("save", "merge"):
        with pytest.raises(ValueError, match="training is not finished|have to run first"):
            run_cell(cell, nb)
    record = read_record(nb["folder"])
    assert record["trained"] == 2 and record["history"] == old["history"]
    assert not (nb["folder"] / "merged").exists()


class Fail(TrainerCallback):
    """Raises an error at a step, once."""

    def __init__(self, at_step, error):
        self.at_step, self.error, self.marks = at_step, error, []

    def on_step_end(self, args, state, control, **options):
        if state.global_step == self.at_step:
            self.at_step = None
            mark = Mock()  # lives as long as this frame does
            self.marks.append(weakref.ref(mark))
            raise self.error


def test_cells_that_run_twice_do_nothing_twice(trained):
    """A training that is done is not done again, and its trainer can be built again."""
    record = read_record(trained["folder"])
    adapter = (trained["adapter_dir"] / "adapter_model.safetensors").stat().st_mtime_ns
    run_cells("load", "save", trained)
    for cell in ("train", "save", "train", "save"):
        run_cell(cell, trained)
    assert read_record(trained["folder"]) == record
    assert (trained["adapter_dir"] / "adapter_model.safetensors").stat().st_mtime_ns == adapter


def test_building_cells_that_run_twice_build_the_same(small, tmp_path, trained):
    nb = build_trainer(**small, output_dir=str(tmp_path / "twice"))
    for cell in (
        "order",
        "split-of-a-step",
        "load",
        "training-args",
        "make-trainer",
        "make-trainer",
    ):
        run_cell(cell, nb)
    for cell in ("by-hand", "by-hand", "run-prompts-once", "share-prompts", "share-prompts"):
        run_cell(cell, nb)
    run_cells("longest", "save", nb)
    names = ("history", "logps", "trained")
    for name in names:
        assert without_times(nb["run"][name]) == without_times(trained["run"][name])


def without_times(content):
    """What is the same in two trainings of the same parameters."""
    if not isinstance(content, list):
        return content
    kept = []
    for entry in content:
        if isinstance(entry, dict):
            entry = {key: value for key, value in entry.items() if "per_second" not in key}
            entry = {key: value for key, value in entry.items() if "runtime" not in key}
        kept.append(entry)
    return kept


def test_questions_that_change_after_the_training_are_not_passed_off_as_asked(finished, capsys):
    """Neither the new question as asked nor the old answers as its own."""
    questions = finished["questions"]
    first, answer = questions[0], finished["before"][questions[0]]
    finished["questions"] = ["Who are you?", *questions[1:]]
    try:
        for cell in ("what-it-came-to", "after"):
            run_cell(cell, finished)
    finally:
        finished["questions"] = questions
    printed = capsys.readouterr().out
    _, _, shown = printed.partition("Who are you?")
    shown, _, _ = shown.partition(questions[1])
    assert shown.count("was not asked") == 2
    assert answer not in printed and first not in printed


def test_the_record_names_what_ran(finished):
    record = read_record(finished["folder"])
    assert record["trained"] == record["merged"] == record["parameters"]["max_steps"] == 2
    assert {entry["step"] for entry in record["history"]} == {0, 1, 2}
    card = (finished["merged_dir"] / "README.md").read_text()
    for name in ("max_steps", "beta", "learning_rate", "lora_targets", "pairs_per_step"):
        assert f"| {name} " in card and str(record["parameters"][name]) in card
    assert (
        json.loads((finished["merged_dir"] / "run.json").read_text())["words"] == finished["words"]
    )


def test_the_rules_of_a_finished_run_are_tried_on_its_own_held_out_pairs(finished, tmp_path):
    run, notebook = rules.read_run(finished["folder"])
    assert notebook["held_out_ids"] == finished["held_out_ids"]
    for name in ("trained", "merged"):
        margin = finished["scores"]["reward margin"][name]
        assert rules.margins(run, name).mean() == pytest.approx(margin)
    table = rules.table_of_rules(run, notebook)
    assert set(table.index) == {*finished["audit"].index, "none of them"}
    rules.draw({"seed 42": (run, notebook)}, tmp_path / "rules.png")
    assert (tmp_path / "rules.png").stat().st_size > 10_000


# Folders: relative, at home, in use.


def test_a_relative_folder_is_found_after_the_working_directory_changed(
    small, tmp_path, monkeypatch
):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.symlink(small["base_model"], "base")
    nb = build_trainer(**{**small, "base_model": "base"}, output_dir="run")
    monkeypatch.chdir(tmp_path / "there")
    train(nb)
    run_cells("free", "merge", nb)
    assert not list((tmp_path / "there").iterdir())
    made = {path.name for path in (tmp_path / "here" / "run").iterdir()}
    assert {"run.json", "adapter", "merged", "checkpoint-2"} <= made


def test_a_tilde_is_the_home_folder(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_bytes(Path(small["dataset_id"]).read_bytes())
    os.symlink(small["base_model"], tmp_path / "base")
    sources = dict(base_model="~/base", dataset_id="~/pairs.jsonl", output_dir="~/runs/dpo")
    nb = run_cells("install", "base", **{**small, **sources})
    assert nb["folder"] == tmp_path / "runs" / "dpo" and not (tmp_path / "~").exists()
    assert len(nb["raw"]) == 60


HOLD = """
import filelock, sys
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_which_another_run_is_going_on_is_refused(small, tmp_path):
    """And is free as soon as that run has ended, however it did."""
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(folder / "run.lock")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="Another notebook is running in .*another output_dir"):
            run_cells("install", "state", **small, output_dir=str(folder))
        assert not (folder / "run.json").exists()
        other.kill()
    run_cells("install", "state", **small, output_dir=str(folder))


# In a real IPython shell, which keeps the frames of what failed.


@pytest.fixture
def shell():
    """An IPython shell as a notebook has it."""
    InteractiveShell.clear_instance()
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


def press(shell, cell):
    """Runs a cell as a click on it does. Returns the error that it ended in, if any."""
    result = shell.run_cell(CELLS[cell])
    return result.error_in_exec


def press_all(shell, first, last, **parameters):
    names = list(CELLS)
    for name in names[names.index(first) : names.index(last) + 1]:
        if name == "before":
            shell.user_ns["before"] = {}
            continue
        error = press(shell, name)
        assert error is None, error
        if name == "parameters":
            shell.user_ns.update(parameters)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_failed_training_cell_runs_again_and_its_frames_are_let_go(
    shell, small, tmp_path, trained, error
):
    press_all(shell, "install", "longest", **small, output_dir=str(tmp_path / "failed"))
    nb = shell.user_ns
    fail = Fail(at_step=1, error=error)
    nb["trainer"].add_callback(fail)
    raised = press(shell, "train")
    assert isinstance(raised, MemoryError | error)
    del raised
    assert fail.marks[0]() is not None  # IPython does keep them
    alive = []
    nb["trainer"].add_callback(AtBegin(lambda: alive.append(fail.marks[0]())))
    assert press(shell, "train") is None and press(shell, "save") is None
    assert alive == [None]
    record = read_record(Path(nb["folder"]))
    assert record["logps"] == trained["run"]["logps"]
    losses = [entry.get("loss") for entry in record["history"]]
    assert losses == [entry.get("loss") for entry in trained["run"]["history"]]


class AtBegin(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_train_begin(self, args, state, control, **options):
        self.action()


def test_a_model_whose_training_failed_is_gone_before_another_is_loaded(shell, small, tmp_path):
    """Else two of them would have to fit into a GPU."""
    press_all(shell, "install", "longest", **small, output_dir=str(tmp_path / "failed"))
    nb = shell.user_ns
    nb["trainer"].add_callback(Fail(at_step=1, error=torch.OutOfMemoryError))
    assert isinstance(press(shell, "train"), MemoryError)
    held = [nb["trainer"], *nb["trainer"].model.modules(), *nb["model"].parameters()]
    held = [weakref.ref(thing) for thing in held]
    alive = []
    load_4bit = nb["load_4bit"]

    def load(*arguments, **options):
        alive.extend(thing for thing in held if thing() is not None)
        return load_4bit(*arguments, **options)

    nb["load_4bit"] = load
    assert press(shell, "load") is None
    assert not alive
