"""What is trained is written through the chat template, begins and ends once, and is what will be asked."""

from collections import Counter

import pytest
from notebook import functions, run_cells
from standins import TEXT

FAMILIES = ("chatml", "llama3", "qwen", "mistral-instruct")
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a license?"}
PAIR = {"turns": [SYSTEM, USER], "chosen": "A grant.", "rejected": "A work."}
EXPECTED = {  # prompt and chosen answer as text, bos included where there is one
    "chatml": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a license?<|im_end|>\n"
    "<|im_start|>assistant\nA grant.<|im_end|>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is a license?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA grant.<|eot_id|>",
    "qwen": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is a license?<|im_end|>\n"
    "<|im_start|>assistant\nA grant.<|im_end|>",
    "mistral-instruct": "<s>[INST] Be brief.\n\nWhat is a license? [/INST] A grant.</s>",
}


@pytest.fixture(params=FAMILIES)
def nb(request, models):
    namespace = functions(base_model=models[request.param], family=request.param)
    return run_cells("tokenizer", "adapt-template", namespace)


def ids_of(tokenizer, text):
    """Token ids of a text that already holds its bos."""
    text = text.removeprefix(tokenizer.bos_token or "")
    return tokenizer(text).input_ids


def test_text_and_tokens(nb):
    tokenizer = nb["tokenizer"]
    row = {"turns": PAIR["turns"], **nb["format_pair"](tokenizer, PAIR)}
    prompt, chosen, rejected = nb["tokenize_pair"](tokenizer, row)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    assert chosen == ids_of(tokenizer, EXPECTED[nb["family"]])
    assert prompt[:1] == bos or not bos
    assert chosen.count(tokenizer.bos_token_id) == len(bos)
    assert chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
    assert chosen[len(prompt) :].count(tokenizer.eos_token_id) == 1 and chosen[-1] == tokenizer.eos_token_id
    nb["check_row"](tokenizer, row)


def test_any_prompt_and_answer_keep_the_invariants(nb):
    """Prompts and answers of every length and with every kind of character at the seam between them."""
    tokenizer = nb["tokenizer"]
    texts = [TEXT[i : i + 1 + i % 60].strip() or "x" for i in range(0, 3000, 50)]
    texts += ["\u0301accent", "日本語", "😀", "1", "-", "'s", ".", "\u00a0nbsp", "a\n\nb", "    code"]
    for question, answer in zip(texts, reversed(texts), strict=True):
        for turns in ([{"role": "user", "content": question}], [SYSTEM, {"role": "user", "content": question}]):
            pair = {"turns": turns, "chosen": answer.strip(), "rejected": question.strip()}
            nb["check_row"](tokenizer, {"turns": turns, **nb["format_pair"](tokenizer, pair)})


def test_the_saved_template_asks_as_trained(nb, tmp_path):
    """Whoever asks the saved tokenizer through its chat template, or a pipeline does, sends the tokens that were trained."""
    from transformers import AutoTokenizer

    nb["tokenizer"].save_pretrained(tmp_path)
    prompt, *_ = nb["tokenize_pair"](nb["tokenizer"], nb["format_pair"](nb["tokenizer"], PAIR))
    turns = nb["turns_for"](nb["tokenizer"], PAIR["turns"])
    asked = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turns, add_generation_prompt=True)
    assert asked["input_ids"] == prompt


def test_marks(nb):
    expected = {
        "chatml": {"<|im_start|>", "<|im_end|>", "<s>", "</s>"},
        "llama3": {"<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"},
        "qwen": {"<|im_start|>", "<|im_end|>", "<|endoftext|>"},
        "mistral-instruct": {"[INST]", "[/INST]", "<s>", "</s>"},
    }
    assert expected[nb["family"]] <= nb["control_marks"](nb["tokenizer"])


# Every invariant, made to fail once.


def row_of(nb, **changes):
    return {"turns": PAIR["turns"], **nb["format_pair"](nb["tokenizer"], PAIR), **changes}


def test_two_ends_fail(nb):
    chosen = row_of(nb)["chosen"] + nb["tokenizer"].eos_token
    with pytest.raises(AssertionError, match="must end in exactly one"):
        nb["check_row"](nb["tokenizer"], row_of(nb, chosen=chosen))


def test_something_after_the_end_fails(nb):
    with pytest.raises(AssertionError, match="must end in exactly one"):
        nb["check_row"](nb["tokenizer"], row_of(nb, rejected=row_of(nb)["rejected"] + "\n"))


def test_no_end_fails(nb):
    chosen = row_of(nb)["chosen"].removesuffix(nb["tokenizer"].eos_token)
    with pytest.raises(AssertionError, match="must end in exactly one"):
        nb["check_row"](nb["tokenizer"], row_of(nb, chosen=chosen))


def test_another_prompt_than_asked_fails(nb):
    with pytest.raises(AssertionError, match="Training and asking differ"):
        nb["check_row"](nb["tokenizer"], row_of(nb, prompt=row_of(nb)["prompt"] + " "))


def test_a_second_bos_fails(nb):
    tokenizer = nb["tokenizer"]
    if tokenizer.bos_token is None:
        pytest.skip("no bos in this family")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(AssertionError, match="once, at its start"):
        nb["check_row"](tokenizer, row_of(nb))


def test_a_missing_bos_fails(nb):
    tokenizer = nb["tokenizer"]
    if nb["family"] != "chatml":
        pytest.skip("the template of this family writes bos itself")
    tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    with pytest.raises(AssertionError, match="Training and asking differ"):
        nb["check_row"](tokenizer, row_of(nb))


def test_a_template_that_rewrites_its_prompt_fails(nb):
    tokenizer = nb["tokenizer"]
    tokenizer.chat_template += "{% if not add_generation_prompt %}{% else %}<think>{% endif %}"
    with pytest.raises(AssertionError, match="writes a prompt differently"):
        nb["format_pair"](tokenizer, PAIR)


def test_a_prompt_that_merges_with_its_answer_fails(nb):
    row = row_of(nb)
    tokens = {"prompt": [7, 8], "answer": [7, 9, nb["tokenizer"].eos_token_id]}
    nb["tokenize_pair"] = lambda tokenizer, strings: [tokens["prompt"], tokens["answer"], tokens["answer"]]

    class Template:
        bos_token, bos_token_id, eos_token_id = None, None, nb["tokenizer"].eos_token_id
        apply_chat_template = staticmethod(
            lambda turns, tokenize=True, **options: {"input_ids": tokens["prompt"]} if tokenize else "Be brief."
        )

    with pytest.raises(AssertionError, match="must stand unchanged"):
        nb["check_row"](Template(), row)


def test_turns_that_a_template_refuses_are_dropped(models, tmp_path):
    """Two turns of the user's in a row, which Mistral-Instruct's template does not take, cost a row and not the run."""
    turns = [USER, USER]
    namespace = functions(base_model=models["mistral-instruct"])
    good = {"turns": [USER], "chosen": "A grant.", "rejected": "A work."}
    namespace |= {"pairs": [good, good | {"turns": turns}], "dropped": Counter(), "raw": [0, 1]}
    run_cells("tokenizer", "format-rows", namespace)
    assert (
        namespace["dropped"] == {"the chat template refuses the order of the turns": 1} and len(namespace["rows"]) == 1
    )


def test_end_of_turn_other_than_eos(models):
    """A base whose tokenizer ends texts otherwise than its template ends turns (Qwen's base models, Gemma)."""
    namespace = functions(base_model=models["qwen"])
    namespace["load_tokenizer"] = load = namespace["load_tokenizer"]

    def with_other_eos(base_model, revision):
        tokenizer = load(base_model, revision)
        tokenizer.eos_token = "<|endoftext|>"
        return tokenizer

    namespace["load_tokenizer"] = with_other_eos
    tokenizer = run_cells("tokenizer", "adapt-template", namespace)["tokenizer"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert namespace["format_pair"](tokenizer, PAIR)["chosen"] == "A grant.<|im_end|>"


def test_no_chat_template_is_one_sentence(models, tmp_path):
    namespace = functions(base_model=models["qwen"])
    load = namespace["load_tokenizer"]

    def without_template(base_model, revision):
        tokenizer = load(base_model, revision)
        tokenizer.chat_template = None
        return tokenizer

    namespace["load_tokenizer"] = without_template
    with pytest.raises(AssertionError, match="has no chat template: choose a chat or instruct model"):
        run_cells("tokenizer", "tokenizer", namespace)
