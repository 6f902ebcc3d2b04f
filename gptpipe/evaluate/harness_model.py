"""The model as lm-evaluation-harness asks it, and its results on tasks.

The harness could load models/gpt with transformers instead. This adapter is smaller than that way's two further
packages, and scores as all of evaluate does: with our network, in the precision and with the mask of the
training. Prompts are encoded as the harness's adapter for transformers does it: without an end-of-text before
them, unless they are empty.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptpipe.evaluate.likelihoods import Question, likelihoods
from gptpipe.formats.tokenizer import Tokenizer
from gptpipe.model.generate import Sampling
from gptpipe.model.gpt import GPT
from gptpipe.score.scoring import Scoring
from gptpipe.score.text_batch import continue_text

_MAX_NEW_TOKENS = 256  # for a task that does not say it
_BOOTSTRAP = 1000  # samples for the errors of metrics that are no means


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """Answers the three kinds of requests of the harness."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, scoring: Scoring, seed: int) -> None:
        super().__init__()
        self._model, self._tokenizer, self._scoring, self._seed = model, tokenizer, scoring, seed

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would give it."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        questions = [Question(context, target) for _, context, target in requests]
        answers = likelihoods(self._model, questions, self._scoring)
        return [(-answer.nats, answer.is_greedy) for answer in answers]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in consecutive windows of the model's context."""
        return [self._rolling(*request.args) for request in requests]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            self.tok_encode(text), self.eot_token_id, self._model.params.context_length, context_len=1
        )
        questions = [Question(*make_disjoint_window(window)) for window in windows]
        return -sum(answer.nats for answer in likelihoods(self._model, questions, self._scoring))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        is_sampled = options.get("do_sample", False)
        sampling = Sampling(
            temperature=float(options.get("temperature", 1.0)) if is_sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            seed=self._seed,
        )
        n_tokens = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        stop = [until] if isinstance(until, str) else list(until)
        return "".join(continue_text(self._model, self._tokenizer, prompt, n_tokens, sampling, stop))


def run_tasks(lm: HarnessModel, loaded: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """The metrics of each task and group with their standard errors, and a digest of what was asked.

    `loaded` is the result of `gptpipe.harness.tasks.load_tasks`.
    """
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    outcome = evaluate(lm, loaded, bootstrap_iters=_BOOTSTRAP)
    digests = {name: _digest(samples) for name, samples in outcome["samples"].items()}
    groups = outcome.get("group_subtasks", {})
    parts = {part for name, members in groups.items() for part in members if part != name}
    results = {}
    for name, values in {**outcome["results"], **outcome.get("groups", {})}.items():
        members = groups.get(name) or [name]
        results[name] = {
            "metrics": _metrics(values),
            "n_documents": sum(
                outcome["n-samples"][member]["effective"] for member in members if member in digests
            ),
            "n_examples": max(outcome["n-shot"].get(member, 0) for member in members),
            "is_part": name in parts,  # of a group that is also listed
            "digest": _joined(digests[member] for member in members if member in digests),
        }
    return results


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The harness names a metric `acc,none` and its error `acc_stderr,none`; `none` filters the answers."""
    metrics: dict[str, float] = {}
    for name, value in values.items():
        metric, _, answer_filter = name.partition(",")
        if answer_filter and isinstance(value, int | float):
            base = metric.removesuffix("_stderr")
            suffix = "" if answer_filter == "none" else f"_{answer_filter}"
            error = "_standard_error" if metric.endswith("_stderr") else ""
            metrics[f"{base}{suffix}{error}"] = float(value)
    return metrics


def _digest(samples: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the documents, prompts and right answers of a task, in their order."""
    parts = ("doc_hash", "prompt_hash", "target_hash")
    return _joined(str(sample[part]) for sample in samples for part in parts)


def _joined(parts: Any) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
