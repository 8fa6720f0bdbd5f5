"""From a model's answers to scores: pure functions, one for each published definition.

    grade(metric, prediction, row)   what was read from one answer, and its score in [0, 1]
    summarize(metric, records)       all answers -> a benchmark's numbers, overall and by group

Numbers are percentages, except where a benchmark counts points. An answer that cannot be read
scores 0 and is counted as unread. README.md says which benchmark is scored by which metric.
"""

import math
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterable

YES_NO = ("yes-no", "mme", "hallusion", "pope")
CHOICE = ("multiple-choice", "circular")
GROUPS = ("l2-category", "category", "split")     # columns by which scores are broken down
FORMULAS = "Handwritten Mathematical Expression Recognition"       # a category of OCRBench


def grade(metric: str, prediction: str, row: dict) -> tuple[str | None, float]:
    """(what was read, None if nothing could be; score). row: "answer" a list of references, the
    options' texts under their letters, "category"."""
    references, options = row["answer"], options_of(metric, row)
    if options:
        read = read_yes_no(prediction) if metric in YES_NO else read_choice(prediction, options)
        return read, float((read or "").lower() == references[0].strip().lower())
    if metric == "vqa":
        return prediction, vqa_accuracy(prediction, references)
    score, _, _ = METRICS[metric]
    if metric == "ocrbench" and row.get("category") == FORMULAS:
        score = holds_formula
    return prediction, float(max(score(prediction, reference) for reference in references))


def options_of(metric: str, row: dict) -> dict[str, str]:
    """What may be answered: letter -> text, where an empty cell is no option; or yes and no. None:
    anything."""
    if metric in YES_NO:
        return {"yes": "yes", "no": "no"}
    letters = string.ascii_uppercase if metric in CHOICE else ""
    return {letter: row[letter] for letter in letters if row.get(letter)}


# ---- reading an answer ----

def read_choice(prediction: str, options: dict[str, str]) -> str | None:
    """The one option that was meant, or None: by its letter, else by its text, as in the first step
    of MMBench's matching (Liu et al. 2023). MMBench asks a language model about the rest.

    A letter has to stand alone ("B", "(b)", "B. red", "the answer is B") and be the only one; the
    article of "A dog" is none. A text is found as whole words, and only one option's may be.
    """
    bare = prediction.strip(string.whitespace + string.punctuation).upper()
    article = r"\bA(?=\s+(?!(?:or|and|is|but|because)\b)[a-z])"
    alone = r"(?<![A-Za-z0-9'-])[A-Z](?![A-Za-z0-9'-])"
    letters = re.findall(alone, re.sub(article, "", prediction))
    said, texts = _plain(prediction.lower()), {x: _plain(options[x].lower()) for x in options}
    for found in ([x for x in options if x == bare],
                  [x for x in options if texts[x] == said],
                  [x for x in options if x in letters],
                  [x for x in options if _holds(said, texts[x])]):
        if found:
            return found[0] if len(found) == 1 else None
    return None


def read_yes_no(prediction: str) -> str | None:
    """"yes" or "no" if that word was said and the other was not: VLMEvalKit's rule. (POPE's own
    script takes whatever is not a no for a yes, which would be a guess.)"""
    said = set(re.findall(r"[a-z]+", prediction.lower())) & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


def _plain(text: str) -> str:
    """White space and a final full stop mean nothing."""
    return " ".join(text.split()).removesuffix(".").rstrip()


def _holds(text: str, part: str) -> bool:
    """part is in text and cuts no word or number in two ("3" is not in "13", "3.5" or "-3")."""
    pattern = rf"(?<![a-z0-9-])(?<![0-9]\.){re.escape(part)}(?!\.?[a-z0-9])"
    return re.search(pattern, text) is not None


# ---- one answer and one reference; of several references the best counts ----

def exact_match(prediction: str, reference: str) -> bool:
    return _plain(prediction) == _plain(reference)


def open_match(prediction: str, reference: str) -> bool:
    """Choices without options, as in MMMU (Yue et al. 2023, its script): a number must be among
    the numbers said, rounded to two places; words must stand in the answer."""
    number = r"-?(?:\d+\.\d+|\.?\d+)(?:[eE][+-]?\d+)?"
    plain = reference.replace(",", "").strip()
    if re.fullmatch(number, plain):
        said = re.findall(number, prediction.replace(",", ""))
        return any(round(float(n), 2) == round(float(plain), 2) for n in said)
    meant = _plain(reference.lower())
    return meant != "" and _holds(_plain(prediction.lower()), meant)


def anls(prediction: str, reference: str) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019; DocVQA, Mathew et al. 2021). As
    in the competition's script, case and runs of white space are ignored, lengths are those of the
    texts as they are, and a similarity of just 0.5 counts."""
    texts = (" ".join(text.lower().split()) for text in (reference, prediction))
    similarity = 1 - levenshtein(*texts) / max(len(reference), len(prediction), 1)
    return similarity if similarity >= 0.5 else 0.0


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))                    # distances from a prefix of a to all of b's
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(before[j + 1] + 1, row[j] + 1, before[j] + (x != y)))
    return row[-1]


def relaxed_match(prediction: str, reference: str) -> bool:
    """ChartQA (Masry et al. 2022, section 5.1): a number may be 5% off; all else must be equal but
    for case. "12%" is 0.12 and a 0 is compared as text, as in Pix2Struct's script."""
    prediction, reference = prediction.strip().lower(), reference.strip().lower()
    said, meant = _number(prediction), _number(reference)
    if meant and math.isfinite(said + meant):
        return abs(said - meant) <= 0.05 * abs(meant)
    return prediction == reference


def _number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return math.nan


def holds_text(prediction: str, reference: str) -> bool:
    """OCRBench (Liu et al. 2023): the reference stands in the answer, case ignored."""
    meant = reference.lower().strip().replace("\n", " ")
    return meant != "" and meant in prediction.lower().replace("\n", " ")


def holds_formula(prediction: str, reference: str) -> bool:
    """The same of OCRBench's formulas: white space is ignored and case is not."""
    meant = "".join(reference.split())
    return meant != "" and meant in "".join(prediction.split())


# ---- agreement with ten people ----

def vqa_accuracy(prediction: str, references: list[str]) -> float:
    """VQA accuracy (Antol et al. 2015; TextVQA's script): min(1, n / 3) where n of the other nine
    people said the same, averaged over leaving out each of the ten. One reference: equality."""
    said, people = normalize_vqa(prediction), list(map(normalize_vqa, references))
    same = people.count(said)
    if len(people) == 1:
        return float(same)
    return sum(min(1, (same - (person == said)) / 3) for person in people) / len(people)


_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
_VQA_WORDS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                      "0 0 1 2 3 4 5 6 7 8 9 10".split()), a="", an="", the="")
for _word in _CONTRACTIONS:                          # one apostrophe missing, any of them
    for _mark in re.finditer("'", _word):
        _VQA_WORDS[_word[:_mark.start()] + _word[_mark.end():]] = _word


def normalize_vqa(text: str) -> str:
    """How TextVQA's challenge reads an answer: lower case; punctuation gone, or a space where it
    stood between words; numbers as digits; no articles; lost apostrophes put back.

        "The Two-door car." -> "2 door car"     "dont" -> "don't"     "$1,000.50" -> "$1000.50"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = original = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        beside_space = mark + " " in original or " " + mark in original
        text = text.replace(mark, "" if beside_space else " ")
    words = re.sub(r"\.(?!\d)", "", text).split()
    return " ".join(filter(None, (_VQA_WORDS.get(word, word) for word in words)))


# ---- many answers ----

def summarize(metric: str, records: list[dict]) -> dict:
    """records: "bad" (why the row could not be asked), or what was asked and answered, its "score",
    and "read".

    -> {"metric", "rows" scored, "bad", "unread", "overall": {name: value}}, and for each of GROUPS
    that the rows have {group: {name: value}}.
    """
    scored = [r for r in records if "bad" not in r]
    result = {"metric": metric, "rows": len(scored), "bad": len(records) - len(scored),
              "unread": sum(r.get("read", "") is None for r in scored)}
    if metric == "pope":               # a row stands for every kind of negative that it is used in
        scored = [r | {"category": kind.strip()} for r in scored
                  for kind in r.get("category", "").split(",")]
    _, mean, more = METRICS[metric]
    result["overall"] = numbers(scored, mean, mme_totals if metric == "mme" else more)
    for column in GROUPS:
        groups = group_by(lambda r: r[column], [r for r in scored if r.get(column)])
        if len(groups) > 1 or column != "split" and groups:
            result[column] = {name: numbers(groups[name], mean, more) for name in sorted(groups)}
    return result


def numbers(records: list[dict], mean: str, more: Callable | None) -> dict[str, float]:
    """name -> value: the mean score, under its name, and more. What is more may replace it."""
    found = {} if more is None else more(records)
    return {mean: percent(r["score"] for r in records), **found, "rows": len(records)}


def group_by(key: Callable, records: Iterable[dict]) -> dict:
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def percent(scores: Iterable[float]) -> float:
    scores = list(scores)
    return 100 * sum(scores) / len(scores) if scores else 0.0


def all_right(groups: Iterable[list[dict]]) -> float:
    """Percentage of the groups in which every answer is right."""
    return percent(all(r["score"] == 1 for r in group) for group in groups)


def circular(records: list[dict]) -> dict[str, float]:
    """CircularEval (MMBench, Liu et al. 2023): a question counts if it is answered rightly in every
    order of its options. The rows of a question are index, index + 1,000,000, ...

    "cut": questions asked fewer times than they have options (--limit, bad rows), so too easy.
    """
    questions = group_by(lambda r: int(r["index"]) % 1_000_000, records).values()
    cut = sum(len(asked) < asked[0].get("options", 1) for asked in questions)
    return {"accuracy": all_right(questions), "questions": len(questions), "cut": cut}


MME = {"perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                      "landmark", "artwork", "ocr"),
       "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                     "code_reasoning")}


def mme(records: list[dict]) -> dict[str, float]:
    """MME (Fu et al. 2023, section 2.2): a category's score, at most 200, is accuracy over
    questions plus accuracy+ over pictures, both of whose two questions must be right."""
    pictures = group_by(lambda r: r["picture"], records).values()
    plus = all_right(asked for asked in pictures if len(asked) > 1)
    return {"score": percent(r["score"] for r in records) + plus, "accuracy+": plus}


def mme_totals(records: list[dict]) -> dict[str, float]:
    """Sums over MME's ten categories of perception (2000) and four of cognition (800)."""
    groups = group_by(lambda r: r.get("category", "").lower(), records)
    totals = {kind: sum(mme(groups[name])["score"] for name in names)
              for kind, names in MME.items()}
    return {"total": sum(totals.values()), **totals}


def hallusion(records: list[dict]) -> dict[str, float]:
    """HallusionBench (Guan et al. 2023): aAcc over questions; fAcc over figures and qAcc over
    questions asked of several figures, all right. The index ends in _set_figure_question."""
    def all_right_by(part: int) -> float:
        def key(record):
            index = record["index"].split("_")
            return record.get("l2-category"), index[-3], index[part]
        return all_right(group_by(key, records).values())

    return {"fAcc": all_right_by(-2), "qAcc": all_right_by(-1)}


def pope(records: list[dict]) -> dict[str, float]:
    """POPE (Li et al. 2023): yes is positive. An unread answer is right nowhere."""
    said_yes = [r["score"] for r in records if r["read"] == "yes"]
    hits, is_yes = sum(said_yes), sum(r["answer"][0].strip().lower() == "yes" for r in records)
    return {"F1": 200 * hits / max(len(said_yes) + is_yes, 1), "precision": percent(said_yes),
            "recall": 100 * hits / max(is_yes, 1)}


def points(records: list[dict]) -> dict[str, float]:
    return {"points": sum(r["score"] for r in records)}


# metric -> score of an answer beside a reference, what the mean score is called, and what else is
# counted over all answers
METRICS = {
    "exact": (exact_match, "accuracy", None), "multiple-choice": (open_match, "accuracy", None),
    "circular": (open_match, "accuracy", circular), "yes-no": (None, "accuracy", None),
    "mme": (None, "accuracy", mme), "hallusion": (None, "aAcc", hallusion),
    "pope": (None, "accuracy", pope), "vqa": (None, "accuracy", None),
    "anls": (anls, "ANLS", None), "relaxed": (relaxed_match, "accuracy", None),
    "ocrbench": (holds_text, "accuracy", points)}
