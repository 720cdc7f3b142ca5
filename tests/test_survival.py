"""A run survives what a Colab runtime does to it: killed at any second, out of disk, cut off from the Hub and from W&B.

`pytest tests/test_survival.py --kills 24` tries more kill points than CI does, and prints them in a table.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import forked
import pytest
import torch
from notebook import PATH, functions, run_cell, run_cells
from safetensors.torch import load_file
from trainers import SMALL

from rehearsal.hub import Failure, Handler, Hub

STEPS = 8  # a checkpoint after each
BASE, DATASET = "some/base", "some/pairs"
TOKEN, KEY = "hf_CanaryThatMustNotSing", "c0ffee" + "7" * 34  # of the Hub and of W&B; neither may show anywhere
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
    with Hub(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
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
    """A run that nothing disturbs: (its result, the seconds that each stage took, its folder)."""
    folder = tmp_path_factory.mktemp("runs") / "uncut"
    process, seen = start(folder, {"WANDB_API_KEY": KEY}), {}
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
    seconds = {stage: after - at for stage, at, after in zip(STAGES, times, times[1:], strict=False)}
    return result(folder, hub), seconds, folder


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
    expected, seconds, _ = uncut
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


# The Hub fails, at every request of a push and in every way that a Hub can.


def answers(status):
    """A request that is answered with this status."""

    def fail(handler):
        raise Failure(status, "so it goes")

    return fail


def cut(handler):
    """A connection that ends half way."""
    next(handler.body, None)
    handler.close_connection = True
    handler.connection.shutdown(2)
    raise ConnectionError("cut")


def silence(handler):
    """A server that never answers: not before the client gives up."""
    handler.silent.wait(60)
    raise ConnectionError("too late")


FAULTS = [
    (request, fault, times)
    for request in ("create", "lfs_upload", "commit")
    for fault, times in ((401, 1), (403, 1), (500, 99), (503, 99), ("cut", 99), ("silence", 99))
] + [("lfs_upload", 503, 1), ("lfs_upload", "cut", 1), ("preupload", 503, 99), ("lfs_batch", 500, 99)]


@pytest.fixture
def pushed(uncut, hub, tmp_path, monkeypatch):
    """The namespace of a notebook that has come to the push cell, and its folder of the merged model."""
    for name in ("constants.ENDPOINT", "hf_api.api.endpoint"):
        monkeypatch.setattr(f"huggingface_hub.{name}", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    nb = functions(new_model=f"{hub.user}/{tmp_path.name}")
    run_cell("accounts", nb)
    nb["huggingface_hub"].set_client_factory(lambda: impatient(nb["client_that_gives_up"]()))
    run = uncut[2] / "dpo_run"
    folders = dict(adapter_dir=run / "adapter", curves_dir=run / "curves", merged_dir=run / "merged")
    nb.update(hub_id=nb["new_model"], **folders)
    yield nb
    nb["huggingface_hub"].set_client_factory(nb["default_client_factory"])


def impatient(client):
    assert 0 < client.timeout.read <= 60  # what the notebook sets; a test has no minute
    client.timeout = 0.3
    return client


@pytest.mark.parametrize("request_name, fault, times", FAULTS)
def test_a_fault_of_the_hub(pushed, hub, monkeypatch, capsys, request_name, fault, times):
    real, failed, sent = getattr(Handler, request_name), [], []
    fail = {"cut": cut, "silence": silence}.get(fault) or answers(fault)

    def faulty(self, *arguments, **options):
        if len(failed) < times and (request_name != "commit" or len(sent) or weights_are_in(self)):
            failed.append(self.path)
            fail(self)
        real(self, *arguments, **options)

    def weights_are_in(handler):
        body = b"".join(handler.body)
        handler.body = iter([body])
        return b"safetensors" in body

    upload = Handler.lfs_upload

    def counted(self, key, sha256):
        upload(self, key, sha256)
        sent.append(sha256)

    monkeypatch.setattr(Handler, "silent", threading.Event(), raising=False)
    monkeypatch.setattr(Handler, "lfs_upload", counted)
    if request_name == "lfs_upload":
        real = counted
    monkeypatch.setattr(Handler, request_name, faulty)
    merged = {path: path.stat().st_mtime_ns for path in pushed["merged_dir"].iterdir()}
    start = time.time()
    if times == 1 and fault in (503, "cut"):
        run_cell("push", pushed)  # the client tries again by itself
    else:
        with pytest.raises(ConnectionError) as error:
            run_cell("push", pushed)
        said = f"the Hub answered {fault} (so it goes)" if isinstance(fault, int) else "the Hub did not answer"
        said = "the Hub refused the token (401)" if fault == 401 else said
        assert (
            said in str(error.value)
            and "The model is safe in" in str(error.value)
            and hub.token not in str(error.value)
        )
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        monkeypatch.setattr(Handler, request_name, real)
        Handler.silent.set()
        run_cell("push", pushed)
    assert failed and time.time() - start < 60
    assert "(private)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in pushed["merged_dir"].iterdir()} == merged
    assert len(sent) == len(set(sent)), "a file was sent twice"
    arrived = hub.folder(pushed["hub_id"]) / "model.safetensors"
    assert arrived.read_bytes() == (pushed["merged_dir"] / "model.safetensors").read_bytes()


def test_the_adapter_is_pushed_before_the_merge(pushed, hub, capsys):
    run_cell("push-adapter", pushed)
    arrived = hub.folder(pushed["hub_id"])
    assert hub.repos["model", pushed["hub_id"]]["private"] and f"in {pushed['hub_id']}" in capsys.readouterr().out
    assert {path.name for path in arrived.rglob("*.safetensors")} == {"adapter_model.safetensors"}
    weights = "adapter_model.safetensors"
    assert (arrived / "adapter" / weights).read_bytes() == (pushed["adapter_dir"] / weights).read_bytes()


def test_an_adapter_for_a_public_repository_stops_nothing(pushed, capsys):
    pushed["api"].create_repo(pushed["hub_id"], private=False)
    run_cell("push-adapter", pushed)
    assert "is not on the Hub yet. http" in capsys.readouterr().out


@pytest.mark.parametrize("request_name", ["create", "lfs_upload", "commit"])
def test_an_adapter_that_cannot_be_pushed_yet_stops_nothing(pushed, hub, monkeypatch, capsys, request_name):
    monkeypatch.setattr(Handler, request_name, lambda self, **arguments: answers(503)(self))
    run_cell("push-adapter", pushed)
    assert "is not on the Hub yet, the Hub answered 503 (so it goes): try again" in capsys.readouterr().out


def test_a_hub_that_did_not_answer_at_first_is_asked_again(pushed, hub, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Handler, "whoami", lambda self: answers(503)(self))
        run_cell("accounts", pushed)
    assert pushed["hub_user"] is None
    assert "is not used, the Hub answered 503 (so it goes): try again later." in capsys.readouterr().out
    card, name = pushed["merged_dir"] / "README.md", pushed["new_model"]
    written = card.read_text()
    card.write_text(written.replace(f"{hub.user}/uncut", f"your-name/{tmp_path.name}"))
    pushed.update(new_model=tmp_path.name, hub_id=f"your-name/{tmp_path.name}")
    run_cell("push", pushed)
    assert f"{name} (private)" in capsys.readouterr().out
    assert f'model="{name}"' in (hub.folder(name) / "README.md").read_text()
    card.write_text(written)


def test_a_public_repository_is_not_pushed_to_unasked(pushed, hub):
    pushed["api"].create_repo(pushed["hub_id"], private=False)
    with pytest.raises(AssertionError, match="is there already and public: set private to False or choose another"):
        run_cell("push", pushed)
    with pytest.raises(AssertionError, match="is there already and public"):
        run_cell("room-on-hub", pushed)
    pushed["private"] = False
    run_cell("push", pushed)


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "someone-else/model",
            r"cannot be made, the Hub answered 403 \(.*namespace\): change what it names. Or set push_to_hub to False",
        ),
        ("a name with spaces", "is no name for a repository: use letters, digits and -._ in new_model"),
    ],
)
def test_a_name_that_cannot_be_pushed_to_is_told_before_training(pushed, name, says):
    pushed["new_model"] = name
    with pytest.raises((ConnectionError, ValueError), match=says) as error:
        run_cell("room-on-hub", pushed)
    assert "\n" not in str(error.value)


def test_a_hub_that_is_down_before_training_does_not_stop_it(pushed, hub, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "create", lambda self: answers(503)(self))
    run_cell("room-on-hub", pushed)
    assert "the Hub answered 503" in capsys.readouterr().out


# The disk fills up, at the worst moments. A limit on the size of files stands for it: each library meets an OSError.


@contextmanager
def full_disk():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # less than an adapter, more than a log
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def losses(nb):
    return [entry["loss"] for entry in nb["trainer"].state.log_history if "loss" in entry]


def test_a_full_disk_costs_no_trained_step(prepare, tmp_path, capsys):
    undisturbed = prepare(load_in_4bit=False, output_dir=str(tmp_path / "undisturbed"))
    run_cells("run-prompts-once", "train", undisturbed)
    nb = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "longest", nb)
    with (
        full_disk(),
        pytest.raises(OSError, match="adapter could not be written .*: free some disk space and run this"),
    ):
        run_cell("train", nb)
    printed = capsys.readouterr().out
    assert [f"No checkpoint at step {step}, training goes on" in printed for step in (1, 2, 3, 4)] == [True] * 4
    assert not list((tmp_path / "run").glob("checkpoint-*")) and nb["trainer"].state.global_step == 4
    run_cells("train", "free", nb)
    assert "Starting" not in capsys.readouterr().out
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("undisturbed", "run")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    with full_disk():
        run_cell("merge-fp16", nb)
        with pytest.raises(
            OSError, match="merged could not be written .*: free some disk space and run this cell again"
        ):
            run_cell("save-merged", nb)
    assert "merged" not in json.loads((tmp_path / "run" / "run.json").read_text())
    run_cell("save-merged", nb)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["merged"] == 4


def test_an_adapter_is_enough_where_the_last_checkpoint_did_not_fit(prepare, tmp_path, monkeypatch):
    """The run ends before its scores are recorded: what was trained is not trained again."""
    nb = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "train", nb)
    history = nb["trainer"].state.log_history
    for path in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(path)
    again = prepare(load_in_4bit=False)
    assert again["steps_done"] == 4
    monkeypatch.setattr(again["LastingTrainer"], "train", None)
    run_cells("run-prompts-once", "score", again)
    one, other = (dict(nb["trainer"].model.named_parameters()) for nb in (nb, again))
    assert all(torch.equal(one[name], other[name]) for name in one if "lora" in name)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["trained"] == 4
    assert [entry for entry in again["history"] if "loss" in entry] == [entry for entry in history if "loss" in entry]


def test_no_checkpoint_asks_the_hub_for_the_base(prepare, tmp_path, monkeypatch):
    """PEFT would, without the revision, and store the embeddings where the newest has another vocabulary."""
    nb = prepare(load_in_4bit=False)
    asked = lambda *arguments, **options: pytest.fail("asked")  # noqa: E731
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    nb["trainer"].model.peft_config["default"].base_model_name_or_path = "some/base"
    run_cells("run-prompts-once", "train", nb)
    assert list((tmp_path / "run").glob("checkpoint-*")) and (tmp_path / "run" / "adapter").exists()


def test_a_checkpoint_after_one_that_failed(prepare, tmp_path):
    from transformers import TrainerCallback

    class Fills(TrainerCallback):
        """The disk is full in the second and third step."""

        def on_step_begin(self, args, state, control, **kwargs):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            small = 100_000 if state.global_step in (1, 2) else limits[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))

    nb = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "longest", nb)
    nb["trainer"].add_callback(Fills())
    run_cell("train", nb)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert len(losses(nb)) == 4 and nb["last_whole_checkpoint"](tmp_path / "run").name == "checkpoint-4"


def test_a_training_cell_that_was_stopped_says_what_to_do(prepare):
    """By the square in Colab, before the first checkpoint: the trainer has moved on, and its start is gone."""
    nb = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "longest", nb)
    nb["trainer"].state.global_step = 1
    with pytest.raises(AssertionError, match="interrupted before its first checkpoint: restart the runtime and run"):
        run_cell("train", nb)


def test_a_checkpoint_of_another_optimizer_is_refused(prepare, tmp_path):
    """One that a GPU made has states of another form than one of a CPU."""
    nb = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "train", nb)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace("adamw_torch", "paged_adamw_32bit"))
    with pytest.raises(
        AssertionError, match="made with paged_adamw_32bit and this machine has adamw_torch: go on as it"
    ):
        prepare(load_in_4bit=False)


def test_a_loss_scale_is_read_where_there_is_one(prepare, tmp_path):
    """A run of a T4 goes on with a GPU that needs none."""
    nb = prepare(load_in_4bit=False)
    trainer, state = nb["trainer"], torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    torch.save(state, tmp_path / "scaler.pt")
    trainer._load_scaler(str(tmp_path))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.get_scale() == 8.0


# Weights & Biases.


class WandbServer(BaseHTTPRequestHandler):
    """A server that refuses every key, is out of service, or never answers."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status is None:
            time.sleep(20)
        self.send_response(self.server.status or 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("status", [401, 503, None, "refused"])
def test_wandb_down_or_key_wrong(prepare, tmp_path, monkeypatch, capsys, status):
    """Training goes through all the same, and its metrics are kept on disk; the key shows nowhere."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.status = status
    if status == "refused":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")
    settings = dict(
        API_KEY=KEY, BASE_URL=f"http://127.0.0.1:{server.server_port}", INIT_TIMEOUT="2", HTTP_TIMEOUT="2", PROJECT="p"
    )
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    start = time.time()
    nb = prepare(load_in_4bit=False)
    printed = capsys.readouterr()
    assert nb["report_to"] == "wandb" and nb["wandb"].run.settings.mode == "offline" and time.time() - start < 60
    assert "so metrics are kept in ./wandb; `wandb sync` sends them later" in printed.out
    run_cells("run-prompts-once", "train", nb)
    assert len(losses(nb)) == 4
    nb["wandb"].finish()
    nb["wandb"].teardown()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert_nowhere(tmp_path, KEY)
    assert KEY not in "".join(printed) + "".join(capsys.readouterr())
    if status != "refused":
        server.shutdown()


# Secrets.


def assert_nowhere(folder, *secrets):
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [secret for secret in secrets if secret.encode() in data], path


def test_token_and_key_show_nowhere(uncut, hub):
    """In nothing that a whole run printed, logged, stored, cached or pushed, W&B's files included."""
    folder = uncut[2]
    assert list(folder.glob("wandb/offline-run-*/*.wandb")) and hub.requests
    assert_nowhere(folder, TOKEN, KEY)
    assert_nowhere(hub.root, TOKEN, KEY)
    assert_nowhere(Path(os.environ["HF_HOME"]), TOKEN, KEY)
    assert not [path for _, path in hub.requests if TOKEN in path or KEY in path]


def test_a_resumed_run_unpickles_under_restrictions(prepare, tmp_path, monkeypatch):
    nb = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "train", nb)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    real, calls = torch.load, []

    def load(*arguments, **options):
        calls.append(Path(arguments[0]).name if isinstance(arguments[0], str | Path) else "?")
        assert options.get("weights_only") is True
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    again = prepare(load_in_4bit=False)
    run_cells("run-prompts-once", "train", again)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(calls)
    assert losses(again) == losses(nb)
