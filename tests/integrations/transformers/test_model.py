"""PagedModel: packed, paged steps give the tokens of generate; models that cannot run so are refused by name."""

import threading

import pytest
import torch
import transformers

from pagedkv import KVPool, PageTable
from pagedkv.integrations.transformers import PagedModel, PagedStep, UnsupportedModelError, check_model
from pagedkv.testing.greedy import first_greedy_difference
from pagedkv.testing.rounded_cache import RoundedCache
from pagedkv.testing.tiny_models import TINY_MODELS, VOCAB_SIZE, tiny_model

PAGE_SIZE = 4
PROMPTS = [
    torch.randint(250, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 13, 21)
]


def paged_greedy(paged, prompts, num_tokens, dtype=None):
    """Greedy tokens of all prompts in one packed batch over shuffled pages of a poisoned pool."""
    num_pages = 64
    pool = KVPool(paged.spec(PAGE_SIZE, dtype), num_pages)  # memory that nothing has written is NaN in every test
    pages = torch.randperm(num_pages).tolist()
    rows = [pages[i :: len(prompts)] for i in range(len(prompts))]
    ids, new = [list(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        table = PageTable.from_rows(rows, [len(row) for row in ids], PAGE_SIZE)
        query_indptr = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
        step = PagedStep(pool, paged.geometry, table, query_indptr)
        packed = torch.tensor([token for row, n in zip(ids, new, strict=True) for token in row[-n:]])
        for row, token in zip(ids, paged.forward(packed, step).argmax(-1).tolist(), strict=True):
            row.append(token)
        new = [1] * len(prompts)
    return [row[len(prompt) :] for row, prompt in zip(ids, prompts, strict=True)], step


def generated(model, prompt, num_tokens, **options):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_forward_gives_the_tokens_of_generate(name):
    model = tiny_model(name)
    tokens, _ = paged_greedy(PagedModel(model), PROMPTS, 10)
    assert tokens == [generated(model, prompt, 10) for prompt in PROMPTS]
    assert len({*map(tuple, tokens)}) == len(PROMPTS)  # no model that says one thing whatever it reads


def test_forward_plans_once_for_each_window():
    _, step = paged_greedy(PagedModel(tiny_model("gemma3", num_hidden_layers=6, layer_types=None)), PROMPTS[:1], 1)
    assert step.num_plans == 2


def test_geometry_names_windows_and_shared_layers():
    layers = check_model(tiny_model("gemma3n")).layers
    assert [layer.window for layer in layers.values()] == [8, None, 8, None]
    assert [layer.stored_in for layer in layers.values()] == [0, 1, 0, 1]
    spec = check_model(tiny_model("gemma3n")).spec(PAGE_SIZE)
    assert [layer.num_kv_heads for layer in spec.layers] == [2, 2, 0, 0]


def test_forward_over_pages_of_another_dtype_than_the_model():
    model = tiny_model("llama")
    paged = PagedModel(model)
    tokens, step = paged_greedy(paged, PROMPTS, 1, dtype=torch.bfloat16)
    assert step.pool.spec.dtype == torch.bfloat16
    assert len(tokens) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3n", "gpt_oss", "opt"])
def test_forward_over_pages_of_another_dtype_loses_what_the_dtype_loses(name, dtype):
    """The tokens of the model's own attention over keys and values that were rounded alike and kept without pages."""
    model = tiny_model(name)
    tokens, _ = paged_greedy(PagedModel(model), PROMPTS, 10, dtype)
    for prompt, ours in zip(PROMPTS, tokens, strict=True):
        theirs = generated(model, prompt, 10, past_key_values=RoundedCache(model.config, dtype))
        difference = first_greedy_difference(model, prompt, ours, theirs, kv_dtype=dtype)
        assert difference is None or difference.is_tie, str(difference)


def test_logits_are_farther_off_the_coarser_the_pages():
    """int8 has 127 steps of equal width below the largest number of a token; float8 has 3 bits or 2 after the first."""
    paged = PagedModel(tiny_model("llama"))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        pool = KVPool(paged.spec(PAGE_SIZE, dtype), 6)
        table = PageTable.from_rows([[5, 0, 2, 1, 4, 3]], [21], PAGE_SIZE)
        step = PagedStep(pool, paged.geometry, table, torch.tensor([0, 21], dtype=torch.int32))
        logits[dtype] = paged.forward(torch.tensor(PROMPTS[2]), step, logit_rows=torch.arange(21))
    errors = [float((other - logits[torch.float32]).square().mean()) for other in logits.values()]
    assert errors == sorted(errors)
    assert errors[1] > 0


@pytest.mark.parametrize("logit_rows", [[0, 4], [2], []])
def test_forward_gives_logits_of_the_named_rows_alone(logit_rows):
    model = tiny_model("llama")
    paged = PagedModel(model)
    pool = KVPool(paged.spec(PAGE_SIZE), 4)
    table = PageTable.from_rows([[2, 0]], [5], PAGE_SIZE)
    step = PagedStep(pool, paged.geometry, table, torch.tensor([0, 5], dtype=torch.int32))
    ids = torch.tensor(PROMPTS[0])
    logits = paged.forward(ids, step, logit_rows=torch.tensor(logit_rows, dtype=torch.int64))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, logit_rows]
    assert logits.shape == (len(logit_rows), VOCAB_SIZE)
    assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist()


COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("model_class", "config", "words"),
    [
        (
            "DeepseekV3ForCausalLM",
            transformers.DeepseekV3Config(**COMMON, intermediate_size=8, kv_lora_rank=8),
            "latent",
        ),
        (
            "BloomForCausalLM",
            transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4),
            "AttentionInter",
        ),
        (
            "T5ForConditionalGeneration",
            transformers.T5Config(vocab_size=97, d_model=32, d_ff=8, num_layers=1),
            "cross att",
        ),
        (
            "MambaForCausalLM",
            transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1),
            "forward must",
        ),
        (
            "Llama4ForCausalLM",
            transformers.Llama4TextConfig(
                **COMMON,
                intermediate_size=8,
                intermediate_size_mlp=8,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=1,
            ),
            "chunked_attention",
        ),
        (
            "Qwen3NextForCausalLM",
            transformers.Qwen3NextConfig(
                **COMMON,
                intermediate_size=8,
                num_key_value_heads=2,
                head_dim=8,
                num_experts=2,
                moe_intermediate_size=8,
                shared_expert_intermediate_size=8,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
            ),
            "linear_attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_model_refuses_by_name(model_class, config, words):
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config)
    with pytest.raises(UnsupportedModelError, match=words):
        check_model(model)


def test_check_model_refuses_attention_that_is_not_causal():
    model = tiny_model("gemma3", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match=r"is_causal must be True|plainly causal"):
        check_model(model)


def test_check_model_refuses_an_argument_it_does_not_know():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: forward(*args, position_bias=torch.zeros(1), **kwargs)
    with pytest.raises(UnsupportedModelError, match="argument 'position_bias' must be absent"):
        check_model(model)


def test_check_model_refuses_keys_that_change_after_they_are_cached():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def changing(*args, past_key_values, **kwargs):
        class Changed:
            def update(self, key, value, layer_idx):
                past_key_values.update(key, value, layer_idx)
                return key * 2, value

        return forward(*args, past_key_values=Changed(), **kwargs)

    attention.forward = changing
    with pytest.raises(UnsupportedModelError, match="other keys and values than it caches in layer 1"):
        check_model(model)


def test_check_model_refuses_what_is_no_model():
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got Linear"):
        check_model(torch.nn.Linear(1, 1))


def small_step(paged):
    pool = KVPool(paged.spec(PAGE_SIZE), 4)
    table = PageTable.from_rows([[0]], [3], PAGE_SIZE)
    return PagedStep(pool, paged.geometry, table, torch.tensor([0, 3], dtype=torch.int32))


def test_forward_refuses_a_padding_mask():
    paged = PagedModel(tiny_model("llama"))
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match="attention_mask must be all ones in a packed, paged call, got zeros"):
        paged.forward(ids, small_step(paged), attention_mask=torch.tensor([[0, 1, 1]]))
    assert paged.forward(ids, small_step(paged), attention_mask=torch.ones(1, 3)).shape == (1, VOCAB_SIZE)


def test_forward_refuses_training_mode():
    paged = PagedModel(tiny_model("llama"))
    paged.model.train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        paged.forward(torch.tensor([1, 2, 3]), small_step(paged))


def test_forward_refuses_tokens_that_do_not_fit_the_step():
    paged = PagedModel(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"token_ids must have shape \[T\] with T = 3"):
        paged.forward(torch.tensor([1, 2]), small_step(paged))


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_forward_leaves_the_model_as_it_was_also_after_an_error(before):
    model = tiny_model("llama", attn_implementation=before)
    paged = PagedModel(model)
    step = small_step(paged)

    def broken(*args, **kwargs):
        assert model.config._attn_implementation == "pagedkv"
        raise RuntimeError("planted")

    hook = model.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="planted"):
        paged.forward(torch.tensor([1, 2, 3]), step)
    hook.remove()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_a_call_of_another_thread_inside_a_step_is_what_it_was(before):
    """Padding included: neither the mask nor the attention of the other user's call is ours."""
    model = tiny_model("llama", attn_implementation=before)
    paged = PagedModel(model)
    ids, mask = torch.tensor([[257, 257, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.inference_mode():
        alone = model(ids, attention_mask=mask).logits
    meanwhile = []

    def other_user():
        with torch.inference_mode():
            meanwhile.append(model(ids, attention_mask=mask).logits)

    def in_the_middle(*args):
        if not meanwhile:
            meanwhile.append(None)  # the other user's call comes through this layer as well
            assert model.config._attn_implementation == "pagedkv"
            thread = threading.Thread(target=other_user)
            thread.start()
            thread.join()

    hook = model.model.layers[0].register_forward_pre_hook(in_the_middle)
    paged.forward(torch.tensor([1, 2, 3]), small_step(paged))
    hook.remove()
    assert torch.equal(meanwhile[1][mask.bool()], alone[mask.bool()])
    assert model.config._attn_implementation == before
