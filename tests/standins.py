"""What the tests have in place of the Hub and of its models: chat models of four families, tiny,
with random weights.

What tells the families apart is tokenizer and template.
"""

import json
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import torch
import trl
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rehearsal.hub import Hub

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()
TEMPLATES = {
    path.stem: path.read_text()
    for path in sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen's own habit: a system turn of its own where the conversation brings none.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    + CHATML
)
# Refuses a system turn, and its marks are plain text rather than special tokens.
MISTRAL_INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DATED = CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1)
# Opens a reasoning when asked, unless enable_thinking is false.
SWITCHED = DATED.replace(
    "assistant\\n'", "assistant\\n' + ('' if enable_thinking is false else '<think>')"
)
# What Llama 3 and Qwen take for words.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Made by transformers 4.57 from OpenHermes' files, slow and fast alike: how that model was trained.
# The first id is bos.
CHAT = "<|im_start|>system\nHi  you<|im_end|>\n<|im_start|>user\n def f():\n    x<|im_end|>\n<|im_start|>assistant\n"
TRUE_IDS = [int(i) for i in (
    "1 32001 1587 13 23809 28705 368 32000 28705 13 32001 2188 13 801 285 5888 13 2287 1318 32000 28705 13 32001 13892 13"
).split()]  # fmt: skip
SIZE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def byte_level(folder, template, special, **named):
    """Saves a byte-level BPE tokenizer, which puts bos before a text if the template does."""
    core, level = (
        Tokenizer(models.BPE()),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), level]
    )
    core.decoder = decoders.ByteLevel()
    kind = dict(special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False)
    core.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=700, **kind))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **named)
    tokenizer.add_tokens(["<think>", "</think>"])
    if "bos_token" in template:
        bos = tokenizer.bos_token
        single = dict(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**single)
    tokenizer.save_pretrained(folder)


def small_sentencepiece():
    """A sentencepiece BPE model of the kind that Llama and Mistral use, with a small vocabulary:
    its file.
    """
    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=written,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return written.getvalue()


def write_sentencepiece_repository(folder, model_file, added=(), **settings):
    """What an old Llama-style repository holds: tokenizer.model and its settings, no
    tokenizer.json.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model_file).get_piece_size()
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>", **dict(enumerate(added, start=pieces))}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "bos_token": "<s>",
    }
    config["added_tokens_decoder"] = {
        i: {"content": token, "special": True} for i, token in tokens.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_file)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))


def make(family, folder):
    """Saves a tiny model of `family` ("chatml", "llama3", "qwen", "mistral-instruct") in
    `folder`.
    """
    config = MistralConfig
    if family == "llama3":
        config = LlamaConfig
        special = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>".split()
        byte_level(
            folder, TEMPLATES["llama3"], special, bos_token=special[0], eos_token=special[-1]
        )
    elif family == "qwen":
        config = Qwen2Config
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        byte_level(folder, QWEN, special, pad_token=special[0], eos_token=special[-1])
    elif family == "chatml":
        settings = dict(
            added=["<|im_end|>", "<|im_start|>"], eos_token="<|im_end|>", pad_token="</s>"
        )
        write_sentencepiece_repository(
            folder, small_sentencepiece(), chat_template=CHATML, **settings
        )
    else:
        settings = dict(eos_token="</s>", chat_template=MISTRAL_INSTRUCT)
        write_sentencepiece_repository(folder, small_sentencepiece(), **settings)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(vocab_size=len(tokenizer), **ends, **SIZE), dtype=torch.float32
    )
    model.half().save_pretrained(folder)
    return folder


@contextmanager
def local_hub(root):
    """A local Hub, which this process takes for the Hub meanwhile, with caches of its own."""
    with Hub(root) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.root / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", hub.root / "datasets")
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        patch.setattr("transformers.utils.hub._hf_api", None)  # which keeps its endpoint
        patch.setattr("datasets.config.HF_ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
