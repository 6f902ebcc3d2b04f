#!/usr/bin/env bash
# Fine-tune a finished model on your own text.
# Before you start: train a model, for example the default one with `dvc repro`, and put your files into data/sources/.
# Run it from the project's root, after `git commit`: bash recipes/finetune.sh
# It starts from the best registered model. To start from another one: MODEL=models:/gpt/2, or MODEL=data/start/NAME
# At the end it prints the losses of both models on both texts.
set -euo pipefail

model=${MODEL:-models:/gpt@champion}
before=.gptpipe/before-fine-tuning # copies of the old text and the old model, to compare with

settings=(
    -S "collect.sources=[{kind: text, paths: ['data/sources/**/*.txt*']}]"
    # The model keeps its tokens and its shape.
    -S "tokenize.encoding='$model'"
    -S "train.init_from='$model'"
    # A tenth of the learning rate of the first training, and two or three passes over the text. More passes make the
    # model forget the old text, and soon overfit the new one; training stops after two validations without improvement.
    -S train.lr=1.0e-3
    -S train.schedule=linear
    -S train.warmup_steps=20
    -S train.epochs=3
    -S train.max_steps=null
    -S train.eval_every=50
    -S train.save_every=50
    -S train.patience=2
)
if [ -d models/gpt ] && [ ! -d "$before" ]; then
    mkdir -p "$before"
    cp -rL models/gpt "$before/model"
    cp -rL data/split "$before/split"
fi
dvc exp run "${settings[@]}"
if [ -d "$before" ]; then
    for split in "$before/split" data/split; do
        for folder in "$before/model" models/gpt; do
            gptpipe score "$split" --model "$folder"
        done
    done
fi
