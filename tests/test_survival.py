"""A run survives what a Colab runtime does to it: killed at any second, out of disk, cut off from the Hub and from W&B.

`pytest tests/test_survival.py --kills 24` tries more kill points than CI does, and prints them in a table.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import forked
import pytest
import torch
from notebook import PATH
from safetensors.torch import load_file
from trainers import SMALL

from rehearsal.hub import Hub

STEPS = 8  # a checkpoint after each
BASE, DATASET = "some/base", "some/pairs"
# Where a run stands, by the last of these that its output holds.
STAGES = {
    "training": "Starting from the base model",
    "merge": "Trained to step",
    "push": "merged/tokenizer_config.json",
}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The notebook as a script that takes its parameters from the environment, in JSON."""
    folder = tmp_path_factory.mktemp("script")
    command = [sys.executable, "-m", "nbconvert", "--to", "script", str(PATH), "--output-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    path = folder / "dpo_finetune.py"
    source, marker = path.read_text(), "# A value of the wrong kind shows here"
    assert marker in source
    override = "import json, os\nglobals().update(json.loads(os.environ['PARAMETERS']))\n"
    path.write_text(source.replace(marker, f"{override}\n{marker}", 1))
    return path


@pytest.fixture(scope="module")
def hub(models, pairs_file, tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add(BASE, models["qwen"])
        folder = tmp_path_factory.mktemp("dataset")
        shutil.copy(pairs_file, folder / "train.jsonl")
        hub.add(DATASET, folder, repo_type="dataset")
        yield hub


@pytest.fixture(scope="module")
def start(script, hub, tmp_path_factory):
    """Starts the script in a folder and returns its process; what it prints is added to log.txt there."""
    settings = hub.environment(tmp_path_factory.mktemp("cache")) | {"TQDM_DISABLE": "1"}
    before = dict(os.environ)
    os.environ.update(settings)

    def start(folder, environment=None, **changes):
        parameters = {**SMALL, "max_steps": STEPS, "base_model": BASE, "dataset_id": DATASET, **changes}
        return forked.start(script, folder, {"new_model": folder.name, **parameters}, **settings, **environment or {})

    yield start
    os.environ.clear()
    os.environ.update(before)


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


def finish(process, folder):
    """Waits for a run to end well. Returns what it printed."""
    process.join()
    log = read(folder / "log.txt")
    assert process.exitcode == 0, log[-3000:]
    return log


def result(folder, hub):
    """What a run came to: its metrics but for speeds, its merged weights, and the pushed ones."""
    run = json.loads((folder / "dpo_run" / "run.json").read_text())
    history = [
        {name: value for name, value in entry.items() if not name.endswith(("time", "per_second", "num_tokens"))}
        for entry in run["history"]
        if "loss" in entry or "eval_loss" in entry
    ]
    merged = load_file(folder / "dpo_run" / "merged" / "model.safetensors")
    pushed = load_file(hub.folder(f"{hub.user}/{folder.name}") / "model.safetensors")
    return history, run["scores"], merged, pushed


def assert_same(one, other):
    assert one[:2] == other[:2]
    for weights, others in zip(one[2:], other[2:], strict=True):
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def uncut(start, hub, tmp_path_factory):
    """A run that nothing disturbs: (its result, the seconds that each stage took)."""
    folder = tmp_path_factory.mktemp("runs") / "uncut"
    process, seen = start(folder), {}
    while process.is_alive():
        log = read(folder / "log.txt")
        for stage, marker in STAGES.items():
            if marker in log:
                seen.setdefault(stage, time.time())
        time.sleep(0.01)
    seen["end"] = time.time()
    finish(process, folder)
    times = list(seen.values())
    assert list(seen) == [*STAGES, "end"]
    return result(folder, hub), {stage: after - at for stage, at, after in zip(STAGES, times, times[1:], strict=False)}


def kill(start, folder, stage, delay):
    """Starts a run and kills it `delay` seconds into a stage. Returns what there was of it, or None if it had ended."""
    process = start(folder)
    reached = False
    while not reached:
        if not process.is_alive():
            return None
        if stage == "checkpoint":
            reached = (folder / "dpo_run" / f"checkpoint-{random.Random(delay).randint(2, STEPS)}").exists()
        else:
            reached = STAGES[stage] in read(folder / "log.txt")
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return "killed" if process.exitcode == -signal.SIGKILL else None


def test_killed_at_any_time_it_ends_as_if_it_had_not_been(start, hub, uncut, tmp_path, pytestconfig):
    """Kill points drawn by a seed: in training and evaluation, while a checkpoint is written, in the merge, in the push.

    Each run that was killed is run again, by the same command, and has to end with the uncut run's losses, margins,
    accuracies and scores, and with its weights, on disk and on the Hub, bit for bit.
    """
    expected, seconds = uncut
    seconds = {"checkpoint": 0.05, **seconds}
    rng = random.Random(0)
    points = [(stage, rng.random()) for stage in ("training", "checkpoint", "merge", "push")]
    points += [(rng.choice(list(seconds)), rng.random()) for _ in range(pytestconfig.getoption("kills") - len(points))]

    def survive(number):
        stage, where = points[number]
        folder = tmp_path / f"cut-{number}"
        while kill(start, folder, stage, where * seconds[stage]) is None:  # ended before it could be killed
            shutil.rmtree(folder)
            hub.repos.pop(("model", f"{hub.user}/{folder.name}"), None)
            where /= 2
        run = folder / "dpo_run"
        found = sorted(path.name for path in run.glob("checkpoint-*"))
        log = finish(start(folder), folder)
        assert_same(result(folder, hub), expected)
        assert len(list(run.glob("checkpoint-*"))) == 2
        resumed = "passed over" * ("passed over" in log) or ""
        return f"{stage:<10} +{where * seconds[stage]:6.3f} s  found {', '.join(found) or 'nothing'} {resumed}"

    with ThreadPoolExecutor(2) as pool:
        table = list(pool.map(survive, range(len(points))))
    print("\n" + "\n".join(table))


def test_a_finished_stage_is_not_done_again(start, hub, uncut, tmp_path):
    """After training the next run merges, after the merge it pushes; more steps are added, fewer are refused."""
    folder = tmp_path / "stages"
    run = folder / "dpo_run"
    finish(start(folder, push_to_hub=False), folder)
    shutil.rmtree(run / "merged")  # as after a kill in the merge
    files = {path: path.stat().st_mtime_ns for path in run.glob("checkpoint-*/*")}

    def again(**changes):
        (folder / "log.txt").unlink()
        return finish(start(folder, **changes), folder)

    log = again(push_to_hub=False)
    assert "trained already" in log and "merged already" not in log and "The weights take" not in log
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoint-*/*")} == files
    weights = run / "merged" / "model.safetensors"
    written = weights.stat().st_mtime_ns

    log = again()
    assert "merged already" in log and weights.stat().st_mtime_ns == written and "(private)" in log
    base = [path for _, path in hub.requests if "/some/base/resolve" in path and path.endswith("model.safetensors")]
    requests = len(base)
    assert_same(result(folder, hub), uncut[0])
    puts = len([path for method, path in hub.requests if method == "PUT"])
    again()
    assert len([path for method, path in hub.requests if method == "PUT"]) == puts
    base = [path for _, path in hub.requests if "/some/base/resolve" in path and path.endswith("model.safetensors")]
    assert len(base) == requests  # the base model is not even asked for

    log = again(max_steps=STEPS + 2)
    assert f"Going on from dpo_run/checkpoint-{STEPS}" in log and "merged already" not in log
    losses = [entry["loss"] for entry in result(folder, hub)[0] if "loss" in entry]
    assert len(losses) == STEPS + 2 and losses[:STEPS] == [e["loss"] for e in uncut[0][0] if "loss" in e]
    assert any(not torch.equal(weight, uncut[0][2][name]) for name, weight in result(folder, hub)[2].items())

    process = start(folder, max_steps=STEPS)
    process.join()
    assert process.exitcode == 1
    last = (folder / "log.txt").read_text().strip().splitlines()[-1]
    assert f"holds a run with max_steps = {STEPS + 2}, not {STEPS}: set it back or choose another output_dir." in last
