from qtune.cache import cache_folder
from qtune.evaluate.answer_cache import AnswerCache, question


def test_answers_are_there_for_the_next_process():
    first = AnswerCache("m1")
    first.add(["a", "b"], [[-1.5, True], "text\n\N{LINE SEPARATOR}ü"])
    first.add(["c"], [-2.25])
    again = AnswerCache("m1")
    assert again["a"] == [-1.5, True] and again["b"] == "text\n\N{LINE SEPARATOR}ü"
    assert "c" in again and "d" not in again
    assert "a" not in AnswerCache("m2")


def test_a_line_that_was_cut_off_is_asked_again():
    AnswerCache("cut").add(["a", "b"], [1.0, 2.0])
    path = cache_folder() / "answers/cut.jsonl"
    path.write_text(path.read_text()[:-4])
    found = AnswerCache("cut")
    assert "a" in found and "b" not in found
    found.add(["b"], [3.0])
    again = AnswerCache("cut")
    assert again["a"] == 1.0 and again["b"] == 3.0


def test_questions_differ_by_kind_and_by_all_that_is_asked():
    asked = [
        question("loglikelihood", ("a", "b")),
        question("loglikelihood", ("ab", "")),
        question("generate_until", ("a", "b")),
        question("generate_until", ("a", {"until": ["b"]})),
        question("generate_until", ("a", {"until": ["c"]})),
    ]
    assert len(set(asked)) == 5
    assert question("loglikelihood", ("a", "b")) == asked[0]
