#!/usr/bin/env bash
# Your own files: put them into data/sources/ (plain, compressed, or in archives) before you run this.
# Run from the project's root, from a commit: bash recipes/your-text.sh
# For web pages, with the usual filters against menus, lists and spam: FILTERS=web bash recipes/your-text.sh
set -euo pipefail

settings=(
    # Each .txt file is a document, also inside an archive. For JSON lines: {kind: jsonl, paths: [...], text_key: text}
    -S "collect.sources=[{kind: text, paths: ['data/sources/**/*.txt*']}]"
    # Old exports are often not UTF-8: strict stops and says where; replace inserts U+FFFD and counts it.
    -S collect.encoding_errors=strict
    # About 4,096 entries for a megabyte, 16,384 for a hundred.
    -S tokenize.vocab_size=4096
)
if [ "${FILTERS:-}" = web ]; then
    # C4's line and phrase filters, Gopher's quality and repetition filters; reports/collect.md counts what each removes.
    settings+=(
        -S 'collect.filters.drop_lines_with=[javascript,"terms of use","privacy policy","cookie policy","uses cookies","use of cookies","use cookies"]'
        -S collect.filters.drop_lines_below=5
        -S collect.filters.drop_lines_unfinished=true
        -S 'collect.filters.phrases=["lorem ipsum","{"]'
        -S collect.filters.sentences=3
        -S 'collect.filters.words=[50,100000]'
        -S 'collect.filters.mean_word_length=[3,10]'
        -S collect.filters.symbols_per_word=0.1
        -S collect.filters.ellipsis_lines=0.3
        -S collect.filters.bullet_lines=0.9
        -S collect.filters.alphabetic_words=0.8
        -S collect.filters.stop_words=2
        -S 'collect.filters.duplicate_lines=[0.3,0.2]'
        -S 'collect.filters.duplicate_paragraphs=[0.3,0.2]'
        -S 'collect.filters.top_ngrams=[0.2,0.18,0.16]'
        -S 'collect.filters.duplicate_ngrams=[0.15,0.14,0.13,0.12,0.11,0.1]'
    )
fi
dvc exp run "${settings[@]}"
