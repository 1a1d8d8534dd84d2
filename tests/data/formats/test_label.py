import pytest

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
FORMS = [
    {"messages": [USER, ASSISTANT]},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"prompt": "hi", "completion": "yo"},
    {"instruction": "hi", "output": "yo", "input": ""},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (1, True), ("true", True), ("1", True), (0, False), (" False ", False)],
)
def test_every_form_with_its_label(parts, form, label, good):
    found = parts("auto", {**form, "label": label})
    assert found.messages == [USER, ASSISTANT]
    assert found.label is good
    assert found.plain is isinstance(form.get("prompt"), str)


@pytest.mark.parametrize("label", ["science", 2, None, "", 0.5, [True]])
def test_labels_that_mark_no_answer(fault, label):
    found = fault("auto", {**FORMS[0], "label": label})
    assert found.startswith(f"'label' must say true or false, not {label!r}; where it is no mark")


def test_another_label_is_passed_over_by_naming_the_format(parts):
    assert parts("messages", {**FORMS[0], "label": "science"}).label is None
