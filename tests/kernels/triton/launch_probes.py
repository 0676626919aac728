"""Compiles what calls launch, for a GPU that is not there: `python launch_probes.py` prints a word for each, as JSON.

The calls are those named here, and of the ops that move and turn tokens all conformance cases.
Unlike the variants of the compile tests, the kernels are specialised by Triton's own launcher, from the arguments of
the call: a number that is 1 becomes a constant, an absent tensor None, an address that is no multiple of 16 says so.
"""

import contextlib
import json
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.device = lambda device: contextlib.nullcontext()
driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
)

import pagedkv  # noqa: E402 (asks for the GPU)
from pagedkv import RotaryEmbedding  # noqa: E402
from pagedkv.kernels import backend, reference, triton  # noqa: E402
from pagedkv.testing.conformance import conformance_cases  # noqa: E402
from pagedkv.testing.conformance.report import run_cases  # noqa: E402

compiled = []


def compile_only(kernel, *args, grid, warmup, **options):
    compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))


run, JITFunction.run = JITFunction.run, compile_only
triton._rejects = lambda call: None
backend.unregister_backend("triton")
triton.register()
# The same, and then the result, so that a case of conformance that compiles passes.
MOVING_OPS = ("store_kv", "rope_store_kv", "gather_kv", "copy_pages", "quantize_kv", "apply_rope", "merge_states")


def compile_and_do(op):
    compile_op = triton._loaded_at_first_call(op)

    def run_op(*args):
        compile_op(*args)
        getattr(reference, op)(*args)

    return run_op


backend.register_backend("done", ops={op: compile_and_do(op) for op in MOVING_OPS}, priority=-300)

BF16, F32, INT8, E4M3 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
ROPE = RotaryEmbedding(32)


def plan(query_len, heads, dims, page_size, **rules):
    table = pagedkv.PageTable.from_rows([list(range(-(-600 // page_size)))], [600], page_size)
    names = ("num_q_heads", "num_kv_heads", "head_dim", "value_dim")
    numbers = dict(zip(names, (*heads, *dims), strict=True))
    return pagedkv.plan_attention(torch.tensor([0, query_len], dtype=torch.int32), table, **numbers, **rules)


def attend(query_len, heads, dtypes=(BF16, BF16), page_size=16, *, scaled=False, rules=None, **options):
    """D 32 and Dv 16, in views that start at an odd element."""
    num_pages = -(-600 // page_size)
    query = torch.zeros(query_len * heads[0] * 33 + 1, dtype=dtypes[0])[1:].view(query_len, heads[0], 33)[..., :32]
    pages = [torch.zeros(num_pages, page_size, heads[1], width).to(dtypes[1]) for width in (32, 16)]
    if scaled:
        options |= dict.fromkeys(("key_scales", "value_scales"), torch.ones(num_pages, heads[1], page_size))
    of = plan(query_len, heads, (32, 16), page_size, **rules or {})
    pagedkv.paged_attention(query, *pages, of, return_lse=True, backend="triton", **options)


def attend_latents(heads):
    latents, ropes = (torch.zeros(2, heads, width, dtype=BF16) for width in (32, 16))
    pages = [torch.zeros(38, 16, width, dtype=BF16) for width in (32, 16)]
    of = plan(2, (heads, 1), (48, 32), 16)
    pagedkv.mla_attention(latents, ropes, *pages, of, sm_scale=0.1, return_lse=True, backend="triton")


def store(num_tokens, heads, to=BF16, *, turns=False):
    tokens = torch.zeros(num_tokens, heads, 32, dtype=BF16)
    pages = [torch.zeros(200, 16, heads, 32).to(to) for _ in "kv"]
    scales = {}
    if to != BF16:
        scales = {name: torch.ones(200, heads, 16) for name in ("key_scales", "value_scales")}
    slots = torch.arange(num_tokens)
    if turns:
        pagedkv.rope_store_kv(tokens, tokens, tokens, slots, ROPE, *pages, slots, backend="triton", **scales)
    else:
        pagedkv.store_kv(tokens, tokens, *pages, slots, backend="triton", **scales)


def move(num_heads):
    pages = torch.zeros(8, 16, num_heads, 32, dtype=BF16)
    ids = torch.arange(1)
    pagedkv.gather_kv(pages, pages, ids, backend="triton")
    pagedkv.copy_pages(pages, pages.clone(), ids, ids, backend="triton")
    pagedkv.quantize_kv(pages[0], INT8, backend="triton")
    pagedkv.apply_rope(pages[0, :1], ids, ROPE, backend="triton")
    pagedkv.merge_states(pages[:1, :1].float(), torch.zeros(1, 1, num_heads), backend="triton")


PROBES = {
    "one head": lambda: attend(1, (1, 1), page_size=1),
    "one group": lambda: attend(40, (8, 1)),
    "float32 on codes with scales": lambda: attend(1, (2, 2), (F32, INT8), scaled=True),
    "codes with scales": lambda: attend(30, (8, 2), (BF16, E4M3), scaled=True),
    "window, cap and sinks": lambda: attend(30, (2, 1), rules={"window_left": 5}, soft_cap=9.0, sinks=torch.ones(2)),
    "mask": lambda: attend(2, (2, 1), rules={"custom_mask": torch.ones(1200, dtype=torch.bool)}),
    "rope": lambda: attend(2, (2, 1), rope=ROPE),
    "latents of one head": lambda: attend_latents(1),
    "latents of 16 heads": lambda: attend_latents(16),
    "few tokens": lambda: store(1, 1),
    "many tokens": lambda: store(3000, 2),
    "many tokens to codes": lambda: store(3000, 1, E4M3),
    "few turned tokens": lambda: store(1, 1, turns=True),
    "many turned tokens to codes": lambda: store(3000, 1, INT8, turns=True),
    "moves of one head": lambda: move(1),
    "moves": lambda: move(3),
}


def main():
    words = {}
    for name, probe in PROBES.items():
        compiled.clear()
        try:
            with torch.no_grad():
                probe()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            while error.__cause__ or error.__context__:
                error = error.__cause__ or error.__context__
            words[name] = f"{type(error).__name__}: {error}"[-500:]
        else:
            words[name] = "compiled" if compiled else "launched nothing"
    cases = list(conformance_cases(*MOVING_OPS))
    report = run_cases(cases, "done", "cpu")
    words |= {str(case): "compiled" for case in cases} | report.failed | report.not_offered
    print(json.dumps(words))


if __name__ == "__main__":
    main()
