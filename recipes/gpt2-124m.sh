#!/usr/bin/env bash
# GPT-2 small (124 M parameters) on 10 billion tokens, on eight GPUs. Put Parquet files of text, such as FineWeb-Edu, into
# data/sources/. Estimated at one hour on eight H100 (docs/scaling.md); we have not run it.
# Needs `pip install -c constraints.txt -e '.[offline]'`. Run from the project's root, from a commit: bash recipes/gpt2-124m.sh
# On one GPU: LAUNCHER=python bash recipes/gpt2-124m.sh
set -euo pipefail

settings=(
    -S "collect.sources=[{kind: parquet, paths: ['data/sources/**/*.parquet']}]"
    -S tokenize.encoding=gpt2
    # One document in a thousand is enough for validation: there are about ten million.
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
    # GPT-3's learning rate and schedule for this size (Brown et al., 2020, table 2.1 and appendix B); 524,288 tokens a step.
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
