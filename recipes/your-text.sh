#!/usr/bin/env bash
# Your own files: put them into data/sources/ (plain, compressed, or in archives) before you run this.
# Run from the project's root, from a commit: bash recipes/your-text.sh
set -euo pipefail

settings=(
    # Every .txt is a document; an archive's files are too. For lines of JSON: {kind: jsonl, paths: [...], text_key: text}
    -S "collect.sources=[{kind: text, paths: ['data/sources/**/*.txt*']}]"
    # Old exports are often not UTF-8: strict stops and says where, replace puts U+FFFD and counts.
    -S collect.encoding_errors=strict
    # About 4,096 entries for a megabyte, 16,384 for a hundred.
    -S tokenize.vocab_size=4096
)
dvc exp run "${settings[@]}"
