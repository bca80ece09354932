"""`nn.MultiheadAttention` on three-GEMM projections."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nmcompile.three_gemm.modules import ThreeGemm


class ThreeGemmAttention(ThreeGemm):
    """Attention whose projections are layers: `in_proj` (or `q_proj`, `k_proj`, `v_proj`) and `out_proj`.

    The packed `in_proj_weight` stays one parameter with one mask; if query, key and value are not one tensor, each is
    projected by its rows. Between the projections it computes the same as `nn.MultiheadAttention` outside of its
    inference fast path, which would read the dense weights. A layer that the plan leaves alone has no triple and runs
    as `F.linear`.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    training: bool
    _qkv_same_embed_dim: bool
    in_proj_weight: Tensor
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: torch.nn.Linear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run as `nn.MultiheadAttention.forward`: `(L, N, E)`, `(N, L, E)` with `batch_first`, or `(L, E)`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give attn_mask too")
        self._check_dims(query, key, value)
        batched = query.dim() == 3
        q, k, v = self._project(*self._tokens_first(query, key, value, batched))
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None
        else:
            is_causal = is_causal and key_padding_mask is None
        self._check_masks((q.shape[0], k.shape[0]), q.shape[1] if batched else None, attn_mask, key_padding_mask)
        mask = _additive(attn_mask, q.dtype)
        mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 2 else mask
        padding = _additive(key_padding_mask, q.dtype)
        padding = padding.unsqueeze(0) if padding is not None and not batched else padding
        k, v, mask, padding = self._extend(k, v, mask, padding)
        mask = self._merge(mask, padding, q.shape[1])
        context, weights = self._attend(q, k, v, mask, is_causal, need_weights)
        output = self._linear("out_proj", context, self.out_proj.weight, self.out_proj.bias)
        output = output.view(q.shape[0], q.shape[1], -1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return (output.transpose(1, 0) if self.batch_first else output), weights

    def _check_dims(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        dims = [tensor.dim() for tensor in (query, key, value)]
        if dims not in ([3, 3, 3], [2, 2, 2]):
            raise RuntimeError(
                f"{self._label()}: query, key and value have {dims[0]}, {dims[1]} and {dims[2]} dims; give each "
                "3, or 2 without a batch"
            )

    def _check_masks(
        self, scores: tuple[int, int], batch: int | None, mask: Tensor | None, padding: Tensor | None
    ) -> None:
        """Refuse, as eager does, masks of another shape, which would broadcast and hide the wrong tokens.

        `scores` is (L, S); `batch` is None if the inputs have none.
        """
        heads = self.num_heads if batch is None else batch * self.num_heads
        self._check_shape("attn_mask", mask, scores, (heads, *scores))
        self._check_shape("key_padding_mask", padding, scores[1:] if batch is None else (batch, scores[1]))

    def _check_shape(self, name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
        # Only shapes of as many dims are compared: a comparison of open sizes would guard on them in torch.export.
        if mask is None or any(len(shape) == mask.dim() and tuple(mask.shape) == shape for shape in shapes):
            return
        wanted = " or ".join(str(tuple(map(int, shape))) for shape in shapes)
        raise RuntimeError(f"{self._label()}: {name} has the shape {tuple(mask.shape)}; give it {wanted}")

    def _label(self) -> str:
        return f"attention with layer {next(iter(self.three_gemms.values())).layer.name!r}"

    def _tokens_first(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return (L, N, E) each; tensors that were one object stay one, since that decides how they are projected."""
        if not batched:
            return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if not self.batch_first:
            return query, key, value
        q = query.transpose(1, 0)
        k = q if key is query else key.transpose(1, 0)
        return q, k, k if value is key else value.transpose(1, 0)

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._qkv_same_embed_dim:
            return self._project_apart(q, k, v)
        if k is v and q is k:
            return _unpack(self._in_proj(q, 0, 3), 3)  # type: ignore[return-value]
        if k is v:
            return self._in_proj(q, 0, 1), *_unpack(self._in_proj(k, 1, 3), 2)  # type: ignore[return-value]
        return self._in_proj(q, 0, 1), self._in_proj(k, 1, 2), self._in_proj(v, 2, 3)

    def _in_proj(self, x: Tensor, first: int, last: int) -> Tensor:
        """Project by the rows of thirds `first` to `last` of the packed weight."""
        rows = None if last - first == 3 else slice(first * self.embed_dim, last * self.embed_dim)
        return self._linear("in_proj", x, self.in_proj_weight, self.in_proj_bias, rows)

    def _project_apart(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            self._linear(f"{name}_proj", x, getattr(self, f"{name}_proj_weight"), bias)
            for name, x, bias in zip("qkv", inputs, biases, strict=True)
        )
        return q, k, v

    def _linear(self, role: str, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice | None = None) -> Tensor:
        if role in self.three_gemms:
            return self.three_gemms[role](x, weight, bias, rows)
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        return F.linear(x, weight, bias)

    def _extend(
        self, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Append the learned key and value, then the zero ones, and open both masks for them."""
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append((self.bias_k.repeat(1, k.shape[1], 1), self.bias_v.repeat(1, k.shape[1], 1)))
        if self.add_zero_attn:
            extra.append((k.new_zeros(1, *k.shape[1:]), v.new_zeros(1, *v.shape[1:])))
        for one_key, one_value in extra:
            k, v = torch.cat([k, one_key]), torch.cat([v, one_value])
            mask = None if mask is None else F.pad(mask, (0, 1))
            padding = None if padding is None else F.pad(padding, (0, 1))
        return k, v, mask, padding

    def _merge(self, mask: Tensor | None, padding: Tensor | None, batch: int) -> Tensor | None:
        """Return one additive mask, (1 or N * heads, L or 1, S)."""
        if padding is None:
            return mask
        spread = padding.view(batch, 1, 1, -1).expand(-1, self.num_heads, -1, -1).reshape(batch * self.num_heads, 1, -1)
        return spread if mask is None else mask + spread

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context, (L * N, E), and the weights of every head, (N, heads, L, S), if they are needed."""
        length, batch, heads, drop = q.shape[0], q.shape[1], self.num_heads, self.dropout if self.training else 0.0
        q, k, v = (x.reshape(x.shape[0], batch * heads, self.head_dim).transpose(0, 1) for x in (q, k, v))
        if need_weights:
            scaled = q * math.sqrt(1.0 / float(q.shape[-1]))
            scores = scaled.bmm(k.transpose(-2, -1)) if mask is None else mask.baddbmm(scaled, k.transpose(-2, -1))
            weights = scores.softmax(dim=-1)
            weights = F.dropout(weights, p=drop) if drop > 0.0 else weights
            context = weights.bmm(v).transpose(0, 1).reshape(length * batch, self.embed_dim)
            return context, weights.view(batch, heads, length, -1)
        q, k, v = (x.unflatten(0, (batch, heads)) for x in (q, k, v))
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(batch, heads, -1, k.shape[2])
        context = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal)
        return context.permute(2, 0, 1, 3).reshape(batch * length, self.embed_dim), None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bool mask (True is hidden) as -inf to add to the scores; return a float mask unchanged."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _unpack(packed: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split (L, N, parts * E) into contiguous thirds, laid out as in eager."""
    stacked = packed.unflatten(-1, (parts, -1)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    if torch.compiler.is_compiling():
        # The gradient of `unbind` is a concatenation, which inductor fuses with nothing.
        return tuple(stacked[part] for part in range(parts))
    thirds: tuple[Tensor, ...] = stacked.unbind(0)
    return thirds
