"""Every metric against cases worked by hand."""

import pytest

from nanoeemllm.evaluation.metrics import (anls, exact_match, grade,
                                           holds_formula, holds_text, levenshtein, mme_totals,
                                           normalize_vqa, open_match, pope, read_choice,
                                           read_yes_no, relaxed_match, summarize, vqa_accuracy)

OPTIONS = {"A": "red", "B": "dark blue", "C": "3", "D": "3.5"}


@pytest.mark.parametrize("said, read", [
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), (" B\n", "B"), ("**B**", "B"), ("B. dark blue", "B"),
    ("The answer is B", "B"), ("Answer: B, dark blue", "B"),
    ("B, not A", None), ("A or B", None), ("E", None), ("", None), ("A is right", "A"), ("I cannot tell.", None),
    ("red", "A"), ("Red.", "A"), ("It is dark  blue here", "B"), ("a red car", "A"), ("A red car", "A"),
    ("red or dark blue", None), ("redder", None), ("blue", None),
    ("3", "C"), ("3.5", "D"), ("It is 3.5.", "D"), ("13", None), ("-3", None)])
def test_choice(said, read):
    assert read_choice(said, OPTIONS) == read


def test_choice_corners():
    assert read_choice("vitamin C", {"A": "vitamin B", "B": "vitamin C", "C": "iron"}) == "B"  # a text, no letter
    assert read_choice("A", {"A": "B", "B": "A"}) == "A"                                          # the letter first
    assert read_choice("red", {"A": "red", "B": "red"}) is None                                   # a tie
    assert read_choice("T-shirt", {"A": "shirt", "B": "coat"}) is None
    assert read_choice("答案是B。", {"A": "猫", "B": "狗"}) == "B"
    assert read_choice("图中是狗", {"A": "猫", "B": "狗"}) == "B"


def test_yes_no():
    assert [read_yes_no(s) for s in ("Yes", "yes, it is.", "No.", "NO", "yes or no", "not", "nothing", "")] == [
        "yes", "yes", "no", "no", None, None, None, None]


def test_exact():
    assert exact_match(" the cat  is red.", "the cat is red") == 1
    assert exact_match("the cat is Red", "the cat is red") == 0
    assert exact_match("", "red") == 0


@pytest.mark.parametrize("text, plain", [
    ("The Two-door car.", "2 door car"), ("a", ""), ("none", "0"), ("Ten", "10"), ("eleven", "eleven"),
    ("dont", "don't"), ("DON'T", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
    ("$1,000.50", "$1000.50"), ("1.", "1"), (".5", ".5"), ("e.g. this", "eg this"), ("yes , no", "yes no"),
    ("men's", "men 's"), ("a/b", "b"), ("a / b", "b"), ("x/y", "x y"), ("x /y", "x y"), ("one\ntwo\tthree", "1 2 3")])
def test_vqa_normalisation(text, plain):
    assert normalize_vqa(text) == plain


def test_vqa_accuracy():
    # n of ten said it: the n leave one of themselves out, the others do not
    for n, score in ((0, 0), (1, 9 * (1 / 3) / 10), (2, (2 / 3 + 8 * 2 / 3) / 10), (3, (3 * 2 / 3 + 7) / 10), (4, 1)):
        assert vqa_accuracy("two", ["2"] * n + ["other"] * (10 - n)) == pytest.approx(score)
    assert vqa_accuracy("The Cat", ["cat"]) == 1 and vqa_accuracy("", ["cat"]) == 0


def test_anls():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3 and levenshtein("abc", "abc") == 0
    assert anls("Kitten", "kitten") == 1
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert anls("ab", "cb") == 0.5                             # exactly the threshold counts
    assert anls("abc", "xyc") == 0                             # a third is under it
    assert grade("anls", "dog", {"answer": ["cat", "dot"]})[1] == pytest.approx(2 / 3)   # the best of several
    assert anls("", "cat") == 0
    assert anls("a  b", "a b") == 1                            # runs of spaces are one


@pytest.mark.parametrize("said, reference, score", [
    ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("95", "-100", 0),
    ("12%", "0.12", 1), ("12%", "12%", 1), ("12.5%", "12%", 1), ("12", "12%", 0), ("0.12", "12%", 1),
    ("0", "0", 1), ("0.0", "0", 0), ("0.001", "0", 0), ("Yes", "yes", 1), ("yes.", "yes", 0), ("", "5", 0),
    ("nan", "5", 0), ("inf", "5", 0), ("2,000", "2000", 0), (" 7 ", "7", 1)])
def test_relaxed_accuracy(said, reference, score):
    assert relaxed_match(said, reference) == score


def test_ocrbench():
    assert holds_text("The sign says STOP!", "stop") and not holds_text("x ^ 2", "x^2")
    assert holds_formula("x ^ 2 + Y", "x^2+Y") and not holds_formula("x ^ 2 + y", "x^2+Y")
    assert not holds_text("", "a")
    assert not holds_text("anything", "") and not holds_formula("x", "")  # nothing is in everything
    formula = {"category": "Handwritten Mathematical Expression Recognition"}
    for category, score in ((formula, 1), ({"category": "Doc-oriented VQA"}, 0), ({}, 0)):
        assert grade("ocrbench", "x ^ 2", {"answer": ["y", "x^2"]} | category)[1] == score


def test_mmmu_open_questions():
    assert open_match("about 1,234.504 kg", "1234.50")
    assert not open_match("12", "12.5") and not open_match("112", "12")
    assert grade("multiple-choice", "It is the Nile.", {"answer": ["red", "the nile"]})[1] == 1
    assert not open_match("", "nile") and not open_match("anything", "")
    for same in ("5%", "9.09%", "1e-5", ".5", "1,000", "-3.25"):
        assert open_match(same, same)
    assert open_match("1e3", "1000") and open_match("0.5", ".5") and not open_match("3.5", ".5")


def test_grade_reads_by_kind():
    row = {"answer": ["B"], "A": "red", "B": "blue", "C": ""}
    assert grade("multiple-choice", "blue", row) == ("B", 1)
    assert grade("multiple-choice", "C", row) == (None, 0)       # an empty cell is no option
    assert grade("multiple-choice", "the Nile", {"answer": ["Nile"]}) == ("the Nile", 1)
    assert grade("pope", "maybe", {"answer": ["Yes"]}) == (None, 0)
    assert grade("mme", "Yes.", {"answer": ["Yes"]}) == ("yes", 1)


def records(*scores, **columns):
    """Records with these scores; each further column is a list of the same length."""
    return [{"score": score, "read": "x", "answer": ["x"], **{key: values[i] for key, values in columns.items()}}
            for i, score in enumerate(scores)]


def test_circular():
    # question 7 right three times of three; question 8 once wrong; question 9 asked once although it has two options
    rows = records(1, 1, 1, 1, 0, 1, 1,
                   index=["7", "1000007", "2000007", "8", "1000008", "2000008", "9"], options=[3, 3, 3, 3, 3, 3, 2])
    assert summarize("circular", rows)["overall"] == {"accuracy": pytest.approx(200 / 3), "questions": 3, "rows": 7, "cut": 1}


def test_mme():
    # color: picture a both right, b one of two -> accuracy 75, accuracy+ 50; code_reasoning: one picture, both right
    rows = records(1, 1, 1, 0, 1, 1, picture=["a", "a", "b", "b", "a", "a"],
                   category=["color"] * 4 + ["code_reasoning"] * 2)
    result = summarize("mme", rows)
    assert result["category"]["color"] == {"score": 125, "accuracy": 75, "accuracy+": 50, "rows": 4}
    assert result["overall"]["perception"] == 125 and result["overall"]["cognition"] == 200
    assert result["overall"]["total"] == 325
    assert mme_totals(records(1, picture=["a"], category=["OCR"]))["total"] == 100    # half a pair has no accuracy+


def test_hallusion():
    # set 1: figure 0 questions 0, 1; figure 1 questions 0, 1.   one wrong: figure 1, question 1
    rows = records(1, 1, 1, 0, index=[f"VD_chart_1_1_{figure}_{question}" for figure in (0, 1) for question in (0, 1)],
                   **{"l2-category": ["chart"] * 4})
    assert summarize("hallusion", rows)["overall"] == {"aAcc": 75, "fAcc": 50, "qAcc": 50, "rows": 4}


def test_pope():
    # truth yes yes yes no no no; said yes yes no yes no (unread): 2 hits, 3 said yes, 3 are yes
    rows = [{"answer": [answer], "read": read, "score": float(read == answer.lower()), "category": "random,popular"}
            for answer, read in zip(["Yes"] * 3 + ["No"] * 3, ["yes", "yes", "no", "yes", "no", None])]
    result = summarize("pope", rows)
    numbers = result["category"]["popular"]
    assert numbers == {"F1": pytest.approx(200 / 3), "accuracy": 50, "precision": pytest.approx(200 / 3),
                       "recall": pytest.approx(200 / 3), "rows": 6}
    assert result["rows"] == 6 and result["unread"] == 1                 # each row once
    assert result["overall"]["rows"] == 12                               # and once for each kind that it stands for
    assert set(result["category"]) == {"random", "popular"} and result["category"]["random"] == numbers
    assert pope([])["F1"] == 0


def test_summary_says_over_how_many_rows():
    rows = records(1, 0, category=["cat", "dog"], split=["dev", "dev"]) + [{"row": 3, "index": "3", "bad": "..."}]
    result = summarize("exact", rows)
    assert (result["rows"], result["bad"], result["unread"]) == (2, 1, 0)
    assert result["overall"] == {"accuracy": 50, "rows": 2}
    assert result["category"]["cat"] == {"accuracy": 100, "rows": 1}
    assert "split" not in result                                         # one split is no table
    assert summarize("exact", [])["overall"] == {"accuracy": 0, "rows": 0}


def test_ocrbench_points():
    assert summarize("ocrbench", records(1, 1, 0))["overall"]["points"] == 2
    assert summarize("anls", records(1, 0.5))["overall"]["ANLS"] == 75
