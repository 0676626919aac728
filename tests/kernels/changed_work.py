"""Runs attention with plans whose work was changed, in a process that a wrong address may end. See test_plan_work.py.

Usage: python changed_work.py NOTE CHANGES... NOTE is a file that names what is being tried.
"""

import dataclasses
import itertools
import os
import random
import sys

import torch

import pagedkv
from pagedkv.testing.bits import same_bits, storage_bytes

REFUSAL = "the plan must be as plan_attention made it"
# Elements before and after a result, which stay what they were; entries after the work, which lead nowhere.
NUM_GUARDS = 64
FAR = 2**62
EXTREMES = (-1, 0, 1, 2**31, FAR, 2**63 - 1, -(2**63))

# Three forks of one prefix, one of which ends within a page they share; a sequence alone, and an empty one.
ROWS = [[*range(20), 20], [*range(20), 21, 22], range(20), [24], []]
KV_LENS, Q_LENS = [330, 345, 310, 3, 0], [1, 2, 1, 5, 1]


def int32(values):
    return torch.tensor(list(values), dtype=torch.int32)


def make_plan(q_lens, rows, kv_lens, num_threads, **options):
    torch.set_num_threads(num_threads)
    table = pagedkv.PageTable.from_rows(rows, kv_lens, 16)
    plan = pagedkv.plan_attention(int32([0, *itertools.accumulate(q_lens)]), table, **options)
    # The cut is for so many threads; one takes the items in order, so that what goes wrong does so again.
    torch.set_num_threads(1)
    return plan


class Case:
    """A call on `out` between guards; `holds` says that nothing else was written."""

    def __init__(self, plan, call, *inputs):
        self.plan, self.call, self.inputs = plan, call, inputs
        self.before = storage_bytes(*inputs)
        size = plan.num_tokens * plan.num_q_heads * plan.value_dim
        self.memory = torch.full((size + 2 * NUM_GUARDS,), 7.0)
        self.out = self.memory[NUM_GUARDS:-NUM_GUARDS].view(plan.num_tokens, plan.num_q_heads, plan.value_dim)

    def run(self, work):
        """True when it ran, False when it was refused in the right words."""
        try:
            self.call(dataclasses.replace(self.plan, work=work), self.out)
        except ValueError as error:
            if REFUSAL not in str(error):
                raise
            return False
        return True

    def holds(self):
        guards = torch.cat([self.memory[:NUM_GUARDS], self.memory[-NUM_GUARDS:]])
        assert guards.eq(7).all(), "wrote around out"
        assert same_bits(storage_bytes(*self.inputs), self.before), "wrote into an input"


def decode(num_threads):
    plan = make_plan(Q_LENS, ROWS, KV_LENS, num_threads, num_q_heads=4, num_kv_heads=2, head_dim=16)
    pages = torch.randn(2, 25, 16, 2, 16).mul(20).to(torch.int8)
    scales, query = torch.rand(25, 2, 16), torch.randn(10, 4, 16)

    def call(plan, out):
        options = {"key_scales": scales, "value_scales": scales, "return_lse": True, "backend": "cpu"}
        pagedkv.paged_attention(query, *pages, plan, out=out, **options)

    return Case(plan, call, pages, scales, query)


def prefill(num_threads):
    mask = torch.rand(150 * 700 + 1 * 40) < 0.9
    heads = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    rows = [range(44), range(44, 47)]
    plan = make_plan([150, 1], rows, [700, 40], num_threads, window_left=400, custom_mask=mask, **heads)
    pages, query = torch.randn(2, 47, 16, 1, 8), torch.randn(151, 2, 8)

    def call(plan, out):
        pagedkv.paged_attention(query, *pages, plan, rope=pagedkv.RotaryEmbedding(8), out=out, backend="cpu")

    return Case(plan, call, pages, query)


def latent(num_threads):
    plan = make_plan(Q_LENS, ROWS, KV_LENS, num_threads, num_q_heads=3, num_kv_heads=1, head_dim=24, value_dim=16)
    pages, query = torch.randn(25, 16, 24), torch.randn(10, 3, 24)

    def call(plan, out):
        parts = query.split([16, 8], 2), pages.split([16, 8], 2)
        pagedkv.mla_attention(*parts[0], *parts[1], plan, sm_scale=0.2, out=out, backend="cpu")

    return Case(plan, call, pages, query)


def every_field(case, _):
    """Each number of the work on its own."""
    old = case.plan.work.tolist()
    for at in range(len(old)):
        near = [old[at] - 1, old[at] + 1, *old[max(at - 1, 0) : at + 2]]
        for value in {*EXTREMES, *near} - {old[at]}:
            yield f"{ {at: value} }", changed(case.plan.work, {at: value})


def several_fields(case, _):
    """Two to four numbers that stand together."""
    old = case.plan.work.tolist()
    for _ in range(1000):
        start = random.randrange(len(old))
        window = range(start, min(start + 8, len(old)))
        places = random.sample(window, min(len(window), random.randint(2, 4)))
        changes = {at: random.choice([*EXTREMES, 2, old[at] - 1, old[at] + 1, random.choice(old)]) for at in places}
        yield str(changes), changed(case.plan.work, changes)


def other_lengths(case, _):
    """Cut anywhere, and with more at its end."""
    work = case.plan.work
    for length in range(len(work)):
        yield f"the first {length}", work[:length]
        yield f"{length + 1} more", torch.cat([work, work[: length + 1]])


def other_plans(case, cases):
    """What was made for another batch."""
    for name, other in cases.items():
        if other is not case:
            yield f"the work of {name}", other.plan.work


def changed(work, changes):
    work = torch.cat([work, torch.full((NUM_GUARDS,), FAR)])[: len(work)]
    for at, value in changes.items():
        work[at] = value
    return work


def main(note, *names):
    torch.manual_seed(0)
    random.seed(0)
    file = os.open(note, os.O_CREAT | os.O_WRONLY)
    cases = {f"{make.__name__}-{number}": make(number) for make in (decode, prefill, latent) for number in (1, 8)}
    for changes, (name, case) in itertools.product(names, cases.items()):
        ran = []
        for what, work in globals()[changes](case, cases):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{name}: {what} of {case.plan.work.tolist()}".encode(), 0)
            ran.append(case.run(work))
            if ran[-1]:
                case.holds()
        case.holds()
        print(f"{changes} of {name}: {sum(ran)} of {len(ran)} ran")
        assert not all(ran)
        assert not any(ran) or changes != "other_lengths"
        assert case.run(case.plan.work)


if __name__ == "__main__":
    main(*sys.argv[1:])
