"""Pools in the memory forms that callers have, and what a loop over tokens puts into them."""

import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32]

POOL_FORMS = ["hnd", "permuted_nhd", "one_buffer", "strided_rows", "wide"]


def pools(form, num_blocks, heads, block_size, dim, value_dim, dtype):
    """k_cache [N, H, P, D] and v_cache [N, H, P, >= Dv], random."""

    def randn(*shape):
        return torch.randn(*shape).to(dtype)

    if form == "hnd":
        return tuple(randn(num_blocks, heads, block_size, d) for d in (dim, value_dim))
    if form == "permuted_nhd":
        return tuple(randn(num_blocks, block_size, heads, d).permute(0, 2, 1, 3) for d in (dim, value_dim))
    if form == "one_buffer":
        both = randn(num_blocks, heads, block_size, dim + value_dim)
        return both.split([dim, value_dim], -1)
    if form == "strided_rows":
        return tuple(
            randn(num_blocks, heads, d, block_size + 1)[..., :block_size].transpose(2, 3) for d in (dim, value_dim)
        )
    assert form == "wide"  # the values' cache has more columns than the values
    return randn(num_blocks, heads, block_size, dim), randn(num_blocks, heads, block_size, value_dim + 3)


TOKEN_FORMS = ["contiguous", "packed_qkv", "padded", "strided_rows"]


def tokens(form, num_tokens, heads, dim, value_dim, dtype):
    """k [T, H, D] and v [T, H, Dv]."""

    def randn(*shape):
        return torch.randn(*shape).to(dtype)

    if form == "contiguous":
        return tuple(randn(num_tokens, heads, d) for d in (dim, value_dim))
    if form == "packed_qkv":  # query heads and both others side by side, head by head
        packed = randn(num_tokens, heads, 2 * dim + value_dim)
        return packed[..., dim : 2 * dim], packed[..., 2 * dim :]
    if form == "padded":
        return tuple(randn(num_tokens + 1, heads + 2, d + 3)[1:, 1:-1, 2:-1] for d in (dim, value_dim))
    assert form == "strided_rows"
    return tuple(randn(heads, d, num_tokens).permute(2, 0, 1) for d in (dim, value_dim))


def stored_by_loop(cache, rows, slots):
    """A copy of the cache [N, H, P, D] after rows [T, H, Dv] went to their slots one by one, in order."""
    result = cache.clone()
    block_size = cache.shape[2]
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            result[slot // block_size, :, slot % block_size, : rows.shape[2]] = row
    return result


def status_and_text(error):
    """What a test asserts of an InfiniopError."""
    return error.value.status, error.value.message
