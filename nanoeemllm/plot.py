from nanoeemllm.border.plot import line_chart  # noqa: F401
