"""The losses against a slow loop and pytorch-metric-learning, edge cases, half precision, two
processes against one, collapse monitors
"""
import math
import os
import warnings
import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError
from pahcl.training.collapse import _collapse_signs, _effective_rank, _uniformity
from pahcl.training.contrast import (
    _gather_rows, _gather_with_gradient, _info_nce, _make_rows, _mean_counted, nt_xent)
from pahcl.training.momentum import MomentumQueue, queue_loss, update_moving_average

def features(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
def numbers(seed, high, n):
    return torch.randint(high, (n,), generator=torch.Generator().manual_seed(seed))

def slow(first, second, person, group, present_first, present_second, temperature):
    "The loss as its formula says it, one number at a time; [B, K, D] per view."
    B, K, _ = first.shape
    z = [v/v.norm() for v in torch.cat([first, second]).reshape(2*B*K, -1)]
    z = {(i, k): z[i*K+k] for i in range(2*B) for k in range(K)}
    there = torch.cat([present_first, present_second])
    losses = []
    for k in range(K):
        for i in range(2*B):
            others = [j for j in range(2*B) if j != i and there[j, k]]
            positive = [j for j in others if group[j%B] == group[i%B]]
            negative = [j for j in others if person[j%B] != person[i%B]]
            if not (there[i, k] and positive and negative): continue
            score = {j: (z[i, k]@z[j, k]).item()/temperature for j in {*positive, *negative}}
            log_sum = math.log(sum(math.exp(s) for s in score.values()))
            losses.append(sum(log_sum-score[p] for p in positive)/len(positive))
    return sum(losses)/max(1, len(losses))

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4),
       st.sampled_from(['view', 'recording', 'subject']), st.floats(0.05, 2), st.integers(0, 999))
def test_equals_the_loop(B, K, persons, positives, temperature, seed):
    first, second, person = (features(seed, B, K, 5), features(seed+1, B, K, 5),
                             numbers(seed, persons, B))
    group = dict(view=torch.arange(B), recording=person*2+numbers(seed+1, 2, B),
                 subject=person)[positives]
    present = [features(seed+v, B, K) > -1 for v in (2, 3)]
    fast = nt_xent(first, second, person, group, *present, temperature)
    assert fast.item() == pytest.approx(slow(first, second, person, group, *present, temperature),
                                        abs=1e-9)

@pytest.mark.parametrize('temperature', [0.07, 0.5])
def test_equals_pytorch_metric_learning(temperature):
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
    first, second = features(0, 12, 8), features(1, 12, 8)
    both, cycle, person = torch.cat([first, second]), torch.arange(12), torch.arange(12) % 5
    assert nt_xent(first, second, cycle, temperature=temperature).item() == pytest.approx(
        NTXentLoss(temperature)(both, cycle.repeat(2)).item(), rel=1e-6)
    assert nt_xent(first, second, person, person, temperature=temperature).item() == pytest.approx(
        SupConLoss(temperature)(both, person.repeat(2)).item(), rel=1e-6)

@pytest.mark.parametrize('K', [1, 4])
def test_gradients_are_right(K):
    "also with the mask, absent sub-structures and a row that does not count"
    person, present = torch.tensor([0, 0, 1, 2]), torch.ones(4, K, dtype=torch.bool)
    present[2:, 0] = K == 1
    inputs = [features(s, 4, K, 3).requires_grad_() for s in (0, 1)]
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, person, None, present, present, 0.5),
                                    inputs)

@pytest.mark.parametrize('first', [torch.ones(1, 4), torch.zeros(6, 4), torch.ones(6, 4),
                                   torch.full((6, 4), 1e-30), torch.full((6, 4), 1e30)])
def test_nothing_becomes_nan(first):
    first = first.clone().requires_grad_()
    for person in (torch.zeros(len(first), dtype=torch.long), torch.arange(len(first))):
        loss = nt_xent(first, first.detach()+0, person)
        loss.backward()
        assert loss.isfinite() and first.grad.isfinite().all()
        if person.unique().numel() == 1: assert loss == 0 and first.grad.abs().sum() == 0
        # all equal: chance
        elif first.abs().max() <= 1:
            assert loss.item() == pytest.approx(math.log(2*len(first)-1), rel=1e-5)

def test_absent_everywhere_is_zero():
    a = features(0, 4, 2, 3).requires_grad_()
    nowhere = torch.zeros(4, 2, dtype=torch.bool)
    loss = nt_xent(a, a.detach(), torch.arange(4), None, nowhere, nowhere)
    loss.backward()
    assert loss == 0 and a.grad.abs().sum() == 0

@pytest.mark.parametrize('kind,error', [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(kind, error):
    first, second = (features(0, 32, 64, dtype=torch.float32),
                     features(1, 32, 64, dtype=torch.float32))
    exact = nt_xent(first, first+0.3*second, torch.arange(32))
    low = first.to(kind).requires_grad_()
    loss = nt_xent(low, (first+0.3*second).to(kind), torch.arange(32))
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss-exact) < error and low.grad.isfinite().all()
    with torch.autocast('cpu', torch.bfloat16):
        assert nt_xent(first, first+0.3*second,
                       torch.arange(32)).item() == pytest.approx(exact.item(), abs=1e-6)

def test_a_person_of_two_cycles_is_no_negative():
    "moving the other cycle of a person does not change the loss of the first one's rows"
    first, second, person = features(0, 5, 8), features(1, 5, 8), torch.tensor([0, 0, 1, 2, 3])
    def of_row_0(a):
        rows = _make_rows(torch.cat([a, second]), person.repeat(2), torch.arange(5).repeat(2))
        return _info_nce(rows, rows, torch.arange(10))[0][0, 0]
    moved, other = first.clone(), first.clone()
    moved[1], other[2] = features(5, 8), features(5, 8)
    assert of_row_0(first) == of_row_0(moved) != of_row_0(other)

# ---- the queue ----
def slow_queue(size, pushes):
    kept = [k for p in pushes for k in p][-size:]
    return sorted(kept)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=5))
def test_queue_keeps_the_last(size, sizes):
    owner = torch.nn.Module()
    queue, pushes, n = MomentumQueue(owner, size, queue=(3,), queue_substructure=(2, 4)), [], 0
    for s in sizes:
        ids = torch.arange(n, n+s)
        n += s
        queue.push(ids, ids, torch.ones(s, 2, dtype=torch.bool),
                   queue=ids[:, None].expand(s, 3).float(),
                   queue_substructure=ids[:, None, None].expand(s, 2, 4).float())
        pushes.append(ids.tolist())
    kept = slow_queue(size, pushes)
    for name, shape in dict(queue=(1, 3), queue_substructure=(2, 4)).items():
        rows = queue.rows(name)
        filled = rows.person >= 0
        assert rows.z.shape == (size, *shape) and sorted(rows.person[filled].tolist()) == kept
        assert ((rows.z[filled] == rows.person[filled, None, None]).all()
                and rows.present[filled].all())

def test_moco_equals_he_et_al():
    """one positive, negatives from the queue: cross-entropy over [l_pos, l_neg], as in MoCo's
    algorithm 1
    """
    q, k, memory = (torch.nn.functional.normalize(features(s, n, 6), dim=1)
                    for s, n in ((0, 1), (1, 1), (2, 10)))
    owner = torch.nn.Module()
    queue = MomentumQueue(owner, 10, queue=(6,))
    owner.double()
    queue.push(torch.arange(1, 11), torch.full((10,), -1), queue=memory)
    logits = torch.cat([(q*k).sum(1, keepdim=True), q@owner.queue], 1)/0.07
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(1, dtype=torch.long))
    assert queue_loss(_make_rows(q, torch.zeros(1).long()), _make_rows(k, torch.zeros(1).long()),
                      queue.rows('queue')).item() == pytest.approx(expected.item(), rel=1e-12)

def test_queue_masks_the_same_person_and_empty_places():
    owner, person = torch.nn.Module(), torch.arange(4)
    queue = MomentumQueue(owner, 8, queue=(6,))
    owner.double()
    query, key = _make_rows(features(0, 4, 6), person), _make_rows(features(1, 4, 6), person)
    empty = queue_loss(query, key, queue.rows('queue'))
    assert empty.item() == pytest.approx(_mean_counted(*_info_nce(query, key)).item(), rel=1e-12)
    # everybody's perfect match, but of the same person
    queue.push(person, torch.full((4,), -1), queue=query.z[:, 0])
    rows = queue.rows('queue')
    losses = [_info_nce(query, r)[0] for r in (rows, rows._replace(person=torch.arange(8)+10))]
    assert losses[0].abs().sum() == 0   # only queue, no positive: nothing counts
    queue.push(torch.full((4,), 99), torch.full((4,), -1), queue=query.z[:, 0])
    assert queue_loss(query, key, queue.rows('queue')) > empty

def test_momentum_update_closed_form():
    a, b = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
            for _ in range(2))
    start = {n: t.clone() for n, t in b.state_dict().items()}
    for _ in range(5): update_moving_average(b, a, 0.9)
    for n, t in b.state_dict().items():
        if t.is_floating_point():
            assert torch.allclose(t, 0.9**5*start[n]+(1-0.9**5)*a.state_dict()[n])

# ---- monitors ----
def test_monitors_against_formulas():
    z = features(0, 40, 6)
    unit = z/z.norm(dim=1, keepdim=True)
    pairs = [math.exp(-2*(unit[i]-unit[j]).square().sum().item()) for i in range(40)
             for j in range(i)]
    assert _uniformity(z) == pytest.approx(math.log(sum(pairs)/len(pairs)), rel=1e-9)
    assert (_effective_rank(z) == pytest.approx(_effective_rank(7*z+3), rel=1e-9)
            and 1 < _effective_rank(z) <= 6)
    assert _effective_rank(torch.ones(5, 3)) == 0 and _effective_rank(
        torch.arange(10.)[:, None]*torch.ones(1, 4)) == pytest.approx(1, abs=1e-4)
    assert all(math.isnan(v) for v in _collapse_signs(z[:1], z[:1]).values())

# ---- several processes ----
def made(n):
    return (features(0, n, 5), features(1, n, 5), torch.arange(n) % 3, torch.arange(n),
            features(2, n, 2) > -1, features(3, n, 2) > -1)

def model_loss(layer, x1, x2, person, group, p1, p2, queued):
    a, b = layer(x1).reshape(len(x1), 2, 4), layer(x2).reshape(len(x1), 2, 4)
    keys = _gather_rows(_make_rows(b.detach(), person, group, p2))[0]
    return (nt_xent(a[:, 0], b[:, 0], person, group) + nt_xent(a, b, person, group, p1, p2)
            + queue_loss(_make_rows(a, person, group, p1), keys, queued))

def layer_and_queue():
    layer, owner = torch.nn.Linear(5, 8).double(), torch.nn.Module()
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()): p.copy_(features(9+i, *p.shape))
    queue = MomentumQueue(owner, 6, queue_substructure=(2, 4))
    owner.double()
    queue.push(torch.arange(4), torch.full((4,), -1), queue_substructure=features(20, 4, 2, 4))
    return layer, queue.rows('queue_substructure')

def process(rank, cuts, store, answers):
    warnings.simplefilter('ignore')
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    for c, (n, cut) in enumerate(cuts):
        layer, queued = layer_and_queue()
        mine = [t[:cut] if rank == 0 else t[cut:] for t in made(n)]
        loss = model_loss(layer, *mine, queued)
        (loss*len(mine[0])*2/n).backward()                      # as the training loop weighs it
        # as DistributedDataParallel does
        for p in layer.parameters(): dist.all_reduce(p.grad); p.grad /= 2
        total = (loss*len(mine[0])/n).detach(); dist.all_reduce(total)
        if rank == 0:
            torch.save(dict(loss=total, gradients=[p.grad for p in layer.parameters()]),
                       f'{answers}{c}')
    try: nt_xent(mine[0], mine[1], mine[2])
    except PahclError as e: assert 'needs `group`' in str(e)
    x = torch.full((rank+1, 2), float(rank), requires_grad=True)
    y = _gather_with_gradient(x)
    assert y.tolist() == [[0, 0], [1, 1], [1, 1]]
    (y.sum()*(rank+1)).backward()
    assert (x.grad == 3).all()   # 1 from process 0 and 2 from process 1
    assert nt_xent(mine[0], mine[1], mine[2], across=False).isfinite()
    # gloo's threads may abort while the interpreter goes down: leave without taking it down
    dist.barrier()
    os._exit(0)

def test_two_processes_equal_one(tmp_path):
    cuts = [(8, 4), (9, 5), (5, 1)]                             # equal shares and unequal ones
    mp.spawn(process, (cuts, tmp_path/'store', tmp_path/'answer'), nprocs=2)
    for c, (n, _) in enumerate(cuts):
        layer, queued = layer_and_queue()
        loss = model_loss(layer, *made(n), queued)
        loss.backward()
        got = torch.load(f'{tmp_path}/answer{c}')
        assert abs(got['loss']-loss) < 1e-6
        for p, g in zip(layer.parameters(), got['gradients']):
            assert (p.grad-g).abs().max() < 1e-6*p.grad.abs().max()
