"""Checks that a GGUF file splits text into the tokens that its model was trained on, and asks it a question.

python recipes/gguf/check.py [FILE [MERGED]]
"""

import argparse

from llama_cpp import Llama
from transformers import AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("file", nargs="?", default="dpo_run/model.Q4_K_M.gguf")
parser.add_argument("merged", nargs="?", default="dpo_run/merged")
arguments = parser.parse_args()

llm = Llama(arguments.file, n_ctx=2048, verbose=False)
tokenizer = AutoTokenizer.from_pretrained(arguments.merged)
for text in (
    "two  spaces   three",
    "\tif é:\n        return '😀'\n\n",
    "naïve café",
    "日本語 👍🏽",
    " ",
):
    turns = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    found = llm.tokenize(chat.encode(), add_bos=False, special=True)
    assert found == ids, (
        f"{arguments.file} splits {text!r} into other tokens than {arguments.merged}."
    )
turns = [{"role": "user", "content": "What is a Large Language Model?"}]
print(
    llm.create_chat_completion(turns, max_tokens=200, temperature=0)["choices"][0]["message"][
        "content"
    ]
)
