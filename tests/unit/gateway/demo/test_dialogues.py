"""The dialogues: what is held out stays out, and the same seed writes the same."""

from __future__ import annotations

import json
import random
from itertools import islice

import pytest

from gateway.demo import dialogues
from gateway.demo.dialogues import (
    EXPLANATIONS,
    FACTS,
    FRAMES,
    REQUESTS,
    SMALL_TALK,
    Group,
    held_out_dialogues,
    split,
    training_dialogue,
)


def _training_questions(count: int) -> list[str]:
    rng = random.Random(5)
    drawn = (training_dialogue(rng) for _ in range(count))
    return [message["content"] for dialogue in drawn for message in dialogue.messages if message["role"] == "user"]


def test_no_held_out_question_is_ever_trained_on() -> None:
    trained = {question.lower() for question in _training_questions(20_000)}
    held = [dialogue.messages[-1]["content"].lower() for dialogue in held_out_dialogues(3, 60)]
    assert len(held) > 250
    assert not trained.intersection(held)


@pytest.mark.parametrize("aspect", sorted(FRAMES))
def test_no_held_out_frame_stands_in_a_training_question(aspect: str) -> None:
    heads = [frame.partition("{}")[0].strip().lower() for frame in split(FRAMES[aspect], held=True)]
    names = [name.lower() for fact in FACTS if fact.aspect == aspect for name in fact.names]
    held = [f"{head} {name}" for head in heads for name in names if head]
    kept = [frame.format(name).lower() for frame in split(FRAMES[aspect], held=False) for name in names]
    inside_another = {text for text in held if any(text in longer for longer in kept)}
    questions = _training_questions(4_000)
    for text in set(held) - inside_another:
        assert not any(question.lower().rstrip("?.") == text for question in questions)


@pytest.mark.parametrize("table", [*FRAMES.values(), *(w for w, _ in (*REQUESTS, *EXPLANATIONS, *SMALL_TALK))])
def test_every_table_is_split_into_two_parts_that_share_nothing(table: tuple[str, ...]) -> None:
    trained, held = split(table, held=False), split(table, held=True)
    assert trained
    assert held
    assert not set(trained) & set(held)
    assert (*trained, *held) == table


def test_the_same_seed_writes_the_same_dialogues() -> None:
    first, second = random.Random(9), random.Random(9)
    assert [training_dialogue(first) for _ in range(200)] == [training_dialogue(second) for _ in range(200)]
    assert list(held_out_dialogues(4, 20)) == list(held_out_dialogues(4, 20))


def test_the_answer_to_a_form_is_the_json_of_its_slots() -> None:
    forms = [dialogue for dialogue in held_out_dialogues(2, 40) if dialogue.group is Group.FORM]
    for form in forms:
        fields = json.loads(form.answer)
        assert fields.keys() == {"name", "doctor", "day", "time"}
        assert all(value in form.messages[-1]["content"] for value in fields.values())


def test_every_group_is_trained_on() -> None:
    rng = random.Random(1)
    groups = {training_dialogue(rng).group for _ in islice(range(2_000), 2_000)}
    assert groups == set(Group)


def test_a_question_outside_the_desk_has_the_one_honest_answer() -> None:
    outside = [dialogue for dialogue in held_out_dialogues(2, 30) if dialogue.group is Group.UNKNOWN]
    assert {dialogue.answer for dialogue in outside} == {dialogues.UNKNOWN}
