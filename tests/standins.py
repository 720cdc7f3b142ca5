"""Tiny chat models of four families, with random weights: what tells the families apart is tokenizer and template."""

import json
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen's own habit: a system turn of its own where the conversation brings none.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
    + CHATML
)
# Writes its own bos, and trims what it is given.
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Refuses a system turn, and its marks are plain text rather than special tokens.
MISTRAL_INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)

SIZE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def byte_level(folder, special, **settings):
    """A byte-level BPE tokenizer as Llama 3 and Qwen have them, saved as tokenizer.json."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    if bos := settings.get("bos_token"):
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **settings)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_sentencepiece_repository(folder, model_file, added, **settings):
    """What an old Llama-style repository holds: tokenizer.model and its settings, no tokenizer.json."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).get_piece_size()
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>", **{pieces + i: token for i, token in enumerate(added)}}
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in tokens.items()},
        **settings,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(Path(model_file).read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({token: pieces + i for i, token in enumerate(added)}))
    return pieces + len(added)


def small_sentencepiece(folder):
    """A sentencepiece BPE model of the kind that Llama and Mistral use, with a small vocabulary."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def make(family, folder):
    """Saves a tiny model of `family` ("chatml", "llama3", "qwen", "mistral-instruct") in `folder`."""
    torch.manual_seed(0)
    if family == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        vocabulary = byte_level(
            folder, special, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3
        )
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=4, **SIZE))
    elif family == "qwen":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        vocabulary = byte_level(folder, special, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=QWEN)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=2, **SIZE))
    else:
        chatml = family == "chatml"
        vocabulary = write_sentencepiece_repository(
            folder,
            small_sentencepiece(Path(folder) / "training"),
            added=["<|im_end|>", "<|im_start|>"] if chatml else [],
            eos_token="<|im_end|>" if chatml else "</s>",
            pad_token="</s>" if chatml else None,
            chat_template=CHATML if chatml else MISTRAL_INSTRUCT,
        )
        config = MistralConfig(vocab_size=vocabulary, bos_token_id=1, eos_token_id=600 if chatml else 2, **SIZE)
        model = MistralForCausalLM(config)
    model.to(torch.float16).save_pretrained(folder)
    return folder
