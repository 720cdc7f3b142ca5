"""What the notebook makes of the machine and the accounts it finds."""

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
    with pytest.raises(AssertionError, match="too large for a CPU: on Colab choose .* or try .*python -m rehearsal"):
        run_cell("size", namespace)


def test_a_folder_holds_one_run(tmp_path):
    parameters = dict(output_dir=str(tmp_path), base_model="some/model")
    run_cell("record", functions(**parameters))
    run_cell("record", functions(**parameters, beta=0.7))  # nothing was trained yet
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_st'), (15, None)):  # one whole, one cut, one empty
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert functions()["last_whole_checkpoint"](tmp_path) == tmp_path / "checkpoint-5"
    assert run_cells("record", "record", functions(**parameters, beta=0.7, max_steps=500))["checkpoint"]
    with pytest.raises(AssertionError, match="holds a run with beta = 0.7, not 0.1: set it back or choose another"):
        run_cell("record", functions(**parameters))


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
    namespace["whoami"] = lambda token: seen.append(token) or {"name": "ada"}
    run_cell("accounts", namespace)
    assert seen == ["hf_canary"] and namespace["hub_user"] == "ada" and namespace["report_to"] == "wandb"
    printed = "".join(capsys.readouterr())
    assert "canary" not in printed and "ada; the model will be pushed, private" in printed


def test_a_token_that_can_only_read(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    namespace = functions()
    namespace["whoami"] = lambda token: {"name": "ada", "auth": {"accessToken": {"role": "read"}}}
    run_cell("accounts", namespace)
    assert namespace["hub_user"] is None and "can only read" in capsys.readouterr().out


def test_a_token_offline_does_not_stop(monkeypatch, capsys):
    from huggingface_hub.errors import OfflineModeIsEnabled

    def whoami(token):
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")

    monkeypatch.setenv("HF_TOKEN", "hf_any")
    namespace = functions()
    namespace["whoami"] = whoami
    run_cell("accounts", namespace)
    assert namespace["hub_user"] is None and "was not accepted (OfflineModeIsEnabled)" in capsys.readouterr().out


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
    assert "was not accepted" in printed and "hf_wrong" not in printed
    assert ("GET", "/api/whoami-v2") in hub.requests
