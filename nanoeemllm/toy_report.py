"""What a model has learned of the tiny world: a table of scores beside their controls, and a few answers to read.

    held-out         scenes that no training picture and no training text shows
    never-seen       every thing a combination of colour and shape that training lacks
    other picture    the held-out questions, each about the next picture: what can be known without looking
    likeliest word   the answer that is most often right for that kind of question
"""

from collections import Counter

from nanoeemllm.evaluation import GROUPS, evaluate_rows, summarize, table
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.toy import WorldConfig, exam


def score(model: EEMLLM, world: WorldConfig, questions: int = 700) -> dict[str, dict]:
    """Exact match in percent, overall, per kind of question and per number of things: metrics.summarize of each."""
    rows = {split: [{"image": e.picture, "question": e.question, "answer": e.answer, "category": e.kind,
                     "l2-category": f"{e.number} in the picture"} for e in exam(world, split, questions)]
            for split in ("held-out", "never-seen")}
    model.eval()
    return {"held-out": evaluate_rows(model, rows["held-out"]),
            "never-seen": evaluate_rows(model, rows["never-seen"]),
            "other picture": evaluate_rows(model, shuffled(rows["held-out"])),
            "likeliest word": majority(rows["held-out"])}


def shuffled(rows: list[dict]) -> list[dict]:
    """The same questions, each about the next picture."""
    pictures = list({id(row["image"]): row["image"] for row in rows}.values())
    after = {id(picture): pictures[(i + 1) % len(pictures)] for i, picture in enumerate(pictures)}
    return [row | {"image": after[id(row["image"])]} for row in rows]


def majority(rows: list[dict]) -> dict:
    """Scores of always saying what is most often right in the row's category."""
    right: dict[str, Counter] = {}
    for row in rows:
        right.setdefault(row["category"], Counter())[row["answer"]] += 1
    said = {category: answers.most_common(1)[0][0] for category, answers in right.items()}
    return summarize("exact", [row | {"score": float(said[row["category"]] == row["answer"])} for row in rows])


def compare(results: dict[str, dict]) -> str:
    """Several results over the same kinds of rows, side by side: the first number of each."""
    lines = {}
    for name, result in results.items():
        groups = {"overall": result["overall"]}
        for column in GROUPS:
            groups |= result.get(column, {})
        for label, numbers in groups.items():
            lines.setdefault(label, {})[name] = next(iter(numbers.values()))
    return table(lines)


def show(model: EEMLLM, world: WorldConfig, results: dict[str, dict], answers: int = 7):
    """Prints the table and what the model says to the first questions of the held-out split."""
    print(f"\nexact match in percent, over {results['held-out']['rows']} questions\n\n{compare(results)}\n")
    asked = exam(world, "held-out", answers)
    prompts = [encode_prompt(model.tokenizer, "<image>\n" + e.question, model.config.chat_template) for e in asked]
    for e, ids in zip(asked, model.generate_batch(prompts, [[e.picture] for e in asked])):
        said = model.tokenizer.decode(ids)
        print(f"  {e.question:44} {said}" + ("" if said == e.answer else f"      (it is: {e.answer})"))
