"""What a model has learned of the tiny world: scores beside two controls, and a few answers.

    held-out         scenes that no training image and no training text shows
    never-seen       every thing a combination of colour and shape that training lacks
    other picture    held-out questions, each about the next image: what is known without looking
    likeliest word   the answer that is most often right for that kind of question
"""

import statistics
from collections import defaultdict

from nanoeemllm.evaluation import GROUPS, evaluate_rows, summarize, table
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.toy.world import WorldConfig, exam


def score(model: EEMLLM, world: WorldConfig) -> dict[str, dict]:
    """Exact match in percent: for each column of the table, what metrics.summarize makes of it."""
    model.eval()
    held_out = exam(world, "held-out", 700)
    return {"held-out": evaluate_rows(model, held_out),
            "never-seen": evaluate_rows(model, exam(world, "never-seen", 700)),
            "other picture": evaluate_rows(model, shuffled(held_out)),
            "likeliest word": majority(held_out)}


def shuffled(rows: list[dict]) -> list[dict]:
    """The same questions, each about the next image."""
    images = list({id(row["image"]): row["image"] for row in rows}.values())
    following = dict(zip(map(id, images), images[1:] + images[:1]))
    return [row | {"image": following[id(row["image"])]} for row in rows]


def majority(rows: list[dict]) -> dict:
    """Scores of always giving the answer that is most often right in the row's category."""
    answers = defaultdict(list)
    for row in rows:
        answers[row["category"]].append(row["answer"])
    likeliest = {kind: statistics.mode(found) for kind, found in answers.items()}
    scored = [row | {"score": row["answer"] == likeliest[row["category"]]} for row in rows]
    return summarize("exact", scored)


def compare(results: dict[str, dict]) -> str:
    """Several results over the same kinds of rows, side by side."""
    lines = defaultdict(dict)
    for name, result in results.items():
        groups = {"overall": result["overall"]}
        for column in GROUPS:
            groups |= result.get(column, {})
        for label, numbers in groups.items():
            lines[label][name] = numbers["accuracy"]
    return table(lines)


def show(model: EEMLLM, world: WorldConfig, results: dict[str, dict]):
    """Prints the table and the model's answers to the first held-out questions."""
    print(f"\nexact match in percent, over {results['held-out']['rows']} questions\n")
    print(compare(results) + "\n")
    for row in exam(world, "held-out", 7):
        ids = encode_prompt(model.tokenizer, "<image>\n" + row["question"],
                            model.config.chat_template)
        answer = model.tokenizer.decode(model.generate(ids, [row["image"]]))
        right = "" if answer == row["answer"] else f"      (it is: {row['answer']})"
        print(f"  {row['question']:44} {answer}{right}")
