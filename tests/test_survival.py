"""A run survives what a Colab runtime does to it: killed at any second, out of disk, cut off from the Hub and from W&B.

`pytest tests/test_survival.py --kills 24 -s` tries more kill points than CI does, and prints them in a table.
"""

import hashlib
import json
import random
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from unittest.mock import Mock, patch

import forked
import httpx2
import pytest
import torch
import wandb
from forked import finish, read
from trainers import SMALL, build_trainer, read_record, train
from transformers import TrainerCallback

from rehearsal.hub import Failure, Handler, Hub
from rehearsal.notebook import CELLS, run_cell, run_cells

STEPS = 8  # a checkpoint after each
TOKEN, KEY = (
    "hf_CanaryThatMustNotSing",
    "c0ffee" + "7" * 34,
)  # of the Hub and of W&B; neither may show anywhere
# Where a run stands, by the last of these that its output holds.
STAGES = {
    "training": " from the base model",
    "merge": "Trained to step",
    "push": "reward accuracy",
}


@pytest.fixture(scope="module")
def hub(models, pairs_file, tmp_path_factory):
    """A local Hub. hub.start(folder, **changes) runs the notebook there, its output is added to log.txt."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("hub", "pairs", "cache")}
    shutil.copy(pairs_file, places["pairs"] / "train.jsonl")
    with Hub(places["hub"], token=TOKEN) as hub:
        hub.add("some/base", models["qwen"])
        hub.add("some/pairs", places["pairs"], repo_type="dataset")
        hub.cache, hub.pairs = places["cache"], places["pairs"]
        settings = hub.environment(places["cache"]) | {"TQDM_DISABLE": "1"}
        forked.serve(settings)

        def start(folder, environment=None, **changes):
            sources = dict(base_model="some/base", dataset_id="some/pairs", new_model=folder.name)
            parameters = {**SMALL, **sources, "max_steps": STEPS, **changes}
            return forked.start(folder, parameters, settings | (environment or {}))

        hub.start = start
        yield hub


def result(*folders):
    """What the run in the first folder came to: metrics, scores, answers, and its weights in all of them."""
    run, metrics = json.loads(read(folders[0] / "run.json")), {}
    for entry in run["history"]:
        for name in {
            "loss",
            "grad_norm",
            "learning_rate",
            "eval_loss",
            "eval_rewards/margins",
            "rewards/margins",
        } & entry.keys():
            metrics[entry["step"], name] = entry[name]
    weights = [path for folder in folders for path in sorted(folder.glob("**/*.safetensors"))]
    weights = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in weights
        if "checkpoint" not in str(path)
    ]
    return metrics, weights, *(run.get(name) for name in ("logps", "before", "after"))


def pushed(hub, name):
    return hub.folder(f"{hub.user}/{name}")


@pytest.fixture(scope="module")
def uncut(hub, tmp_path_factory):
    """A run that nothing disturbs: (its result, the seconds it took, its folder)."""
    folder, begun = tmp_path_factory.mktemp("runs") / "uncut", time.time()
    finish(hub.start(folder, {"WANDB_API_KEY": KEY}), folder)
    found = result(folder / "dpo_run", pushed(hub, "uncut"))
    assert len(found[1]) == 4
    return found, time.time() - begun, folder


def kill(hub, folder, stage, delay, **changes):
    """Starts a run and kills it `delay` seconds into a stage. Says whether it was still running."""
    process = hub.start(folder, **changes)
    checkpoint = folder / "dpo_run" / f"checkpoint-{random.Random(delay).randint(2, STEPS)}"
    while not (
        checkpoint.exists() if stage == "checkpoint" else STAGES[stage] in read(folder / "log.txt")
    ):
        if not process.is_alive():
            return False
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_at_any_time_it_ends_as_if_it_had_not_been(hub, uncut, tmp_path, pytestconfig):
    """In training, while a checkpoint is written, in the merge or the push; run again, it equals the uncut run in all."""
    seconds = {
        "training": uncut[1] / 3,
        "checkpoint": 0.05,
        "merge": uncut[1] / 5,
        "push": uncut[1] / 20,
    }
    rng = random.Random(0)
    points = [(stage, rng.random()) for stage in seconds]
    points += [
        (rng.choice(list(seconds)), rng.random())
        for _ in range(pytestconfig.getoption("kills") - len(points))
    ]

    def survive(number):
        stage, where = points[number]
        folder = tmp_path / f"cut-{number}"
        while not kill(
            hub, folder, stage, where * seconds[stage]
        ):  # it ended before it could be killed
            shutil.rmtree(folder)
            hub.repos.pop(("model", f"{hub.user}/{folder.name}"), None)
            where /= 2
        found = sorted(path.name for path in folder.glob("dpo_run/checkpoint-*"))
        log = finish(hub.start(folder), folder)
        assert result(folder / "dpo_run", pushed(hub, folder.name)) == uncut[0]
        assert len(list(folder.glob("dpo_run/checkpoint-*"))) == 2
        passed = "passed over" if "passed over" in log else ""
        return f"{stage:<10} +{where * seconds[stage]:6.3f} s  found {', '.join(found) or 'nothing'} {passed}"

    with ThreadPoolExecutor(2) as pool:
        print("\n" + "\n".join(pool.map(survive, range(len(points)))))


def test_a_run_goes_on_with_the_commits_that_it_began_with(
    hub, uncut, models, tmp_path, tmp_path_factory
):
    """Weights, config, tokenizer and pairs: of all of them the newest commits are others by then."""
    sources = dict(base_model="moved/base", dataset_id="moved/pairs")
    pairs, others = tmp_path_factory.mktemp("pairs"), tmp_path_factory.mktemp("others")
    (pairs / "train.jsonl").write_bytes((hub.pairs / "train.jsonl").read_bytes())
    (others / "train.jsonl").write_text(json.dumps({"chosen": "Yes", "rejected": "No"}))
    hub.add("moved/base", models["qwen"])
    hub.add("moved/pairs", pairs, repo_type="dataset")
    assert kill(hub, tmp_path / "cut", "checkpoint", 0.01, **sources)
    for name in ("base", "pairs"):
        kind = "model" if name == "base" else "dataset"
        hub.add(f"moved/{name}", models["llama3"] if name == "base" else others, repo_type=kind)

    finish(hub.start(tmp_path / "cut", **sources), tmp_path / "cut")
    run = tmp_path / "cut" / "dpo_run"
    assert result(run, pushed(hub, "cut")) == uncut[0]
    for path in (uncut[2] / "dpo_run" / "merged").iterdir():
        if path.name not in ("README.md", "run.json", "whole.json"):
            assert (run / "merged" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_finished_stage_is_not_done_again(hub, uncut, tmp_path):
    """Not the training, not the merge, for which the base is not even fetched; but more steps may be added."""
    folder, run = tmp_path / "stages", tmp_path / "stages" / "dpo_run"
    shutil.copytree(uncut[2] / "dpo_run", run)
    (run / "merged" / "whole.json").unlink()  # as after a kill in the merge
    trained = {
        path: path.stat().st_mtime_ns
        for path in (*run.glob("checkpoint-*/*"), *run.glob("adapter/*"))
    }
    finish(hub.start(folder), folder)
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    assert (
        result(run, pushed(hub, "stages")) == uncut[0] and (run / "merged" / "whole.json").exists()
    )

    merged, uploads = (
        run / "merged" / "model.safetensors",
        [request for request in hub.requests if "PUT" in request],
    )
    written = merged.stat().st_mtime_ns
    (base,) = hub.cache.glob("hub/models--some--base/snapshots/*/model.safetensors")
    base.unlink()
    finish(hub.start(folder), folder)
    assert merged.stat().st_mtime_ns == written and not base.exists()
    assert uploads == [request for request in hub.requests if "PUT" in request]

    assert f"Going on from checkpoint-{STEPS}" in finish(
        hub.start(folder, max_steps=STEPS + 2), folder
    )
    longer, losses = (
        result(run)[0],
        {key: value for key, value in uncut[0][0].items() if key[1] == "loss"},
    )
    assert losses.items() <= longer.items() and (STEPS + 2, "loss") in longer
    assert merged.stat().st_mtime_ns > written


# The training cell, in one session.


@pytest.fixture(scope="module")
def ready(models, pairs_file):
    """Runs the notebook's cells up to the training, for a small run in float32."""
    sources = dict(base_model=models["qwen"], dataset_id=pairs_file)
    return partial(build_trainer, **sources, load_in_4bit=False)


class Faults(TrainerCallback):
    """Counts the steps of a trainer, and meets faults: {steps taken: what is called then}."""

    def __init__(self, nb, faults=None):
        self.faults, self.steps = faults or {}, []
        nb["trainer"].add_callback(self)

    def on_step_begin(self, args, state, control, **options):
        if state.global_step in self.faults:
            self.faults.pop(state.global_step)()

    def on_step_end(self, args, state, control, **options):
        self.steps.append(state.global_step)


@pytest.fixture(scope="module")
def undisturbed(ready, tmp_path_factory):
    """The folder of a training of four steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(ready(output_dir=str(folder)))
    return folder


@pytest.mark.parametrize(
    "stop, says", [(KeyboardInterrupt, None), (torch.OutOfMemoryError, r"gpu_memory to 10\.0")]
)
def test_a_training_that_was_stopped_goes_on_when_its_cell_is_run_again(
    ready, undisturbed, tmp_path, stop, says
):
    """From its newest whole checkpoint, also from that of a GPU that trained in fp16."""
    nb, folder = ready(output_dir=str(tmp_path / "run")), tmp_path / "run"
    nb["planning_advice"] = nb["planning_advice"].replace("0.0", "10.0")
    faults = Faults(nb, {3: Mock(side_effect=stop)})
    with pytest.raises((KeyboardInterrupt, MemoryError), match=says):
        train(nb)
    (folder / "checkpoint-3" / "scheduler.pt").unlink()
    torch.save(torch.amp.GradScaler("cpu").state_dict(), folder / "checkpoint-2" / "scaler.pt")
    run_cells("train", "save", nb)
    assert faults.steps == [1, 2, 3, 3, 4]
    assert result(folder) == result(undisturbed)


def test_a_training_that_was_stopped_before_any_checkpoint_begins_again(
    ready, undisturbed, tmp_path
):
    """With the adapter, the optimizer and the metrics as they were at first."""
    nb, folder = ready(output_dir=str(tmp_path / "run")), tmp_path / "run"
    faults = Faults(nb, {2: Mock(side_effect=KeyboardInterrupt)})
    with pytest.raises(KeyboardInterrupt):
        train(nb)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run_cells("train", "save", nb)
    assert faults.steps == [1, 2, 1, 2, 3, 4]
    assert result(folder) == result(undisturbed)


@pytest.mark.parametrize("what", ["training_step", "prediction_step"])
def test_a_training_that_was_stopped_inside_a_step_goes_on_as_if_it_had_not_been(
    ready, undisturbed, tmp_path, what
):
    """Of the batch that was computed no gradient is left, and no metric. Each has two batches: of
    the fourth, the first evaluation or step is past, and half of the second.
    """
    nb, folder = ready(output_dir=str(tmp_path / "run")), tmp_path / "run"
    plain, batches = getattr(nb["trainer"], what), []

    def stopped_once(*arguments, **options):
        batches.append(len(batches))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    setattr(nb["trainer"], what, stopped_once)
    with pytest.raises(KeyboardInterrupt):
        train(nb)
    run_cells("train", "save", nb)
    assert nb["training_args"].gradient_accumulation_steps == 2 and len(batches) > 6
    assert result(folder) == result(undisturbed)


@contextmanager
def disk():
    """(fill, empty): two functions. A full disk has room for a log, and not for an adapter."""
    free, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, most))
    empty = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (free, most))
    try:
        yield fill, empty
    finally:
        empty()


def test_a_full_disk_costs_no_trained_step(ready, undisturbed, tmp_path, capsys):
    """A checkpoint that fails is a line of text; the cell *save* is run again for the adapter."""
    nb, folder = ready(output_dir=str(tmp_path / "run")), tmp_path / "run"
    with disk() as (fill, empty):
        faults = Faults(nb, {0: fill, 2: empty, 3: fill})
        with pytest.raises(Exception, match="large"):  # each library has an error of its own
            train(nb)
        printed = capsys.readouterr().out
        failed = [step for step in range(1, 5) if f"No checkpoint at step {step}" in printed]
        assert failed == [1, 2, 4]
        assert nb["newest_checkpoint"](folder) == folder / "checkpoint-3"
        assert not list(folder.glob("checkpoint-[124]"))
        assert "trained" not in read_record(folder)
        empty()
        run_cell("save", nb)
    assert faults.steps == [1, 2, 3, 4]
    assert result(folder) == result(undisturbed)


def test_a_disk_that_is_full_before_the_seal_costs_no_trained_step(ready, tmp_path, capsys):
    nb, folder = ready(output_dir=str(tmp_path / "run")), tmp_path / "run"
    (watch,) = [x for x in nb["trainer"].callback_handler.callbacks if isinstance(x, nb["Watch"])]
    complete, full = watch.complete, iter([False, True, False, False])

    def complete_or_fail(checkpoint):
        if next(full):
            raise OSError("No space left on device")
        complete(checkpoint)

    watch.complete = complete_or_fail
    train(nb)
    assert "No checkpoint at step 2" in capsys.readouterr().out
    assert read_record(folder)["trained"] == 4
    assert nb["is_whole"](folder / "checkpoint-4")


@pytest.mark.newest
@pytest.mark.parametrize("library_renames_it", [True, False])
def test_checkpoints_are_sealed_without_the_librarys_private_method(
    ready, tmp_path, capsys, library_renames_it
):
    """They are by a public callback, and a training that wrote none of them says so."""
    nb, folder = ready(output_dir=str(tmp_path / "run"), max_steps=2), tmp_path / "run"
    if library_renames_it:
        del nb["LastingTrainer"]._save_checkpoint
    else:
        nb["trainer"]._save_checkpoint = Mock()
    train(nb)
    says = "No complete checkpoint was written" in capsys.readouterr().out
    assert says != library_renames_it
    assert bool(nb["newest_checkpoint"](folder)) == library_renames_it
    assert read_record(folder)["trained"] == 2


FAILED = [(1e30, 4, "learning_rate"), (1e30, 2, "learning_rate"), (1e-30, 2, "Nothing was learnt")]


@pytest.mark.parametrize("learning_rate, max_steps, says", FAILED)
def test_a_training_that_failed_ends_in_one_sentence(
    ready, tmp_path, learning_rate, max_steps, says
):
    """Two steps show it in the last evaluation only. Running the cells again does not pass it off as trained."""
    folder = tmp_path / "run"
    nb = ready(output_dir=str(folder), learning_rate=learning_rate, max_steps=max_steps)
    with pytest.raises((FloatingPointError, ValueError), match=says):
        train(nb)
    with pytest.raises((FloatingPointError, ValueError)):
        run_cells("train", "save", nb)
    assert "trained" not in read_record(folder)


# The Hub fails, at every request of a push and in every way that a Hub can.


def cut(handler):
    """A connection that ends half way."""
    next(handler.body, None)
    handler.close_connection = True
    handler.connection.shutdown(2)
    raise ConnectionError("cut")


def silence(handler):
    """A server that does not answer before the client gives up."""
    handler.silent.wait(30)
    raise ConnectionError("too late")


FAULTS = [401, 403, 503, cut, silence]


@contextmanager
def failing(request, fault):
    """A request of the local Hub fails."""
    met, Handler.silent = [], threading.Event()

    def faulty(self, *arguments, **options):
        met.append(self.path)
        if callable(fault):
            fault(self)
        raise Failure(fault, "so it goes")

    with patch.object(Handler, request, faulty):
        yield
    assert met
    Handler.silent.set()


@pytest.fixture
def finished(uncut, hub, tmp_path, monkeypatch):
    """The namespace of a notebook with a finished run that has come to its accounts."""
    send, patience = httpx2.Client.send, []

    def impatient(self, request, **options):  # a test has no minute
        patience.extend(request.extensions["timeout"].values())
        request.extensions["timeout"] = dict.fromkeys(request.extensions["timeout"], 0.25)
        return send(self, request, **options)

    monkeypatch.setattr(httpx2.Client, "send", impatient)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    sources = dict(base_model="some/base", dataset_id="some/pairs", new_model=tmp_path.name)
    folder = str(uncut[2] / "dpo_run")
    nb = run_cells(
        "install", "sources", **{**SMALL, **sources, "max_steps": STEPS, "output_dir": folder}
    )
    assert nb["merged"] and not nb["hub_id"]
    monkeypatch.setenv("HF_TOKEN", hub.token)
    run_cell("card", nb)
    return nb | dict(public=nb["run"]["parameters"], tables={}, patience=patience)


def assert_sentence(text, fault):
    assert callable(fault) or str(fault) in text
    assert text and "\n" not in text.strip() and TOKEN not in text


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_name", ["preupload", "lfs_batch", "lfs_upload", "commit"])
def test_a_fault_of_the_hub_in_the_push(finished, hub, monkeypatch, capsys, request_name, fault):
    """It stops nothing after the training, is one sentence at the end, and then goes through with nothing sent twice."""
    upload, sent = Handler.lfs_upload, []

    def counted(self, key, sha256):
        upload(self, key, sha256)
        sent.append(sha256)

    monkeypatch.setattr(Handler, "lfs_upload", counted)
    run_cell("accounts", finished)
    capsys.readouterr()
    with failing(request_name, fault):
        run_cell("push-adapter", finished)
        assert_sentence(capsys.readouterr().out, fault)
        with pytest.raises(ConnectionError) as error:
            run_cell("push", finished)
    assert_sentence(str(error.value), fault)
    assert fault != silence or all(finished["patience"]), "it would be waited for without end"
    run_cell("push", finished)
    assert len(sent) == len(set(sent)), "a file was sent twice"
    for place in (
        "merged/model.safetensors",
        "adapter/adapter_model.safetensors",
        "curves/loss.png",
    ):
        arrived = pushed(hub, finished["new_model"]) / place.removeprefix("merged/")
        assert arrived.read_bytes() == (finished["folder"] / place).read_bytes()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("request_name", ["whoami", "create", "info"])
def test_a_hub_that_does_not_answer_yet_stops_nothing(finished, hub, capsys, request_name, fault):
    """A finished run goes on through all its cells, knows which commit it is of, and is pushed later."""
    with failing(request_name, fault):
        for cell in ("accounts", "publish"):
            capsys.readouterr()
            run_cell(cell, finished)
            assert_sentence(capsys.readouterr().out.splitlines()[0], fault)
            run_cell("push-adapter", finished)
        if fault in (503, cut, silence):
            run_cell("sources", finished)
            assert finished["base_commit"] == hub.head(("model", "some/base"))[0]
            for name in (
                "base_revision",
                "dataset_revision",
            ):  # what is asked for is not passed over
                with pytest.raises(ValueError, match=f"{name}|0000"):
                    run_cell("sources", finished | {name: "0" * 40})
    assert fault != silence or all(finished["patience"]), "it would be waited for without end"
    run_cells("publish", "push", finished)
    there = pushed(hub, finished["new_model"])
    assert (there / "model.safetensors").exists()
    assert f'model="{hub.user}/{finished["new_model"]}"' in read(there / "README.md")


def test_the_adapter_is_pushed_right_after_the_training_and_not_to_a_public_repository_unasked(
    finished, hub
):
    assert (
        list(CELLS).index("train") < list(CELLS).index("push-adapter") < list(CELLS).index("merge")
    )
    run_cell("accounts", finished)
    run_cell("push-adapter", finished)
    (weights,) = pushed(hub, finished["new_model"]).rglob("*.safetensors")
    assert (
        weights.read_bytes() == (finished["adapter_dir"] / "adapter_model.safetensors").read_bytes()
    )
    assert weights.parent.name == "adapter" and hub.repos["model", finished["hub_id"]]["private"]
    shown = finished | {"private": False, "new_model": "shown"}
    run_cell("accounts", shown)
    assert not hub.repos["model", shown["hub_id"]]["private"]
    with pytest.raises(AssertionError, match="public"):
        run_cell("accounts", shown | {"private": True})


# Weights & Biases, and secrets.


@pytest.mark.parametrize("down", [False, True], ids=["key refused", "silent"])
def test_wandb_down_or_key_wrong(hub, tmp_path, monkeypatch, capfd, down):
    """The run goes on, with its metrics on disk; the key shows nowhere. The local Hub refuses W&B's keys as W&B would."""
    settings, silent = wandb.Settings, threading.Event()
    if down:
        monkeypatch.setattr(Handler, "reply", lambda *answer: silent.wait(60))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    environment = {
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": hub.url,
    }
    for name, value in {
        **environment,
        "WANDB_HTTP_TIMEOUT": "2",
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "wandb.Settings", lambda init_timeout: settings(init_timeout=init_timeout / 15)
    )
    nb = run_cells("install", "accounts")
    assert nb["report_to"] == "wandb" and wandb.run.settings.mode == "offline"
    wandb.finish()
    wandb.teardown()
    silent.set()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert_nowhere(tmp_path, KEY)
    assert KEY not in "".join(capfd.readouterr())


def assert_nowhere(folder, *secrets):
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path


def test_wandb_gets_the_metrics_and_token_and_key_show_nowhere(uncut, hub):
    """In nothing that a whole run printed, logged, stored, cached or pushed, W&B's files included."""
    (metrics,) = (path.read_bytes() for path in uncut[2].glob("wandb/offline-run-*/*.wandb"))
    for name in (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
    ):
        assert f"train/{name}".encode() in metrics and f"eval/{name}".encode() in metrics
    assert pushed(hub, "uncut").exists()
    for folder in (uncut[2], hub.root, hub.cache):
        assert_nowhere(folder, TOKEN, KEY)
    assert not [path for _, path in hub.requests if TOKEN in path or KEY in path]
