"""The merge: in shards it writes what PEFT writes in memory, in little memory; and what is saved
with the weights.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from standins import SWITCHED
from trainers import SMALL, perturb
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.notebook import ROOT, alone, run_cells

ROOMY, TIGHT = 1e12, 0  # bytes of free memory, enough for a merge in memory and not


def make_adapter(base, folder):
    """An adapter that is not at its start, as the notebook trains it: float32, on all linear
    layers.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    perturb(model)
    model.save_pretrained(folder)


@pytest.fixture
def base(models, tmp_path):
    """A copy of a tiny model, to be changed."""
    return Path(shutil.copytree(models["qwen"], tmp_path / "base"))


@pytest.fixture
def merge(pairs_file, tmp_path):
    """Runs the notebook up to its merge, with an adapter as if trained: the namespace after it."""

    def run(base, free, name="run"):
        sources = dict(base_model=str(base), dataset_id=pairs_file, output_dir=str(tmp_path / name))
        nb = run_cells("install", "base", **{**SMALL, **sources})
        make_adapter(base, nb["adapter_dir"])
        nb["run"].write(trained=SMALL["max_steps"])
        nb["run"].stage("saving")
        nb["trained"] = True
        nb["free_memory"] = lambda: free
        nb["merged_dir"].mkdir()
        of_a_cut_merge = nb["merged_dir"] / "model-00007-of-00008.safetensors"
        of_a_cut_merge.write_text("half")
        original = [path.read_bytes() for path in Path(base).glob("*.safetensors")]
        run_cells("merge-in-shards", "merge", nb)
        assert original == [path.read_bytes() for path in Path(base).glob("*.safetensors")]
        assert nb["run"]["merged"] == SMALL["max_steps"] and nb["is_whole"](nb["merged_dir"])
        return nb

    return run


def tensors(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def weights(folder):
    return {
        name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in tensors(folder).items()
    }


@pytest.mark.parametrize(
    "family", ["qwen", "chatml", "tied, in bf16 and shards", "with an index besides"]
)
def test_bit_equal_to_the_merge_in_memory(models, base, merge, family):
    base = Path(models.get(family, base))
    if family == "tied, in bf16 and shards":
        config = transformers.AutoConfig.from_pretrained(base, tie_word_embeddings=True)
        (base / "model.safetensors").unlink()
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(
            base, max_shard_size="50KB"
        )
        assert len(list(base.glob("*.safetensors"))) > 3
    elif family not in models:  # transformers takes the single file
        index = dict.fromkeys(tensors(base), "model-00001-of-00001.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    whole, shards = [
        merge(base, free, name)["merged_dir"]
        for free, name in ((ROOMY, "whole"), (TIGHT, "shards"))
    ]
    assert weights(whole) == weights(shards)
    before, after = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float16).state_dict()
        for f in (base, shards)
    )
    assert sum(not torch.equal(weight, after[name]) for name, weight in before.items()) == 14
    for path in set(whole.glob("*.json")) - {whole / "whole.json"}:
        assert json.loads(path.read_text()) == json.loads((shards / path.name).read_text()), (
            path.name
        )


def test_many_shards_have_an_index_and_integers_stay_integers(base, tmp_path):
    counts, adapter, merged = (
        torch.tensor([1, 123_456_789]),
        tmp_path / "adapter",
        tmp_path / "merged",
    )
    save_file({**tensors(base), "model.counts": counts}, base / "model.safetensors")
    make_adapter(base, adapter)
    transformers.AutoConfig.from_pretrained(base).save_pretrained(merged)
    alone("merge-in-shards")["merge_in_shards"](base, adapter, merged, shard_size="50KB")
    assert len(list(merged.glob("*.safetensors"))) > 3 and torch.equal(
        tensors(merged)["model.counts"], counts
    )
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float16).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    expected = PeftModel.from_pretrained(expected, adapter).merge_and_unload().state_dict()
    assert (
        all(torch.equal(found.pop(name), weight) for name, weight in expected.items()) and not found
    )


@pytest.mark.parametrize("kind", ["no safetensors", "other names"])
def test_a_base_that_cannot_be_merged_in_shards_ends_in_one_sentence(base, merge, kind):
    if kind == "other names":
        save_file(
            {f"transformer.{name}": tensor for name, tensor in tensors(base).items()},
            base / "model.safetensors",
        )
    else:
        torch.save(tensors(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights for .*more memory"):
        merge(base, TIGHT)
    if kind == "no safetensors":
        assert merge(base, ROOMY, "roomy")


def test_a_base_with_float32_parts_is_merged_in_memory(models, merge, monkeypatch):
    monkeypatch.setattr("transformers.Qwen2ForCausalLM._keep_in_fp32_modules", ["norm"])
    merged = tensors(merge(models["qwen"], TIGHT)["merged_dir"])
    assert merged["model.norm.weight"].dtype == torch.float32
    assert merged["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16


UNDER_A_LIMIT = """
import resource, sys, torch
from pathlib import Path
from rehearsal.notebook import alone
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.mistral import modeling_mistral
merge_in_shards = alone("merge-in-shards")["merge_in_shards"]
base, adapter, merged = map(Path, sys.argv[1:])
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + 130_000_000, resource.RLIM_INFINITY))
merge_in_shards(base, adapter, merged, shard_size="20MB")
print("in shards")
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
print("in memory")
"""


def test_peak_memory_under_a_hard_limit(tmp_path):
    """A model of 190 MB in shards of 20 MB, in a process that gets 130 MB more than its libraries
    took.
    """
    size = dict(
        hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12
    )
    config = transformers.MistralConfig(vocab_size=2000, num_key_value_heads=12, **size)
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        base, max_shard_size="20MB"
    )
    make_adapter(base, adapter)
    merged.mkdir()
    command = [sys.executable, "-c", UNDER_A_LIMIT, base, adapter, merged]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["in shards", ""], done.stderr[
        -2000:
    ]  # the limit is one: in memory it is passed
    before, after = (
        sum(path.stat().st_size for path in x.glob("*.safetensors")) for x in (base, merged)
    )
    assert before > 180e6 and abs(after - before) < 1e6


@pytest.mark.parametrize(
    "free, settings", [(TIGHT, None), (ROOMY, {"eos_token_id": [0, 5], "temperature": 0.3})]
)
def test_what_is_saved_with_the_weights(base, merge, free, settings):
    """It stops where the base stops and at the end of a turn."""
    (base / "generation_config.json").unlink()
    if settings:
        (base / "generation_config.json").write_text(json.dumps(settings))
    merged = merge(base, free)["merged_dir"]
    generation = transformers.GenerationConfig.from_pretrained(merged)
    assert generation.eos_token_id == ([0, 2, 5] if settings else [2])
    assert generation.temperature == (0.3 if settings else None)
    assert AutoTokenizer.from_pretrained(merged).eos_token == "<|im_end|>"


def test_the_merged_model_is_asked_as_was_trained(models, merge, tmp_path):
    """By its saved template: begun and in the mode as trained, with the date of the day of
    asking.
    """
    base = shutil.copytree(models["chatml"], tmp_path / "base")
    (base / "chat_template.jinja").write_text(SWITCHED)
    nb = merge(base, ROOMY)
    saved = AutoTokenizer.from_pretrained(nb["merged_dir"])
    turns, *_ = nb["read_pair"](nb["raw"][0])
    asked = saved.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert asked == nb["rows"][0]["prompt_ids"] and asked[0] == saved.bos_token_id not in asked[1:]
    assert saved.eos_token == "<|im_end|>" and "strftime_now" in saved.chat_template


@pytest.mark.parametrize("free", [ROOMY, TIGHT], ids=["in memory", "in shards"])
def test_a_weight_beyond_fp16_stops_the_merge(base, merge, free):
    """Instead of a model of infinities; the adapter is what can be used then."""
    weights = tensors(base)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="FP16 overflowed: use the adapter"):
        merge(base, free)
