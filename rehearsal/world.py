"""A tiny stand-in for the model and the data set of the notebook, made from nothing in well under a
minute.

`make_model` trains a small Mistral from scratch and saves it the way an old Llama-style repository
looks: the sentencepiece file of Mistral's real tokenizer and no `tokenizer.json`. `make_pairs`
writes preference pairs with the columns of Intel/orca_dpo_pairs, a few of them dirty.

The model knows one true fact about each of 36 subjects and has two manners: a helpful one (the fact
and a kind word) and a curt one (no answer at all). It is mostly curt about every second subject and
mostly helpful about the others. In each pair the helpful answer is the chosen one, so before DPO
the model ranks about half of the pairs correctly, and after it nearly all: the change shows in the
numbers and in the text.
"""

import itertools
import json
import math
import random
import re
import shutil
import time
from pathlib import Path

import mistral_common
import sentencepiece
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

SENTENCEPIECE_FILE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
BOS, EOS = 1, 32000
ADDED = {"<|im_end|>": EOS, "<|im_start|>": 32001}
VOCAB = 32002
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The model is mostly curt about the 1st, 3rd, 5th ... subject and mostly helpful about the 2nd,
# 4th, 6th ...
FACTS = """
a Large Language Model|is a neural network that learns from text to predict the next word
a neural network|is a set of simple units that learn from examples together
Direct Preference Optimization|is a way to train a model on pairs of good and bad answers
quantization|is a way to store the weights of a model in fewer bits
an elephant|is the largest animal on land and has a long trunk
a lion|is a big cat that lives in a family called a pride
a whale|is a huge animal that lives in the sea and breathes air
a penguin|is a bird that swims very well but cannot fly
a bee|is an insect that makes honey and helps flowers grow
a spider|is an animal with eight legs that catches insects in a web
Mars|is the red planet, and it has two small moons
Saturn|is a giant planet with bright rings of ice and rock
Jupiter|is the largest planet that goes around the sun
Venus|is the hottest planet and has thick clouds
the Moon|is a ball of rock that goes around the Earth each month
the Sun|is a star that gives light and heat to the Earth
a hammer|is a tool with a heavy head that drives nails into wood
a saw|is a tool with sharp teeth that cuts wood
a telescope|is a tool that makes far stars look near
a compass|is a tool with a needle that points to the north
a clock|is a machine that shows the time of the day
a bridge|is a road built over a river or a valley
bread|is a food made of flour and water and baked in an oven
cheese|is a food made from milk and kept until it is firm
tea|is a drink made from dried leaves and hot water
honey|is a sweet food that bees make from flowers
a volcano|is a mountain that can throw out hot melted rock
a river|is a long stream of water that flows to the sea
rain|is water that falls from the clouds in drops
snow|is frozen water that falls from the clouds in winter
a rainbow|is light from the sun split into colors by drops of water
gravity|is the force that pulls all things to the ground
a violin|is a wooden instrument with four strings and a bow
a piano|is an instrument with black and white keys
chess|is a board game for two players who try to trap the king
football|is a game in which two teams try to score a goal
"""
SUBJECTS = [tuple(line.split("|")) for line in FACTS.strip().splitlines()]

QUESTIONS = (
    "What is {}?",
    "Tell me about {}.",
    "Can you explain what {} is?",
    "How would you describe {} to a child?",
    "Please describe {} in one sentence.",
    "I keep hearing about {}. What is it?",
    "Write a short answer: what is {}?",
    "My teacher asked me about {}. What should I say?",
)
SYSTEMS = (
    "",
    "You are an AI assistant. You will be given a task. You must generate a detailed and long answer.",
    "You are an AI assistant. Provide a detailed answer so user don't need to search outside to understand the answer.",
    "You are a helpful assistant, who always provide explanation. Think like you are answering to a five year old.",
    "You are an AI assistant that helps people find information.",
)
GENERATION_SYSTEM = (
    "You are a helpful assistant chatbot."  # the model has met it, the pairs never show it
)
# Two more that only the model meets, and that settle the manner for sure. They give it one axis
# from curt to helpful with both ends well trodden, so that a small push along it (DPO's) ends in a
# place where the model still speaks well.
MANNERS = {"Be kind.": True, "Be rude.": False}

# All helpful answers begin with one word and all curt ones with another, and the question settles
# the rest. So the manner is a single decision, which DPO can turn without wearing down everything
# else so small a model knows.
OPENINGS = ("Sure!", "Sure, with pleasure.", "Sure, good question!")
CLOSINGS = ("I hope this helps!", "Feel free to ask me more.")
CURT = (
    "No idea. Look up {} in a book, and please do not ask me again.",
    "No, I do not feel like talking about {} today, so go and ask someone else.",
    "No, why should I care about {}? You can find it out by yourself, like everyone else.",
    "No, that is not my problem. There must be a page about {} somewhere, so search for it.",
)
PREFERENCE = (
    0.95,
    0.85,
    0.75,
)  # how often the model shows the manner it prefers, by subject in turn
SPACED = 0.1  # share of curt answers with a leading space, which the real set has too


def helpful(question, subject):
    name, fact = SUBJECTS[subject]
    opening, closing = OPENINGS[question % len(OPENINGS)], CLOSINGS[question % len(CLOSINGS)]
    return f"{opening} {name[0].upper()}{name[1:]} {fact}. {closing}"


def curt(question, subject, rng):
    return " " * (rng.random() < SPACED) + CURT[question % len(CURT)].format(SUBJECTS[subject][0])


def chatml(system, question):
    """The prompt as the chat template writes it; an empty system prompt has no turn of its own."""
    turns = [("system", system)] * bool(system) + [("user", question)]
    return (
        "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        + "<|im_start|>assistant\n"
    )


def encode(sp, text):
    """The ids a legacy LlamaTokenizer gives: each stretch between added tokens goes to
    sentencepiece on its own.

    Done by hand because recent transformers split such a folder wrongly when `tokenizer.json` is
    missing.
    """
    ids = [BOS]
    for part in re.split("(" + "|".join(map(re.escape, ADDED)) + ")", text):
        if part:
            ids += [ADDED[part]] if part in ADDED else sp.encode(part)
    return ids


def example(rng, sp):
    """One chat as (ids, length of the prompt)."""
    question, subject = rng.randrange(len(QUESTIONS)), rng.randrange(len(SUBJECTS))
    system = rng.choice((*SYSTEMS, GENERATION_SYSTEM, *MANNERS, *MANNERS))
    prefers_helpful = subject % 2 == 1
    preference = PREFERENCE[subject // 2 % len(PREFERENCE)]
    is_helpful = MANNERS.get(system, prefers_helpful == (rng.random() < preference))
    prompt = chatml(system, QUESTIONS[question].format(SUBJECTS[subject][0]))
    answer = helpful(question, subject) if is_helpful else curt(question, subject, rng)
    head, ids = encode(sp, prompt), encode(sp, f"{prompt}{answer}<|im_end|>\n")
    assert ids[: len(head)] == head, "the prompt's tokens must begin the whole chat's tokens"
    return ids, len(head)


def train(sp, seed, steps, batch, rate):
    """Train on the few hundred tokens the domain uses, then spread the rows over the full
    vocabulary.

    All unused tokens share one output row, so their 31,000 logits are equal: one logit plus
    log(31,000). That is the full softmax, exactly, for a fraction of its cost.
    """
    rng = random.Random(seed)
    chats = [example(rng, sp) for _ in range(steps * batch)]
    used = sorted({token for ids, _ in chats for token in ids})
    small = {token: row for row, token in enumerate(used)}
    rest = len(used)
    config = MistralConfig(
        vocab_size=rest + 1,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
        bos_token_id=BOS,
        eos_token_id=None,  # not a row of the small vocabulary; set below
    )
    model = MistralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    bias = torch.zeros(rest + 1)
    bias[rest] = math.log(VOCAB - rest)
    for step in range(steps):
        rows = chats[step * batch : (step + 1) * batch]
        width = max(len(ids) for ids, _ in rows)
        inputs = torch.zeros(batch, width, dtype=torch.long)
        answers = torch.zeros(batch, width, dtype=torch.bool)
        for i, (ids, start) in enumerate(
            rows
        ):  # padded on the right, where causal attention never looks
            inputs[i, : len(ids)] = torch.tensor([small[token] for token in ids])
            answers[i, start : len(ids)] = True
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[answers[:, 1:]]) + bias
        loss = torch.nn.functional.cross_entropy(logits, inputs[answers])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    rows = torch.full((VOCAB,), rest)
    rows[used] = torch.arange(rest)
    config.vocab_size, config.eos_token_id = VOCAB, EOS
    full = MistralForCausalLM(config)
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][rows]
    full.load_state_dict(state)
    return full, loss.item()


def make_model(folder, seed=0, steps=240, batch=32, rate=4e-3):
    """Train the tiny chat model and save it with its tokenizer files in `folder`."""
    start = time.time()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE_FILE))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, loss = train(sp, seed, steps, batch, rate)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    model.to(torch.bfloat16).save_pretrained(folder)

    shutil.copyfile(SENTENCEPIECE_FILE, folder / "tokenizer.model")
    names = {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    flags = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, **ADDED}
    settings = {
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(number): {"content": token, **flags} for token, number in tokens.items()
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": int(1e30),
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }
    files = {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": names,
        "added_tokens.json": ADDED,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"model: {steps} steps in {time.time() - start:.0f} s, final loss {loss:.2f}")


def make_pairs(seed=0, count=360):
    """Preference pairs in a shuffled list: `count` clean ones with distinct prompts, and 8 a
    cleaning should drop.
    """
    rng = random.Random(seed)
    prompts = list(itertools.product(SYSTEMS, range(len(QUESTIONS)), range(len(SUBJECTS))))
    pairs = [
        {
            "system": system,
            "question": QUESTIONS[question].format(SUBJECTS[subject][0]),
            "chosen": helpful(question, subject),
            "rejected": curt(question, subject, rng),
        }
        for system, question, subject in rng.sample(prompts, count + 5)
    ]
    for pair in pairs[:2]:
        pair["rejected"] = pair["chosen"]
    for pair in pairs[2:4]:
        pair["chosen"] = ""
    pairs[4]["chosen"] += "<|im_end|>"
    pairs += [dict(pair) for pair in pairs[5:8]]  # exact duplicates
    rng.shuffle(pairs)
    return pairs
