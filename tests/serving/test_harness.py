"""lm-evaluation-harness as a client of the server: a task that generates, under a model's name with a domain."""

import json
import logging

import httpx
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'steermoe[lm-eval]'")
pytest.importorskip("tenacity", reason="the clients of lm-eval are not installed: pip install 'lm-eval[api]'")

QUESTIONS = ["Once upon a time", "hello"]
TASK = """
task: own_writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "nothing"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def answers(url, model, folder):
    """What the harness is answered, by question."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = lm_eval.simple_evaluate(
        "local-completions",
        model_args={
            "model": model,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": None,
            "tokenized_requests": False,
        },
        tasks=["own_writes"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return {sample["doc"]["question"]: sample["resps"][0][0] for sample in results["samples"]["own_writes"]}


def test_a_task_that_generates(server, tmp_path):
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in QUESTIONS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "writes.yaml").write_text(TASK.format(data=tmp_path / "documents.jsonl", cache=tmp_path / "cache"))
    plain, steered = (answers(server.url, model, folder) for model in ("tiny-mixtral", "tiny-mixtral:sport"))
    for found, model in ((plain, "tiny-mixtral"), (steered, "tiny-mixtral:sport")):
        for question in QUESTIONS:
            body = {"model": model, "prompt": question, "max_tokens": 12, "temperature": 0}
            answer = httpx.post(f"{server.url}/v1/completions", json=body).json()["choices"][0]["text"]
            assert found[question] == answer
    assert plain != steered
