"""lm-eval's tasks, and the one that needs no network."""

from pathlib import Path

import pytest
import torch

from lrquant.entrypoints.evaluate import evaluate_answers
from lrquant.errors import UsageError
from lrquant.evaluation import check_tasks, run_tasks
from lrquant.loading.pretrained import load_model, load_processor, load_tokenizer
from lrquant.zoo.corpus import documents
from lrquant.zoo.tasks.cloze import ANSWER_WORDS, CHOICES, CONTEXT_WORDS, items
from tests.tiny import write_tiny

pytest.importorskip("lm_eval")


def test_the_questions_are_the_same_every_time_and_from_held_out_text() -> None:
    questions = items()
    assert questions == items()
    assert len(questions) > 300
    held_out = " ".join(" ".join(document.split()) for document in documents("pydoc", "heldout"))
    for question in questions:
        right = question["choices"][question["answer"]]
        assert f"{question['context']} {right}" in held_out
        assert len(question["context"].split()) == CONTEXT_WORDS
        assert len(set(question["choices"])) == CHOICES
        assert {len(choice.split()) for choice in question["choices"]} == {ANSWER_WORDS}
    # The answer's place tells nothing: each is right about as often.
    places = [sum(question["answer"] == place for question in questions) / len(questions) for place in range(CHOICES)]
    assert max(places) < 0.35


def test_the_bundled_model_is_clearly_above_chance_and_a_random_one_is_not(tmp_path: Path) -> None:
    """Chance is 1/4; over 120 questions its standard deviation is 0.04: 0.38 is more than three away."""
    tokenizer = load_tokenizer("zoo:llama")
    accuracy = {}
    for name in ("zoo:llama", str(write_tiny(tmp_path / "random"))):
        found = run_tasks(load_model(name, torch.float32), tokenizer, ["zoo:cloze"], limit=120, batch_size=16)
        assert "zoo_cloze" in found.table
        accuracy[name] = found.results["zoo_cloze"]["acc,none"]
    good, random = accuracy.values()
    assert good > 0.4
    assert random < 0.38


def test_questions_about_pictures_go_through_lm_evals_multimodal_wrapper() -> None:
    """Answers of lm-eval's wrapper are right as often as our own measure says, on the same questions."""
    processor = load_processor("zoo:llava", "image+text")
    model = load_model("zoo:llava", torch.float32)
    found = run_tasks(model, processor, ["zoo:shapes-vqa"], limit=24)
    assert not found.failed
    ours = evaluate_answers(model, ["zoo:shapes-vqa"], 24, processor=processor)["zoo:shapes-vqa"]
    assert found.results["zoo_shapes-vqa"]["exact_match,none"] == pytest.approx(ours.exact_match)


def test_a_model_of_text_is_not_asked_about_pictures(tmp_path: Path) -> None:
    model = load_model(str(write_tiny(tmp_path / "random")), torch.float32)
    found = run_tasks(model, load_tokenizer("zoo:llama"), ["zoo:shapes-vqa"], limit=2)
    assert "could not be run" in found.failed["zoo:shapes-vqa"]
    with pytest.raises(UsageError, match="takes only images"):
        run_tasks(load_model("zoo:vit", torch.float32), None, ["zoo:shapes-vqa"], limit=2)


def test_a_task_out_of_reach_costs_the_others_nothing(tmp_path: Path) -> None:
    """The suite runs offline, so piqa's data cannot be fetched."""
    model = load_model(str(write_tiny(tmp_path / "random")), torch.float32)
    found = run_tasks(model, load_tokenizer("zoo:llama"), ["piqa", "zoo:cloze"], limit=2)
    assert set(found.results) == {"zoo_cloze"}
    assert found.failed["piqa"].startswith("task 'piqa' could not be run")


def test_unknown_tasks_are_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="unknown task 'zoo:nothing'"):
        check_tasks(["zoo:cloze", "zoo:nothing"])
