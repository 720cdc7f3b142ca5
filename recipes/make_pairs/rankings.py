"""Three ways to rank answers: each makes a function of a prompt's turns and answers, to scores."""

import itertools
import os
import re
import runpy
from concurrent.futures import ThreadPoolExecutor

import torch
from answers import load
from huggingface_hub import InferenceClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

QUESTION = """Two assistants answered the same conversation. Which answer is more correct and more
helpful? Longer is not better, and the order of the two means nothing. Reply with A, with B, or with
"tie", and nothing else.

[Conversation]
{conversation}

[Answer A]
{first}

[Answer B]
{second}"""


def by_rule(file):
    """By score(prompt, answer) in a Python file, where prompt is the text of the last turn."""
    score = runpy.run_path(file)["score"]

    def rank(turns, answers):
        return [float(score(turns[-1]["content"], answer)) for answer in answers]

    return rank


def by_reward_model(name):
    """By a sequence-classification model with one output, which reads the turns and an answer."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = load(AutoModelForSequenceClassification, name)
    outputs = model.config.num_labels
    assert outputs == 1, (
        f"{name} gives {outputs} numbers for an answer: choose a reward model, which gives one."
    )

    @torch.inference_mode()
    def rank(turns, answers):
        scores = []
        for answer in answers:  # one by one, because padding changes what some of these models say
            conversation = [*turns, {"role": "assistant", "content": answer}]
            read = tokenizer.apply_chat_template(
                conversation, return_dict=True, return_tensors="pt"
            )
            scores.append(model(**read.to(model.device)).logits.item())
        return scores

    return rank


def by_judge(address, name):
    """By a model behind an OpenAI-compatible address; its key, if it wants one, is OPENAI_API_KEY.

    It sees each two answers in both orders, since judges favour one place. An answer wins if it is
    called better both times, and anything else is a tie. Its score is its wins less its defeats.
    """
    # Without a key of its own the client would send the Hugging Face token to that address.
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = InferenceClient(base_url=address, api_key=key, timeout=300)

    def verdict(conversation, first, second):
        text = QUESTION.format(conversation=conversation, first=first, second=second)
        reply = client.chat_completion(
            [{"role": "user", "content": text}], model=name, temperature=0
        )
        words = re.findall(r"\b(A|B|tie)\b", reply.choices[0].message.content or "")
        return words[-1] if words else "tie"  # after its reasoning, if it writes one down

    def rank(turns, answers):
        conversation = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        couples = list(itertools.permutations(range(len(answers)), 2))
        with ThreadPoolExecutor(8) as pool:
            asked = {
                (first, second): pool.submit(verdict, conversation, answers[first], answers[second])
                for first, second in couples
            }
        scores = [0.0] * len(answers)
        for first, second in couples:
            if asked[first, second].result() == "A" and asked[second, first].result() == "B":
                scores[first] += 1
                scores[second] -= 1
        return scores

    return rank
