"pahcl.training: several processes equal one, a killed run goes on, the bar is for terminals"
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pahcl.training import decays, first_difference, grouped, learning_rate, load_checkpoint, shares

LINE = textwrap.dedent('''
    import sys, time, torch
    from pahcl.basics import generator
    from pahcl.config import TrainingSection
    from pahcl.training import Run, fit, parameter_groups
    folder, pause = sys.argv[1], float(sys.argv[2])
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
    line, options = Line(), TrainingSection(num_epochs=6, batch_size=16, accumulation_steps=2, learning_rate=.05, warmup_epochs=1, num_workers=0, early_stopping_patience=0)
    with Run(folder, options.model_dump()) as run:
        found = fit(run, line, parameter_groups(dict(line=line), 1e-4), lambda e: generator(1, 'rows', e).permutation(101), lambda r, e: dict(x=x[r], y=y[r]),
                    lambda e: dict(score=float(e)), lambda: dict(kind='pretrain', model_state_dict=line.state_dict()), options)
        run.finish(dict(losses=[h['train/loss'] for h in found['history']]))
''')


def start(folder, pause=0., processes=1, wait=True):
    script = folder.parent/'line.py'
    script.write_text(LINE)
    command = [sys.executable] if processes == 1 else [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port=29613']
    process = subprocess.Popen([*command, str(script), str(folder), str(pause)], env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''), stderr=subprocess.PIPE, text=True)
    if wait: assert process.wait(120) == 0, process.stderr.read()
    return process


def weights(folder): return load_checkpoint(folder/'final_model.pt')['model_state_dict']


def test_two_processes_equal_one(tmp_path):
    for name, processes in (('one', 1), ('two', 2)): start(tmp_path/name, processes=processes)
    one, two = weights(tmp_path/'one'), weights(tmp_path/'two')
    for key in one: assert torch.allclose(one[key], two[key], atol=1e-9), key
    losses = [json.loads((tmp_path/n/'final_metrics.json').read_text())['losses'] for n in ('one', 'two')]
    assert np.allclose(*losses, atol=1e-9)


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


@pytest.mark.parametrize('terminal', [True, False])
def test_the_bar_is_for_terminals(tmp_path, terminal):
    "A bar within the epoch on a terminal, nothing but lines elsewhere."
    (tmp_path/'line.py').write_text(LINE)
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))   # a new terminal has no width
    process = subprocess.Popen([sys.executable, str(tmp_path/'line.py'), str(tmp_path/'run'), '0.03'], stderr=slave if terminal else subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', TQDM_DISABLE=''))
    os.close(slave)
    told = b'' if terminal else process.communicate()[1]
    while terminal:
        try: part = os.read(master, 65536)
        except OSError: break   # the other end is closed
        if not part: break
        told += part
    assert process.wait(60) == 0
    os.close(master)
    assert (b'epoch 2/6:   0%' in told and b'\r' in told) == terminal and told.count(b'best') == 6
    assert terminal or len(told.splitlines()) == 8   # how it began, six epochs, and a step of log_interval
