"""The whole model: two processes against one in float64, what a level costs, what stands in the
queue, and what a partial group of micro-batches weighs
"""
import os
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import pahcl.training.contrastive_model as C
from pahcl.core.config_sections import _ContrastSection, _TrainingSection
from pahcl.training.contrastive_model import ContrastiveModel
import pahcl.models.pooling as pooling
from pahcl.models.encoders import build_encoder
from pahcl.training.runs import Run
from pahcl.training.batches import _group_batches, _split_batch
from pahcl.training.schedule import _parameter_groups
from pahcl.training.trainer import Trainer

N, T, K = 13, 400, 4

def made_batch(rows=slice(None), epoch=0):
    """Two noisy copies of each of 13 cycles of 5 persons, float64; one sub-structure is absent here
    and there.
    """
    g = torch.Generator().manual_seed(epoch)
    x = torch.randn(N, 1, T, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    n = torch.randint(200, T+1, (N,), generator=g)
    phases = ((torch.arange(T)*K//n[:, None]+1)*(torch.arange(T) < n[:, None])).to(torch.uint8)
    phases[::5] = torch.where(phases[::5] == 2, 1, phases[::5])
    views = {f'x{v}': (x+0.5*torch.randn(N, 1, T, generator=g, dtype=torch.float64))
             *(phases > 0)[:, None] for v in (1, 2)}
    return {k: v[rows] for k, v in (views | dict(
        phases1=phases, phases2=phases, person=torch.arange(N) % 5, group=torch.arange(N))).items()}

def made_model(**contrast):
    torch.manual_seed(0)
    encoder = build_encoder('cnn', cnn_channels=[8, 8], cnn_kernel_sizes=[9, 5], cnn_strides=[8, 2],
                            mamba_d_model=8, dropout=0.0)
    return ContrastiveModel(encoder, _ContrastSection(
        **dict(cycle_projector=[12, 6], substructure_projector=[12, 4], queue_size=20) | contrast),
                            K).double()

# ---- several processes ----
CASES = [dict(), dict(positives='subject'), dict(moco=True), dict(moco=True, lambda_cycle=0.0),
         dict(moco=True, lambda_substructure=0.0), dict(lambda_cycle=0.0),
         dict(lambda_substructure=0.0)]

def one_step(contrast, rank, processes):
    """Gradients and queue of one optimiser step of three micro-batches of 5, 5 and 3 rows, weighed
    as the training loop weighs them; before it a step that fills the queue.
    """
    model = made_model(**contrast)
    model.train()
    for epoch in range(2):
        model.zero_grad()
        [step] = _group_batches(np.arange(N), 5, 3, processes)
        for rows in step:
            mine = _split_batch(rows, processes)[rank]
            batch = made_batch(mine, epoch)
            if contrast.get('positives') == 'subject': batch['group'] = batch['person']
            loss, _ = model(batch)
            (loss*(len(mine)*processes/N)).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        for g in gradients.values() if processes > 1 else ():
            dist.all_reduce(g)
            g /= processes   # as DistributedDataParallel does
        with torch.no_grad():
            for n, g in gradients.items(): model.get_parameter(n).sub_(0.1*g)
        model.follow()
    return (gradients | {n: b.clone() for n, b in model.named_buffers() if n.startswith('queue')}
            | {n: p.detach().clone() for n, p in model.named_parameters() if '_momentum' in n})

def process(rank, store, answers):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    found = [one_step(c, rank, 2) for c in CASES]
    torch.save(found, f'{answers}{rank}')
    # gloo's threads may abort while the interpreter goes down: leave without taking it down
    dist.barrier()
    os._exit(0)

def test_two_processes_equal_one_in_float64(tmp_path):
    mp.spawn(process, (tmp_path/'store', tmp_path/'answer'), nprocs=2)
    for rank in (0, 1):
        for contrast, two in zip(CASES, torch.load(f'{tmp_path}/answer{rank}')):
            one = one_step(contrast, 0, 1)
            assert one.keys() == two.keys() and any(n.startswith('encoder.') for n in one)
            for name in one:
                if name.startswith('queue') and not one[name].is_floating_point(): continue
                if not name.startswith('queue'):
                    assert (one[name]-two[name]).abs().max() < 1e-6, (contrast, name)
            if contrast.get('moco'):   # the same keys with the same persons, wherever they stand
                persons = [sorted(w['queue_person'].tolist()) for w in (one, two)]
                assert persons[0] == persons[1] and -1 not in persons[0]

# ---- the queue ----
def test_every_key_of_every_micro_batch_is_queued_with_its_person():
    model = made_model(moco=True, queue_size=2*N)
    model.train()
    keys = []
    for epoch in range(2):
        for rows in np.array_split(np.arange(N), 3):
            batch = made_batch(rows, epoch)
            with torch.no_grad():
                keys.append(model.project(batch['x2'], batch['phases2'], momentum=True))
            model(batch)[0].backward()
    unit = lambda level: torch.nn.functional.normalize(torch.cat([k[level] for k in keys]), dim=-1)
    assert (torch.allclose(model.queue.T, unit('cycle'))
            and torch.allclose(model.queue_substructure.permute(2, 0, 1), unit('substructure')))
    assert (model.queue_person.tolist() == (torch.arange(N) % 5).repeat(2).tolist()
            and (model.queue_group == -1).all())
    assert torch.equal(model.queue_present.T, torch.cat([k['present'] for k in keys]))
    model.eval()
    before = model.queue_ptr.item(), model.queue.clone()
    model(made_batch())   # validation leaves no trace
    assert model.queue_ptr.item() == before[0] and torch.equal(model.queue, before[1])

# ---- what a level costs ----
@pytest.mark.parametrize('contrast', [dict(), dict(lambda_cycle=0.0), dict(lambda_substructure=0.0),
                                      dict(moco=True), dict(moco=True, lambda_cycle=0.0),
                                      dict(moco=True, lambda_substructure=0.0)],
                         ids=lambda c: ' '.join(f'{k}={v:g}' for k, v in c.items()) or 'all')
def test_two_passes_and_no_more_and_a_level_that_is_off_costs_nothing(contrast, monkeypatch):
    model, calls = made_model(**contrast), {}
    def counted(owner, name, label):
        real = getattr(owner, name)
        def wrapped(*a, **k):
            calls[label] = calls.get(label, 0)+1
            return real(*a, **k)
        monkeypatch.setattr(owner, name, wrapped)
    for name, module in model.named_children():
        counted(module, 'sequence' if name.startswith('encoder') else 'forward', name)
    counted(pooling, '_pool_phases', 'phase_pool')
    counted(C, 'queue_loss' if contrast.get('moco') else 'nt_xent', 'loss')
    model(made_batch())[0].backward()
    levels = [l for l in ('cycle', 'substructure') if contrast.get(f'lambda_{l}', 1)]
    parts = ['encoder', *(f'{l}_projector' for l in levels)]
    expected = ({p: 1 for p in parts} | {f'{p}_momentum': 1 for p in parts} if contrast.get('moco')
                else {p: 2 for p in parts})
    assert (calls == expected | (dict(phase_pool=2) if 'substructure' in levels else {})
            | dict(loss=len(levels)))
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # each level alone trains the whole encoder
    assert [n for n, p in learning.items() if p.grad is None or not p.grad.any()] == []
    assert not [n for n in model.state_dict() for l in ('cycle', 'substructure')
                if l not in levels and n.startswith(f'{l}_projector')]

# ---- micro-batches ----
@pytest.mark.parametrize('rows,batch,accumulation',
                         [(20, 4, 3), (23, 4, 3), (7, 10, 2), (12, 4, 3), (9, 2, 4)])
def test_a_step_is_the_mean_over_its_rows_however_they_are_cut(tmp_path, rows, batch, accumulation):
    "against gradient descent on whole steps, in closed form"
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, 3, generator=g, dtype=torch.float64),
            torch.randn(rows, 1, generator=g, dtype=torch.float64))
    class Line(torch.nn.Linear):
        def forward(self, b): return (super().forward(b['x'])-b['y']).square().mean(), {}
    line = Line(3, 1, dtype=torch.float64)
    weight, bias = (line.weight.detach().clone().requires_grad_(),
                    line.bias.detach().clone().requires_grad_())
    done = []
    class Recipe:
        batch_rows, score_name, objective, groups = (batch, 'score', line,
                                                     _parameter_groups(dict(line=line), 0.))
        settings = _TrainingSection(num_epochs=1, warmup_epochs=0, learning_rate=0.1, min_lr=0.1,
                                    batch_size=batch, accumulation_steps=accumulation,
                                    grad_clip_norm=0.0, num_workers=0, save_steps=0)
        def epoch_rows(self, epoch): return np.arange(rows)
        def make_batch(self, r, epoch): return dict(x=x[r], y=y[r])
        def validate(self, epoch): return dict(score=0.)
        def training_scores(self, values): return values
        def checkpoint(self): return dict(model_state_dict=line.state_dict())
        def after_step(self, share): done.append(share)
    with Run(tmp_path/'run', {}, use_amp=False) as run:
        trainer = Trainer(run, Recipe())
        trainer.optimiser = torch.optim.SGD(trainer.optimiser.param_groups, 0.1)
        trainer.fit()
    steps = [np.arange(rows)[i:i+batch*accumulation] for i in range(0, rows, batch*accumulation)]
    for step in steps:
        loss = (x[step]@weight.T+bias-y[step]).square().mean()
        for p, gradient in zip((weight, bias), torch.autograd.grad(loss, (weight, bias))):
            p.data -= 0.1*gradient
    assert torch.allclose(line.weight, weight, atol=1e-12) and torch.allclose(
        line.bias, bias, atol=1e-12) and done == [(i+1)/len(steps) for i in range(len(steps))]

# ---- the momentum schedule ----
def test_momentum_schedule_reaches_its_end():
    model = made_model(moco=True, moco_momentum=0.5, moco_momentum_end=1.0)
    name = next(n for n, _ in model.encoder.named_parameters())
    slow, fast = model.encoder_momentum.get_parameter(name), model.encoder.get_parameter(name)
    for share, momentum in ((0., 0.5), (0.5, 0.75), (1., 1.)):
        with torch.no_grad(): fast.add_(1)
        before = slow.clone()
        model.follow(share)
        assert torch.allclose(slow, momentum*before+(1-momentum)*fast, atol=1e-12)
