"""pahcl.training.trainer: several processes equal one, a killed run goes on, the bar is for
terminals
"""
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import time

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
import pahcl.training.run_folders as run_folders
import pahcl.training.runs as runs
from pahcl.core.basics import PahclError
from pahcl.core.config_sections import _ContrastSection, _TrainingSection
from pahcl.training.contrastive_model import ContrastiveModel
from pahcl.models.encoders import build_encoder
from pahcl.models.checkpoints import load_checkpoint
from pahcl.training.runs import _choose_precision, Run, _supports_bfloat16
from pahcl.training.batches import _group_batches, _split_batch
from pahcl.training.schedule import _has_weight_decay, _learning_rate, _parameter_groups
from pahcl.training.trainer import Trainer

LINE = textwrap.dedent('''
    import sys, time, torch
    from pahcl.core.basics import generator
    from pahcl.core.config_sections import _TrainingSection
    from pahcl.training.runs import Run
    from pahcl.training.schedule import _parameter_groups
    from pahcl.training.trainer import Trainer
    folder, pause, stop_at = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    x = torch.from_numpy(generator(0, 'x').normal(size=(101, 3)))
    y = x@torch.tensor([[1.], [-2.], [.5]], dtype=torch.float64)
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1, dtype=torch.float64)
            torch.nn.init.zeros_(self.layer.weight); torch.nn.init.zeros_(self.layer.bias)
        def forward(self, batch):
            time.sleep(pause)
            error = (self.layer(batch['x'])-batch['y']).square()
            return error.mean(), dict(error=error[:, 0])
    class Recipe:
        batch_rows, score_name, objective = 16, 'score', Line()
        groups = _parameter_groups(dict(line=objective), 1e-4)
        settings = _TrainingSection(num_epochs=6, batch_size=16, accumulation_steps=2, \
learning_rate=.05, warmup_epochs=1, num_workers=0, early_stopping_patience=0, save_steps=2)
        def epoch_rows(self, epoch): return generator(1, 'rows', epoch).permutation(101)
        def make_batch(self, rows, epoch): return dict(x=x[rows], y=y[rows])
        def validate(self, epoch): return dict(score=float(epoch))
        def training_scores(self, values): return {}
        def checkpoint(self): return dict(kind='pretrain', \
model_state_dict=self.objective.state_dict())
        def after_step(self, share): assert share < stop_at, 'stopped on purpose'
        def resume(self, saved): pass
    with Run(folder, Recipe.settings.model_dump()) as run:
        found = Trainer(run, Recipe()).fit()
        run.finish(dict(losses=[h['train/loss'] for h in found.history]))
''')


def start(folder, pause=0., processes=1, wait=True, stop_at=2., code=0):
    "Train in one process, or in several as torchrun starts them; the processes."
    script = folder.parent/'line.py'
    script.write_text(LINE)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1',
                  MASTER_PORT=port) if processes > 1 else {}
    started = [forked.start(
        [script, str(folder), str(pause), str(stop_at)],
        stderr=folder.parent/f'{folder.name}.{rank}',
        env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') | shared
            | (dict(RANK=rank, LOCAL_RANK=rank) if shared else {})) for rank in range(processes)]
    if wait:
        for rank, process in enumerate(started):
            process.join(300)
            assert process.exitcode == code, (folder.parent/f'{folder.name}.{rank}').read_text()
    return started


def weights(folder): return load_checkpoint(folder/'final_model.pt')['model_state_dict']


def test_two_processes_equal_one(tmp_path):
    for name, processes in (('one', 1), ('two', 2)): start(tmp_path/name, processes=processes)
    one, two = weights(tmp_path/'one'), weights(tmp_path/'two')
    for key in one: assert torch.allclose(one[key], two[key], atol=1e-9), key
    losses = [json.loads((tmp_path/n/'final_metrics.json').read_text())['losses']
              for n in ('one', 'two')]
    assert np.allclose(*losses, atol=1e-9)
    # in the fourth of six epochs of four steps, after its third step
    start(tmp_path/'stopped', processes=2, stop_at=15/24, code=1)
    start(tmp_path/'stopped', processes=2)
    assert 'goes on after epoch 3 and 2 optimiser steps' in (
        tmp_path/'stopped'/'train.log').read_text()
    for key, value in two.items(): assert torch.equal(value, weights(tmp_path/'stopped')[key])
    assert json.loads((tmp_path/'stopped'/'final_metrics.json').read_text())['losses'] == losses[1]


def test_kill_minus_nine(tmp_path):
    start(tmp_path/'whole')
    for kills in range(3):
        [process] = start(tmp_path/'killed', pause=.02, wait=False)
        last = tmp_path/'killed'/'last.pt'
        while process.is_alive() and not (last.exists() and load_checkpoint(
                last)['training_state']['epoch'] > kills): time.sleep(.02)
        time.sleep(.03*kills)
        process.kill()
        process.join()
    start(tmp_path/'killed')
    assert 'goes on after epoch' in (tmp_path/'killed'/'train.log').read_text()
    for key, value in weights(tmp_path/'whole').items():
        assert torch.equal(value, weights(tmp_path/'killed')[key])
    assert json.loads((tmp_path/'killed'/'status.json').read_text())['state'] == 'finished'
    assert (not list((tmp_path/'killed').glob('.*.tmp'))
            or all(p.stat().st_size for p in (tmp_path/'killed').glob('*.pt')))


def test_killed_before_the_first_file_was_whole(tmp_path):
    "What is left is no folder of somebody else."
    for name in ('inputs.json', '.config.yaml.0a1b2c3d.tmp'): (tmp_path/name).touch()
    assert run_folders._find_run_state(tmp_path, {}) == 'new'
    (tmp_path/'thesis.txt').touch()
    with pytest.raises(PahclError, match='is no run of pahcl'):
        run_folders._find_run_state(tmp_path, {})


def test_killed_after_the_last_file_but_one(tmp_path):
    "`final_metrics.json` is there: the run is finished, and what was left to do is done."
    with Run(tmp_path, {}) as run: run.finish(dict(loss=1.))
    left = [tmp_path/'last.pt', tmp_path/'.status.json.0a1b2c3d.tmp']
    for path in (*left, tmp_path/'best_model.pt'): path.touch()
    (tmp_path/'status.json').write_text('{"state": "running", "why": ""}')
    again = Run(tmp_path, {})
    assert again.finished
    assert json.loads((tmp_path/'status.json').read_text())['state'] == 'finished'
    assert not any(path.exists() for path in left) and (tmp_path/'best_model.pt').exists()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None)
def test_every_row_once(rows, batch, accumulation, processes):
    steps = _group_batches(np.arange(rows), batch, accumulation, processes)
    seen = [r for step in steps for b in step for share in _split_batch(b, processes)
            for r in share]
    lost = rows-len(seen)
    assert seen == list(range(len(seen))) and lost < processes or batch < processes
    assert all(len(step) == accumulation for step in steps[:-1])
    for step in steps:
        for b in step:
            assert {len(s) for s in _split_batch(b, processes)} <= {len(b)//processes,
                                                                    len(b)//processes+1}


@given(st.integers(2, 500), st.floats(0, .9), st.floats(1e-6, 1), st.floats(0, 1))
def test_rate_stays_between_its_ends(total, share, highest, low):
    warmup, lowest = int(total*share), low*highest
    rates = [_learning_rate(s, total, warmup, highest, lowest) for s in range(total)]
    assert max(rates) <= highest*(1+1e-9) and min(rates[warmup:], default=lowest) >= lowest*(1-1e-9)
    assert (all(a < b for a, b in zip(rates[:warmup], rates[1:warmup]))
            and all(a >= b*(1-1e-9) for a, b in zip(rates[warmup:], rates[warmup+1:])))
    if total-warmup > 1: assert rates[-1] == pytest.approx(lowest, abs=1e-12)


def test_what_decays():
    from pahcl.models.encoders import build_encoder
    names = {n: _has_weight_decay(n, p)
             for n, p in build_encoder('cnn_mamba_small').named_parameters()}
    assert not any(v for n, v in names.items()
                   if n.endswith(('A_log', '.D', 'bias')) or '.norm.' in n)
    assert all(names[f'mamba.layers.0.ssm.{n}.weight']
               for n in ('in_proj', 'conv1d', 'x_proj', 'dt_proj', 'out_proj'))


@given(st.dictionaries(st.sampled_from('abc'), st.integers(0, 2)),
       st.dictionaries(st.sampled_from('abc'), st.integers(0, 2)))
def test_first_difference(a, b):
    found = run_folders._first_difference(dict(s=a), dict(s=b))
    assert (found is None) == (a == b)
    if found:
        assert (a.get(found[0][2:]), b.get(found[0][2:])) == found[1:] and found[1] != found[2]


def test_bfloat_is_what_the_processor_says():
    flags = open('/proc/cpuinfo').read() if os.path.exists('/proc/cpuinfo') else ''
    assert _supports_bfloat16() == ('avx512_bf16' in flags)


@pytest.mark.parametrize('use_amp,cuda,capability,hip,native,expected', [
    (True, True, (8, 0), None, False, 'bf16'), (True, True, (9, 0), None, False, 'bf16'),
    (True, True, (7, 5), None, True, 'fp16'), (True, True, (7, 5), '6.0', False, 'bf16'),
    (True, False, None, None, True, 'bf16'), (True, False, None, None, False, 'no'),
    (False, True, (9, 0), None, True, 'no'), (False, False, None, None, True, 'no')])
def test_precision(monkeypatch, use_amp, cuda, capability, hip, native, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(runs, '_supports_bfloat16', lambda: native)
    assert _choose_precision(use_amp) == _choose_precision(use_amp, cuda) == expected


def test_without_pytorchs_word_it_is_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, '_is_avx512_bf16_supported', raising=False)
    assert not _supports_bfloat16() and _choose_precision(cuda=False) == 'no'


class Net(torch.nn.Module):
    "A small network with a softmax loss that notes in what precision it was called."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last, self.notes = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3), []
    def forward(self, batch):
        hidden = self.layer(batch['x'])
        if hidden.requires_grad:
            hidden.register_hook(
                lambda g: self.notes.append(('backward', torch.is_autocast_enabled('cpu'))))
        self.notes.append(('forward', hidden.dtype))
        loss = torch.nn.functional.cross_entropy(self.last(hidden.relu()).float(), batch['y'])
        return loss, dict(cross_entropy=loss)


class NetRecipe:
    "64 made rows, softmax; stopped in the third epoch's validation where asked for."
    batch_rows, score_name = 16, 'score'
    def __init__(self, net, settings, stop):
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(64, 8, generator=g), torch.randint(0, 3, (64,), generator=g)
        self.objective, self.settings, self.stop, self.groups = (
            net, settings, stop, _parameter_groups(dict(net=net), 0.))
    def epoch_rows(self, epoch): return np.random.default_rng(epoch).permutation(64)
    def make_batch(self, rows, epoch): return dict(x=self.x[rows], y=self.y[rows])
    def validate(self, epoch):
        if self.stop and epoch == 2: raise KeyboardInterrupt
        with torch.no_grad():
            return dict(score=-float(self.objective.eval()(self.make_batch(slice(0, 64), 0))[0]))
    def training_scores(self, values): return values
    def checkpoint(self): return dict(kind='pretrain', model_state_dict=self.objective.state_dict())
    def after_step(self, share): pass
    def resume(self, saved): pass


def train_net(folder, scaled=False, stop=False, **options):
    net, settings = Net(), _TrainingSection(num_epochs=4, batch_size=16, learning_rate=0.01,
                                            warmup_epochs=1, num_workers=0, accumulation_steps=2,
                                            **options)
    run = Run(folder, settings.model_dump(), use_amp=settings.use_amp)
    # what accelerate sets up on a GPU without bfloat16; on a CPU it does not
    # offer it, though PyTorch does
    if scaled:
        (run.accelerator.scaler, run.accelerator.native_amp,
         run.accelerator.state._mixed_precision) = (torch.amp.GradScaler('cpu', growth_interval=3),
                                                    True, 'fp16')
    with run: found = Trainer(run, NetRecipe(net, settings, stop)).fit()
    return net, found, run


def test_half_precision_is_for_the_forward_pass_of_training_only(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, '_choose_precision', lambda use_amp: 'bf16' if use_amp else 'no')
    half, found, run = train_net(tmp_path/'half')
    epoch = [('forward', torch.bfloat16), ('backward', False)]*4+[('forward', torch.float32)]
    assert half.notes == epoch*4
    assert all(p.dtype == torch.float32 and p.grad is None or p.grad.dtype == torch.float32
               for p in half.parameters())
    full, other, _ = train_net(tmp_path/'full', use_amp=False)
    assert {n for n in full.notes} == {('forward', torch.float32), ('backward', False)}
    losses, exact = ([h['train/loss'] for h in f.history] for f in (found, other))
    assert losses != exact and np.allclose(losses, exact, atol=0.01)
    fresh = Net()
    fresh.load_state_dict(half.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.last(fresh.layer(torch.ones(1, 8))),
                           half.last(half.layer(torch.ones(1, 8))))
    assert ('precision bfloat16 autocast' in (tmp_path/'half'/'train.log').read_text()
            and 'precision float32' in (tmp_path/'full'/'train.log').read_text())


def test_scaled_losses_change_nothing_but_roundings(tmp_path):
    """float16 with the loss multiplied by 65536: clipping and steps see the gradients as they are,
    and a killed run goes on with the scale it had.
    """
    full, other, _ = train_net(tmp_path/'full', use_amp=False, grad_clip_norm=0.5)
    scaled, found, run = train_net(tmp_path/'scaled', scaled=True, grad_clip_norm=0.5)
    assert (scaled.notes[0] == ('forward', torch.float16)
            and scaled.notes[-1] == ('forward', torch.float32))
    assert np.allclose([h['train/loss'] for h in found.history],
                       [h['train/loss'] for h in other.history], atol=0.01)
    for a, b in zip(full.parameters(), scaled.parameters()):
        torch.testing.assert_close(a, b, atol=0.01, rtol=0.05)
    assert run.accelerator.scaler.get_scale() == 65536*4  # 8 steps, doubled every third
    with pytest.raises(KeyboardInterrupt):
        train_net(tmp_path/'killed', scaled=True, stop=True, grad_clip_norm=0.5)
    again, _, run = train_net(tmp_path/'killed', scaled=True, grad_clip_norm=0.5)
    assert (run.accelerator.scaler.get_scale() == 65536*4
            and all(torch.equal(a, b) for a, b in zip(scaled.parameters(), again.parameters())))


@pytest.mark.parametrize('moco', [False, True])
def test_a_contrastive_step_in_half_precision(moco):
    """The encoder computes in bfloat16, the losses of both levels in float32, and the gradient
    points where it pointed.
    """
    torch.manual_seed(0)
    model = ContrastiveModel(build_encoder('cnn_mamba_small', dropout=0.),
                             _ContrastSection(moco=moco, queue_size=32, temperature=0.2)).eval()
    x, t = torch.randn(12, 1, 2000), torch.arange(2000)
    phases = (1+t*5//2000).clamp(max=4)*(t < 1800)
    batch = dict(x1=x, x2=x+0.3*torch.randn_like(x), person=torch.arange(12), group=torch.arange(
        12)) | {f'phases{i}': phases.to(torch.uint8).expand(12, -1) for i in (1, 2)}
    seen, out = {}, []
    model.encoder.mamba.layers[0].ssm.in_proj.register_forward_hook(
        lambda m, i, y: seen.setdefault(y.dtype))
    for half in (False, True):
        model.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=half): loss, parts = model(batch)
        loss.backward()
        assert loss.dtype == torch.float32 and {v.dtype for v in parts.values()} == {torch.float32}
        out.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()
                                            if p.grad is not None])))
    assert list(seen) == [torch.float32, torch.bfloat16]
    (exact, g), (rounded, h) = out
    assert (rounded != exact and abs(rounded/exact-1) < 0.01
            and torch.nn.functional.cosine_similarity(g, h, 0) > 0.99)


@pytest.mark.parametrize('terminal', [True, False])
def test_the_bar_is_for_terminals(tmp_path, terminal):
    "A bar within the epoch on a terminal, nothing but lines elsewhere."
    (tmp_path/'line.py').write_text(LINE)
    master, slave = os.openpty()
    # a new terminal has no width
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path/'line.py'), str(tmp_path/'run'), '0.03', '9'],
        stderr=slave if terminal else subprocess.PIPE,
        env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', TQDM_DISABLE=''))
    os.close(slave)
    told = b'' if terminal else process.communicate()[1]
    while terminal:
        try: part = os.read(master, 65536)
        except OSError: break   # the other end is closed
        if not part: break
        told += part
    assert process.wait(300) == 0
    os.close(master)
    assert (b'epoch 2/6:   0%' in told and b'\r' in told) == terminal and told.count(b'best') == 6
    # how it began, six epochs, and a step of log_interval
    assert terminal or len(told.splitlines()) == 9
