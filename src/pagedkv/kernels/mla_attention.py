"""Multi-head latent attention over compressed pages: all heads read one latent and one rope key a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..shapes import Shapes, check_device, check_dtype, check_floating, check_last_dim_contiguous
from ..spec import CACHE_DTYPES
from .attention_checks import as_float32, check_contiguous, check_no_overlap
from .attention_options import AttentionOptions
from .attention_plan import AttentionPlan
from .backend import OpCall, select
from .merge_states import AttentionState
from .pages import check_no_grad

__all__ = ["mla_attention"]

_MASKED, _UNMASKED = frozenset({"custom_mask"}), frozenset[str]()


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    *,
    sm_scale: float,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | AttentionState:
    """Attention of each sequence's last q_len tokens over its cached latents, which serve as keys and as values.

    Shapes: q_latent [T, H, C]; q_rope [T, H, R]; latent_pages [N, P, C]; rope_pages [N, P, R], often views of one
            [N, P, C + R]; out [T, H, C] in the dtype of q_latent; with return_lse AttentionState(out, lse),
            lse [T, H] float32, natural logarithm. R may be 0: q_rope and rope_pages None or of width 0.
            The plan is made with num_q_heads=H, num_kv_heads=1, head_dim=C + R, value_dim=C.
    Rule:   row i of a sequence stands at position kv_len - q_len + i; logit = sm_scale * (q_latent . latent +
            q_rope . rope); then mask, window and softmax of the plan; the value of a token is its latent.
            sm_scale has no default: it follows the head dims before compression, which the cache does not show.
            A row that sees no key gives exactly 0 and -inf. Accumulation is float32.
    When:   after latents and rope keys of the new tokens are stored (`store_mla`); q_latent = q_nope @ W_UK and
            out @ W_UV, head by head, are the caller's.
    Owns:   writes `out` alone, which must not overlap the inputs. Slots beyond a sequence's length are never used.
    Raises: ValueError, TypeError for what breaks the lines above and for a tensor that requires a gradient while
            gradients are recorded; BackendUnavailableError for an explicit back end that cannot run it.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. Reference: kernels/reference/mla_attention.py.

    >>> pages = torch.ones(4, 16, 40 + 8)
    >>> table = PageTable.from_rows([[2, 0]], seq_lens=[20], page_size=16)
    >>> query_indptr = torch.tensor([0, 1], dtype=torch.int32)
    >>> plan = plan_attention(query_indptr, table, num_q_heads=3, num_kv_heads=1, head_dim=40 + 8, value_dim=40)
    >>> q_latent, q_rope = torch.ones(1, 3, 40), torch.ones(1, 3, 8)
    >>> mla_attention(q_latent, q_rope, pages[..., :40], pages[..., 40:], plan, sm_scale=0.1).shape
    torch.Size([1, 3, 40])
    """
    if torch.is_grad_enabled():
        check_no_grad(q_latent=q_latent, q_rope=q_rope, latent_pages=latent_pages, rope_pages=rope_pages, out=out)
    run = _traced if torch.compiler.is_compiling() else _mla_attention
    result, lse = run(q_latent, q_rope, latent_pages, rope_pages, plan, sm_scale, return_lse, out, backend)
    return result if lse is None else AttentionState(result, lse)


def _mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    sm_scale: float,
    return_lse: bool,
    out: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Looking once costs a fraction of checking rule by rule, which is what finds the words for an error.
    if not _is_plainly_right(q_latent, q_rope, latent_pages, rope_pages, plan):
        _check_tensors(q_latent, q_rope, latent_pages, rope_pages, plan)
    if plan.head_dim == plan.value_dim:
        q_rope = rope_pages = None
    options = AttentionOptions(as_float32("sm_scale", sm_scale))
    if out is None:
        out = q_latent.new_empty(q_latent.shape)
    else:
        _check_out(out, q_latent)
        check_no_overlap("out", out, q_latent=q_latent, q_rope=q_rope, latent_pages=latent_pages, rope_pages=rope_pages)
    lse = q_latent.new_empty(q_latent.shape[:2], dtype=torch.float32) if return_lse else None
    call = OpCall(
        "mla_attention",
        q_latent.device.type,
        (q_latent.dtype, latent_pages.dtype, latent_pages.dtype, out.dtype),
        plan.head_dim,
        plan.value_dim,
        _UNMASKED if plan.custom_mask is None else _MASKED,
    )
    select(call, backend)(q_latent, q_rope, latent_pages, rope_pages, plan, options, out, lse)
    return out, lse


def _is_plainly_right(q_latent: object, q_rope: object, latent_pages: object, rope_pages: object, plan: object) -> bool:
    """True only for what `_check_tensors` lets pass."""
    if not (
        isinstance(plan, AttentionPlan)
        and isinstance(q_latent, torch.Tensor)
        and isinstance(q_rope, torch.Tensor)
        and isinstance(latent_pages, torch.Tensor)
        and isinstance(rope_pages, torch.Tensor)
        and latent_pages.dim() == 3
    ):
        return False
    latent_dim, num_pages, device = plan.value_dim, latent_pages.shape[0], latent_pages.device
    rope_dim = plan.head_dim - latent_dim
    return bool(
        plan.num_kv_heads == 1
        and q_latent.shape == (plan.num_tokens, plan.num_q_heads, latent_dim)
        and q_rope.shape == (plan.num_tokens, plan.num_q_heads, rope_dim)
        and latent_pages.shape == (num_pages, plan.page_size, latent_dim)
        and rope_pages.shape == (num_pages, plan.page_size, rope_dim)
        and q_latent.stride(2) == q_rope.stride(2) == latent_pages.stride(2) == rope_pages.stride(2) == 1
        and q_latent.dtype in CACHE_DTYPES
        and q_rope.dtype == q_latent.dtype
        and latent_pages.dtype in CACHE_DTYPES
        and rope_pages.dtype == latent_pages.dtype
        and q_latent.device == q_rope.device == rope_pages.device == plan.query_indptr.device == device
        and plan.max_page < num_pages
        and not (q_latent.is_neg() or q_rope.is_neg() or latent_pages.is_neg() or rope_pages.is_neg())
    )


def _check_tensors(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
) -> None:
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must be an AttentionPlan, got {type(plan).__name__}. Build it with plan_attention.")
    shapes = Shapes()
    for symbol, size in (("T", plan.num_tokens), ("H", plan.num_q_heads), ("P", plan.page_size)):
        shapes.bind(symbol, size, "the plan")
    shapes.check("latent_pages", latent_pages, "N P C")
    if rope_pages is None:
        shapes.bind("R", 0, "rope_pages = None")
    else:
        shapes.check("rope_pages", rope_pages, "N P R")
    _check_plan(plan, shapes["C"], shapes["R"])
    shapes.check("q_latent", q_latent, "T H C")
    if q_rope is not None:
        shapes.check("q_rope", q_rope, "T H R")
    elif shapes["R"]:
        raise ValueError(f"q_rope must be given for rope_pages with R = {shapes['R']}, got None.")
    check_floating("q_latent", q_latent)
    check_floating("latent_pages", latent_pages)
    for name, tensor, first in (
        ("q_latent", q_latent, None),
        ("q_rope", q_rope, q_latent),
        ("latent_pages", latent_pages, None),
        ("rope_pages", rope_pages, latent_pages),
    ):
        if tensor is None:
            continue
        if first is not None:
            check_dtype(name, tensor, first.dtype)
        check_device(name, tensor, latent_pages.device, "latent_pages")
        check_last_dim_contiguous(name, tensor)
    check_device("the plan", plan.query_indptr, latent_pages.device, "latent_pages")
    if plan.max_page >= shapes["N"]:
        raise ValueError(f"page ids of the plan must be below {shapes['N']} (N of latent_pages), got {plan.max_page}.")


def _check_plan(plan: AttentionPlan, latent_dim: int, rope_dim: int) -> None:
    if (plan.num_kv_heads, plan.head_dim, plan.value_dim) != (1, latent_dim + rope_dim, latent_dim):
        raise ValueError(
            f"plan must have num_kv_heads = 1, head_dim = C + R = {latent_dim + rope_dim} and value_dim = C = "
            f"{latent_dim}, got {plan.num_kv_heads}, {plan.head_dim} and {plan.value_dim}. "
            "Build it with plan_attention(..., num_kv_heads=1, head_dim=C + R, value_dim=C)."
        )


def _check_out(out: torch.Tensor, q_latent: torch.Tensor) -> None:
    check_dtype("out", out, q_latent.dtype)
    if out.shape != q_latent.shape:
        raise ValueError(f"out must have the shape of q_latent, {list(q_latent.shape)}, got {list(out.shape)}.")
    check_device("out", out, q_latent.device, "q_latent")
    check_contiguous("out", out)


@torch.library.custom_op("pagedkv::mla_attention", mutates_args=())
def _mla_attention_op(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan_tensors: Sequence[torch.Tensor],
    mask_tensors: Sequence[torch.Tensor],
    plan_numbers: Sequence[int],
    sm_scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = AttentionPlan.unpack(plan_tensors, mask_tensors, plan_numbers)
    out, lse = _mla_attention(q_latent, q_rope, latent_pages, rope_pages, plan, sm_scale, return_lse, None, backend)
    return out, q_latent.new_empty(0, dtype=torch.float32) if lse is None else lse


@_mla_attention_op.register_fake
def _mla_attention_shape(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan_tensors: Sequence[torch.Tensor],
    mask_tensors: Sequence[torch.Tensor],
    plan_numbers: Sequence[int],
    sm_scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_shape = q_latent.shape[:2] if return_lse else (0,)
    return q_latent.new_empty(q_latent.shape), q_latent.new_empty(lse_shape, dtype=torch.float32)


def _traced(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor | None,
    latent_pages: torch.Tensor,
    rope_pages: torch.Tensor | None,
    plan: AttentionPlan,
    sm_scale: float,
    return_lse: bool,
    out: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The call as torch.compile sees it: one opaque op over the plan's tensors and numbers."""
    result, lse = _mla_attention_op(
        q_latent, q_rope, latent_pages, rope_pages, *plan.pack(), sm_scale, return_lse, backend
    )
    if out is not None:
        _check_out(out, q_latent)
        result = out.copy_(result)
    return result, lse if return_lse else None
