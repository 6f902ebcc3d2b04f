"""Optimizers: who updates what, and what Muon's update is."""

import pytest
import tiny
import torch
from torch import nn

from gptpipe.train.optim import Muon, build_optimizers, orthogonalise, set_lr
from gptpipe.train.params import TrainParams


def section(**changes: object) -> TrainParams:
    return TrainParams(**{**tiny.TRAIN, **changes})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("switches", tiny.SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(
    optimizer: str, switches: dict[str, object]
) -> None:
    model = tiny.network(**switches)
    groups = [group for o in build_optimizers(model, section(optimizer=optimizer)) for group in o.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())  # each once
    for group in groups:
        assert {p.dim() == 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)


def test_muon_updates_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = tiny.network(tie_embeddings=False)
    adamw, muon = build_optimizers(model, section(optimizer="muon"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert found == {
        name for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2
    }


def test_one_step_of_adamw_by_hand() -> None:
    """After bias correction the moments are g and g squared: the update is lr * sign(g), plus weight decay."""
    model = tiny.network(dropout=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, section(lr=0.01, weight_decay=0.5))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        kept = 1 - 0.01 * 0.5 * (p.dim() == 2)
        torch.testing.assert_close(p.detach(), kept * before[name] - 0.01 * p.grad.sign(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 32, 48), (1, 32, 32), (2, 20, 60), (1, 90, 30)])
def test_orthogonalise_moves_singular_values_to_about_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(x)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    moved = (u.mT @ found @ vt.mT).diagonal(dim1=-2, dim2=-1)  # along the directions of x itself
    assert found.shape == x.shape
    assert moved[s > 0.1].min() > 0.6
    assert moved.max() < 1.3


def test_one_step_of_muon_by_hand() -> None:
    """Momentum m = 0.05 g, Nesterov 0.05 g + 0.95 m: all in direction g, with length 0.2 * sqrt(48)."""
    g = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(48, 32, generator=g)) for _ in range(2)]
    before = [w.detach().clone() for w in weights]
    for w in weights:
        w.grad = torch.randn(48, 32, generator=g)
    Muon(weights, lr=0.1, weight_decay=0.5).step()
    for w, old in zip(weights, before, strict=True):
        expected = 0.95 * old - 0.1 * 0.2 * 48**0.5 * orthogonalise(w.grad[None])[0]
        torch.testing.assert_close(w.detach(), expected, atol=1e-4, rtol=1e-3)


def test_muon_treats_queries_keys_and_values_as_three_matrices() -> None:
    """Two query heads of width 16 and one for keys and values: rows 0 to 31, 32 to 47 and 48 to 63."""
    model = tiny.network(architecture="llama", n_embd=32, n_head=2, n_kv_head=1, n_layer=2)
    _, muon = build_optimizers(model, section(optimizer="muon", lr=0.1, weight_decay=0.0))
    blocks = [block.attention.qkv_proj.weight for block in model.blocks]
    before, generator = [w.detach().clone() for w in blocks], torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    muon.step()
    for w, old in zip(blocks, before, strict=True):
        for rows in (slice(0, 32), slice(32, 48), slice(48, 64)):
            alone = nn.Parameter(old[rows].clone())
            alone.grad = w.grad[rows]
            Muon([alone], lr=0.1, weight_decay=0.0).step()
            torch.testing.assert_close(w.detach()[rows], alone.detach())


@pytest.mark.parametrize("shape", [(48, 32), (32, 128), (64, 64)])
def test_muons_update_has_a_root_mean_square_of_about_a_fifth_of_lr(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_momentum_includes_the_previous_step() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    muon = Muon([weight], lr=1.0, weight_decay=0.0)
    first, second = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    weight.grad = first.clone()
    muon.step()
    middle = weight.detach().clone()
    weight.grad = second.clone()
    muon.step()
    momentum = 0.95 * 0.05 * first + 0.05 * second
    torch.testing.assert_close(muon.state[weight]["momentum"], momentum, atol=1e-6, rtol=1e-4)
    expected = middle - 0.2 * 2 * orthogonalise((0.05 * second + 0.95 * momentum)[None])[0]
    torch.testing.assert_close(weight.detach(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "optimizer", "scaled"),
    [
        ({"tie_embeddings": False}, "muon", {"embedding.weight": 15.0, "head.weight": 0.5}),
        ({"tie_embeddings": False}, "adamw", {}),
        ({}, "muon", {}),
        ({"architecture": "gpt2", "n_kv_head": 4}, "muon", {}),
    ],
)
def test_set_lr_scales_the_rate_of_every_group(
    changes: dict[str, object], optimizer: str, scaled: dict[str, float]
) -> None:
    model = tiny.network(**changes)
    optimizers = build_optimizers(model, section(optimizer=optimizer))
    set_lr(optimizers, 0.125)
    found = {id(p): group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        name: 0.125 * scaled.get(name, 1.0) for name, _ in model.named_parameters()
    }
