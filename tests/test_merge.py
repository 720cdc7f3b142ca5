"""The merge in shards: what it writes is what merging in memory writes, and it needs no more memory than a shard or two."""

import json
import re
import resource
import shutil
import subprocess
import sys
import types

import pytest
import torch
from notebook import ROOT, functions, run_cell
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import perturb
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralConfig, Qwen2Config


def make_adapter(base, folder):
    """An adapter that is not at its start, as the notebook trains it: float32, on all linear layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.float()
    perturb(model)
    model.save_pretrained(folder)


def merge(base, folder, free, **changes):
    """Runs the merge and its saving with so many bytes free. Returns the folder of the merged model."""
    nb = functions(base_model=str(base), output_dir=str(folder))
    adapter_dir = folder.parent / "adapter"
    if not adapter_dir.exists():
        make_adapter(base, adapter_dir)
    folder.mkdir()
    nb.update(
        adapter_dir=adapter_dir,
        merged_dir=folder / "merged",
        record=folder / "run.json",
        run={},
        config=AutoConfig.from_pretrained(base),
    )
    nb.update(merge_size=1e6, tokenizer=AutoTokenizer.from_pretrained(base), **changes)
    nb["psutil"] = types.SimpleNamespace(virtual_memory=lambda: types.SimpleNamespace(available=free))
    run_cell("merge-fp16", nb)
    run_cell("save-merged", nb)
    return folder / "merged"


def weights(folder):
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


@pytest.mark.parametrize("family", ["qwen", "chatml", "tied, in bf16 and shards, with a generation config"])
def test_bit_equal_to_the_merge_in_memory(models, tmp_path, capsys, family):
    base = models.get(family)
    if base is None:
        base = tmp_path / "base"
        AutoTokenizer.from_pretrained(models["qwen"]).save_pretrained(base)
        size = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
        config = Qwen2Config(vocab_size=900, num_key_value_heads=2, tie_word_embeddings=True, **size)
        model = AutoModelForCausalLM.from_config(config)
        model.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[2, 5])
        model.bfloat16().save_pretrained(base, max_shard_size="50KB")
        assert len(list(base.glob("*.safetensors"))) > 3
    whole = merge(base, tmp_path / "whole", free=2e6)
    shards = merge(base, tmp_path / "shards", free=1e6)
    assert re.findall("Merging in (memory|shards)", capsys.readouterr().out) == ["memory", "shards"]
    expected, found = weights(whole), weights(shards)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert weight.dtype == found[name].dtype == torch.float16 and torch.equal(weight, found[name]), name
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).state_dict()
    assert sum(not torch.equal(weight, original[name]) for name, weight in found.items()) >= 14
    for path in whole.iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((shards / path.name).read_text()), path.name
    loaded = AutoModelForCausalLM.from_pretrained(shards, dtype=torch.float16).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())


def test_many_shards_have_an_index(models, tmp_path):
    whole = merge(models["qwen"], tmp_path / "whole", free=2e6)
    merge(models["qwen"], tmp_path / "shards", free=1e6)
    nb = functions(base_model=models["qwen"], output_dir=str(tmp_path))
    nb.update(adapter_dir=tmp_path / "adapter", config=AutoConfig.from_pretrained(models["qwen"]))
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "model.safetensors").write_bytes(b"of a merge that was cut off")
    nb["merge_in_shards"](tmp_path / "many", shard_size="50KB").config.save_pretrained(tmp_path / "many")
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and not [path for path in files if path.name == "model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float16).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights(whole).items())


def test_a_base_that_cannot_be_merged_in_shards_is_one_sentence(models, tmp_path):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(models["qwen"])
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(models["qwen"]).save_pretrained(base)
    make_adapter(base, tmp_path / "adapter")
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(MemoryError, match=r"cannot be merged in shards, the base has no safetensors.* is safe in") as e:
        merge(base, tmp_path / "run", free=1e6)
    assert "\n" not in str(e.value) and not (tmp_path / "run" / "merged").exists()


def test_a_base_with_float32_parts_is_not_merged_in_shards(models, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Qwen2ForCausalLM._keep_in_fp32_modules", ["norm"])
    with pytest.raises(MemoryError, match="cannot be merged in shards, parts of it have to stay in float32"):
        merge(models["qwen"], tmp_path / "run", free=1e6)


def test_the_single_file_goes_before_an_index(models, tmp_path):
    """As transformers has it, in a repository that has both."""
    base = tmp_path / "base"
    shutil.copytree(models["qwen"], base)
    whole = merge(base, tmp_path / "whole", free=2e6)
    index = {"weight_map": dict.fromkeys(weights(whole), "model-00001-of-00001.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = weights(merge(base, tmp_path / "shards", free=1e6))
    assert all(torch.equal(weight, shards[name]) for name, weight in weights(whole).items())


def test_a_shard_that_does_not_fit_on_the_disk(models, tmp_path):
    make_adapter(models["qwen"], tmp_path / "adapter")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="merged could not be written .*: free some disk space and run this cell again"
        ):
            merge(models["qwen"], tmp_path / "run", free=1e6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from notebook import functions
from transformers import AutoConfig, AutoTokenizer
folder = Path({folder!r})
nb = functions(base_model=str(folder / "base"), output_dir=str(folder))
nb.update(adapter_dir=folder / "adapter", config=AutoConfig.from_pretrained(folder / "base"))
nb["load_base"]  # both ways have all that they import by now
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + {room}, resource.RLIM_INFINITY))
try:
    if {shards}:
        nb["merge_in_shards"](folder / "merged", shard_size="20MB")
    else:
        nb["PeftModel"].from_pretrained(nb["load_base"](dtype=nb["torch"].float16), folder / "adapter")
except (MemoryError, RuntimeError, ValueError) as error:
    print("NO ROOM", type(error).__name__, error)
    raise SystemExit
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_peak_memory_under_a_hard_limit(tmp_path):
    """A model of 350 MB in shards of 20 MB, in a process that gets 150 MB more than its libraries took."""
    size = dict(hidden_size=768, intermediate_size=2304, num_hidden_layers=24, num_attention_heads=12)
    config = MistralConfig(vocab_size=2000, num_key_value_heads=12, **size)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "base", max_shard_size="40MB"
    )
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    total = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert total > 350e6
    said = []
    for shards in (True, False):
        source = UNDER_A_LIMIT.format(
            tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path), room=int(150e6), shards=shards
        )
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
        said.append(done.stdout + done.stderr)
    assert "PEAK" in said[0], said[0][-2000:]
    assert "NO ROOM" in said[1], said[1][-2000:]  # the limit is one: the merge in memory does not fit under it
    written = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert abs(written - total) < 1e6 and len(list((tmp_path / "merged").glob("*.safetensors"))) > 8
    print(f"{total / 1e6:.0f} MB merged, peak of the process {int(said[0].split()[-1]) / 1e6:.0f} MB")
