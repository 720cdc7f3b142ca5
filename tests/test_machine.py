"""What the notebook makes of the machine and the accounts it finds."""

import json
import sys
import types

import pytest
from notebook import functions, run_cell, run_cells


def fake_cuda(monkeypatch, cards, capability=(7, 5), memory=15.8e9):
    import torch

    visible = lambda: min(len(cards), len(os_environ("CUDA_VISIBLE_DEVICES").split(",")))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device_count", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: cards[device])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
    properties = types.SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=0: properties)


def os_environ(name):
    import os

    return os.environ.get(name, ",".join("0123"))


@pytest.mark.parametrize(
    "gpu_memory, printed", [(0, "planned with 16 GB, all of it"), (8, "planned with 8 GB, as gpu")]
)
def test_a_t4_gets_fp16(monkeypatch, capsys, gpu_memory, printed):
    namespace = functions(gpu_memory=gpu_memory)
    fake_cuda(monkeypatch, ["Tesla T4"])
    run_cell("machine", namespace)
    shown = capsys.readouterr().out
    assert "Tesla T4, 16 GB" in shown and "torch.float16, because the compute capability is 7.5" in shown
    assert printed in shown and namespace["memory"] == (gpu_memory * 1e9 or 15.8e9)


@pytest.mark.parametrize("before, after", [(None, "0"), ("2,3", "2")])
def test_one_of_several_gpus(monkeypatch, capsys, before, after):
    namespace = run_cells("parameters", "parameters")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fake_cuda(monkeypatch, ["A", "B", "C", "D"])
    run_cell("one-gpu", namespace)
    assert os_environ("CUDA_VISIBLE_DEVICES") == after
    assert "one used" in capsys.readouterr().out


def test_a_launched_process_keeps_its_gpus(monkeypatch):
    namespace = run_cells("parameters", "parameters")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    fake_cuda(monkeypatch, ["A", "B"])
    run_cell("one-gpu", namespace)
    assert os_environ("CUDA_VISIBLE_DEVICES") == "0,1"


def test_a_large_model_stops_on_a_cpu(tmp_path):
    from transformers import MistralConfig

    MistralConfig(vocab_size=32002).save_pretrained(tmp_path)  # the 7B shape; there is nothing else in the folder
    namespace = functions(base_model=str(tmp_path))
    run_cell("machine", namespace)
    with pytest.raises(
        AssertionError, match="too large to train on a CPU: on Colab choose .* or try .*python -m rehearsal"
    ):
        run_cell("size", namespace)


def make_checkpoint(folder, step):
    """A checkpoint with all the files that are looked at, as the trainer writes them."""
    import torch
    from safetensors.torch import save_file

    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"lora": torch.zeros(100)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(100)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize(
    "name, damage",
    [(name, damage) for name in FILES for damage in ("cut", "emptied", "missing", "garbled")]
    # Files that a checkpoint need not have, and a garbled tensor, which safetensors cannot tell from any other.
    + [("trainer_state.json", "not a state")],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name, damage):
    if (name, damage) in {("rng_state.pth", "missing"), ("adapter_model.safetensors", "garbled")}:
        pytest.skip("not to be told from a whole one")
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    last = functions()["last_whole_checkpoint"]
    assert last(tmp_path) == newer
    path = newer / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = data[: len(data) // 2] + b"\0\1\2" + data[len(data) // 2 + 3 :]
        path.write_bytes({"cut": data[:-9], "emptied": b"", "garbled": middle, "not a state": b"[1]"}[damage])
    assert last(tmp_path) == older
    assert "checkpoint-10 is passed over: it was not written to its end" in capsys.readouterr().out


def test_a_folder_holds_one_run(tmp_path):
    (tmp_path / "source").mkdir()
    source = str(tmp_path / "source")
    parameters = dict(output_dir=str(tmp_path / "run"), base_model=source, dataset_id=source)

    def cells(**changes):
        namespace = functions(**parameters, **changes)
        run_cells("record", "record", namespace)
        return run_cells("sources", "same-run", namespace | dict(api=None))

    cells()
    cells(beta=0.7)  # nothing was trained yet
    make_checkpoint(tmp_path / "run", 500)
    assert cells(beta=0.7, max_steps=600)["steps_done"] == 500
    with pytest.raises(AssertionError, match="holds a run with beta = 0.7, not 0.1: set it back or choose another"):
        cells()
    with pytest.raises(
        AssertionError, match="holds a run with max_steps = 500, not 400: set it back or choose another"
    ):
        cells(beta=0.7, max_steps=400)
    (tmp_path / "run" / "run.json").unlink()  # whatever made that checkpoint, nobody knows
    with pytest.raises(AssertionError, match="holds a run with base_model = 'unknown'"):
        cells()


def test_a_record_that_cannot_be_read_and_folders_that_are_no_checkpoints(tmp_path):
    namespace = functions(output_dir=str(tmp_path))
    (tmp_path / "checkpoint-old").mkdir()
    run_cell("record", namespace)
    assert namespace["checkpoint"] is None
    for text in ('{"trained": 2', "null", "[1]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json cannot be read: bring it back, or choose another output_dir."):
            run_cell("record", namespace)
        assert (tmp_path / "run.json").read_text() == text


@pytest.mark.parametrize("damage", ["cut", "missing", "none"])
def test_a_damaged_result_is_made_again(tmp_path, damage):
    """A Drive may have kept the record of a stage and lost, or cut, the file that the stage wrote."""
    import torch
    from safetensors.torch import save_file

    namespace = functions(output_dir=str(tmp_path), max_steps=4, warmup_steps=1)
    (tmp_path / "run.json").write_text(json.dumps(dict(adapter=4, trained=4, merged=4)))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "merged").mkdir()
    files = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "merged" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for path in (
        tmp_path / "adapter" / "adapter_model.safetensors",
        *(tmp_path / "merged" / f for f in files.values()),
    ):
        save_file({"a": torch.zeros(9)}, path)
    run_cell("record", namespace)
    assert namespace["trained"] and namespace["merged"] and namespace["steps_done"] == 4

    def hurt(path):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "missing":
            path.unlink()

    hurt(tmp_path / "merged" / "model-2.safetensors")
    run_cell("record", namespace)
    assert namespace["trained"] and namespace["merged"] == (damage == "none")
    hurt(tmp_path / "adapter" / "adapter_model.safetensors")
    run_cell("record", namespace)
    assert namespace["trained"] == (damage == "none") and (damage == "none" or namespace["steps_done"] == 0)


def test_one_process_keeps_the_record(tmp_path, monkeypatch):
    namespace = functions(output_dir=str(tmp_path))
    run_cell("record", namespace)
    with monkeypatch.context() as patch:
        patch.setitem(namespace, "processes", types.SimpleNamespace(is_main_process=False))
        namespace["write_record"](trained=1)
    assert namespace["run"] == {"trained": 1} and not namespace["record"].exists()
    namespace["write_record"](trained=1)
    assert json.loads(namespace["record"].read_text()) == {"trained": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_revision_that_the_hub_did_not_tell_is_not_compared(tmp_path, capsys):
    """A run that began while the Hub was down is gone on with when it is back, and the other way round."""
    known, parameters = "a" * 40, dict(output_dir=str(tmp_path), base_model="some/base", dataset_id="some/pairs")

    def cells(base_commit, dataset_commit):
        namespace = functions(**parameters, beta=0.5)
        run_cells("record", "record", namespace)
        namespace.update(base_commit=base_commit, dataset_commit=dataset_commit)
        return run_cell("same-run", namespace)

    cells(None, known)
    make_checkpoint(tmp_path, 2)
    cells(known, known)
    assert f"base_revision: None then, {known} now; not compared" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="holds a run with base_revision = 'aaa"):
        cells("b" * 40, known)


def test_what_a_local_folder_is_known_by(tmp_path):
    """Its files: not what editors hide there, nor what the run itself makes in it."""
    (tmp_path / "data.txt").write_text("1")
    resolve = functions(output_dir=str(tmp_path / "run"))["resolve"]
    before = resolve(str(tmp_path), None, "model")
    for name in (".cache/x", "run/checkpoint-1/y"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("2")
    assert resolve(str(tmp_path), None, "model") == before and list(before[1]) == ["data.txt"]
    (tmp_path / "more.txt").write_text("3")
    assert resolve(str(tmp_path), None, "model")[0] != before[0]
    assert len(resolve(str(tmp_path / "data.txt"), None, "dataset")[0]) == 64


@pytest.mark.parametrize(
    "files, safetensors, weights",
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], True, 2),
        (["pytorch_model-00001-of-00002.bin", "training_args.bin", "consolidated.safetensors"], False, 1),
        ([], None, 0),
    ],
)
def test_which_files_are_the_weights(files, safetensors, weights):
    namespace = functions()
    namespace["base_files"] = dict.fromkeys(files, 1)
    run_cell("weights", namespace)
    assert namespace["use_safetensors"] == safetensors and len(namespace["weight_files"]) == weights


@pytest.fixture(autouse=True)
def token_is_used(monkeypatch):
    """A refused token is switched off for the rest of the process, which is here the next test's too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)


@pytest.fixture
def colab(monkeypatch):
    """A stand-in of google.colab whose secrets are the dict returned; an exception as value is raised."""
    package, colab, errors, userdata = (
        types.ModuleType(name) for name in ("google", "google.colab", "google.colab.errors", "google.colab.userdata")
    )
    errors.Error = type("Error", (Exception,), {})
    userdata.SecretNotFoundError = type("SecretNotFoundError", (errors.Error,), {})
    userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})
    userdata.TimeoutException = type("TimeoutException", (errors.Error,), {})
    secrets = {}

    def get(name):
        value = secrets.get(name, userdata.SecretNotFoundError(name))
        if isinstance(value, Exception):
            raise value
        return value

    userdata.get, colab.errors, colab.userdata = get, errors, userdata
    for module in (package, colab, errors, userdata):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("huggingface_hub.utils._auth.is_google_colab", lambda: True)
    monkeypatch.setattr("huggingface_hub.utils._auth._IS_GOOGLE_COLAB_CHECKED", False)
    monkeypatch.setattr("huggingface_hub.utils._auth._GOOGLE_COLAB_SECRET", None)
    return secrets


@pytest.mark.parametrize("problem", ["SecretNotFoundError", "NotebookAccessError", "TimeoutException"])
def test_colab_secret_not_to_be_had(colab, monkeypatch, capsys, problem):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    error = getattr(sys.modules["google.colab.userdata"], problem)("denied")
    colab.update(HF_TOKEN=error, WANDB_API_KEY=error)
    namespace = functions()
    run_cell("accounts", namespace)
    assert namespace["report_to"] == "none" and namespace["hub_user"] is None
    assert "no token to push with; the model stays in dpo_run/merged" in capsys.readouterr().out


def test_colab_secrets_are_used_and_never_printed(colab, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "")
    colab.update(HF_TOKEN="hf_canary", WANDB_API_KEY="wandb-canary")
    namespace = functions()
    seen = []
    monkeypatch.setattr(namespace["HfApi"], "whoami", lambda self, token: seen.append(token) or {"name": "ada"})
    run_cell("accounts", namespace)
    assert seen == ["hf_canary"] and namespace["hub_user"] == "ada" and namespace["report_to"] == "wandb"
    printed = "".join(capsys.readouterr())
    assert "canary" not in printed and "ada; the model will be pushed, private" in printed


def test_a_token_that_can_only_read(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    namespace = functions()
    account = {"name": "ada", "auth": {"accessToken": {"role": "read"}}}
    monkeypatch.setattr(namespace["HfApi"], "whoami", lambda self, token: account)
    run_cell("accounts", namespace)
    assert namespace["hub_user"] is None and "can only read" in capsys.readouterr().out


def test_a_token_with_a_pasted_character_that_none_has(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_pasted\u200b")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    namespace = functions()
    run_cell("accounts", namespace)
    printed = capsys.readouterr().out
    assert "is not used, the token holds a character that no token has: copy it again." in printed
    assert namespace["hub_user"] is None and "hf_pasted" not in printed
    assert namespace["huggingface_hub"].constants.HF_HUB_DISABLE_IMPLICIT_TOKEN  # public sources can be had


def test_a_token_offline_does_not_stop(monkeypatch, capsys):
    from huggingface_hub.errors import OfflineModeIsEnabled

    def whoami(self, token):
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")

    monkeypatch.setenv("HF_TOKEN", "hf_any")
    namespace = functions()
    monkeypatch.setattr(namespace["HfApi"], "whoami", whoami)
    run_cell("accounts", namespace)
    assert namespace["hub_user"] is None and "did not answer (OfflineModeIsEnabled)" in capsys.readouterr().out


def test_an_unreachable_hub_does_not_stop(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    namespace = functions()
    run_cell("accounts", namespace)
    assert "is not used, the Hub did not answer (ConnectError)" in capsys.readouterr().out
    assert namespace["hub_user"] is None


def test_a_refused_token_does_not_stop(monkeypatch, tmp_path, capsys):
    from rehearsal.hub import Hub

    with Hub(tmp_path) as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        namespace = functions()
        run_cell("accounts", namespace)
    printed = "".join(capsys.readouterr())
    assert namespace["hub_user"] is None
    assert "token is not used, the Hub refused" in printed and "hf_wrong" not in printed
    assert namespace["huggingface_hub"].constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    assert ("GET", "/api/whoami-v2") in hub.requests
