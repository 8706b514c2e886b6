"""What benchmarks/against_trl.py is made of.

`lengths` forces completions to the same lengths on both sides, `serve` is vLLM's command with that in it, `ours` is
launch/run.py with that server, `stock` is stock TRL, `offline` the ceiling of generation, `reward` the reward that
both are given, `gpus` looks at the GPUs meanwhile, `results` does the arithmetic and `drawing` the picture.
"""
