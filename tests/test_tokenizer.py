"""The tokenizer is the one the base model was trained with, however its repository carries it."""

import shutil
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
import standins
from rows import pair, read
from standins import CHAT, TRUE_IDS
from tokenizers import normalizers
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

from rehearsal.hub import Failure, Handler
from rehearsal.notebook import alone

MISTRAL = (Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()
JUDGE = sentencepiece.SentencePieceProcessor(model_proto=MISTRAL)
TEXTS = [
    "Hello",
    "two  spaces   three    four",
    "\tif x:\n        return 1\n\n\n",
    "naïve café",
    "日本語 😀👍🏽",
    " ",
]


def repository(folder, config=MistralConfig, **settings):
    """OpenHermes' tokenizer files: Mistral's tokenizer.model with the two ChatML tokens, no
    tokenizer.json.
    """
    settings = dict(
        eos_token="<|im_end|>", pad_token="</s>", chat_template=standins.CHATML, **settings
    )
    standins.write_sentencepiece_repository(
        folder, MISTRAL, ["<|im_end|>", "<|im_start|>"], **settings
    )
    config(vocab_size=32002, **standins.SIZE).save_pretrained(folder)
    return folder


def with_tokenizer_json(folder):
    """The same with a tokenizer.json like that of transformers 4: a normalizer puts the space
    before every stretch.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(repository(folder))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.save_pretrained(folder)
    return folder


def of_llama(folder):
    """The first under a Llama's config.json, for which transformers takes a class that errs."""
    repository(folder, LlamaConfig)
    assert (
        AutoTokenizer.from_pretrained(folder)(CHAT).input_ids != TRUE_IDS
    )  # else there is nothing to mend any more
    return folder


def load(base_model, revision=None):
    """(tokenizer, what it was compared with)"""
    return alone("load-tokenizer")["load_tokenizer"](str(base_model), revision)


@pytest.mark.parametrize("make", [repository, with_tokenizer_json, of_llama])
def test_true_ids(make, tmp_path):
    """When loaded, in the rows that are trained on, and when saved and loaded again as the merged
    model is.
    """
    question = {**pair(" def f():\n    x", system="Hi  you"), "chosen": "Yes.", "rejected": "No."}
    nb = read(str(make(tmp_path / "base")), question)
    (row,), tokenizer = nb["pairs"].values(), nb["tokenizer"]
    assert list(row["prompt_ids"]) == TRUE_IDS
    assert list(row["chosen_ids"]) == [
        *tokenizer.encode("x\nYes.", add_special_tokens=False)[2:],
        32000,
    ]
    tokenizer.save_pretrained(tmp_path / "merged")
    MistralConfig(vocab_size=32002, **standins.SIZE).save_pretrained(tmp_path / "merged")
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "merged")):
        assert found.encode(CHAT, add_special_tokens=False) == TRUE_IDS[1:]
        assert [found.encode(text, add_special_tokens=False) for text in TEXTS] == JUDGE.encode(
            TEXTS
        )
        assert [found.decode(ids) for ids in JUDGE.encode(TEXTS)] == TEXTS
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 32000, 2)


@pytest.mark.parametrize("config", [MistralConfig, LlamaConfig])
def test_not_legacy(config, tmp_path):
    """A repository that says `legacy: false` gets the prefix space at the start of the text
    only.
    """
    ids = load(repository(tmp_path, config, legacy=False))[0](
        "<|im_start|>user\nHi<|im_end|>\n"
    ).input_ids
    assert ids == [1, 32001, 1838, 13, 23809, 32000, 13]


def test_disagreement_stops(models, tmp_path):
    base = with_tokenizer_json(tmp_path / "base")
    shutil.copy(f"{models['chatml']}/tokenizer.model", base)
    with pytest.raises(ValueError, match="disagree"):
        load(base)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub, which can refuse every request for a file that has the end `hub.down`."""

    def answer(handler, key, revision, path, found=Handler.resolve):
        if path.endswith(hub.down):
            raise Failure(503, "down")
        found(handler, key, revision, path)

    monkeypatch.setattr(Handler, "resolve", answer)
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda seconds: None
    )  # before it tries again
    with standins.local_hub(tmp_path / "hub") as hub:
        hub.down = "nothing"
        yield hub


@pytest.mark.parametrize("make", [repository, with_tokenizer_json, of_llama])
def test_a_sentencepiece_model_that_does_not_come_is_not_done_without(make, hub, tmp_path):
    hub.add("some/base", make(tmp_path / "base"))
    hub.down = "tokenizer.model"
    with pytest.raises((OSError, ValueError)):
        load("some/base")


def test_no_sentencepiece_model(hub, models):
    """Once that is known, the Hub need not be there to say it again."""
    commit, _ = hub.head(hub.add("some/base", models["qwen"]))
    assert load("some/base", commit)[1] == "there is no sentencepiece model to compare with"
    hub.down = ""
    assert load("some/base", commit)[1] == "there is no sentencepiece model to compare with"
