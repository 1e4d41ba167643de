"pahcl.training: several processes equal one, a killed run goes on, trackers hold what was sent, running out of memory is explained"
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pahcl.basics import PahclError
from pahcl.runs import Run, first_difference, load_checkpoint, make_trackers
from pahcl.training import decays, grouped, learning_rate, shares

LINE = textwrap.dedent('''
    import sys, time, torch
    from pahcl.basics import generator
    from pahcl.config import TrainingSection
    from pahcl.runs import Run
    from pahcl.training import fit, parameter_groups
    folder, pause, stop_at = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    def stop(share): assert share < stop_at, 'stopped on purpose'
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
    line, options = Line(), TrainingSection(num_epochs=6, batch_size=16, accumulation_steps=2, learning_rate=.05, warmup_epochs=1, num_workers=0, early_stopping_patience=0, save_steps=2)
    with Run(folder, options.model_dump()) as run:
        found = fit(run, line, parameter_groups(dict(line=line), 1e-4), lambda e: generator(1, 'rows', e).permutation(101), lambda r, e: dict(x=x[r], y=y[r]),
                    lambda e: dict(score=float(e)), lambda: dict(kind='pretrain', model_state_dict=line.state_dict()), options, after_step=stop)
        run.finish(dict(losses=[h['train/loss'] for h in found['history']]))
''')


def start(folder, pause=0., processes=1, wait=True, stop_at=2., code=0):
    script = folder.parent/'line.py'
    script.write_text(LINE)
    command = [sys.executable] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port=29613']
    process = subprocess.Popen([*command, str(script), str(folder), str(pause), str(stop_at)], env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''), stderr=subprocess.PIPE, text=True)
    if wait: assert process.wait(120) == code, process.stderr.read()
    return process


def weights(folder): return load_checkpoint(folder/'final_model.pt')['model_state_dict']


def test_two_processes_equal_one(tmp_path):
    for name, processes in (('one', 1), ('two', 2)): start(tmp_path/name, processes=processes)
    one, two = weights(tmp_path/'one'), weights(tmp_path/'two')
    for key in one: assert torch.allclose(one[key], two[key], atol=1e-9), key
    losses = [json.loads((tmp_path/n/'final_metrics.json').read_text())['losses'] for n in ('one', 'two')]
    assert np.allclose(*losses, atol=1e-9)
    start(tmp_path/'stopped', processes=2, stop_at=15/24, code=1)                # in the fourth of six epochs of four steps, after its third step
    start(tmp_path/'stopped', processes=2)
    assert 'goes on after epoch 3 and 2 optimiser steps' in (tmp_path/'stopped'/'train.log').read_text()
    for key, value in two.items(): assert torch.equal(value, weights(tmp_path/'stopped')[key])
    assert json.loads((tmp_path/'stopped'/'final_metrics.json').read_text())['losses'] == losses[1]


def test_kill_minus_nine(tmp_path):
    start(tmp_path/'whole')
    for kills in range(3):
        process = start(tmp_path/'killed', pause=.02, wait=False)
        for _ in range(400):
            if (tmp_path/'killed'/'last.pt').exists() and load_checkpoint(tmp_path/'killed'/'last.pt')['training_state']['epoch'] > kills: break
            time.sleep(.05)
        time.sleep(.03*kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
    start(tmp_path/'killed')
    assert 'goes on after epoch' in (tmp_path/'killed'/'train.log').read_text()
    for key, value in weights(tmp_path/'whole').items(): assert torch.equal(value, weights(tmp_path/'killed')[key])
    assert json.loads((tmp_path/'killed'/'status.json').read_text())['state'] == 'finished'
    assert not list((tmp_path/'killed').glob('.*.tmp')) or all(p.stat().st_size for p in (tmp_path/'killed').glob('*.pt'))


def test_both_trackers_hold_what_was_sent(tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    with Run(tmp_path/'run', dict(training=dict(learning_rate=.1), seed=1), tensorboard=True, wandb=True, group='pascal') as run:
        for step in range(3): run.track({'train/loss': 1/(step+1), 'validation/auroc': None}, step+1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')).Reload()
    assert [e.value for e in events.Scalars('train/loss')] == pytest.approx([1, 1/2, 1/3])
    assert 'validation/auroc' not in events.Tags()['scalars'] and 'learning_rate: 0.1' in events.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()
    [log] = (tmp_path/'run'/'wandb').glob('offline-run-*/run-*.wandb')
    assert b'train/loss' in log.read_bytes() and b'learning_rate' in log.read_bytes() and b'pascal' in log.read_bytes()


def test_a_missing_tracker_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr('pahcl.runs.is_wandb_available', lambda: False)
    with pytest.raises(PahclError, match='pip install wandb'): make_trackers(tmp_path, {}, wandb=True)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
@settings(deadline=None)
def test_every_row_once(rows, batch, accumulation, processes):
    steps = grouped(np.arange(rows), batch, accumulation, processes)
    seen = [r for step in steps for b in step for share in shares(b, processes) for r in share]
    lost = rows-len(seen)
    assert seen == list(range(len(seen))) and lost < processes or batch < processes
    assert all(len(step) == accumulation for step in steps[:-1])
    for step in steps:
        for b in step: assert {len(s) for s in shares(b, processes)} <= {len(b)//processes, len(b)//processes+1}


@given(st.integers(2, 500), st.floats(0, .9), st.floats(1e-6, 1), st.floats(0, 1))
def test_rate_stays_between_its_ends(total, share, highest, low):
    warmup, lowest = int(total*share), low*highest
    rates = [learning_rate(s, total, warmup, highest, lowest) for s in range(total)]
    assert max(rates) <= highest*(1+1e-9) and min(rates[warmup:], default=lowest) >= lowest*(1-1e-9)
    assert all(a < b for a, b in zip(rates[:warmup], rates[1:warmup])) and all(a >= b*(1-1e-9) for a, b in zip(rates[warmup:], rates[warmup+1:]))
    if total-warmup > 1: assert rates[-1] == pytest.approx(lowest, abs=1e-12)


def test_what_decays():
    from pahcl.encoder import build_encoder
    names = {n: decays(n, p) for n, p in build_encoder('cnn_mamba_small').named_parameters()}
    assert not any(v for n, v in names.items() if n.endswith(('A_log', '.D', 'bias')) or '.norm.' in n)
    assert all(names[f'mamba.layers.0.ssm.{n}.weight'] for n in ('in_proj', 'conv1d', 'x_proj', 'dt_proj', 'out_proj'))


@given(st.dictionaries(st.sampled_from('abc'), st.integers(0, 2)), st.dictionaries(st.sampled_from('abc'), st.integers(0, 2)))
def test_first_difference(a, b):
    found = first_difference(dict(s=a), dict(s=b))
    assert (found is None) == (a == b)
    if found: assert (a.get(found[0][2:]), b.get(found[0][2:])) == found[1:] and found[1] != found[2]
