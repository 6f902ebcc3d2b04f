"""One new token for each of several sequences: the network of gpt.py in fewer and larger operations.

For a single token, the arithmetic of a small network takes less time than starting its operations does. So
this does the same with a third of them. Queries and keys are normalised and rotated together, a residual is
added by the matrix product before it, and an RMSNorm takes four operations instead of torch's seven. Sequences
are columns, because two threads multiply (out, in) by (in, 16) a fifth faster than the other way around.

Shapes as in gpt.py, and G for the query heads of one key head.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpipe.model.gpt import GPT, Block, CacheUpdate, KVCache


class Decoder:
    """A network without dropout. It shares the matrices of the model."""

    def __init__(self, model: GPT) -> None:
        self._embedding = model.embedding.weight
        self._positions: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        if model.params.architecture == "gpt2":
            self._positions = model.position_embedding.weight
        else:
            self._rotary = _signed_tables(model.get_buffer("rotary_cos"), model.get_buffer("rotary_sin"))
        self._layers = [_Layer(block) for block in model.blocks if isinstance(block, Block)]
        self._final_norm = _column_norm(model.final_norm)
        self._head = model.head.weight

    @torch.no_grad()
    def logits(self, tokens: Tensor, cache: KVCache, rows: Sequence[int]) -> Tensor:
        """Logits (B, V) after tokens (B,), which continue these rows of the cache."""
        update = CacheUpdate(cache, rows, 1)
        positions = update.positions[..., 0]  # (B,), or () if all are the same
        x = self._embedding[tokens]  # (B, D)
        rotary = None
        if self._positions is not None:
            x = x + self._positions[positions]
        else:
            assert self._rotary is not None
            cos, sin = self._rotary
            rotary = (cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2))  # (B, 1, H), or (1, H)
        x = x.t()  # (D, B)
        for number, layer in enumerate(self._layers):
            x = layer.attend(x, rotary, update, number)
            x = layer.feed_forward(x)
        for row in rows:
            cache.lengths[row] += 1
        return torch.mm(self._head, self._final_norm(x)).t()


class _Layer:
    """A block of gpt.py."""

    def __init__(self, block: Block) -> None:
        attention = block.attention
        self._block = block
        self._n_head, self._n_kv_head = attention.n_head, attention.n_kv_head
        self._head_dim = attention.head_dim
        self._attention_norm = _column_norm(block.attention_norm)
        self._feed_forward_norm = _column_norm(block.feed_forward_norm)
        self._qk_norm: _RMSNorm | None = None
        if attention.normalises_qk:
            q_norm, k_norm = attention.q_norm, attention.k_norm
            n_heads = (self._n_head, self._n_kv_head)
            weights = [norm.weight.expand(n, -1) for norm, n in zip((q_norm, k_norm), n_heads, strict=True)]
            self._qk_norm = _RMSNorm(torch.cat(weights), q_norm.eps, self._head_dim, -1)  # (N + K, H)

    def attend(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, update: CacheUpdate, number: int
    ) -> Tensor:
        """x (D, B) plus the attention of layer `number`."""
        n_qk, attention = self._n_head + self._n_kv_head, self._block.attention
        qkv = _product(attention.qkv_proj, self._attention_norm(x))
        qkv = qkv.t().contiguous().view(x.shape[1], -1, self._head_dim)  # (B, N + 2K, H)
        qk, v = qkv[:, :n_qk], qkv[:, n_qk:]
        if self._qk_norm is not None:
            qk = self._qk_norm(qk)
        if rotary is not None:
            cos, sin = rotary
            qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, dims=-1), sin)
        keys, values = update.append(number, qk[:, None, self._n_head :], v[:, None])  # (B, places, K, H)
        q = qk[:, : self._n_head].reshape(x.shape[1], self._n_kv_head, -1, self._head_dim)  # (B, K, G, H)
        y = F.scaled_dot_product_attention(
            q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=update.mask
        )  # (B, K, G, H): the queries of a group see the same keys, as positions would
        return _product(attention.o_proj, y.reshape(x.shape[1], -1).t(), residual=x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (D, B) plus the result of the feed-forward layer."""
        feed_forward = self._block.feed_forward
        normed = self._feed_forward_norm(x)
        h = _product(feed_forward.up_proj, normed)
        if feed_forward.is_gated:
            h = h.mul_(F.silu(_product(feed_forward.gate_proj, normed), inplace=True))
        else:
            h = F.gelu(h, approximate="tanh")
        return _product(feed_forward.down_proj, h, residual=x)


class _RMSNorm:
    """RMSNorm over one dimension of `width` numbers, with a weight that can be broadcast to x."""

    def __init__(self, weight: Tensor, eps: float | None, width: int, dim: int) -> None:
        assert eps is not None
        # sqrt(mean square + eps) is hypot(length, sqrt(width * eps)) / sqrt(width).
        self._weight = weight.detach() * math.sqrt(width)
        self._floor = weight.new_tensor(math.sqrt(width * eps))
        self._dim = dim

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=self._dim, keepdim=True)
        normed: Tensor = x * (self._weight / length.hypot_(self._floor))
        return normed


def _column_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same norm for the columns of x (D, B)."""
    if isinstance(norm, nn.RMSNorm):
        return _RMSNorm(norm.weight[:, None], norm.eps, len(norm.weight), 0)
    return lambda x: norm(x.t()).t()


def _signed_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for `x * cos + roll(x) * sin`, which is `rotate`: the first half of the sines is negative."""
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat((-first, second), dim=-1)


def _product(linear: nn.Linear, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The linear layer of x (in, B), plus a residual (out, B)."""
    if residual is not None:
        y = torch.addmm(residual, linear.weight, x)
        return y if linear.bias is None else y.add_(linear.bias[:, None])
    if linear.bias is not None:
        return torch.addmm(linear.bias[:, None], linear.weight, x)
    return torch.mm(linear.weight, x)
