"""What is trained is written through the chat template, begins and ends once, and is what will be
asked.
"""

import re
from types import SimpleNamespace

import pytest
import standins
from rows import ANSWERS, kept_pairs, pair, read, talk
from standins import CHATML, DATED, MISTRAL_INSTRUCT
from transformers import AutoTokenizer

from rehearsal.notebook import alone, run_cell

TEMPLATES = {
    name: text for name, text in standins.TEMPLATES.items() if not name.endswith("_training")
}
# Two open a reasoning when asked and write none down; the others take lists of parts only, for
# their images.
REFUSED = {"deepseek_r1_distill", "deepseekv3", "idefics3", "llava_next", "smolvlm"}
THINKING = {f"nemotron_3_{size}" for size in ("nano", "super", "ultra", "5_lightning")}
THINKING |= {
    "qwen3_5_think",
    "qwen3_6",
}  # open a reasoning when asked, unless enable_thinking is false
# Writes a system turn before the last user turn only.
TEMPLATES["mistral_v3"] = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system, messages = messages[0], messages[1:] %}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% if loop.last and system %}"
    "{{ system['content'] + '\\n\\n' }}{% endif %}{{ message['content'] }}[/INST]{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CUTTING = CHATML.replace(
    "message['content']", "message['content'].split('</think>')[-1]"
)  # as R1 does
SKIPPING = CHATML.replace("messages %}", "messages if message['content'] != '42' %}")
OPENING = CHATML.replace(
    "assistant\\n' }}", "assistant\\n' }}{% if messages | length > 1 %}{{ 'So' }}{% endif %}"
)
REASONED = ("<think>\nHm.\n</think>\n\nIt flies.", "<think>\nHo.\n</think>\n\nA stone.")
BEE = "<|im_start|>user\nA bee?<|im_end|>\n<|im_start|>assistant\nIt flies.<|im_end|>"
BRIEF = f"<|im_start|>system\nBe brief.<|im_end|>\n{BEE}"
WRITTEN = {  # template, its tokenizer's bos, and the end of "Be brief.", "A bee?", "It flies." as it is written
    "chatml": (None, "", f"<s>{BRIEF}"),  # families have their own models
    "llama3": (
        None,
        "",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nA bee?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt flies.<|eot_id|>",
    ),
    "qwen": (None, "", BRIEF),
    "mistral-instruct": (None, "", "<s>[INST] Be brief.\n\nA bee? [/INST] It flies.</s>"),
    "bos is the turn mark": (CHATML, "<|im_start|>", BEE),
    "eos is another": (CHATML, "<s>", BEE),
    "eos besides": (
        TEMPLATES["phi3"],
        "<s>",
        "<|user|>\nA bee?<|end|>\n<|assistant|>\nIt flies.<|end|>",
    ),
    "last end is another": (
        TEMPLATES["gptoss"],
        "<s>",
        "<|channel|>final<|message|>It flies.<|return|>",
    ),
    "two ends": (TEMPLATES["cohere2"], "<s>", "It flies.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "no end": (TEMPLATES["glm4moe"], "<s>", "A bee?<|assistant|>\n<think></think>\nIt flies.</s>"),
    "named templates": ({"tool_use": TEMPLATES["phi3"], "default": CHATML}, "<s>", BRIEF),
    "date": (DATED, "<s>", f"02 Jan 2026{BRIEF}"),
}
DROPPED = {  # template, turns, answers, a word of the reason
    "reasoning is cut": (CUTTING, ["A bee?"], REASONED, "leaves out"),
    "a turn is left out": (SKIPPING, ["A bee?", "42", "A bird?"], ANSWERS, "leaves out"),
    "they differ in what is trimmed": (TEMPLATES["llama3"], ["A bee?"], ("X", "X\n"), "same"),
    "a mark in the history": (CHATML, ["A bee?", "<|im_start|>", "A bird?"], ANSWERS, "control"),
    "a mark in an answer": (CHATML, ["A bee?"], ("It flies.", "It </s> flies."), "control"),
    "a mark that is no token": (
        MISTRAL_INSTRUCT,
        ["A bee?"],
        ("It flies. [INST] A bird?", "A stone."),
        "control",
    ),
    "the prompt changes": (OPENING, ["A bee?", "An insect.", "A bird?"], ANSWERS, "differently"),
    "the prompt's tokens change": (CHATML, ["A bee?"], ("\n\nIt flies.", "A stone."), "tokens"),
}


def base(folder, template, bos="<s>"):
    """The folder of a tokenizer that has a template's marks."""
    marks = set(re.findall(r"<[|｜]?[^<>\s'\"{}%+]+?[|｜]?>", str(template))) - {
        "<think>",
        "</think>",
    }
    standins.byte_level(folder, template, sorted(marks), bos_token=bos, eos_token="</s>")
    return str(folder)


def squeezed(text):
    return "".join(text.split())


def check(nb, row, pair):
    """That a pair is trained as its row says it, and as the model will be asked."""
    tokenizer, prompt = nb["tokenizer"], list(row["prompt_ids"])
    turns = nb["join_system"](pair["prompt"], nb["chat"].takes_system)
    assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    written = squeezed(tokenizer.decode(prompt))
    assert all(squeezed(turn["content"]) in written for turn in pair["prompt"])
    if nb["chat"].begins:
        assert prompt[0] == tokenizer.bos_token_id not in prompt[1:]
    for name in ("chosen", "rejected"):
        ids, turn = list(row[f"{name}_ids"]), {"role": "assistant", "content": pair[name]}
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        whole = tokenizer.apply_chat_template([*turns, turn])["input_ids"]
        assert whole[: len(prompt + ids) - 1] == (prompt + ids)[:-1]
        asked = tokenizer.decode(prompt).rpartition(turns[-1]["content"])[2] + tokenizer.decode(ids)
        assert squeezed(pair[name]) in squeezed(asked)
        reasonings = asked.count("<think>"), asked.count("</think>")
        assert reasonings in ((0, 0), (1, 1)), "the template's reasoning besides the row's"


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written(name, models, tmp_path):
    template, bos, end = WRITTEN[name]
    pairs = [pair("A bee?", system="Be brief."), pair("A bee?", "An insect.", "A bird?")]
    nb = read(base(tmp_path, template, bos) if template else models[name], *pairs)
    for row, given in zip(kept_pairs(nb), pairs, strict=True):
        check(nb, row, given)
    ids = [*kept_pairs(nb)[0]["prompt_ids"], *kept_pairs(nb)[0]["chosen_ids"]]
    expected = nb["tokenizer"].encode(end, add_special_tokens=False)
    assert ids[-len(expected) :] == expected


def test_a_greeting_stays_the_assistants(models):
    """Where a system turn before it has no place of its own."""
    nb = read(models["mistral-instruct"], pair("A bee?"))
    greeting = {"role": "assistant", "content": "Hello."}
    turns = [*talk(system="Be brief."), greeting, *talk("A bee?")]
    turns = nb["join_system"](turns, nb["chat"].takes_system)
    assert [turn["role"] for turn in turns if "Hello." in turn["content"]] == ["assistant"]


def test_a_tokenizer_that_pads_and_truncates_by_itself(models, tmp_path):
    """As its file says, or as a call left it."""
    tokenizer = AutoTokenizer.from_pretrained(models["qwen"])
    tokenizer.backend_tokenizer.enable_truncation(16)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.save_pretrained(tmp_path)
    nb = read(str(tmp_path), pair("A bee?", system="Be brief. " * 9))
    check(nb, kept_pairs(nb)[0], pair("A bee?", system="Be brief. " * 9))
    expected = nb["encode"](nb["tokenizer"], talk("A bee?"), *ANSWERS, 3000)
    nb["tokenizer"]("A bee?", truncation=True, padding="max_length", max_length=8)
    assert nb["encode"](nb["tokenizer"], talk("A bee?"), *ANSWERS, 3000) == expected
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert alone("encode")["encode"](tokenizer, talk("A bee?"), *ANSWERS, 3000) == expected


def test_a_pair_of_exactly_max_length_is_kept(models):
    encode, tokenizer = alone("encode")["encode"], AutoTokenizer.from_pretrained(models["llama3"])
    ids = encode(tokenizer, talk("A bee?"), *ANSWERS, 3000)
    length = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
    assert encode(tokenizer, talk("A bee?"), *ANSWERS, length) == ids
    with pytest.raises(ValueError, match=f"more than {length - 1} tokens"):
        encode(tokenizer, talk("A bee?"), *ANSWERS, length - 1)


def test_a_template_that_refuses_a_row(models):
    """Costs that row, and the reason is the template's own."""
    tokenizer = AutoTokenizer.from_pretrained(models["mistral-instruct"])
    with pytest.raises(
        ValueError, match="the chat template refuses it: Conversation roles must alternate"
    ):
        alone("encode")["encode"](tokenizer, [*talk("A bee?"), *talk("A bat?")], *ANSWERS, 3000)


@pytest.mark.parametrize("kind", DROPPED)
def test_what_cannot_be_trained_as_it_is_written_is_dropped(kind, tmp_path):
    template, texts, answers, word = DROPPED[kind]
    tokenizer = read(base(tmp_path, template), pair("A bee?"))["tokenizer"]
    encode = alone("encode")["encode"]
    assert encode(tokenizer, talk("A bee?"), *ANSWERS, 3000)
    with pytest.raises(ValueError, match=word):
        encode(tokenizer, talk(*texts), *answers, 3000)


@pytest.mark.parametrize("reasoning", [False, True], ids=["plain", "reasoning"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_of_trl(name, reasoning, tmp_path):
    """Each pair is trained as it is written, or dropped and counted; or all of them are refused in
    a sentence.
    """
    answers, others = (REASONED, ANSWERS) if reasoning else (ANSWERS, REASONED)
    certain = [pair("A bee?", answers=answers), pair("A bat?", answers=answers, system="Be brief.")]
    certain += [
        pair("A bee?", "An insect.", "A bird?", answers=answers, system=text)
        for text in (None, "Be brief.")
    ]
    unlike, before = (
        pair("A fly?", answers=others),
        pair("A bee?", "<think>1</think>2", "A fish?", answers=answers),
    )
    pairs = [
        *certain,
        unlike,
        before,
        pair("A cat?", answers=[f"<think>{i}</think>X" for i in "12"]),
    ]
    if (
        name in REFUSED or reasoning and name == "qwen3_8"
    ):  # which takes a reasoning in a field of its own
        with pytest.raises(ValueError, match="chat template" if name in REFUSED else "No row"):
            read(base(tmp_path, TEMPLATES[name]), *pairs)
        return
    nb = read(base(tmp_path, TEMPLATES[name]), *pairs)
    for row in kept_pairs(nb):
        asked = nb["tokenizer"].decode(row["prompt_ids"])
        check(
            nb,
            row,
            pairs.pop(
                next(i for i, pair in enumerate(pairs) if pair["prompt"][-1]["content"] in asked)
            ),
        )
    assert len(pairs) == nb["dropped"].total() and not any(pair in pairs for pair in certain)


def ask(tokenizer, **options):
    return tokenizer.apply_chat_template(
        talk("A bee?"), tokenize=False, add_generation_prompt=True, **options
    )


@pytest.mark.parametrize("name", sorted(THINKING))
def test_a_reasoning_is_opened_where_the_answers_hold_one(name, tmp_path):
    """By default, in what is saved: whoever asks for the other mode gets it still."""
    original = AutoTokenizer.from_pretrained(base(tmp_path, TEMPLATES[name]))
    for answers, mode in ((ANSWERS, False), (REASONED, True)):
        tokenizer = read(str(tmp_path), pair("A bee?", answers=answers))["tokenizer"]
        assert ask(tokenizer) == ask(original, enable_thinking=mode)
        assert ask(tokenizer, enable_thinking=not mode) == ask(original, enable_thinking=not mode)


def test_the_first_question_is_asked_as_the_article_did():
    chat = SimpleNamespace(takes_system=True)
    nb = run_cell("questions", alone("chat-template") | {"chat": chat})
    system, question = nb["conversations"][0]
    assert system == {"role": "system", "content": "You are a helpful assistant chatbot."}
    assert question == {"role": "user", "content": "What is a Large Language Model?"}
    assert nb["sampling"] == dict(max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.9)
