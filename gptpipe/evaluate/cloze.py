"""Cloze: can the model complete the last word of a sentence, given the text before it?

The measures are those of LAMBADA (Paperno et al., 2016, arXiv:1606.06031), on held-out documents: accuracy, the
share of words that greedy decoding gives, and perplexity per word. LAMBADA's words can be guessed from their
passage by people; here no one has chosen them, so no model gets all of them.
"""

import math
from typing import Any

import numpy as np

from gptpipe.evaluate.likelihoods import Question, likelihoods
from gptpipe.evaluate.sentences import MAX_WORDS, MIN_WORDS, Sentence, mean_over_documents
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.gpt import GPT
from gptpipe.score.scoring import Scoring

MAX_PASSAGES = 256
PASSAGE_TOKENS = 128  # at most, the last word included; less if the context of the model is shorter
_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer's mean, so that a passage is rarely too short


def cloze(
    model: GPT, tokenizer: Tokenizer, sentences: list[Sentence], scoring: Scoring, seed: int
) -> dict[str, Any]:
    """Accuracy and perplexity of last words, with their standard errors over documents.

    Both are None, with a reason, if there is no passage: in scripts without spaces, tokens do not end where
    words do.
    """
    n_tokens = min(PASSAGE_TOKENS, model.params.context_length)
    documents: list[int] = []
    questions: list[Question] = []
    for i in np.random.default_rng(seed).permutation(len(sentences)):
        question = _question(sentences[i], tokenizer, n_tokens)
        if question is not None:
            documents.append(sentences[i].document)
            questions.append(question)
        if len(questions) == MAX_PASSAGES:
            break
    if not questions:
        reason = (
            f"no sentence of {MIN_WORDS} to {MAX_WORDS} words ends with a word that follows a space "
            "and has tokens of its own"
        )
        return {"accuracy": None, "perplexity": None, "reason": reason}
    answers = likelihoods(model, questions, scoring)
    accuracy, accuracy_error = mean_over_documents([answer.is_greedy for answer in answers], documents)
    loss, loss_error = mean_over_documents([answer.nats for answer in answers], documents)
    perplexity = math.exp(min(loss, 700.0))  # finite, because JSON has no infinity
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": accuracy_error,
        "perplexity": perplexity,
        "perplexity_standard_error": perplexity * loss_error,
        "n_passages": len(questions),
        "n_documents": len(set(documents)),
    }


def _question(sentence: Sentence, tokenizer: Tokenizer, n_tokens: int) -> Question | None:
    """The last word with the space before it, and the end of the text before it.

    None if the word follows no space, or if the tokens of the text and of the word, each encoded alone, are not
    those of both together: a model never saw such tokens.
    """
    word, text = sentence.words[-1], sentence.text
    space = word.start - 1
    if not word.is_spaced or text[space] != " ":
        return None
    start = max(0, space - _CHARACTERS_PER_TOKEN * n_tokens)
    context, target = tokenizer.encode(text[start:space]), tokenizer.encode(text[space : word.end])
    if len(target) >= n_tokens or tokenizer.encode(text[start : word.end]) != context + target:
        return None
    return Question([tokenizer.end_of_text, *context][len(target) - n_tokens :], target)
