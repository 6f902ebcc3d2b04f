"""The network alone: positions, causality, cache and loss. test_hf_weights compares it with transformers."""

import math
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptpipe.model.cpu_kernels import TanhGELU
from gptpipe.model.gpt import GPT, document_mask, gelu, rotary_tables, rotate

every_architecture = pytest.mark.parametrize(
    "switches", tiny.SWITCHES, ids=lambda s: "-".join(map(str, s.values()))
)


def test_rotary_tables_of_two_frequencies() -> None:
    cos, sin = rotary_tables(n_positions=3, head_dim=4, theta=100.0)
    angles = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.1, 1.0, 0.1], [2.0, 0.2, 2.0, 0.2]])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_rotation_turns_pairs_by_their_angle() -> None:
    cos, sin = (torch.tensor([[f(math.pi / 2), f(math.pi)] * 2]) for f in (math.cos, math.sin))
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])  # the pairs (1, 3) by a quarter turn and (2, 4) by a half
    torch.testing.assert_close(rotate(x, cos, sin), torch.tensor([[[[-3.0, -2.0, 1.0, -4.0]]]]))


def test_attention_scores_depend_on_the_distance_only() -> None:
    cos, sin = rotary_tables(32, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def scored(i: int, j: int) -> torch.Tensor:
        return (rotate(q, cos[i : i + 1], sin[i : i + 1]) * rotate(k, cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(scored(5, 2), scored(30, 27))
    assert not torch.allclose(scored(5, 2), scored(5, 3))


def test_gelu_and_its_gradient_equal_those_of_torch() -> None:
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e15, -200.0, 0.0, 200.0, 1e15])])
    weights = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    result, expected = gelu(ours), F.gelu(theirs, approximate="tanh")
    assert type(result.grad_fn).__name__ == "TanhGELUBackward"
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(result, expected.float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad.float(), atol=5e-6, rtol=1e-6)
    assert torch.autograd.gradcheck(TanhGELU.apply, theirs[400:600].detach().requires_grad_())


@every_architecture
@pytest.mark.parametrize("masking", [False, True], ids=["causal", "document masking"])
def test_no_position_depends_on_later_tokens(switches: dict[str, Any], masking: bool) -> None:
    """The gradient of its logits is exactly zero there, and with a document mask also in other documents."""
    model = tiny.network(**switches)
    tokens = tiny.token_ids(1, 12)
    tokens[0, [3, 4, 8]] = 7  # ends of documents; 4 is a document of one token
    document = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3])
    embedded: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    mask = document_mask(tokens, 7) if masking else None
    logits = model.head(model.hidden(tokens, mask=mask))
    weights = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for t in range(12):
        gradient, *_ = torch.autograd.grad((logits[0, t] * weights).sum(), embedded, retain_graph=True)
        is_seen = torch.arange(12) <= t
        if masking:
            is_seen &= document == document[t]
        assert torch.equal(gradient[0].abs().sum(-1) > 0, is_seen)


@every_architecture
def test_logits_with_a_cache_equal_those_of_a_single_pass(switches: dict[str, Any]) -> None:
    model, tokens = tiny.network(**switches), tiny.token_ids(3, 12)
    cache = model.new_cache(3, 1000)
    with torch.no_grad():
        pieces = [model(tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 12))]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-5, rtol=1e-5)
    assert cache.lengths == [12] * 3


@every_architecture
@pytest.mark.parametrize("vocab_size", [50, 600])
def test_loss_and_its_gradients_equal_those_of_cross_entropy(switches: dict[str, Any], vocab_size: int) -> None:
    """Compared for two sizes of the vocabulary."""
    model = tiny.network(vocab_size, **switches)
    tokens, targets = (tiny.token_ids(20, 16, vocab_size=vocab_size, seed=seed) for seed in (1, 2))

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    loss = model.loss(tokens, targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(loss), gradients(expected), atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [None, "eager"], ids=["own kernel", "as compiled"])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(backend: str | None) -> None:
    model = tiny.network(300)
    tokens, targets = (tiny.token_ids(20, 16, vocab_size=300, seed=seed) for seed in (1, 2))
    weights = list(model.parameters())
    logits = model(tokens).flatten(0, 1)
    cross_entropy = F.cross_entropy(logits, targets.flatten())
    expected = torch.autograd.grad(cross_entropy + 0.1 * logits.logsumexp(-1).square().mean(), weights)
    loss = torch.compile(model.loss, backend=backend) if backend else model.loss
    result = loss(tokens, targets, z_loss=0.1)
    torch.testing.assert_close(result, cross_entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(result, weights), expected, atol=1e-5, rtol=1e-4)


@every_architecture
def test_with_document_masking_each_document_is_scored_as_if_alone(switches: dict[str, Any]) -> None:
    """Learned positions are absolute: only the first document has the same positions as it has alone."""
    model, end = tiny.network(**switches), 49
    tokens = tiny.token_ids(1, 12, vocab_size=49)
    tokens[0, [4, 5, 9]] = end
    with torch.no_grad():
        masked = model.hidden(tokens, mask=document_mask(tokens, end))
        for a, b in ((0, 5), (5, 6), (6, 10), (10, 12)):
            if a and switches["architecture"] == "gpt2":
                continue
            torch.testing.assert_close(masked[:, a:b], model.hidden(tokens[:, a:b]), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(masked[:, 6:], model.hidden(tokens)[:, 6:], atol=1e-2)


def test_loss_with_an_end_of_text_masks_documents() -> None:
    model, end = tiny.network(), 49
    tokens, targets = tiny.token_ids(2, 12, vocab_size=49), tiny.token_ids(2, 12, seed=2)
    tokens[:, 5] = end
    with torch.no_grad():
        logits = torch.cat([model(tokens[:, :6]), model(tokens[:, 6:])], dim=1)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(model.loss(tokens, targets, end_of_text=end), expected)


def test_loss_is_finite_if_the_target_has_almost_no_probability() -> None:
    model = tiny.network()
    with torch.no_grad():
        model.head.weight *= 1e4
    assert math.isfinite(model.loss(tiny.token_ids(2, 8), tiny.token_ids(2, 8, seed=2)).item())


@every_architecture
def test_activation_checkpointing_changes_no_gradient(switches: dict[str, Any]) -> None:
    model = tiny.network(**switches, dropout=0.3).train()
    gradients: list[list[torch.Tensor]] = []
    for recomputes in (False, True):
        model.activation_checkpointing = recomputes
        model.zero_grad()
        torch.manual_seed(0)
        model.loss(tiny.token_ids(2, 16), tiny.token_ids(2, 16, seed=2)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_acts_in_training_only() -> None:
    model, tokens = tiny.network(dropout=0.5), tiny.token_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        assert not torch.equal(model(tokens), model(tokens))


def test_dropout_leaves_attention_its_fast_kernel_on_a_cpu() -> None:
    model = tiny.network(dropout=0.5).train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error if torch cannot use this kernel
        model(tiny.token_ids(1, 8))


@every_architecture
def test_a_new_network_gives_all_tokens_the_same_probability(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = GPT(tiny.model_params(**switches), 200)
    with torch.no_grad():
        loss = model.loss(tiny.token_ids(8, 16, vocab_size=200), tiny.token_ids(8, 16, vocab_size=200, seed=2))
    assert loss.item() == pytest.approx(math.log(200), abs=0.1)


def test_gpt2_small_has_124_million_parameters() -> None:
    """124,439,808 is the number in the literature and in transformers."""
    small = {
        "context_length": 1024,
        "n_layer": 12,
        "n_head": 12,
        "n_kv_head": 12,
        "n_embd": 768,
        "n_inner": 3072,
    }
    with torch.device("meta"):
        assert GPT(tiny.model_params(**small, architecture="gpt2"), 50257).n_parameters() == 124_439_808


@every_architecture
def test_flops_equal_those_that_torch_counts(switches: dict[str, Any]) -> None:
    """torch counts a forward pass; a backward pass takes twice as many."""
    model = tiny.network(**switches)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(tiny.token_ids(2, 16))
    assert model.flops_per_token() == pytest.approx(3 * counter.get_total_flops() / (2 * 16))
