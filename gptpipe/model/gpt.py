"""A decoder-only transformer that can be a GPT-2, a Llama or a Qwen3.

| part            | gpt2                   | llama          | qwen3                        |
|-----------------|------------------------|----------------|------------------------------|
| positions       | learned                | rotary         | rotary                       |
| norm            | LayerNorm              | RMSNorm        | RMSNorm, also on q and k     |
| feed-forward    | GELU                   | SwiGLU         | SwiGLU                       |
| biases          | yes                    | no             | no                           |
| keys and values | one per query head     | grouped        | grouped                      |

Shapes: B batch, T tokens, D n_embd, N n_head, K n_kv_head, H head dimension, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptpipe.model.cpu_kernels import linear_cross_entropy, tanh_gelu
from gptpipe.model.params import ModelParams


@dataclass
class KVCache:
    """Keys and values of the past tokens of several sequences: a (rows, capacity, K, H) tensor each per layer.

    Each sequence has a row, in which the first `lengths[row]` places are filled. The others are ignored.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[int]


class CacheUpdate:
    """One forward pass with a cache: T new tokens for each of the given rows.

    `positions` are those of the new tokens: (B, T), or (T,) if they are the same in all rows. `mask` says what
    they attend to, by 0 or -inf, (B, 1, T, places). It is None if it would be causal, or would hide nothing.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], n_new: int) -> None:
        self._cache = cache
        like = cache.keys[0]
        starts = [cache.lengths[row] for row in rows]
        self._end = max(starts) + n_new  # places that the longest row fills
        self.starts_empty = not any(starts)
        self._rows: slice | Tensor = slice(0, len(rows))
        if list(rows) != list(range(len(rows))):
            self._rows = torch.tensor(rows, device=like.device)
        new = torch.arange(n_new, device=like.device)
        self.mask: Tensor | None = None
        self._is_aligned = min(starts) == max(starts) and isinstance(self._rows, slice)
        if self._is_aligned:
            self.positions = new + starts[0]  # (T,)
        else:
            self.positions = torch.tensor(starts, device=like.device)[:, None] + new  # (B, T)
        if not (self.starts_empty or (self._is_aligned and n_new == 1)):
            places = torch.arange(self._end, device=like.device)
            is_hidden = places > self.positions[..., None]  # (B, T, places), or (T, places)
            mask = torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device)
            self.mask = mask.masked_fill_(is_hidden, -math.inf).view(-1, 1, *is_hidden.shape[-2:])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of the new tokens, (B, T, K, H); returns those of all, (B, places, K, H)."""
        return self._append(self._cache.keys[layer], k), self._append(self._cache.values[layer], v)

    def _append(self, stored: Tensor, new: Tensor) -> Tensor:
        if self._is_aligned:
            stored[self._rows, self._end - new.shape[1] : self._end] = new
        else:
            rows = torch.arange(len(new), device=new.device) if isinstance(self._rows, slice) else self._rows
            stored[rows[:, None], self.positions] = new
        return new if self.starts_empty else stored[self._rows, : self._end]


def rotary_tables(n_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, (T, H) each (Su et al., 2021, arXiv:2104.09864, eq. 34)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # (H/2,)
    angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequencies).repeat(1, 2)  # (T, H)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + H/2]) by the angle of its position; x (B, N, T, H), tables (T, H).

    With other positions in each sequence, the tables are (B, 1, T, H).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def document_mask(tokens: Tensor, end_of_text: int) -> Tensor:
    """Attention mask (B, 1, T, T) of tokens (B, T): True where a token may attend to another.

    A token attends to itself and to earlier tokens of the same document. An end-of-text token is the last token
    of its document.
    """
    ends = (tokens == end_of_text).long()
    document = ends.cumsum(1) - ends  # (B, T)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def qkv_rows(params: ModelParams) -> list[int]:
    """Numbers of rows for queries, keys and values in `qkv_proj`.

    They share one matrix, because one product is faster than three.
    """
    kv_width = params.n_kv_head * params.resolved_head_dim
    return [params.n_head * params.resolved_head_dim, kv_width, kv_width]


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al., 2023, arXiv:2305.13245)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.n_head = params.n_head
        self.n_kv_head = params.n_kv_head
        self.head_dim = params.resolved_head_dim
        self.dropout = params.dropout
        bias = params.architecture == "gpt2"
        self.qkv_proj = nn.Linear(params.n_embd, sum(qkv_rows(params)), bias=bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, params.n_embd, bias=bias)
        self.normalises_qk = params.architecture == "qwen3"
        if self.normalises_qk:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=params.norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=params.norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: CacheUpdate | None,
        layer: int,
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, N + 2K, H)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)  # (B, T, N or K, H)
        if self.normalises_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, N or K, T, H)
        if rotary is not None:
            q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        is_causal = mask is None
        if cache is not None:
            k, v = (x.transpose(1, 2) for x in cache.append(layer, k.transpose(1, 2), v.transpose(1, 2)))
            mask, is_causal = cache.mask, cache.starts_empty
        if self.n_kv_head < self.n_head:
            group = self.n_head // self.n_kv_head
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, N, T, H)
        # On a CPU, torch has no fast kernel with dropout: a step would take half as long again.
        dropout = self.dropout if self.training and q.device.type != "cpu" else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim)
        return F.dropout(self.o_proj(y), self.dropout, self.training)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's activation, by the fastest kernel for this device."""
    is_eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_eager_cpu and x.dtype == torch.float32 and x.requires_grad:
        return tanh_gelu(x)
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """GELU (GPT-2's tanh form), or SwiGLU (Shazeer, 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.is_gated = params.architecture != "gpt2"
        self.dropout = params.dropout
        if self.is_gated:
            self.gate_proj = nn.Linear(params.n_embd, params.n_inner, bias=False)
        self.up_proj = nn.Linear(params.n_embd, params.n_inner, bias=not self.is_gated)
        self.down_proj = nn.Linear(params.n_inner, params.n_embd, bias=not self.is_gated)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        h = F.silu(self.gate_proj(x)) * up if self.is_gated else gelu(up)
        return F.dropout(self.down_proj(h), self.dropout, self.training)


def _norm(params: ModelParams) -> nn.Module:
    if params.architecture == "gpt2":
        return nn.LayerNorm(params.n_embd, eps=params.norm_eps)
    return nn.RMSNorm(params.n_embd, eps=params.norm_eps)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.attention_norm = _norm(params)
        self.attention = Attention(params)
        self.feed_forward_norm = _norm(params)
        self.feed_forward = FeedForward(params)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: CacheUpdate | None,
        layer: int,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, mask, cache, layer)
        y: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return y


class GPT(nn.Module):
    """Token ids (B, T) in, logits (B, T, V) out. Draws its initial weights from torch's global generator."""

    def __init__(self, params: ModelParams, vocab_size: int) -> None:
        super().__init__()
        self.params = params
        self.vocab_size = vocab_size
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(vocab_size, params.n_embd)
        if params.architecture == "gpt2":
            self.position_embedding = nn.Embedding(params.context_length, params.n_embd)
        else:
            cos, sin = rotary_tables(params.context_length, params.resolved_head_dim, params.rope_theta)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.n_layer))
        self.final_norm = _norm(params)
        self.head = nn.Linear(params.n_embd, vocab_size, bias=False)
        if params.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's weights; residual outputs are scaled down with depth (Radford et al., 2019, section 2.3).

        Llama and Qwen3 without tied embeddings differ in two matrices. The embedding has a standard deviation
        of 1, the scale that the norms produce. The head is zero, so that all tokens are equally probable at
        first (Yang et al., 2022, arXiv:2203.03466, appendix D.2).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                is_residual_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                n_summed = 2 * self.params.n_layer if is_residual_output else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(n_summed))
        if self.params.architecture != "gpt2" and not self.params.tie_embeddings:
            nn.init.normal_(self.embedding.weight)
            nn.init.zeros_(self.head.weight)

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, D) of tokens (B, T).

        With a cache, the tokens continue those in its `rows`, by default the first B. `mask` (B, 1, T, T)
        replaces the causal mask: True where a token may attend to another.
        """
        assert cache is None or mask is None  # with a cache, CacheUpdate makes the mask
        rows = rows if rows is not None else range(len(tokens))
        update = None if cache is None else CacheUpdate(cache, rows, tokens.shape[1])
        x = self.embedding(tokens)  # (B, T, D)
        rotary = None
        if self.params.architecture == "gpt2":
            x = x + self._at(self.position_embedding.weight, tokens.shape[1], update)
            x = F.dropout(x, self.params.dropout, self.training)
        else:
            rotary = self._rotary(tokens.shape[1], update)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rotary, mask, update, layer, use_reentrant=False)
            else:
                x = block(x, rotary, mask, update, layer)
        if cache is not None:
            for row in rows:
                cache.lengths[row] += tokens.shape[1]
        normed: Tensor = self.final_norm(x)
        return normed

    def _rotary(self, n_tokens: int, update: CacheUpdate | None) -> tuple[Tensor, Tensor]:
        """Rotary tables of the new tokens, (T, H) each, or (B, 1, T, H) if the rows differ."""
        tables = (self.get_buffer("rotary_cos"), self.get_buffer("rotary_sin"))
        cos, sin = (self._at(table, n_tokens, update) for table in tables)
        return (cos[:, None], sin[:, None]) if cos.dim() == 3 else (cos, sin)

    @staticmethod
    def _at(table: Tensor, n_tokens: int, update: CacheUpdate | None) -> Tensor:
        """The rows of a table of positions that belong to the new tokens."""
        return table[:n_tokens] if update is None else table[update.positions]

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V); those at position t predict the token at t + 1."""
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits

    def loss(
        self, tokens: Tensor, targets: Tensor, *, z_loss: float = 0.0, end_of_text: int | None = None
    ) -> Tensor:
        """Mean cross entropy in nats per token of targets (B, T) given tokens (B, T), in float32.

        `z_loss` times the mean squared log normalizer contributes to the gradient only, not to the returned
        value (Chowdhery et al., 2022, arXiv:2204.02311, section 5). With `end_of_text`, attention stays inside
        documents.
        """
        mask = None if end_of_text is None else document_mask(tokens, end_of_text)
        hidden = self.hidden(tokens, mask=mask).flatten(0, 1)  # (B * T, D)
        flat_targets = targets.flatten()
        is_eager_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_eager_cpu and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            return linear_cross_entropy(hidden, self.head.weight, flat_targets, z_loss) / targets.numel()
        logits = self.head(hidden).float()
        cross_entropy = F.cross_entropy(logits, flat_targets)
        if z_loss:
            penalty = z_loss * logits.logsumexp(-1).square().mean()
            cross_entropy = cross_entropy + penalty - penalty.detach()  # changes the gradient only
        return cross_entropy

    def new_cache(self, batch_size: int, n_tokens: int) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `n_tokens` tokens, at most the context."""
        length = min(n_tokens, self.params.context_length)
        shape = (batch_size, length, self.params.n_kv_head, self.params.resolved_head_dim)
        like = self.embedding.weight
        return KVCache(
            [like.new_zeros(shape) for _ in self.blocks],
            [like.new_zeros(shape) for _ in self.blocks],
            [0] * batch_size,
        )

    def n_parameters(self) -> int:
        """The number of trained weights; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def n_multiplied(self) -> int:
        """The number of weights that take part in a matrix product for every token.

        Embedding look-ups do not count.
        """
        tables = [] if self.params.tie_embeddings else [self.embedding]
        if self.params.architecture == "gpt2":
            tables.append(self.position_embedding)
        matrices = sum(parameter.numel() for parameter in self.parameters() if parameter.dim() == 2)
        return matrices - sum(table.weight.numel() for table in tables)

    def flops_per_token(self) -> float:
        """FLOPs of a forward and a backward pass at full context, as used for model FLOPs utilisation.

        Attention counts all T x T pairs, including masked ones. Recomputation by activation checkpointing is
        not counted (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).
        """
        params = self.params
        attention = params.n_layer * params.n_head * params.resolved_head_dim * params.context_length
        return 6 * self.n_multiplied() + 12 * attention
