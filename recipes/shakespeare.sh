#!/usr/bin/env bash
# Tiny Shakespeare (1.1 MB): plays in pieces of 4 kB, and a small model that sees each piece several times.
# Run from the project's root, from a commit: bash recipes/shakespeare.sh
set -euo pipefail

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed

settings=(
    # One file, downloaded once and checked. It is cut at line ends into documents of at most 4 kB, because the split
    # needs several documents.
    -S "collect.sources=[{kind: url, url: '$url', sha256: $sha256}]"
    -S collect.max_document_bytes=4000
    # Little text supports only a small vocabulary, and the model soon overfits: use dropout, and stop early.
    -S tokenize.vocab_size=1024
    -S split.val_fraction=0.1
    -S split.test_fraction=0.0
    -S model.dropout=0.2
    -S train.patience=3
    -S 'train.sample_prompts=["ROMEO:", "First Citizen:"]'
    -S 'evaluate.prompts=["ROMEO:", "JULIET:"]'
)
dvc exp run "${settings[@]}"
