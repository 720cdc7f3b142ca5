"""Samples a chat model's answers, by vLLM where it is installed with a GPU, or by transformers."""

import importlib.util

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model_class, name, dtype="auto"):
    """A model by Hub id or folder, on the GPU if there is one.

    dtype: "auto" is bfloat16 on a GPU that has it, float16 on an older one, and float32 on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    elif dtype == "auto":
        dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    model = model_class.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to("cuda" if on_gpu else "cpu")


def sampler(batch_size):
    """The function that samples on this machine, and how many prompts it takes at once."""
    if torch.cuda.is_available() and importlib.util.find_spec("vllm"):
        return sample_with_vllm, 256
    return sample_with_transformers, batch_size


@torch.inference_mode()
def sample_with_transformers(model, batches, answers, max_new_tokens, temperature, dtype="auto"):
    """Yields a batch's answers: for each prompt a list of {"text", "tokens", "finished"}.

    model: Hub id or folder. batches: {seed: prompts}, a prompt being a list of {"role", "content"}.
    answers: how many to each prompt. One is finished if it ended within `max_new_tokens`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load(AutoModelForCausalLM, model, dtype)
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops]) | {tokenizer.eos_token_id}
    stops.discard(None)
    for seed, prompts in batches.items():
        torch.manual_seed(seed)
        texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        asked = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(
            model.device
        )
        ids = model.generate(
            **asked,
            num_return_sequences=answers,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            eos_token_id=sorted(stops),
            pad_token_id=tokenizer.pad_token_id,
        )
        found = []
        for written in ids[:, asked["input_ids"].shape[1] :].tolist():
            ends = [place for place, token in enumerate(written) if token in stops]
            length = ends[0] if ends else len(written)
            text = tokenizer.decode(written[:length], skip_special_tokens=True).strip()
            found.append({"text": text, "tokens": length, "finished": bool(ends)})
        yield [found[start : start + answers] for start in range(0, len(found), answers)]


def sample_with_vllm(model, batches, answers, max_new_tokens, temperature, dtype="auto"):
    """The same, by vLLM, which keeps a GPU busy."""
    from vllm import LLM, SamplingParams

    model = LLM(model, dtype=dtype)
    for seed, prompts in batches.items():
        how = SamplingParams(
            n=answers, max_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        given = []
        for request in model.chat(prompts, how):
            found = []
            for one in request.outputs:
                finished = one.finish_reason == "stop"
                found.append(
                    {"text": one.text.strip(), "tokens": len(one.token_ids), "finished": finished}
                )
            given.append(found)
        yield given
