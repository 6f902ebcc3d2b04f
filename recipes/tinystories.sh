#!/usr/bin/env bash
# TinyStories (Eldan and Li, 2023, arXiv:2305.07759): the first 200 MB, streamed from the Hugging Face Hub.
# Before you start: `pip install -e '.[huggingface]'`
# Run it from the project's root, after `git commit`: bash recipes/tinystories.sh
set -euo pipefail

revision=f54c09fd23315a6f9c86f9dc80f725de7d8f9c64 # a commit of the data set, because branches and tags can move

settings=(
    -S "collect.sources=[{kind: huggingface, dataset: roneneldan/TinyStories, revision: $revision, max_bytes: 200000000}]"
    # With this much text, one pass is enough, and so are one percent of the documents for validation and test.
    -S split.val_fraction=0.005
    -S split.test_fraction=0.005
    -S train.epochs=1
    -S train.max_steps=null
    -S train.stride=256
    -S train.batch_size=32
    -S 'train.sample_prompts=["Once upon a time", "One day, Lily"]'
    -S 'evaluate.prompts=["Once upon a time", "Tom and his dog"]'
)
dvc exp run "${settings[@]}"
