"""Minimal pairs: does the model find a real sentence likelier than the same one with two words swapped?

The pairs are made from held-out documents, so they need no download and fit any language. BLiMP (Warstadt et
al., 2020, arXiv:1912.00582) measures in the same way which of two sentences a model finds likelier, but its
pairs differ in grammar alone. A model that guesses has an accuracy of 0.5.
"""

from typing import Any

import numpy as np

from gptpipe.evaluate.likelihoods import Question, likelihoods
from gptpipe.evaluate.sentences import MAX_WORDS, MIN_WORDS, Sentence, mean_over_documents
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.gpt import GPT
from gptpipe.score.scoring import Scoring

MAX_PAIRS = 256


def minimal_pairs(
    model: GPT, tokenizer: Tokenizer, sentences: list[Sentence], scoring: Scoring, seed: int
) -> dict[str, Any]:
    """The share of pairs whose real sentence is likelier, with its standard error over documents.

    Each sentence is scored as the start of a document. Two equally likely ones count as half. The accuracy is
    None, with a reason, if no sentence can be used.
    """
    random = np.random.default_rng(seed)
    sentences = [sentence for sentence in sentences if _can_be_swapped(sentence)]
    documents: list[int] = []
    questions: list[Question] = []
    for i in random.permutation(len(sentences)):
        texts = (sentences[i].text[sentences[i].start : sentences[i].end], swap_words(sentences[i], random))
        pair = [Question([tokenizer.end_of_text], tokenizer.encode(text)) for text in texts]
        if max(len(question.target) for question in pair) <= model.params.context_length:
            documents.append(sentences[i].document)
            questions += pair
        if len(documents) == MAX_PAIRS:
            break
    if not documents:
        return {
            "accuracy": None,
            "reason": f"no sentence has {MIN_WORDS} to {MAX_WORDS} words, two of them different, "
            f"and fits into {model.params.context_length} tokens",
        }
    nats = np.array([answer.nats for answer in likelihoods(model, questions, scoring)]).reshape(-1, 2)
    hits = (nats[:, 0] < nats[:, 1]) + 0.5 * (nats[:, 0] == nats[:, 1])
    accuracy, error = mean_over_documents(hits, documents)
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": error,
        "n_pairs": len(documents),
        "n_documents": len(set(documents)),
    }


def _can_be_swapped(sentence: Sentence) -> bool:
    return len({_folded(sentence, i) for i in range(1, len(sentence.words))}) > 1


def _folded(sentence: Sentence, i: int) -> str:
    """A word without its case: a swap of `The` and `the` would be no error."""
    word = sentence.words[i]
    return sentence.text[word.start : word.end].casefold()


def swap_words(sentence: Sentence, random: np.random.Generator) -> str:
    """The sentence with two different words swapped. The first word stays, its capital letter would tell."""
    indices = range(1, len(sentence.words))
    one = int(random.choice(indices))
    other = int(random.choice([i for i in indices if _folded(sentence, i) != _folded(sentence, one)]))
    first, second = (sentence.words[i] for i in sorted((one, other)))
    text = sentence.text
    return (
        text[sentence.start : first.start]
        + text[second.start : second.end]
        + text[first.end : second.start]
        + text[first.start : first.end]
        + text[second.end : sentence.end]
    )
