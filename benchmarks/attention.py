"""The workloads of softmax attention; registry.py lists them with the others.

Work counts pairs of query and key that see each other only: 4 D flops forward, 3.5 times that in training.
"""

# An override says what it does by the method it overrides.
# ruff: noqa: D102

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

import fastlm

WINDOW = 256


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attend(nn.Module):
    """A function of (q, k, v, mask), the mask in the dtype of q where it is a bias."""

    def __init__(self, function: object, mask: Tensor | None) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mask", mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The form of q."""
        return self.function(q, k, v, self.mask)


@dataclass(frozen=True)
class Attention:
    """q (B, H, Tq, D), k and v (B, Hkv, Tk, D); `kind` says what hides keys: see `seen`."""

    name: str
    batch: int
    heads: int
    q_len: int
    k_len: int
    dim: int
    kv_heads: int
    kind: str = "full"  # full, causal, keypad, window, docs, bias or varlen
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = ("forward", "training")
    copies: int = 1  # inputs taken in turn, so that they come from memory

    op = "attention"

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 5e-2

    @property
    def causal(self) -> bool:
        return self.kind == "causal"

    @cached_property
    def lengths(self) -> Tensor:
        """Of the sequences of a padded or packed batch, or of the documents of one sequence."""
        generator = torch.Generator().manual_seed(0)
        if self.kind == "docs":
            cuts = torch.randperm(self.k_len - 1, generator=generator)[:15].sort().values + 1
            return torch.diff(cuts, prepend=torch.zeros(1).long(), append=torch.tensor([self.k_len]))
        least = 32 if self.kind == "varlen" else 16
        return torch.randint(least, self.k_len + 1, (self.batch,), generator=generator)

    @cached_property
    def starts(self) -> list[int]:
        """Where packed sequences or documents begin and end."""
        return [0, *torch.cumsum(self.lengths, 0).tolist()]

    @cached_property
    def seen(self) -> Tensor | None:
        """A boolean mask, True: takes part; None: all or by is_causal."""
        i, j = torch.arange(self.q_len)[:, None], torch.arange(self.k_len)
        if self.kind == "keypad":
            return (j < self.lengths[:, None])[:, None, None]
        if self.kind == "window":
            return (j <= i) & (j > i - WINDOW)
        if self.kind == "docs":
            document = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
            return (document[:, None] == document) & (j <= i)
        return None

    @property
    def mask(self) -> Tensor | None:
        """As scaled_dot_product_attention takes it."""
        return _randn(7, 1, self.heads, self.q_len, self.k_len) if self.kind == "bias" else self.seen

    @property
    def pairs(self) -> int:
        """Of one head."""
        if self.kind == "varlen":
            return int(self.lengths.square().sum())
        if self.causal:
            return self.batch * self.q_len * (self.q_len + 1) // 2
        if self.seen is None:
            return self.batch * self.q_len * self.k_len
        return int(self.seen.expand(self.batch, 1, self.q_len, self.k_len).sum())

    def gflop(self, mode: str) -> float:
        return 4 * self.dim * self.pairs * self.heads * (1 if mode == "forward" else 3.5) / 1e9

    @property
    def bound_by_memory(self) -> bool:
        """True for decoding, which reads every key for one query."""
        return self.q_len == 1

    @property
    def gbytes(self) -> float:
        """Of keys and values."""
        return 2 * self.batch * self.kv_heads * self.k_len * self.dim * self.dtype.itemsize / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        if self.kind == "varlen":
            return tuple(_randn(seed, self.starts[-1], self.heads, self.dim) for seed in (1, 2, 3))
        return (
            _randn(1, self.batch, self.heads, self.q_len, self.dim),
            *(_randn(seed, self.batch, self.kv_heads, self.k_len, self.dim) for seed in (2, 3)),
        )

    def grad_output(self, output: Tensor) -> Tensor:
        return _randn(4, *output.shape).to(output.dtype)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Nothing with dropout: every implementation draws its own."""
        return [] if self.dropout else list(results)

    def module(self) -> nn.Module:
        """Torch's default; a loop over packed sequences, for which it has no call on a CPU."""
        options = {"dropout_p": self.dropout, "is_causal": self.causal, "enable_gqa": self.heads != self.kv_heads}
        if self.kind == "varlen":
            return Attend(lambda q, k, v, mask: self._by_sequence(q, k, v), None)
        return Attend(lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, mask, **options), self.mask)

    def _by_sequence(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            scaled_dot_product_attention(*(x[begin:end].transpose(0, 1)[None] for x in (q, k, v)))[0]
            for begin, end in pairwise(self.starts)
        ]
        return torch.cat(parts, 1).transpose(0, 1)

    def fast_module(self) -> nn.Module:
        ops = fastlm.ops
        if self.kind == "varlen":
            return Attend(lambda q, k, v, mask: ops.attention_varlen(q, k, v, self.starts, self.starts), None)
        if self.kind == "window":
            window = {"causal": "upper_left", "window": (WINDOW - 1, -1)}
            return Attend(lambda q, k, v, mask: ops.attention(q, k, v, **window), None)
        options = {"dropout_p": self.dropout, "is_causal": self.causal, "enable_gqa": self.heads != self.kv_heads}
        return Attend(lambda q, k, v, mask: ops.scaled_dot_product_attention(q, k, v, mask, **options), self.mask)

    def lengths_module(self) -> nn.Module | None:
        """Fastlm told of lengths or documents instead of a mask."""
        if self.kind == "keypad":
            return Attend(lambda q, k, v, mask: fastlm.ops.attention(q, k, v, kv_lengths=self.lengths), None)
        if self.kind != "docs":
            return None

        def packed(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
            rows = (x[0].transpose(0, 1) for x in (q, k, v))
            output = fastlm.ops.attention_varlen(*rows, self.starts, self.starts, causal="upper_left")
            return output.transpose(0, 1)[None]

        return Attend(packed, None)

    def naive_module(self) -> nn.Module | None:
        """The textbook's three lines."""
        if self.kind == "varlen":
            return None

        def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if self.kv_heads != self.heads:
                k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
            scores = q @ k.mT * self.dim**-0.5
            if self.causal:
                mask = torch.ones(self.q_len, self.k_len, dtype=torch.bool).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return torch.dropout(torch.softmax(scores, -1), self.dropout, self.dropout > 0) @ v

        return Attend(naive, self.mask)

    def loop_module(self) -> nn.Module | None:
        """Torch piece by piece, where its call would compute what no query sees: documents, windows."""
        if self.kind == "docs":

            def documents(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
                pieces = (tuple(x[:, :, begin:end] for x in (q, k, v)) for begin, end in pairwise(self.starts))
                return torch.cat([scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces], 2)

            return Attend(documents, None)
        if self.kind != "window":
            return None

        def windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            made = []
            for begin in range(0, self.q_len, WINDOW):
                rows, keys = slice(begin, begin + WINDOW), slice(max(0, begin - WINDOW), begin + WINDOW)
                made.append(scaled_dot_product_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask[rows, keys]))
            return torch.cat(made, 2)

        return Attend(windows, self.mask)

    def flex_module(self) -> nn.Module | None:
        """flex_attention, compiled."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if self.kind in ("varlen", "keypad") or self.dropout:
            return None
        block_mask, score = None, None
        if self.causal:
            block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, self.q_len, self.k_len, "cpu")
        elif self.seen is not None:
            seen = self.seen
            block_mask = create_block_mask(lambda b, h, i, j: seen[i, j], None, None, self.q_len, self.k_len, "cpu")
        if self.kind == "bias":
            bias = self.mask[0].to(self.dtype)
            score = lambda value, b, h, i, j: value + bias[h, i, j]  # noqa: E731
        compiled = torch.compile(flex_attention, dynamic=False)
        gqa = self.heads != self.kv_heads
        return Attend(
            lambda q, k, v, mask: compiled(q, k, v, score_mod=score, block_mask=block_mask, enable_gqa=gqa), None
        )


class SelfAttention(nn.Module):
    """nn.MultiheadAttention over its input; weights: they are asked for, as by default, and not used."""

    def __init__(self, module: nn.MultiheadAttention, causal: bool, weights: bool) -> None:
        super().__init__()
        self.attention, self.causal, self.weights = module, causal, weights

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        return self.attention(x, x, x, need_weights=self.weights, attn_mask=mask, is_causal=self.causal)[0]


class Composed(nn.Module):
    """The same by hand: linear, torch's scaled_dot_product_attention, linear."""

    def __init__(self, module: nn.MultiheadAttention, causal: bool) -> None:
        super().__init__()
        self.attention, self.causal = module, causal

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        m = self.attention
        q, k, v = (
            part.unflatten(-1, (m.num_heads, m.head_dim)).transpose(1, 2)
            for part in linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
        )
        output = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return m.out_proj(output.transpose(1, 2).flatten(-2))


@dataclass(frozen=True)
class AttentionModule:
    """Self-attention as a module, projections included."""

    name: str
    batch: int
    seq_len: int
    width: int
    heads: int
    causal: bool
    weights: bool = False
    dtype: torch.dtype = torch.float32

    op = "mha"
    modes = ("forward", "training")
    tolerance = 1e-4

    def gflop(self, mode: str) -> float:
        pairs = self.seq_len * (self.seq_len + 1) // 2 if self.causal else self.seq_len**2
        attention = 4 * self.width * pairs * self.batch * (1 if mode == "forward" else 3.5)
        projections = 8 * self.width**2 * self.seq_len * self.batch * (1 if mode == "forward" else 3)
        return (attention + projections) / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        return (_randn(1, self.batch, self.seq_len, self.width),)

    def grad_output(self, output: Tensor) -> Tensor:
        return _randn(4, *output.shape).to(output.dtype)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        return list(results)

    def _attention(self) -> nn.MultiheadAttention:
        torch.manual_seed(0)
        return nn.MultiheadAttention(self.width, self.heads, batch_first=True)

    def module(self) -> nn.Module:
        return SelfAttention(self._attention(), self.causal, self.weights)

    def fast_module(self) -> nn.Module:
        return fastlm.replace(self.module())

    def composed_module(self) -> nn.Module | None:
        """By hand, without the class."""
        return None if self.weights else Composed(self._attention(), self.causal)


class EncoderLayer(AttentionModule):
    """A whole layer of torch's encoder, its linear layers replaced too."""

    def gflop(self, mode: str) -> float:
        linear = 16 * self.width**2 * self.seq_len * self.batch * (1 if mode == "forward" else 3)
        return super().gflop(mode) + linear / 1e9

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(self.width, self.heads, 4 * self.width, 0.0, "gelu", batch_first=True)

    def fast_module(self) -> nn.Module:
        return fastlm.replace(self.module(), linear=True)

    def composed_module(self) -> nn.Module | None:
        return None


def _both_dtypes(name: str, *sizes: int, **options: object) -> tuple[Attention, Attention]:
    batch, heads, q_len, k_len, dim, *kv_heads = sizes
    shape = (batch, heads, q_len, k_len, dim, *(kv_heads or (heads,)))
    return (
        Attention(name, *shape, **options),
        Attention(f"{name}_bf16", *shape, dtype=torch.bfloat16, **options),
    )


_FORWARD = {"modes": ("forward",)}
WORKLOADS: tuple[Attention | AttentionModule, ...] = (
    *_both_dtypes("prefill1024_full", 1, 12, 1024, 1024, 64),
    *_both_dtypes("prefill1024_causal", 1, 12, 1024, 1024, 64, kind="causal"),
    *_both_dtypes("b4_512_full", 4, 12, 512, 512, 64),
    *_both_dtypes("b4_512_causal", 4, 12, 512, 512, 64, kind="causal"),
    *_both_dtypes("long4096_causal", 1, 8, 4096, 4096, 64, kind="causal"),
    *_both_dtypes("gqa2048_causal", 1, 32, 2048, 2048, 128, 8, kind="causal"),
    *_both_dtypes("tiny64_causal", 8, 4, 64, 64, 32, kind="causal"),
    *_both_dtypes("small256_causal", 12, 4, 256, 256, 32, kind="causal"),
    *_both_dtypes("keypad128", 16, 12, 128, 128, 64, kind="keypad"),
    *_both_dtypes("window256_4096", 1, 8, 4096, 4096, 64, kind="window"),
    *_both_dtypes("docs16_4096", 1, 8, 4096, 4096, 64, kind="docs"),
    *_both_dtypes("bias1000_d80", 1, 16, 1000, 1000, 80, kind="bias"),
    *_both_dtypes("varlen16x32-512", 16, 12, 512, 512, 64, kind="varlen"),
    *_both_dtypes("drop0.1_b4_512_causal", 4, 12, 512, 512, 64, kind="causal", dropout=0.1, modes=("training",)),
    *_both_dtypes("drop0.1_small256_causal", 12, 4, 256, 256, 32, kind="causal", dropout=0.1, modes=("training",)),
    *_both_dtypes("decode_gqa4096_hot", 1, 32, 1, 4096, 128, 8, **_FORWARD),
    *_both_dtypes("decode_gqa4096_cold", 1, 32, 1, 4096, 128, 8, **_FORWARD, copies=8),
    *_both_dtypes("decode_b16_1024", 16, 12, 1, 1024, 64, **_FORWARD),
    *_both_dtypes("decode_b1_128", 1, 12, 1, 128, 64, **_FORWARD),
    AttentionModule("b64_t40_384", 64, 40, 384, 12, False),
    AttentionModule("b1_t512_768_causal", 1, 512, 768, 12, True),
    AttentionModule("b4_t512_512_causal", 4, 512, 512, 8, True),
    AttentionModule("b8_t64_128_causal", 8, 64, 128, 4, True),
    AttentionModule("b4_t512_512_weights", 4, 512, 512, 8, False, weights=True),
    AttentionModule("b8_t64_128_weights", 8, 64, 128, 4, False, weights=True),
    EncoderLayer("encoder_b4_t512_512", 4, 512, 512, 8, False),
    EncoderLayer("encoder_b16_t128_768", 16, 128, 768, 12, False),
)
