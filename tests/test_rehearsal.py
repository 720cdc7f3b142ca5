"""The rehearsal's end state: the unchanged notebook ran from its first cell to its last, against a local Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from notebook import CELLS, ROOT, run_cells
from safetensors.torch import load_file
from test_tokenizer import CHAT, TRUE_IDS

from rehearsal.hub import Failure, Handler, Hub

REPOSITORY = "rehearsal/tiny-chat-dpo"


@pytest.fixture(scope="module")
def run(rehearsal):
    return rehearsal[0] / "dpo_run"


def outputs(folder):
    """Cell id -> the text that the executed notebook shows under it."""
    executed = json.loads((folder / "dpo_finetune.ipynb").read_text())
    shown = {}
    for cell in executed["cells"]:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            shown[cell["id"]] = shown.get(cell["id"], "") + "".join(text)
    return shown


def percent(text):
    return float(text.rstrip("%"))


def test_summary(rehearsal):
    folder, printed = rehearsal
    lines = printed.strip().splitlines()[-6:]
    assert [line.split()[0] for line in lines] == ["Pairs:", "Loss:", "Rewards:", "Ranking:", "Hub:", "Left"]
    before, after = map(percent, re.findall(r"[\d.]+%", lines[2]))
    assert before == 0 and after >= 95
    base, tuned, merged = map(percent, re.findall(r"[\d.]+%", lines[3]))
    assert 30 <= base <= 70 and tuned >= 95 and merged >= 95
    assert (folder / "dpo_finetune.html").stat().st_size > 100_000
    assert (folder.parent / "curves.png").stat().st_size > 50_000


def test_the_notebook_was_unchanged(rehearsal):
    executed = json.loads((rehearsal[0] / "dpo_finetune.ipynb").read_text())
    code = [cell for cell in executed["cells"] if cell["cell_type"] == "code"]
    injected = [cell for cell in code if "injected-parameters" in cell["metadata"].get("tags", [])]
    assert len(injected) == 1
    assert {cell["id"]: "".join(cell["source"]) for cell in code if cell not in injected} == CELLS
    assert all(cell["execution_count"] for cell in code)


def test_every_choice_is_shown(rehearsal):
    shown = outputs(rehearsal[0])
    assert "CPU" in shown["machine"] and "rehearsal/tiny-chat-dpo, private: True" in shown["accounts"]
    assert "equal to a sentencepiece model" in shown["tokenizer"] and "<|im_start|>assistant" in shown[
        "check-rows"
    ].replace("> ", ">")
    assert "4 pairs at once × 4 accumulated" in shown["split-of-a-step"] and "Prompts are run once" in shown["train"]
    assert all("Figure" in shown[f"plot-{name}"] for name in ("loss", "rewards", "margins", "accuracies"))
    assert "(private)" in shown["push"] and "hf_" not in json.dumps(shown)  # the token


def test_dropped_rows_are_counted(rehearsal):
    shown = outputs(rehearsal[0])["rows"]
    assert "Rows: 368. Dropped: 8. Kept: 360." in shown
    assert sorted(map(int, re.findall(r"^ +(\d+) \w", shown, re.MULTILINE))) == [1, 2, 2, 3]


def test_answers_changed(run):
    record = json.loads((run / "run.json").read_text())
    assert any(answer.startswith("No") for answer in record["before"].values())
    assert len(record["after"]) == 3 and all(answer.startswith("Sure") for answer in record["after"].values())


def test_the_split_has_no_question_twice(rehearsal, tmp_path):
    made = rehearsal[0] / "made"
    parameters = dict(eval_pairs=64, max_length=256, output_dir=str(tmp_path), base_model=str(made / "model"))
    nb = run_cells("install", "split", dataset_id=str(made / "pairs" / "train.jsonl"), **parameters)
    prompts = [tuple(ids) for ids in nb["rows"]["prompt_ids"]]
    train, held_out = ({prompts[i] for i in nb[name]} for name in ("train", "held_out"))
    assert len(nb["held_out"]) == 64 and train and not train & held_out


def test_files_and_precision(run):
    merged = load_file(run / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float16}
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapter.values()} == {torch.float32}
    kept = [path for folder in ("merged", "curves") for path in (run / folder).iterdir()]
    assert {path.suffix for path in kept} == {".json", ".jinja", ".md", ".safetensors", ".png"}
    assert len(list(run.glob("checkpoint-*"))) == 2


def test_the_merge_is_base_plus_adapter(rehearsal, run):
    """W + (alpha / r) B A for every adapted layer, computed here; everything else as in the base."""
    base = load_file(rehearsal[0] / "made" / "model" / "model.safetensors")
    merged = load_file(run / "merged" / "model.safetensors")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in adapter if "lora_A" in name
    }
    assert len(adapted) == 21 and merged.keys() == base.keys()
    for name, weight in merged.items():
        expected = base[name].half().float()
        if (layer := name.removesuffix(".weight")) in adapted:
            a, b = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
            assert b.any()
            expected = expected + b @ a
        assert torch.allclose(weight.float(), expected, atol=2e-3, rtol=2e-3), name


def test_card(run):
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / "merged" / "README.md")
    assert card.data.base_model == "rehearsal/tiny-chat" and card.data.datasets == ["rehearsal/tiny-pairs"]
    assert {"dpo", "trl", "lora"} <= set(card.data.tags) and card.data.pipeline_tag == "text-generation"
    text = card.text
    assert f'pipeline("text-generation", model="{REPOSITORY}")' in text
    assert re.search(r"\| learning_rate +\| 0.0005 +\|", text) and re.search(r"\| a duplicate +\| +3 \|", text)
    record = json.loads((run / "run.json").read_text())
    assert all(sentence in text for sentence in record["words"])
    for name, scores in record["scores"].items():
        row = re.search(rf"^\| {name} .*$", text, re.MULTILINE)[0]
        assert [float(x) for x in row.strip("| ").split("|")[1:]] == pytest.approx([*scores.values()], abs=1e-4)


def client(hub, home, source, token=True):
    """Runs Python source in a fresh process with an empty cache, against the Hub. Returns what it printed."""
    environment = os.environ | hub.environment(home) | {"PYTHONPATH": str(Path(__file__).parent)}
    if not token:
        environment["HF_TOKEN"] = ""
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def hub(rehearsal):
    with Hub(rehearsal[0] / "hub") as hub:
        yield hub


def test_pushed_is_what_was_saved(hub, run):
    assert hub.repos["model", REPOSITORY]["private"]
    pushed = hub.folder(REPOSITORY)
    local = {path.relative_to(run / "merged"): path for path in (run / "merged").iterdir()}
    local |= {path.relative_to(run): path for folder in ("adapter", "curves") for path in (run / folder).iterdir()}
    skipped = ("adapter/README.md", "whole.json", "adapter/whole.json", "adapter/training_args.bin")
    local = {name: path for name, path in local.items() if str(name) not in skipped}
    assert {path.relative_to(pushed) for path in pushed.rglob("*") if path.is_file()} == set(local)
    for name, path in local.items():
        assert (pushed / name).read_bytes() == path.read_bytes(), name
    base = load_file(hub.folder("rehearsal/tiny-chat") / "model.safetensors")
    merged = load_file(pushed / "model.safetensors")
    assert any(not torch.equal(base[name].half(), merged[name]) for name in merged)


RELOAD = f"""
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{REPOSITORY}")
model = AutoModelForCausalLM.from_pretrained("{REPOSITORY}", dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained("rehearsal/tiny-chat", dtype=torch.float32)
ids = tokenizer({CHAT!r}, return_tensors="pt").input_ids
with torch.no_grad():
    merged = model(ids).logits
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, "{REPOSITORY}", subfolder="adapter")(ids).logits
turns = [{{"role": "user", "content": "What is a Large Language Model?"}}]
answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(turns, do_sample=False, return_full_text=False)
print(json.dumps(dict(
    ids=ids[0].tolist(),
    to_adapted=(merged - adapted).abs().max().item(),
    to_base=(merged - plain).abs().max().item(),
    answer=answer[0]["generated_text"],
)))
"""


def test_reload_from_the_hub_with_an_empty_cache(hub, tmp_path):
    found = json.loads(client(hub, tmp_path, RELOAD).splitlines()[-1])
    assert found["ids"] == TRUE_IDS
    assert found["to_adapted"] < 0.1 < found["to_base"]
    assert found["answer"].startswith("Sure")


def test_private_means_private(hub, tmp_path):
    source = f"""
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
try:
    hf_hub_download("{REPOSITORY}", "config.json")
except RepositoryNotFoundError:
    print("refused")
"""
    assert client(hub, tmp_path, source, token=False).strip() == "refused"


def push(run, hub_id):
    return f"""
from pathlib import Path
from types import SimpleNamespace
from notebook import run_cells
nb = run_cells("install", "accounts", new_model="{hub_id}", output_dir={str(run)!r}, max_steps=50, warmup_steps=5)
card = SimpleNamespace(save=lambda path: None)  # it is there already
nb |= dict(model_card=lambda *_: card, public=nb["run"], tables={{}})
run_cells("push-adapter", "push-adapter", nb)
run_cells("push", "push", nb)
"""


def test_push_again_sends_nothing_twice(hub, run, tmp_path):
    commits = len(hub.repos["model", REPOSITORY]["commits"])
    assert "(private)" in client(hub, tmp_path, push(run, REPOSITORY))
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert len(hub.repos["model", REPOSITORY]["commits"]) == commits


def test_push_again_after_a_failed_commit(hub, run, tmp_path, monkeypatch):
    """A commit of the weights that the Hub fails costs nothing: the next run of the cell completes the push."""
    commit, failed = Handler.commit, []

    def fail_once(self, key, revision):
        if '"model.safetensors"' in (body := b"".join(self.body)).decode() and not failed:
            failed.append(key)
            raise Failure(503, "Service unavailable")
        self.body = iter([body])
        commit(self, key, revision)

    monkeypatch.setattr(Handler, "commit", fail_once)
    with pytest.raises(AssertionError, match="503"):
        client(hub, tmp_path, push(run, "rehearsal/again"))
    assert failed
    assert "(private)" in client(hub, tmp_path, push(run, "rehearsal/again"))
    uploads = [path for method, path in hub.requests if method == "PUT"]
    assert len(uploads) == len(set(uploads))  # no content was sent twice
    assert (
        hub.folder("rehearsal/again").joinpath("model.safetensors").read_bytes()
        == (run / "merged" / "model.safetensors").read_bytes()
    )


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-m", "rehearsal", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "holds other things than a rehearsal" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
