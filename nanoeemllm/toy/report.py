"""What a model has learned of the tiny world: scores beside two controls, and a few answers.

    held-out         scenes that no training image and no training text shows
    never-seen       every thing a combination of colour and shape that training lacks
    other picture    held-out questions, each about the next image: what is known without looking
    likeliest word   the answer that is most often right for that kind of question
"""

from collections import Counter, defaultdict

from nanoeemllm.evaluation import GROUPS, evaluate_rows, summarize, table
from nanoeemllm.model import EEMLLM
from nanoeemllm.prompt import encode_prompt
from nanoeemllm.toy.world import WorldConfig, exam


def score(model: EEMLLM, world: WorldConfig, questions: int = 700) -> dict[str, dict]:
    """Exact match in percent: for each column of the table, what metrics.summarize makes of it."""
    model.eval()
    held_out, never_seen = (exam(world, split, questions) for split in ("held-out", "never-seen"))
    return {"held-out": evaluate_rows(model, held_out),
            "never-seen": evaluate_rows(model, never_seen),
            "other picture": evaluate_rows(model, shuffled(held_out)),
            "likeliest word": majority(held_out)}


def shuffled(rows: list[dict]) -> list[dict]:
    """The same questions, each about the next image."""
    images = list({id(row["image"]): row["image"] for row in rows}.values())
    following = dict(zip(map(id, images), images[1:] + images[:1]))
    return [row | {"image": following[id(row["image"])]} for row in rows]


def majority(rows: list[dict]) -> dict:
    """Scores of always giving the answer that is most often right in the row's category."""
    answers = defaultdict(Counter)
    for row in rows:
        answers[row["category"]][row["answer"]] += 1
    scored = []
    for row in rows:
        likeliest = answers[row["category"]].most_common(1)[0][0]
        scored.append(row | {"score": float(row["answer"] == likeliest)})
    return summarize("exact", scored)


def compare(results: dict[str, dict]) -> str:
    """Several results over the same kinds of rows, side by side: the first number of each."""
    lines = defaultdict(dict)
    for name, result in results.items():
        groups = {"overall": result["overall"]}
        for column in GROUPS:
            groups |= result.get(column, {})
        for label, numbers in groups.items():
            lines[label][name] = next(iter(numbers.values()))
    return table(lines)


def show(model: EEMLLM, world: WorldConfig, results: dict[str, dict], answers: int = 7):
    """Prints the table and the model's answers to the first held-out questions."""
    print(f"\nexact match in percent, over {results['held-out']['rows']} questions\n")
    print(compare(results) + "\n")
    template = model.config.chat_template
    for row in exam(world, "held-out", answers):
        ids = encode_prompt(model.tokenizer, "<image>\n" + row["question"], template)
        answer = model.tokenizer.decode(model.generate_batch([ids], [[row["image"]]])[0])
        right = "" if answer == row["answer"] else f"      (it is: {row['answer']})"
        print(f"  {row['question']:44} {answer}{right}")
