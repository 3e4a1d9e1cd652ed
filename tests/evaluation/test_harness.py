"""lm-evaluation-harness on a steered model, with tasks that read local files; skipped where it is not installed."""

import json
from dataclasses import replace

import pytest

from steermoe.errors import CorpusError, SteeringError, SteerMoEError
from steermoe.evaluation.harness import Tasks, run_tasks, table_rows
from steermoe.evaluation.likelihood import encode_pair, likelihoods
from steermoe.steering.plans import plan_for
from steermoe.vectors.file import write_vector

needs_harness = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("lm_eval"), reason="needs lm-eval: pip install 'steermoe[lm-eval]'"
)
DOCUMENTS = [
    {"question": "what is that", "choices": [" a dog", " b", " some cat"], "answer": 0},
    {"question": "and this one here", "choices": [" c", " d", " e f"], "answer": 2},
    {"question": "hello", "choices": [" there", " x", " you"], "answer": 1},
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{cache}"}}
test_split: test
"""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "writes": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "reads": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def folder(tmp_path):
    """A folder of three tasks on three documents."""
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    own = tmp_path / "tasks"
    own.mkdir()
    for name, what in TASKS.items():
        common = COMMON.format(data=data, cache=tmp_path / "cache")
        (own / f"{name}.yaml").write_text(f"task: own_{name}\n{common}{what}metadata: {{version: 1}}\n")
    return own


@pytest.fixture
def plan(make_vector):
    return plan_for(make_vector(), 60.0, formula="additive", positions="last-prompt")


@needs_harness
def test_tasks_steered_and_unsteered(tiny_model, folder, plan):
    found = run_tasks(tiny_model, plan, Tasks(("own_*",), folder=folder, batch_size=2))
    assert set(found["tasks"]) == {"own_choices", "own_writes", "own_reads"}
    assert (found["model"], found["plan"]["positions"]) == ("tiny-mixtral", "last-prompt")
    choices = found["tasks"]["own_choices"]
    right = []
    for own in (None, plan):  # by hand
        hits = []
        for document in DOCUMENTS:
            pairs = [encode_pair(tiny_model.tokenizer, document["question"], choice) for choice in document["choices"]]
            scores = [one.logprob for one in likelihoods(tiny_model, pairs, own)]
            hits.append(scores.index(max(scores)) == document["answer"])
        right.append(sum(hits) / len(hits))
    accuracy = choices["metrics"]["acc"]
    assert [accuracy["unsteered"], accuracy["steered"]] == pytest.approx(right)
    assert accuracy["difference"]["openings"] == choices["documents"] == 3
    reads = found["tasks"]["own_reads"]["metrics"]
    assert abs(reads["bits_per_byte"]["difference"]["mean"]) > 1e-4
    assert "low" not in reads["bits_per_byte"]["difference"]  # no mean over documents
    rows = table_rows(found)
    assert ["own_choices", "3", "acc"] in [row[:3] for row in rows]
    assert "[" in next(row for row in rows if row[2] == "acc")[5]


@needs_harness
def test_without_a_plan_nothing_is_compared(tiny_model, folder):
    found = run_tasks(tiny_model, None, Tasks(("own_choices",), limit=2, folder=folder))
    task = found["tasks"]["own_choices"]
    assert task["documents"] == 2
    assert set(task["metrics"]["acc"]) == {"unsteered"}


@needs_harness
def test_contexts_that_are_too_long_lose_their_beginning():
    from steermoe.evaluation.harness_model import _cut

    assert _cut([1, 2, 3], [4, 5], 8) == ([1, 2, 3], [4, 5])
    assert _cut([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5])
    assert _cut([1, 2], [4, 5, 6, 7], 3) == ([2], [4, 5, 6, 7])


@needs_harness
def test_what_is_wrong_is_said_in_a_line(tiny_model, folder, plan, tmp_path):
    with pytest.raises(SteerMoEError, match="is no folder of tasks"):
        Tasks(("own_choices",), folder=tmp_path / "missing").find()
    (folder / "choices.yaml").write_text((folder / "choices.yaml").read_text().replace("documents.jsonl", "gone.jsonl"))
    with pytest.raises(CorpusError, match="task 'own_choices' can't be run") as caught:
        run_tasks(tiny_model, None, Tasks(("own_choices",), folder=folder))
    assert "\n" not in str(caught.value)


@needs_harness
@pytest.mark.slow  # the harness reads all of its tasks
def test_unknown_tasks(folder):
    with pytest.raises(SteerMoEError, match="has no task 'nonsense_task'"):
        Tasks(("own_choices", "nonsense_task"), folder=folder).find()
    assert Tasks(("own_choices", "arc_easy"), folder=folder).find()[0] == ["own_choices", "arc_easy"]


@needs_harness
def test_positions_that_steer_no_answer_are_an_error(tiny_model, folder, plan):
    single = [{**document, "choices": ["a", "b", "c"]} for document in DOCUMENTS]
    (folder.parent / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in single))
    with pytest.raises(SteeringError, match=r"none of the \d+ tokens"):
        run_tasks(tiny_model, replace(plan, positions="generated"), Tasks(("own_choices",), folder=folder))


@needs_harness
def test_the_command(run, folder, bare_search_path, tiny_checkpoint, make_vector):
    write_vector(make_vector(), bare_search_path / "steering_vectors" / "tiny-mixtral" / "sport.safetensors")
    arguments = ("lm-eval", "-t", "own_choices", "--tasks-folder", folder, "--model", tiny_checkpoint)
    code, out, err = run(*arguments, "-d", "sport", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["plan"]["positions"] == "last-prompt"
    assert "acc" in found["tasks"]["own_choices"]["metrics"]
    code, out, _ = run(*arguments, "--limit", "1")
    assert (code, out.split()[0]) == (0, "task")


def test_without_the_harness_an_extra_is_named(run, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = run("lm-eval", "-t", "arc_easy")
    assert (code, "pip install 'steermoe[lm-eval]'" in err) == (1, True)
