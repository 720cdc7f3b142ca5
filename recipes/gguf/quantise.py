"""Makes a Q4_K_M file from an F16 one.

python recipes/gguf/quantise.py [SOURCE [TARGET]]
"""

import argparse

import llama_cpp

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("source", nargs="?", default="dpo_run/model.F16.gguf")
parser.add_argument("target", nargs="?", default="dpo_run/model.Q4_K_M.gguf")
arguments = parser.parse_args()

settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
failed = llama_cpp.llama_model_quantize(
    arguments.source.encode(), arguments.target.encode(), settings
)
assert not failed, f"{arguments.source} could not be quantised."
