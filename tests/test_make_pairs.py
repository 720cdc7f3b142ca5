"""Pairs from a model's own answers, and from comparisons: recipes/make_pairs.

The models are tiny, and the judge runs on this machine.
"""

import json
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rehearsal.notebook import ROOT, alone

FOLDER = ROOT / "recipes" / "make_pairs"
sys.path.insert(0, str(FOLDER))

import from_comparisons  # noqa: E402
import make_pairs  # noqa: E402
import rankings  # noqa: E402

from rehearsal import behaviour  # noqa: E402

PROMPTS = [
    f"What is {subject}?"
    for subject in ("a lion", "a bee", "Mars", "tea", "rain", "chess", "a saw")
]


@pytest.fixture
def make(models, tmp_path, monkeypatch, capsys):
    """Runs make_pairs.py as a command, on a tiny model with random weights.

    Returns its pairs and what it printed.
    """
    prompts, rule = tmp_path / "prompts.txt", tmp_path / "rule.py"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    rule.write_text("def score(prompt, answer):\n    return len(answer) % 7\n")

    def run(*options, output="pairs.jsonl", how=("--rule", rule)):
        line = ["make_pairs.py", "--model", models["qwen"], "--prompts", prompts]
        line += ["--answers", 3, "--max-new-tokens", 8, "--batch-size", 2, "--temperature", 1]
        line += ["--output", tmp_path / output, *how, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        make_pairs.main()
        pairs = [json.loads(line) for line in (tmp_path / output).open()]
        return pairs, capsys.readouterr().out

    return run


@pytest.fixture
def all_finished(monkeypatch):
    """A model with random weights does not know how to end an answer: here each counts as ended."""
    sample = make_pairs.sample_answers

    def finished(*places, **how):
        return [
            [{**answer, "finished": True} for answer in answers]
            for answers in sample(*places, **how)
        ]

    monkeypatch.setattr(make_pairs, "sample_answers", finished)


def test_the_best_and_the_worst_make_a_pair_that_the_notebook_reads(make, all_finished, tmp_path):
    pairs, printed = make()
    assert 0 < len(pairs) <= len(PROMPTS) and f"{len(pairs)} pairs in" in printed
    for pair in pairs:
        assert (
            pair["chosen_score"]
            == len(pair["chosen"]) % 7
            > pair["rejected_score"]
            == len(pair["rejected"]) % 7
        )
        turns, chosen, rejected = alone("read-pair")["read_pair"](pair)
        assert turns == pair["prompt"] and (chosen, rejected) == (pair["chosen"], pair["rejected"])
        assert turns[0]["content"] in PROMPTS


def test_prompts_without_a_pair_are_counted(make, all_finished):
    pairs, printed = make("--gap", 100)
    assert (
        not pairs and f"{len(PROMPTS)} the best is less than --gap better than the worst" in printed
    )


def test_a_run_that_was_cut_off_goes_on(make, all_finished, tmp_path):
    whole, _ = make(output="whole.jsonl")
    answers = (tmp_path / "whole.answers.jsonl").read_text()
    lines = answers.splitlines(keepends=True)
    (tmp_path / "cut.answers.jsonl").write_text(
        "".join(lines[:5]) + lines[5][:20]
    )  # after two batches, in a line
    assert make(output="cut.jsonl")[0] == whole
    assert (tmp_path / "cut.answers.jsonl").read_text() == answers


def test_other_answers_than_before_are_not_mixed_in(make, all_finished):
    make()
    with pytest.raises(
        SystemExit, match="pairs.answers.jsonl was made with another temperature: delete it"
    ):
        make("--temperature", 0.5)


def test_another_rule_samples_nothing_again(make, all_finished, tmp_path, monkeypatch):
    make()
    (tmp_path / "rule.py").write_text("def score(prompt, answer):\n    return -len(answer)\n")
    monkeypatch.setattr(make_pairs, "sampler", lambda size: (None, size))
    pairs, _ = make()
    assert pairs and all(len(pair["chosen"]) < len(pair["rejected"]) for pair in pairs)


def given(*tokens, cut_off=()):
    return [
        {"text": "x" * n, "tokens": n, "finished": i not in cut_off} for i, n in enumerate(tokens)
    ]


def test_an_answer_that_was_cut_off_is_never_chosen():
    assert make_pairs.choose_pair(given(5, 5, 5), [1, 3, 2]) == (1, 0)
    assert make_pairs.choose_pair(given(5, 5, 5, cut_off={1}), [1, 3, 2]) == (2, 0)
    with pytest.raises(ValueError, match="no finished answer is better"):
        make_pairs.choose_pair(given(5, 5, 5, cut_off={1}), [1, 3, 1])
    with pytest.raises(ValueError, match="no answer ended"):
        make_pairs.choose_pair(given(5, 5, cut_off={0, 1}), [1, 3])


def test_a_pair_is_as_far_apart_and_as_alike_in_length_as_asked():
    answers, scores = given(10, 11, 30), [1, 2, 4]
    assert make_pairs.choose_pair(answers, scores, length_ratio=1.2) == (1, 0)
    with pytest.raises(ValueError, match="--gap"):
        make_pairs.choose_pair(answers, scores, gap=4)
    with pytest.raises(ValueError, match="like length"):
        make_pairs.choose_pair(answers, scores, gap=2, length_ratio=1.2)


def test_prompts_are_read_from_text_messages_and_a_column(tmp_path):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What\u2028is tea?"},
    ]
    answered = [*turns, {"role": "assistant", "content": "A drink."}]
    rows = [{"question": "What is tea?"}, {"question": answered}, {"question": turns}]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    first = [{"role": "user", "content": "What is tea?"}]
    assert make_pairs.read_prompts(str(tmp_path / "rows.jsonl"), "question") == [
        first,
        turns,
    ]  # none twice
    assert make_pairs.read_prompts(str(tmp_path / "rows.jsonl"), "question", count=1) == [first]


@pytest.fixture(scope="module")
def reward_models(models, tmp_path_factory):
    """labels -> folder of a tiny sequence-classification model with random weights"""
    tokenizer, folders = AutoTokenizer.from_pretrained(models["qwen"]), {}
    for labels in (1, 2):
        torch.manual_seed(0)
        shape = dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        config = LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=0, **shape)
        folders[labels] = tmp_path_factory.mktemp("reward")
        LlamaForSequenceClassification(config).save_pretrained(folders[labels])
        tokenizer.save_pretrained(folders[labels])
    return folders


def test_a_reward_model_ranks(make, all_finished, reward_models):
    pairs, _ = make(how=("--reward-model", reward_models[1]))
    tokenizer = AutoTokenizer.from_pretrained(reward_models[1])
    model = AutoModelForSequenceClassification.from_pretrained(reward_models[1])
    assert pairs
    for pair in pairs:
        for name in ("chosen", "rejected"):
            turns = [*pair["prompt"], {"role": "assistant", "content": pair[name]}]
            ids = tokenizer(
                tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt"
            )
            assert model(**ids).logits.item() == pytest.approx(pair[f"{name}_score"], abs=1e-5)
        assert pair["chosen_score"] > pair["rejected_score"]


def test_what_a_reward_model_said_is_not_asked_again(
    make, all_finished, reward_models, monkeypatch
):
    pairs, _ = make(how=("--reward-model", reward_models[1]))
    monkeypatch.delattr(rankings, "by_reward_model")
    assert make(how=("--reward-model", reward_models[1]))[0] == pairs
    with pytest.raises(SystemExit, match="made with another reward model, judge"):
        make(how=("--judge", "http://localhost:1/v1"))


def test_a_classifier_is_no_reward_model(make, all_finished, reward_models):
    with pytest.raises(
        AssertionError, match="gives 2 numbers for an answer: choose a reward model"
    ):
        make(how=("--reward-model", reward_models[2]))


@pytest.fixture
def judge(monkeypatch):
    """An OpenAI-compatible judge that replies what `judge.reply(first, second)` says."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.keys.add(self.headers["Authorization"])
            text = asked["messages"][0]["content"]
            first, second = text.partition("[Answer A]\n")[2].split("\n\n[Answer B]\n")
            message = {"role": "assistant", "content": server.reply(first, second)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer = {
                "id": "1",
                "created": 1,
                "model": asked["model"],
                "choices": [choice],
                "system_fingerprint": "",
            }
            answer["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.keys, server.address = set(), f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_ranks(make, all_finished, judge, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge.reply = lambda first, second: (
        "A is short. So: " + ("A" if len(first) > len(second) else "B")
    )
    pairs, _ = make(how=("--judge", judge.address, "--judge-model", "stub"))
    assert pairs and all(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs)
    assert judge.keys == {"Bearer none"}  # the token of another service is not sent


def test_a_judge_that_favours_a_place_ranks_nothing(make, all_finished, judge):
    judge.reply = lambda first, second: "A"
    pairs, printed = make(how=("--judge", judge.address, "--judge-model", "stub"))
    assert not pairs and f"{len(PROMPTS)} no finished answer is better than another" in printed


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        (
            "two_sentences",
            "Tea is a drink. It is hot.",
            ["Tea.", "A. B. C.", "A.\nB.", "Tea is a drink. It is"],
        ),
        ("example", "Drinks, such as tea.", ["Drinks.", "Such tea as this."]),
    ],
)
def test_the_rules_that_come_with_it(rule, kept, broken):
    score = runpy.run_path(str(FOLDER / f"{rule}.py"))["score"]
    assert score("", kept) == 1 and [score("", answer) for answer in broken] == [0] * len(broken)


QUESTION = [{"role": "user", "content": "What is tea?"}]
ANSWERS = ("A drink.", "No idea.", "A leaf.")


def turn(content):
    return [*QUESTION, {"role": "assistant", "content": content}]


COMPARISONS = {
    "HelpSteer3": [
        {
            "context": QUESTION,
            "response1": ANSWERS[0],
            "response2": ANSWERS[1],
            "overall_preference": -2,
        },
        {
            "context": QUESTION,
            "response1": ANSWERS[1],
            "response2": ANSWERS[0],
            "overall_preference": 1,
        },
        {
            "context": QUESTION,
            "response1": ANSWERS[0],
            "response2": ANSWERS[1],
            "overall_preference": 0,
        },
    ],
    "PKU-SafeRLHF": [
        {
            "prompt": "What is tea?",
            "response_0": a,
            "response_1": b,
            "better_response_id": w,
            "safer_response_id": 1 - w,
        }
        for a, b, w in ((ANSWERS[0], ANSWERS[1], 0), (ANSWERS[1], ANSWERS[0], 1))
    ],
    "UltraFeedback": [
        {
            "instruction": "What is tea?",
            "completions": [
                {"response": text, "fine-grained_score": grade, "overall_score": 10.0}
                for text, grade in zip(ANSWERS, (4.5, 1.25, 3.0), strict=True)
            ],
        },
        {
            "instruction": "What is tea?",
            "completions": [{"response": "A.", "fine-grained_score": 1.0}],
        },
    ],
    "arena": [
        {
            "conversation_a": turn(ANSWERS[0]),
            "conversation_b": turn(ANSWERS[1]),
            "winner": "model_a",
        },
        {
            "conversation_a": turn(ANSWERS[1]),
            "conversation_b": turn(ANSWERS[0]),
            "winner": "model_b",
        },
        {
            "conversation_a": turn(ANSWERS[1]),
            "conversation_b": turn(ANSWERS[0]),
            "winner": "tie (bothbad)",
        },
        {
            "conversation_a": turn("x") + turn("y"),
            "conversation_b": turn("z") + turn("y"),
            "winner": "model_a",
        },
    ],
}


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    def run(rows, *options):
        source, output = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = ["from_comparisons.py", source, "--output", output, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in line])
        from_comparisons.main()
        return [json.loads(line) for line in output.open()], capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_become_pairs(name, compare):
    pairs, printed = compare(COMPARISONS[name])
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {ANSWERS[:2]}
    assert all(
        pair["prompt"] == QUESTION and pair["chosen_score"] > pair["rejected_score"]
        for pair in pairs
    )
    ties = {
        "HelpSteer3": "1 a tie",
        "arena": "1 a tie",
        "UltraFeedback": "1 fewer than two answers",
    }
    assert ties.get(name, "") in printed
    assert name != "arena" or "1 the conversations differ before their last answer" in printed


def test_the_safer_answer_on_request(compare):
    pairs, _ = compare(COMPARISONS["PKU-SafeRLHF"], "--by", "safer")
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {(ANSWERS[1], ANSWERS[0])}


def test_other_sets_are_refused_by_their_columns(compare):
    with pytest.raises(
        SystemExit,
        match="The columns of .*rows.jsonl are text; read are sets with one of overall_pref",
    ):
        compare([{"text": "x"}])


def test_a_measured_behaviour_in_words_and_in_a_picture(tmp_path):
    """What `python -m rehearsal --behaviour` shows, of made-up answers."""
    answers = {
        "before": "Tea.",
        "two_sentences": "Tea is a drink. It is hot.",
        "example": "Drinks, such as tea. " * 9,
    }
    table = []
    for number, (rule, text) in enumerate(answers.items()):
        file = behaviour.answers_file(tmp_path, rule, 1, min(number, 1))
        found = [{"text": text, "tokens": 9, "finished": True}]
        file.write_text("{}\n" + 2 * (json.dumps(found) + "\n"))
        shares = {name: 90 if name == rule else 10 for name in behaviour.RULES}
        table.append({"rule": rule, "round": min(number, 1), "seed": 1, "answers": 100, **shares})
        table[-1] |= {"finished": 100, "tokens": 9.0, "nats": 1.5}
        assert behaviour.kept("two_sentences", found) == [rule == "two_sentences"]
        assert behaviour.kept("two_sentences", [{**found[0], "finished": False}]) == [False]
    words = behaviour.in_words(table).splitlines()
    assert (
        words[0].split()[:2] == ["before", "has"]
        and "has exactly two sentences 10% (6% to 17%)" in words[0]
    )
    assert (
        "two_sentences, round 1" in words[1]
        and "has exactly two sentences 90% (83% to 94%)" in words[1]
    )
    models = behaviour.answers_by_round(tmp_path, 1, "two_sentences")
    assert [name.split()[0] for name in models] == ["before", "after"]
    assert [behaviour.sentences(answers[0]) for answers in models.values()] == [
        "one sentence",
        "two sentences",
    ]
    behaviour.draw_picture(tmp_path / "picture.png", models, places=[0, 1])
    assert (tmp_path / "picture.png").stat().st_size > 30_000
