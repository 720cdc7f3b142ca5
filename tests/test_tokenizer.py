"""The tokenizer is the one the base model was trained with, however its repository carries it."""

import json
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import standins
from notebook import functions
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
# Made by transformers 4.57 from OpenHermes' files, slow and fast alike: how that model was trained. The first id is bos.
CHAT = "<|im_start|>system\nHi  you<|im_end|>\n<|im_start|>user\n def f():\n    x<|im_end|>\n<|im_start|>assistant\n"
TURNS = [{"role": "system", "content": "Hi  you"}, {"role": "user", "content": " def f():\n    x"}]
TRUE_IDS = [int(i) for i in (
    "1 32001 1587 13 23809 28705 368 32000 28705 13 32001 2188 13 801 285 5888 13 2287 1318 32000 28705 13 32001 13892 13"
).split()]  # fmt: skip
TEXTS = [
    "Hello",
    "two  spaces   three    four     five",
    "\tif x:\n        return 1\n\n\n",
    "naïve café",
    "日本語 😀👍🏽",
    " ",
]


@pytest.fixture(scope="module")
def nb():
    return functions()


def repository(folder):
    """OpenHermes' tokenizer files: Mistral's tokenizer.model with the two ChatML tokens, no tokenizer.json."""
    standins.write_sentencepiece_repository(
        folder,
        MISTRAL,
        added=["<|im_end|>", "<|im_start|>"],
        eos_token="<|im_end|>",
        pad_token="</s>",
        chat_template=standins.CHATML,
    )
    MistralConfig(vocab_size=32002, **standins.SIZE).save_pretrained(folder)
    return folder


def with_tokenizer_json(folder):
    """The same with the tokenizer.json that transformers 4 wrote: merges by score, prefix space before every stretch."""
    repository(folder)
    proto = functions()["import_protobuf"]().ModelProto.FromString(MISTRAL.read_bytes())
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    vocabulary = {piece: i for i, (piece, _) in enumerate(scores)}
    parts = [
        (vocabulary[left], vocabulary[right], score, left, right)
        for piece, score in scores
        for left, right in ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if left in vocabulary and right in vocabulary
    ]
    parts.sort(key=lambda part: (-part[2], -len(part[3]), -len(part[4])))
    core = Tokenizer(
        BPE(vocabulary, [part[3:] for part in parts], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, add_bos_token=True, **settings)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def llama_repository(folder):
    """The first again, under a Llama's config.json, for which transformers chooses another tokenizer class."""
    repository(folder)
    LlamaConfig(vocab_size=32002, **standins.SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(
    params=[repository, with_tokenizer_json, llama_repository],
    ids=["tokenizer.model alone", "tokenizer.json too", "tokenizer.model alone, Llama"],
)
def folder(request, tmp_path):
    return request.param(tmp_path / "base")


def test_true_ids(nb, folder, tmp_path):
    tokenizer = nb["load_tokenizer"](str(folder), None)
    saved = tmp_path / "merged"
    tokenizer.save_pretrained(saved)
    MistralConfig(vocab_size=32002, **standins.SIZE).save_pretrained(saved)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL))
    for version in (tokenizer, AutoTokenizer.from_pretrained(saved)):
        assert version(CHAT).input_ids == TRUE_IDS
        for text in TEXTS:
            assert version.encode(text, add_special_tokens=False) == judge.encode(text), text
            assert version.decode(version.encode(text, add_special_tokens=False)) == text
        assert (version.bos_token_id, version.eos_token_id, version.pad_token_id) == (1, 32000, 2)


def test_transformers_alone_is_not_faithful(tmp_path):
    """Why the notebook looks twice. If this fails, the library has mended it, and `from_sentencepiece` can go.

    transformers 5.24 has mended it for Mistral's configuration, not for Llama's.
    """
    tokenizer = AutoTokenizer.from_pretrained(llama_repository(tmp_path))
    assert tokenizer(CHAT).input_ids != TRUE_IDS


def test_disagreement_stops(nb, tmp_path, monkeypatch):
    monkeypatch.setitem(nb, "from_sentencepiece", lambda tokenizer, model_file: tokenizer)
    with pytest.raises(AssertionError, match="disagree on"):
        nb["load_tokenizer"](str(llama_repository(tmp_path)), None)


def test_true_ids_in_training(nb, folder):
    tokenizer = nb["load_tokenizer"](str(folder), None)
    nb["base_model"] = str(folder)
    pair = nb["format_pair"](tokenizer, {"turns": TURNS, "chosen": "Yes.", "rejected": "No."})
    prompt, chosen, rejected = nb["tokenize_pair"](tokenizer, pair)
    assert prompt == TRUE_IDS
    assert chosen[:-1] == TRUE_IDS + tokenizer.encode("x\nYes.", add_special_tokens=False)[2:]
    assert chosen[-1] == rejected[-1] == 32000


def test_not_legacy(nb, tmp_path):
    """A repository that says `legacy: false` gets the prefix space at the start of the text only."""
    folder = repository(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))
    ids = nb["load_tokenizer"](str(folder), None)("<|im_start|>user\nHi<|im_end|>\n").input_ids
    assert ids == [1, 32001, 1838, 13, 23809, 32000, 13]


def test_a_sentencepiece_model_that_did_not_come_is_not_done_without(nb, tmp_path, monkeypatch):
    """The repository lists one, the download fails: without its judge the tokenizer is not trusted."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def missing(*arguments, **options):
        raise LocalEntryNotFoundError("offline")

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *arguments, **options: tokenizer)
    monkeypatch.setitem(nb, "hf_hub_download", missing)
    nb["load_tokenizer"]("some/base", None)
    monkeypatch.setitem(nb, "base_files", {"tokenizer.model": 1})
    with pytest.raises(AssertionError, match="some/base/tokenizer.model did not come: run this cell again"):
        nb["load_tokenizer"]("some/base", None)
