#!/usr/bin/env bash
# Tiny Shakespeare (1.1 MB): a small model that makes several passes over the plays.
# Run it from the project's root, after `git commit`: bash recipes/shakespeare.sh
set -euo pipefail

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed

settings=(
    # One file, downloaded once and checked by its SHA-256. It is cut at line ends into documents of at most 4 kB,
    # because the split distributes whole documents.
    -S "collect.sources=[{kind: url, url: '$url', sha256: $sha256}]"
    -S collect.max_document_bytes=4000
    # A small text supports only a small vocabulary. The model soon overfits: dropout delays this, and the training
    # stops after three validations without improvement.
    -S tokenize.vocab_size=1024
    -S split.val_fraction=0.1
    -S split.test_fraction=0.0
    -S model.dropout=0.2
    -S train.patience=3
    -S 'train.sample_prompts=["ROMEO:", "First Citizen:"]'
    -S 'evaluate.prompts=["ROMEO:", "JULIET:"]'
)
dvc exp run "${settings[@]}"
