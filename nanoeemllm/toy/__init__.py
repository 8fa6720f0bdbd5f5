from nanoeemllm.toy.world import (ToyDataset, WorldConfig, draw, exam, export_llava, export_tsv,
                                  make_scene, make_tokenizer)

__all__ = ["ToyDataset", "WorldConfig", "draw", "exam", "export_llava", "export_tsv", "make_scene",
           "make_tokenizer"]
