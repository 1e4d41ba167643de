"""A pretraining that is killed with SIGKILL again and again, wherever it hurts, ends with the same
bits as one that was not; a full disk costs nothing but time.

One process imports everything and forks a child for each start of the command: a start costs a
fraction of a second, and each child is a process of its own that is really killed.
"""
import json
import os
import sys

import forked
import pytest
import torch
from pahcl.models.checkpoints import load_checkpoint

TINY = dict(model=dict(encoder_type='cnn', cnn_channels=[16, 16], cnn_kernel_sizes=[9, 5],
                       cnn_strides=[8, 4], mamba_d_model=8, dropout=0.1),
            contrast=dict(cycle_projector=[16, 8], substructure_projector=[16, 8], queue_size=32,
                          moco_momentum=0.9, moco_momentum_end=1.0), validation_fraction=0.4,
            training=dict(num_epochs=3, warmup_epochs=1, batch_size=6, accumulation_steps=2,
                          cycles_per_recording=2, num_workers=2, use_amp=False, learning_rate=5e-3,
                          save_interval=2, save_steps=2))

DRIVER = '''
import json, os, resource, signal, sys, threading, time
import torch
from tqdm import tqdm
torch.set_num_threads(1)
# the bar's own lock is shared with children, and a killed one would keep it; its thread would
# live while we fork
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
import pahcl.training.probe, pahcl.training.trainer
from pahcl.training.contrastive_model import ContrastiveModel
from pahcl.pretrain import pahcl_pretrain

def die():
    os.write(2, b'died as planned\\n')
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, wanted, act, count=1):
    "Let `act` stand in for the `count`-th call of owner.name that is wanted."
    real, seen = getattr(owner, name), []
    def wrapped(*args, **kwargs):
        if wanted(*args, **kwargs): seen.append(1)
        return (act(real, *args, **kwargs) if len(seen) == count and wanted(*args, **kwargs)
                else real(*args, **kwargs))
    setattr(owner, name, wrapped)

def half_written(real, content, path):
    real(content, path)
    os.truncate(path, os.path.getsize(path)//2)
    die()

def written(real, path, content):
    real(path, content)
    die()

def prepare_death(how, *what):
    # within an epoch, weights moved, nothing saved
    if how == 'step':
        at_call(ContrastiveModel, 'follow', lambda *a: True, lambda real, *a: die(), what[0])
    if how == 'writing':
        at_call(torch, 'save', lambda content, path: f'.{what[0]}.' in str(path),
                half_written, what[1])
    # between two checkpoints, or just after the last
    if how == 'written':
        at_call(pahcl.training.trainer, 'save_checkpoint',
                lambda path, content: path.name == what[0], written, what[1])
    if how == 'limit':   # a write beyond it fails half-way, as on a full disk
        half = os.path.getsize(what[0])//2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))

def start(arguments, death):
    "Run the command in a forked child; its exit status."
    child = os.fork()
    if child == 0:
        # torch's pool does not survive a fork; two threads that mend it at once break it
        # ("Invalid thread pool!"), so one does before there are others
        torch.set_num_threads(1)
        if death: prepare_death(*death)
        os._exit(pahcl_pretrain(arguments))
    if death and death[0] == 'after':
        time.sleep(death[1])
        os.kill(child, signal.SIGKILL)
    if death and death[0] == 'limit': before = open(death[1], 'rb').read()
    status = os.waitpid(child, 0)[1]
    return (status if not death or death[0] != 'limit'
            else [status, before == open(death[1], 'rb').read(),
                  [p for p in os.listdir(os.path.dirname(death[1])) if p.endswith('.tmp')]])

answers, plan = [], json.loads(sys.argv[1])
for arguments, deaths in plan:
    # 'here': warms up what the children inherit
    for death in deaths:
        answers.append([death,
                        pahcl_pretrain(arguments) if death == 'here' else start(arguments, death)])
print(json.dumps(answers))
'''

@pytest.fixture(scope='module')
def root(pretraining_on):
    folder = pretraining_on(TINY)
    (folder/'driver.py').write_text(DRIVER)
    return folder

def drive(root, *plan):
    """Start the command for each death in turn; (name of the run, more flags, deaths) -> (exit
    states, standard error).
    """
    where = ['--config', str(root/'tiny.yaml'), '--processed-dir', str(root/'processed'),
             '--downstream-dir', str(root/'downstream'), '--output-dir', str(root/'out')]
    work = [[[*where, '--experiment-name', name, *flags], deaths] for name, flags, deaths in plan]
    done = forked.run([sys.executable, str(root/'driver.py'), json.dumps(work)],
                          capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr

def same_end(root, a, b):
    weights = [load_checkpoint(root/'out'/n/'final_model.pt')['model_state_dict'] for n in (a, b)]
    assert weights[0].keys() == weights[1].keys()
    for key in weights[0]: assert torch.equal(weights[0][key], weights[1][key]), key
    best = [load_checkpoint(root/'out'/n/'best_model.pt') for n in (a, b)]
    assert best[0]['epoch'] == best[1]['epoch'] and all(torch.equal(
        v, best[1]['model_state_dict'][k]) for k, v in best[0]['model_state_dict'].items())
    history = [json.loads((root/'out'/n/'final_metrics.json').read_text())['history']
               for n in (a, b)]
    assert history[0] == history[1] and len(history[0]) == 3

DEATHS = [['step', 1], ['writing', 'last.pt', 1], ['step', 3],
          ['written', 'best_model.pt', 1], ['written', 'last.pt', 1], ['writing', 'epoch_2.pt', 1],
          # the last two come from outside, at any moment
          ['writing', 'last.pt', 2], ['written', 'final_model.pt', 1], ['after', 0.1],
          ['after', 0.2], None]

@pytest.mark.parametrize('kind', ['simclr', 'moco'])
def test_killed_at_every_bad_moment(root, kind):
    flags = ['--moco'] if kind == 'moco' else []
    states, errors = drive(root, (f'{kind}_whole', flags, ['here']),
                           (f'{kind}_killed', flags, DEATHS))
    planned = [s for d, s in states if d not in ('here', None) and d[0] != 'after']
    assert planned == [9]*8 and states[0] == ['here', 0] and states[-1] == [None, 0], (
        f'{states}\n{errors}')
    # by its own hand, not because memory ran out
    assert errors.count('died as planned') == 8, f'{states}\n{errors}'
    log = (root/'out'/f'{kind}_killed'/'train.log').read_text()
    assert ('goes on after epoch 0 and 2 optimiser steps' in log
            and 'goes on after epoch 1 of' in log), f'{log}\n{errors}'
    same_end(root, f'{kind}_whole', f'{kind}_killed')
    # what was half-written is gone
    assert [p.name for p in (root/'out'/f'{kind}_killed').glob('.*')] == ['.pahcl.json']
    if kind == 'moco':
        weights = load_checkpoint(root/'out'/'moco_killed'/'final_model.pt')['model_state_dict']
        own = 'objectives.moco.model.'
        slow = [k for k in weights if k.startswith(f'{own}encoder_momentum.')]
        fast = lambda k: weights[k.removeprefix(own).replace('_momentum', '')]
        assert weights[f'{own}queue_person'].ge(0).all() and slow and not all(
            torch.equal(weights[k], fast(k)) for k in slow)

def test_a_full_disk_costs_nothing_but_time(root):
    last = root/'out'/'disk_full'/'last.pt'
    states, errors = drive(root, ('disk_whole', [], ['here']), (
        'disk_full', [], [['written', 'last.pt', 3], ['limit', str(last)], None]))
    status, intact, left = states[2][1]
    assert (os.waitstatus_to_exitcode(status) == 1 and intact and not left
            and states[-1] == [None, 0])
    assert ('could not be written' in errors and 'Free some space and give the same command again'
            in errors and 'Traceback' not in errors)
    same_end(root, 'disk_whole', 'disk_full')
