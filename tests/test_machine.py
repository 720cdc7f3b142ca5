"""What the notebook makes of the machine, the run folder, the accounts and the sources that it finds."""

import json
import os
import resource
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from notebook import run_cell, run_cells
from trainers import SMALL
from transformers import MistralConfig

from rehearsal.hub import Hub


@pytest.fixture
def installs(monkeypatch):
    """The commands that the install cell runs, or would."""
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **options: commands.append(command))
    return commands


@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize("place", ["Colab", "Kaggle", "elsewhere"])
def test_what_is_installed_where(monkeypatch, installs, place, uv):
    if place == "Colab":
        monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    elif place == "Kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if uv else None)
    run_cell("install", {})
    assert bool(installs) == (place != "elsewhere")
    if installs:
        packages = {word.split(">=")[0] for word in installs[0] if ">=" in word}
        assert (installs[0][:3] == ["uv", "pip", "install"]) == uv and sys.executable in installs[0]
        assert {"transformers", "trl", "bitsandbytes"} <= packages and not {"torch", "torchvision", "numpy"} & packages


def test_a_library_that_was_imported_before_it_was_replaced_ends_in_one_sentence(monkeypatch, installs):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setattr("datasets.__version__", "4.0.0")
    with pytest.raises(AssertionError, match="datasets .*restart"):
        run_cell("install", {})


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in of a GPU of 15.8 GB; what it returns gives it its generation."""
    PartialState(cpu=True)  # once for the process, before there is a card to be taken
    card = SimpleNamespace(name="a card", total_memory=15.8e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    yield lambda major: setattr(card, "major", major)
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("gpu_memory, planned", [(0, 15.8e9), (8, 8e9), (100, 15.8e9)])
@pytest.mark.parametrize("major, dtype", [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_precision_and_memory_of_a_gpu(gpu, major, dtype, gpu_memory, planned):
    gpu(major)
    nb = run_cells("install", "machine", gpu_memory=gpu_memory)
    assert nb["dtype"] == dtype and nb["memory"] == planned
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it makes a plan for every new length


@pytest.mark.parametrize("other, dtype, planned", [((7, 24e9), torch.float16, 15.8e9), ((9, 8e9), torch.bfloat16, 8e9)])
def test_several_processes_plan_for_the_least_gpu_among_them(gpu, monkeypatch, other, dtype, planned):
    gpu(8)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, other])
    nb = run_cells("install", "machine")
    assert nb["dtype"] == dtype and nb["memory"] == planned


@pytest.mark.parametrize("visible, rank, used", [(None, None, "0"), ("2,3", None, "2"), ("2,3", "1", "2,3")])
def test_a_bare_notebook_takes_one_gpu_and_a_launched_process_what_it_is_given(monkeypatch, visible, rank, used):
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    run_cells("install", "machine")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == used


V1, V2 = "memory/memory.limit_in_bytes", "memory.max"


@pytest.mark.parametrize("file, limit", [(V2, 3e9), (V2, "max"), (V1, 3e9), (V1, 2**63 - 4096)])
def test_free_memory_knows_its_container(tmp_path, file, limit):
    nb = run_cells("install", "run-folder")
    (tmp_path / "memory").mkdir()
    (tmp_path / file).write_text("max\n" if limit == "max" else f"{limit:.0f}\n")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1e9))
    host = SimpleNamespace(available=8e9)
    nb["psutil"] = SimpleNamespace(virtual_memory=lambda: host, Process=lambda: process)
    nb["Path"] = lambda root, name: tmp_path / name
    assert nb["free_memory"]() == (2e9 if limit == 3e9 else 8e9)


def test_the_plan_on_a_cpu_stays_within_its_free_memory(models, pairs_file, tmp_path):
    sources = dict(base_model=models["qwen"], dataset_id=pairs_file, output_dir=str(tmp_path / "run"))
    nb = run_cells("install", "memory", **{**SMALL, **sources})
    nb["free_memory"] = lambda: 64e9
    run_cell("split-of-a-step", nb)
    activations, at_once = max(nb["needs"]) - nb["fixed"], nb["at_once"]
    free = 1.5 * (nb["fixed"] + 0.6 * activations)
    nb["free_memory"] = lambda: free
    run_cell("split-of-a-step", nb)
    assert max(nb["needs"]) < 0.9 * free and (nb["at_once"] < at_once or nb["again"] > 0)
    split = nb["at_once"], nb["again"]
    nb |= {"free_memory": lambda: 64e9, "gather_object": lambda mine: [*mine, free]}  # of another process
    run_cell("split-of-a-step", nb)
    assert split == (nb["at_once"], nb["again"])
    nb["free_memory"] = lambda: 0.1 * free
    with pytest.raises(AssertionError, match="max_length"):
        run_cell("split-of-a-step", nb)
    run_cell("split-of-a-step", nb | {"trained": True})  # elsewhere


def test_a_large_model_stops_on_a_cpu_before_anything_is_downloaded(tmp_path):
    MistralConfig(vocab_size=32002).save_pretrained(tmp_path / "base")  # the 7B shape; nothing else is there
    sources = dict.fromkeys(("base_model", "dataset_id"), str(tmp_path / "base"))
    nb = run_cells("install", "sources", output_dir=str(tmp_path / "run"), **sources)
    with pytest.raises(AssertionError, match="too large for a CPU"):
        run_cell("base", nb)
    run_cell("base", nb | {"trained": True})  # elsewhere: it can be merged and pushed here


# The run folder.


def run_folder(path):
    return run_cells("install", "state", output_dir=str(path), max_steps=4, warmup_steps=1)


def write(nb, name):
    """A whole folder of the run."""
    place = nb["folder"] / name
    place.mkdir()
    for file in ("weights", "state"):
        (place / file).write_text("as it was written")
    nb["seal"](place)
    return place


DAMAGES = {
    "cut": lambda place: (place / "weights").write_text("as it was"),
    "missing": lambda place: (place / "state").unlink(),
    "never sealed": lambda place: (place / "whole.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_passed_over(tmp_path, damage):
    nb = run_folder(tmp_path)
    older, newer, merged, adapter = (write(nb, name) for name in ("checkpoint-2", "checkpoint-10", "merged", "adapter"))
    (merged / "README.md").write_text("added later")
    (tmp_path / "checkpoint-old").mkdir()
    nb["write_record"](trained=4, merged=4, day="2026-01-01")
    nb = run_folder(tmp_path)
    assert nb["trained"] and nb["merged"] and nb["checkpoint"] == newer
    DAMAGES[damage](newer)
    DAMAGES[damage](merged)
    nb = run_folder(tmp_path)
    assert nb["trained"] and not nb["merged"] and nb["checkpoint"] == older
    DAMAGES[damage](adapter)
    assert not run_folder(tmp_path)["trained"]


def test_the_record_is_written_in_one_go_and_by_one_process(tmp_path):
    nb, record = run_folder(tmp_path), tmp_path / "run.json"
    nb["write_record"](trained=1)
    nb["processes"] = SimpleNamespace(is_main_process=False)
    nb["write_record"](trained=2)
    assert nb["run"]["trained"] == 2 and json.loads(record.read_text()) == {"trained": 1}
    nb["processes"], limits = PartialState(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(OSError):
        nb["write_record"](history="long" * 1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert json.loads(record.read_text()) == {"trained": 1}


def test_a_folder_of_an_earlier_version_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "run.json").write_text('{"parameters": {}}')
    with pytest.raises(AssertionError, match="output_dir"):
        run_folder(tmp_path)
    assert (tmp_path / "run.json").read_text() == '{"parameters": {}}'


# Sources: which model, which data, and whether they are still those that the run began with.


@pytest.fixture
def sources(tmp_path):
    """Runs the cells up to the sources; `commit` is what the Hub says of a base there, None where it is down."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "data.txt").write_text("1")

    def run(commit=None, **parameters):
        def repo_info(source, repo_type, revision, **options):
            if commit is None:
                raise OSError("down")
            return SimpleNamespace(sha=revision or commit)

        local = dict.fromkeys(("base_model", "dataset_id"), str(tmp_path / "source"))
        small = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "warmup_steps": 1, **local, **parameters}
        nb = run_cells("install", "accounts", **small)
        nb["api"] = SimpleNamespace(repo_info=repo_info)
        return run_cell("sources", nb)

    return run


def test_a_folder_holds_one_run(sources, tmp_path):
    sources()
    write(sources(beta=0.7), "checkpoint-2")  # nothing was trained before that
    sources(beta=0.7, max_steps=6, gpu_memory=8, private=False)
    for changes in ({"beta": 0.1}, {"seed": 1}, {"load_in_4bit": False}, {"max_steps": 4}):
        with pytest.raises(AssertionError, match="another output_dir"):
            sources(**{"beta": 0.7, "max_steps": 6, **changes})
    (tmp_path / "source" / "data.txt").write_text("2")
    with pytest.raises(AssertionError, match="base_revision"):
        sources(beta=0.7, max_steps=6)


def test_what_a_local_source_is_known_by(sources, tmp_path):
    """All its files, but not what the run itself makes among them."""
    source = tmp_path / "source"
    exactly = sources(output_dir=str(source / "run"))["exactly"]
    before = exactly(str(source), "", "model")
    (source / "run" / "adapter").mkdir()
    (source / "run" / "adapter" / "weights").write_text("2")
    assert exactly(str(source), "", "model") == before and exactly(str(source / "data.txt"), "", "dataset")
    (source / "deep").mkdir()
    (source / "deep" / "more.txt").write_text("3")
    assert exactly(str(source), "", "model") != before


def test_a_run_keeps_the_commit_that_it_began_with(sources):
    old, new = "a" * 40, "b" * 40
    write(sources(old, base_model="some/base"), "checkpoint-2")
    for commit in (new, None):  # the Hub has gone on, or is down
        assert sources(commit, base_model="some/base")["base_revision"] == old
    with pytest.raises(AssertionError, match="base_revision"):
        sources(new, base_model="some/base", base_revision=new)


def test_a_revision_that_the_hub_did_not_tell_is_not_compared(sources):
    write(sources(None, base_model="some/base"), "checkpoint-2")
    assert sources("a" * 40, base_model="some/base")["base_revision"] == "a" * 40


@pytest.fixture
def accounts(tmp_path, monkeypatch):
    """Runs the cells up to the accounts, and that cell again: with a local Hub that knows one token."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
    for name in ("time.sleep", "wandb.init", "subprocess.run"):
        monkeypatch.setattr(name, lambda *arguments, **options: None)
    with Hub(tmp_path / "hub", token="hf_canary") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)

        def run(nb=None):
            return run_cell("accounts", nb) if nb else run_cells("install", "accounts", new_model="tuned")

        run.hub = hub
        yield run


def test_a_source_on_the_hub_is_a_commit_or_one_sentence(accounts, sources, tmp_path):
    nb, hub = sources(), accounts.hub
    accounts(nb)
    hub.add("some/base", tmp_path / "source")
    assert nb["exactly"]("some/base", None, "model") == hub.head(("model", "some/base"))[0]
    for source, revision in (("some/other", None), ("some/base", "no-such-branch"), ("no name", None)):
        with pytest.raises(ValueError, match=source):
            nb["exactly"](source, revision, "model")


# Accounts.


@pytest.fixture
def colab(monkeypatch):
    """A stand-in of google.colab, which does not import its userdata; the dict holds its secrets, or what they raise."""
    for name in ("google.colab", "google.colab.errors", "google.colab.userdata"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    userdata, sys.modules["google.colab.errors"].Error = sys.modules["google.colab.userdata"], Exception
    for name in ("SecretNotFoundError", "NotebookAccessError", "TimeoutException"):
        setattr(userdata, name, type(name, (Exception,), {}))
    secrets = {}

    def get(name):
        value = secrets.get(name, userdata.SecretNotFoundError(name))
        if isinstance(value, Exception):
            raise value
        return value

    userdata.get = get
    return secrets


@pytest.mark.parametrize("problem", ["SecretNotFoundError", "NotebookAccessError", "TimeoutException"])
@pytest.mark.parametrize("names", [("HF_TOKEN", "WANDB_API_KEY"), ("huggingface", "wandb")])
def test_secrets_of_colab_are_asked_for_until_they_are_found_and_never_printed(colab, accounts, capfd, names, problem):
    colab.update(dict.fromkeys(names, getattr(sys.modules["google.colab.userdata"], problem)("not now")))
    nb = accounts()
    assert nb["hub_id"] is None and nb["report_to"] == "none"
    colab.update(zip(names, ("hf_canary", "wandb-canary"), strict=True))
    accounts(nb)
    assert nb["hub_id"] == "rehearsal/tuned" and nb["report_to"] == "wandb"
    assert "canary" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("token, says", [("hf_refused", "401"), ("hf_pasted\u200b", ""), ("hf_canary", "Connect")])
def test_a_token_that_is_of_no_use_does_not_stop_the_run(accounts, monkeypatch, capfd, token, says):
    monkeypatch.setenv("HF_TOKEN", token)
    if token == "hf_canary":  # a Hub that is out of reach
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    nb, printed = accounts(), "".join(capfd.readouterr())
    assert nb["hub_id"] is None and says in printed and token not in printed
