"""A page that asks two models the same question, side by side: BASE_MODEL and TUNED_MODEL, Hub ids or folders."""

import os

import gradio as gr
from transformers import pipeline

MODELS = {
    "base": os.environ.get("BASE_MODEL", "teknium/OpenHermes-2.5-Mistral-7B"),
    "tuned": os.environ.get("TUNED_MODEL", "dpo_run/merged"),
}
chats = [  # both with the tokenizer that the notebook has checked
    pipeline("text-generation", model=model, tokenizer=MODELS["tuned"], device_map="auto")
    for model in MODELS.values()
]


def text(content):
    """The text of a message, which gradio hands back as a list of parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def ask(question, *histories):
    for chat, history in zip(chats, histories, strict=True):
        history.append({"role": "user", "content": question})
        turns = [{"role": turn["role"], "content": text(turn["content"])} for turn in history]
        answer = chat(turns, max_new_tokens=400, do_sample=False, return_full_text=False)[0][
            "generated_text"
        ]
        history.append({"role": "assistant", "content": answer})
    return "", *histories


with gr.Blocks(title="Before and after DPO") as page:
    with gr.Row():
        histories = [gr.Chatbot(label=f"{name}: {model}") for name, model in MODELS.items()]
    question = gr.Textbox(label="Question", submit_btn="Ask both")
    question.submit(ask, [question, *histories], [question, *histories])

page.launch()
