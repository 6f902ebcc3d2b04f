"""The model card that training writes: what it knows, before anything is evaluated."""

from typing import Any

from gptpipe.config import Params
from gptpipe.files import Manifest


def model_card(params: Params, summary: dict[str, Any], lineage: Manifest) -> str:
    """README.md of a model folder, with the metadata header that model hubs read."""
    model, train, val = params.model, params.train, summary["val"]
    origin = "from scratch" if train.init_from is None else f"from the weights in `{train.init_from}`"
    ancestors = "\n".join(f"| {name} | `{digest}` |" for name, digest in sorted(lineage.lineage("split").items()))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gptpipe, {model.architecture}]
---

# gpt

A {model.architecture} language model with {summary["parameters"]:,} parameters, trained {origin} by gptpipe.

- Network: {model.n_layer} layers, width {model.n_embd}, {model.n_head} heads ({model.n_kv_head} for keys and values), \
context of {model.context_length} tokens.
- Training: {summary["steps"]:,} steps of {train.batch_size} sequences, {summary["tokens"]:,} tokens in all; \
{train.optimizer}, learning rate {train.lr:g}, {train.schedule} schedule, seed {params.seed}.
- Best validation, at step {summary["best_step"]:,}: {val["loss"]:.4f} nats per token, perplexity \
{val["perplexity"]:.2f}, {val["bits_per_byte"]:.4f} bits per byte, token accuracy {val["token_accuracy"]:.1%}.
- Red flags: {"; ".join(summary["red_flags"].values()) or "none"}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

## Made from

| | digest |
|---|---|
{ancestors}
"""
