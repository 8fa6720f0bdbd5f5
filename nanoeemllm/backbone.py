from nanoeemllm.toy.backbones import make_backbones, tiny_config, tiny_tokenizer  # noqa: F401
