"""From what a model said to a score: pure functions, one for each published definition.

    grade(metric, prediction, row)   what was read from one prediction, and its score in [0, 1]
    summarize(metric, records)       records -> the numbers of a benchmark: overall, per category, per split

    metric            a row's score                           over the rows                          benchmarks
    exact             the same words                          accuracy                               the tiny world
    multiple-choice   the right letter                        accuracy                               SEEDBench, MMMU ...
    circular          the right letter                        right under every order of the options MMBench, CCBench
    yes-no            the right word                          accuracy                               any
    mme               the right word                          accuracy, accuracy+, totals            MME
    hallusion         the right word                          aAcc, fAcc, qAcc                       HallusionBench
    pope              the right word                          F1, accuracy, precision, recall        POPE
    vqa               agreement with ten people               accuracy                               TextVQA
    anls              1 - edit distance, 0 under a half       ANLS                                   DocVQA
    relaxed           within 5% of a number, or the same word accuracy                               ChartQA
    ocrbench          an answer stands in the prediction      accuracy, points                       OCRBench

Numbers over rows are percentages, except where a benchmark counts points. What cannot be read scores 0 and is counted.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable

YES_NO = ("yes-no", "mme", "hallusion", "pope")
CHOICE = ("multiple-choice", "circular")
METRICS = ("exact", *CHOICE, *YES_NO, "vqa", "anls", "relaxed", "ocrbench")
GROUPS = ("l2-category", "category", "split")


def grade(metric: str, prediction: str, row: dict) -> tuple[str | None, float]:
    """(what was read, None if nothing could be; score). row: "answer" a list of references, the options' texts under
    their letters, "category"."""
    references = row["answer"]
    if metric in YES_NO:
        read = read_yes_no(prediction)
        return read, float(read == references[0].strip().lower())
    if metric in CHOICE and options_of(row):
        read = read_choice(prediction, options_of(row))
        return read, float(read == references[0].strip())
    if metric == "ocrbench":
        return prediction, contains_answer(prediction, references, row.get("category", ""))
    score = {"exact": exact_match, "vqa": vqa_accuracy, "anls": anls, "relaxed": relaxed_accuracy}
    return prediction, score.get(metric, open_answer)(prediction, references)       # open: a choice without options


def options_of(row: dict) -> dict[str, str]:
    """letter -> text; an empty cell is no option."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}


# ---- reading an answer ----

def read_choice(prediction: str, options: dict[str, str]) -> str | None:
    """The one option that was meant, or None: a letter first, then an option's text, as in the first step of MMBench's
    own matching (Liu et al. 2023). MMBench asks a language model about the rest; here it stays unread.

    A letter has to stand alone ("B", "(b)", "B. red", "the answer is B"), and only one may; "A dog" begins with an
    article. A text is found as whole words, and only one option's text may be: "red or blue" is no answer.
    """
    bare = prediction.strip(string.whitespace + string.punctuation)
    if len(bare) == 1 and bare.upper() in options:
        return bare.upper()
    same = [letter for letter, text in options.items() if _words(text) == _words(prediction)]
    if same:
        return same[0] if len(same) == 1 else None
    without_article = re.sub(r"\bA(?=\s+(?!(?:or|and|is|but|because)\b)[a-z])", "", prediction)
    letters = set(re.findall(r"(?<![A-Za-z0-9'-])[A-Z](?![A-Za-z0-9'-])", without_article)) & options.keys()
    if letters:
        return letters.pop() if len(letters) == 1 else None
    found = [letter for letter, text in options.items() if _holds(_words(prediction), _words(text))]
    return found[0] if len(found) == 1 else None


def read_yes_no(prediction: str) -> str | None:
    """"yes" or "no" if one of the two words was said and the other was not (VLMEvalKit's rule; MME's own script looks
    at the answer alone or its first letters, POPE's takes whatever is not a no for a yes, which would be a guess)."""
    said = set(re.findall(r"[a-z]+", prediction.lower())) & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


def _words(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").strip()


def _holds(text: str, part: str) -> bool:
    """part stands in text and cuts no word and no number ("3" is not in "13", "3.5" or "-3")."""
    return re.search(rf"(?<![a-z0-9-])(?<![0-9]\.){re.escape(part)}(?!\.?[a-z0-9])", text) is not None


# ---- one answer ----

def exact_match(prediction: str, references: Iterable[str]) -> float:
    """The same text but for white space and a final full stop."""
    plain = lambda text: " ".join(text.split()).removesuffix(".").rstrip()
    return float(plain(prediction) in map(plain, references))


def open_answer(prediction: str, references: Iterable[str]) -> float:
    """MMMU's questions without options (Yue et al. 2023, its evaluation script): a number must be among the numbers
    said, compared after rounding to two places; words must stand in the answer. The script first cuts key phrases
    out of long reasoning; the prompt asks for a word or phrase, so the whole answer is taken."""
    number = r"-?(?:\d+\.\d+|\.?\d+)(?:[eE][+-]?\d+)?"
    said = {round(float(n), 2) for n in re.findall(number, prediction.replace(",", ""))}

    def is_met(reference):
        if re.fullmatch(number, reference.replace(",", "").strip()):
            return round(float(reference.replace(",", "")), 2) in said
        return _words(reference) != "" and _holds(_words(prediction), _words(reference))

    return float(any(map(is_met, references)))


def vqa_accuracy(prediction: str, references: list[str]) -> float:
    """VQA accuracy (Antol et al. 2015; TextVQA, Singh et al. 2019, its challenge's script): min(1, n / 3) where n of
    the other nine people said the same, averaged over leaving out each of the ten. With one reference: equality."""
    said, people = normalize_vqa(prediction), [normalize_vqa(reference) for reference in references]
    if len(people) == 1:
        return float(said == people[0])
    same = people.count(said)
    return sum(min(1, (same - (person == said)) / 3) for person in people) / len(people)


def anls(prediction: str, references: Iterable[str]) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019; DocVQA, Mathew et al. 2021), threshold 0.5, the
    best reference. As in the competition's script case and runs of white space are ignored, lengths are those of
    the texts as they stand, and a similarity of exactly 0.5 counts (the paper's inequality would drop it)."""
    best = 0.0
    for reference in references:
        distance = levenshtein(" ".join(reference.lower().split()), " ".join(prediction.lower().split()))
        longest = max(len(reference), len(prediction))
        best = max(best, 1 - distance / longest if longest else 1.0)
    return best if best >= 0.5 else 0.0


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements from a to b."""
    row = list(range(len(b) + 1))                       # distances from a's beginning to every beginning of b
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def relaxed_accuracy(prediction: str, references: Iterable[str]) -> float:
    """ChartQA (Masry et al. 2022, section 5.1): a number may be 5% off, all else must be the same text, case ignored.
    "12%" is 0.12, and 0 must be met as text, as in the script that the field shares (Pix2Struct's)."""
    def is_met(reference):
        said, meant = _number(prediction.strip()), _number(reference.strip())
        if said is not None and meant:
            return abs(said - meant) <= 0.05 * abs(meant)
        return prediction.strip().lower() == reference.strip().lower()

    return float(any(map(is_met, references)))


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def contains_answer(prediction: str, references: Iterable[str], category: str) -> float:
    """OCRBench (Liu et al. 2023): a reference stands in the prediction, case ignored; in formulas white space is
    ignored and case is not."""
    if category == "Handwritten Mathematical Expression Recognition":
        plain = lambda text: re.sub(r"\s", "", text)
    else:
        plain = lambda text: text.lower().strip().replace("\n", " ")
    return float(any(plain(reference) in plain(prediction) for reference in references if plain(reference)))


# ---- TextVQA's normalisation ----

_NUMBER_WORDS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've
    'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've""".split()
_APOSTROPHE_LOST = {word[:i] + word[i + 1:]: word for word in _CONTRACTIONS
                    for i, letter in enumerate(word) if letter == "'"}     # one apostrophe missing, any of them


def normalize_vqa(text: str) -> str:
    """How TextVQA's challenge reads an answer: lower case; punctuation gone (a space in its place where it stood
    between words); full stops gone except before a digit; numbers as digits; no articles; apostrophes back in place.

        "The Two-door car." -> "2 door car"        "dont" -> "don't"        "$1,000.50" -> "$1000.50"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text                                                          # judged before anything was taken out
    for mark in ';/[]"{}()=+\\_-><@`!':
        text = text.replace(mark, "" if mark + " " in spaced or " " + mark in spaced else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBER_WORDS.get(word, word) for word in text.split()]
    return " ".join(_APOSTROPHE_LOST.get(word, word) for word in words if word not in ("a", "an", "the"))


# ---- many answers ----

def summarize(metric: str, records: list[dict]) -> dict:
    """records: "bad" (why the row could not be asked), or what was asked and said with its "score", and "read".

    -> {"metric", "rows" scored, "bad", "unread", "overall": {name: value}, and for each of GROUPS that the rows have:
    {group: {name: value}}}.
    """
    scored = [r for r in records if "bad" not in r]
    result = {"metric": metric, "rows": len(scored), "bad": len(records) - len(scored),
              "unread": sum(r.get("read", "") is None for r in scored)}
    if metric == "pope":    # one row stands for every kind of negative sampling that it is used in
        scored = [r | {"category": part.strip()} for r in scored for part in r.get("category", "").split(",")]
    result["overall"] = mme_totals(scored) if metric == "mme" else _numbers(metric, scored)
    for column in GROUPS:
        groups = defaultdict(list)
        for record in scored:
            if record.get(column):
                groups[record[column]].append(record)
        if len(groups) > 1 or column != "split" and groups:
            result[column] = {name: _numbers(metric, groups[name]) for name in sorted(groups)}
    return result


def _numbers(metric: str, records: list[dict]) -> dict[str, float]:
    special = {"circular": circular, "mme": mme, "hallusion": hallusion, "pope": pope, "ocrbench": ocrbench}
    if metric in special:
        return special[metric](records)
    return {"ANLS" if metric == "anls" else "accuracy": _percent(r["score"] for r in records), "rows": len(records)}


def _percent(scores: Iterable[float]) -> float:
    scores = list(scores)
    return 100 * sum(scores) / len(scores) if scores else 0.0


def _percent_whole(records: Iterable[dict], key) -> float:
    """Of the groups of records with the same key: those in which every answer is right, in percent."""
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record["score"] == 1)
    return _percent(map(all, groups.values()))


def circular(records: list[dict]) -> dict[str, float]:
    """CircularEval (MMBench, Liu et al. 2023): a question counts if it is answered rightly each time it is
    asked, its options turned by one between the times. The rows of a question are index, index + 1,000,000, ...

    "cut": questions asked fewer times than they have options (--limit, bad rows); they are easier than the rule wants.
    """
    question = lambda r: int(r["index"]) % 1_000_000
    times = Counter(map(question, records))
    asked_for = {question(r): r.get("options", 1) for r in records}
    return {"accuracy": _percent_whole(records, question), "questions": len(times), "rows": len(records),
            "cut": sum(n < asked_for[q] for q, n in times.items())}


MME_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                  "ocr")
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme(records: list[dict]) -> dict[str, float]:
    """MME (Fu et al. 2023, section 2.2): accuracy over questions; accuracy+ over pictures, both of whose two questions
    must be right; a category's score is their sum, at most 200. A picture with one question alone has no accuracy+."""
    questions = Counter(r["picture"] for r in records)
    plus = _percent_whole((r for r in records if questions[r["picture"]] > 1), lambda r: r["picture"])
    accuracy = _percent(r["score"] for r in records)
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy+": plus, "rows": len(records)}


def mme_totals(records: list[dict]) -> dict[str, float]:
    """Sums over MME's ten categories of perception (2000) and four of cognition (800); absent ones add nothing."""
    scores = {name: mme([r for r in records if r.get("category", "").lower() == name])["score"]
              for name in MME_PERCEPTION + MME_COGNITION}
    perception, cognition = (sum(scores[name] for name in names) for names in (MME_PERCEPTION, MME_COGNITION))
    return {"total": perception + cognition, "perception": perception, "cognition": cognition,
            "accuracy": _percent(r["score"] for r in records), "rows": len(records)}


def hallusion(records: list[dict]) -> dict[str, float]:
    """HallusionBench (Guan et al. 2023): aAcc over questions; fAcc over figures, qAcc over questions that are asked of
    several figures: all right. The index ends in ..._set_figure_question; sets are counted within a subcategory."""
    def part(record, which):
        parts = record["index"].split("_")
        return record.get("l2-category"), parts[-3], parts[which]

    return {"aAcc": _percent(r["score"] for r in records), "fAcc": _percent_whole(records, lambda r: part(r, -2)),
            "qAcc": _percent_whole(records, lambda r: part(r, -1)), "rows": len(records)}


def pope(records: list[dict]) -> dict[str, float]:
    """POPE (Li et al. 2023): yes is positive. An unread answer is right nowhere: it costs recall or accuracy."""
    said_yes = sum(r["read"] == "yes" for r in records)
    is_yes = sum(r["answer"][0].strip().lower() == "yes" for r in records)
    hit = sum(r["read"] == "yes" and r["score"] == 1 for r in records)
    precision, recall = hit / said_yes if said_yes else 0.0, hit / is_yes if is_yes else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    return {"F1": 100 * f1, "accuracy": _percent(r["score"] for r in records), "precision": 100 * precision,
            "recall": 100 * recall, "rows": len(records)}


def ocrbench(records: list[dict]) -> dict[str, float]:
    """OCRBench counts points: one a question, 1000 in all."""
    return {"points": sum(r["score"] for r in records), "accuracy": _percent(r["score"] for r in records),
            "rows": len(records)}
