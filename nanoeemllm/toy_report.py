from nanoeemllm.toy.report import compare, majority, score, show, shuffled  # noqa: F401
