"""pahcl.training.trackers: what was sent is read back, from TensorBoard's files and from W&B's own,
in a whole fine-tuning with both
"""
import json
import os
import socket
import struct
import subprocess
import sys
import time

import forked
import pytest
import torch
from matplotlib.figure import Figure
from pahcl.core.basics import PahclError
from pahcl.training.finetuning import finetune
from pahcl.data.splitting import prepare
from pahcl.testing.made import _make_processed_folder, _make_recordings
from pahcl.training import trackers
from pahcl.training.trackers import _make_trackers, Trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = {'model.encoder_type': 'cnn', 'model.cnn_channels': [4, 6], 'model.cnn_kernel_sizes': [7, 5],
        'model.cnn_strides': [8, 8], 'training.num_workers': 0, 'training.warmup_epochs': 0}


@pytest.fixture
def offline(monkeypatch):
    for name, value in dict(WANDB_MODE='offline', WANDB_SILENT='true',
                            WANDB_X_STATS_SAMPLING_INTERVAL='0.2').items():
        monkeypatch.setenv(name, value)


def wandb_records(folder):
    """The records of an offline run: leveldb's log format (blocks of 32 KiB, chunks of crc, length,
    type) around W&B's protobuf messages.
    """
    from wandb.proto.wandb_internal_pb2 import Record
    [path] = folder.glob('wandb/offline-run-*/run-*.wandb')
    data, at, parts, out = path.read_bytes(), 7, b'', []
    while at+7 <= len(data):
        left = 32768-at % 32768
        if left < 7: at += left; continue
        _, length, kind = struct.unpack('<IHB', data[at:at+7])
        if not kind: break
        parts, at = parts+data[at+7:at+7+length], at+7+length
        if kind in (1, 4):
            out.append(Record.FromString(parts))
            parts = b''
    return out


def history_of(records):
    return [{'/'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
            for r in records if r.HasField('history')]


def test_a_fine_tuning_with_both(tmp_path, offline):
    _make_processed_folder(tmp_path/'processed',
                           _make_recordings(('pascal',), persons=24), cycles=2)
    prepare('pascal', tmp_path/'no raw', tmp_path/'processed', tmp_path/'downstream')
    finetune(output_dir=tmp_path/'out', data_dir=tmp_path/'downstream', task='pascal',
             pretrained='none', epochs=2, tensorboard=True, wandb=True, wandb_project='hearts',
             **TINY, **{'experiment.description': 'a test'})
    folder = tmp_path/'out'/'pascal_downstream'
    final = json.loads((folder/'final_metrics.json').read_text())

    events = EventAccumulator(str(folder/'tensorboard'),
                              size_guidance=dict(images=0, histograms=0)).Reload()
    tags = events.Tags()
    scalars = ({f'train/{m}' for m in ('loss', 'accuracy', 'f1', 'precision', 'recall')}
               | {f'validation/{m}' for m in ('loss', 'accuracy', 'f1', 'auroc', 'auprc')}
               | {'learning_rate/encoder', 'learning_rate/classifier'})
    assert scalars <= set(tags['scalars'])
    # it opens on curves, not on charts of one point: final scores are a table
    assert not [t for t in tags['scalars'] if t.startswith('final')]
    assert 'final/text_summary' in tags['tensors']
    for tag in scalars:
        assert [e.value
                for e in events.Scalars(tag)] == pytest.approx([h[tag] for h in final['history']])
    assert set(tags['images']) == {'validation/confusion_matrix', 'validation/curves'}
    for tag in tags['images']:
        assert ([e.step for e in events.Images(tag)] == [1, 2]
                and all(e.encoded_image_string.startswith(b'\x89PNG') and e.width > 200
                        for e in events.Images(tag)))
    weights = {k: v for k, v in torch.load(folder/'final_model.pt',
                                           weights_only=True)['model_state_dict'].items()
               if k.startswith('classifier')}
    for name, value in weights.items():
        last = events.Histograms(f'parameters/model.{name}')[-1].histogram_value
        assert (last.num, last.min, last.max) == (value.numel(), pytest.approx(value.min().item()),
                                                  pytest.approx(value.max().item()))
        assert events.Histograms(f'gradients/model.{name}')[-1].histogram_value.num == value.numel()

    records = wandb_records(folder)
    [run] = [r.run for r in records if r.HasField('run')][-1:]
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert (run.run_group, run.project, run.display_name,
            run.notes) == ('pascal', 'hearts', 'pascal_downstream', 'a test')
    assert (config['training']['num_epochs'] == 2 and config['model']['cnn_channels'] == [4, 6]
            and config['pretrain']['checkpoint_path'] == 'none')
    rows = {h['_step']: h for h in history_of(records)}
    for epoch, sent in enumerate(final['history'], 1):
        for tag in scalars: assert rows[epoch][tag] == pytest.approx(sent[tag]), tag
        assert {rows[epoch][f'validation/{n}/_type']
                for n in ('confusion_matrix', 'curves')} == {'image-file'}
        for kind in ('parameters', 'gradients'):
            drawn = [v for k, v in rows[epoch].items()
                     if k.startswith(f'{kind}/') and k.endswith('/_type')]
            assert len(drawn) > 4 and set(drawn) == {'histogram'}
        assert (sum(rows[epoch]['parameters/model.classifier.0.weight/values'])
                == weights['classifier.0.weight'].numel())
    pictures = list(folder.glob('wandb/offline-run-*/files/media/images/validation/*.png'))
    assert len(pictures) == 4 and all(p.stat().st_size > 2000 for p in pictures)


ALONE = """
import sys, time
from accelerate import PartialState
from pahcl.training.trackers import Trackers
PartialState()
trackers = Trackers(sys.argv[1], dict(seed=1), wandb=True)
time.sleep(float(sys.argv[2]))
trackers.log_text('why', 'a note')
trackers.close()
"""


def test_system_metrics(tmp_path, offline):
    """In a process of its own: W&B's service starts to measure late, or not at all, in one that has
    had a run before.
    """
    for seconds in (4, 15, 60):   # a loaded machine begins to measure late
        folder = tmp_path/str(seconds)
        subprocess.run([sys.executable, '-c', ALONE, str(folder), str(seconds)], check=True,
                       capture_output=True, timeout=600)
        records = wandb_records(folder)
        if measured := {i.key for r in records if r.HasField('stats') for i in r.stats.item}: break
    assert any('cpu' in k for k in measured) and any('memory' in k for k in measured), measured
    assert any(u.key == 'why' and json.loads(u.value_json) == 'a note' for r in records
               if r.HasField('summary') for u in r.summary.update)


def test_gradients_are_those_of_the_last_step(tmp_path):
    layer = torch.nn.Linear(2, 1)
    trackers = Trackers(tmp_path, {}, tensorboard=True)
    trackers.watch(layer)
    for scale in (1., 3.):
        layer.zero_grad()
        (scale*layer(torch.ones(5, 2))).sum().backward()
    layer.zero_grad()   # as the optimiser leaves it
    trackers.log_histograms(1)
    trackers.close()
    last = EventAccumulator(str(tmp_path/'tensorboard')).Reload().Histograms(
        'gradients/weight')[-1].histogram_value
    assert (last.min, last.max) == (15., 15.)


def test_nobody_watches(tmp_path):
    layer, trackers = torch.nn.Linear(2, 1), Trackers()
    trackers.watch(layer)
    assert not layer.weight._post_accumulate_grad_hooks and not trackers
    for call in (lambda: trackers.log_scalars({'a': 1}, 1),
                 lambda: trackers.log_figures(dict(a=Figure()), 1),
                 lambda: trackers.log_histograms(1), lambda: trackers.log_text('a', 'b'),
                 trackers.close):
        call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('package', ['tensorboard', 'wandb'])
def test_a_missing_package_is_one_sentence_and_leaves_nothing(tmp_path, package):
    "A process in which the package cannot be imported, as where it is not installed."
    _make_processed_folder(tmp_path/'processed',
                           _make_recordings(('pascal',), persons=24), cycles=1)
    prepare('pascal', tmp_path/'no raw', tmp_path/'processed', tmp_path/'downstream')
    hide = (f"import sys; sys.modules.update({{m: None for m in ('{package}', 'tensorboardX')}}); "
            "from pahcl.finetune import pahcl_finetune; sys.exit(pahcl_finetune())")
    flags = ['--task', 'pascal', '--pretrained', 'none', '--encoder-type', 'cnn', '--epochs', '1',
             '--data-dir', tmp_path/'downstream', '--output-dir', tmp_path/'out', '--tensorboard',
             '--wandb']
    done = forked.run([sys.executable, '-c', hide, *map(str, flags)], capture_output=True,
                      text=True, env=dict(os.environ, WANDB_MODE='offline'))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and 'Traceback' not in done.stderr and last.startswith(
        'pahcl_finetune: error: ') and f'pip install {package}' in last and f'--{package}' in last
    assert not list((tmp_path/'out').glob('*'))


def test_a_missing_tracker_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr('pahcl.training.trackers.is_wandb_available', lambda: False)
    with pytest.raises(PahclError, match='pip install wandb'):
        _make_trackers(tmp_path, {}, wandb=True)


def test_wandb_that_does_not_answer_is_logged_offline(tmp_path, offline, monkeypatch):
    "A server that takes no connection; a name that nobody knows answers at once, and not either."
    monkeypatch.setenv('WANDB_MODE', 'online')
    for n in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY'): monkeypatch.delenv(n, raising=False)
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))   # and does not listen
        monkeypatch.setenv('WANDB_BASE_URL', f'http://127.0.0.1:{silent.getsockname()[1]}')
        assert trackers._PATIENCE == 10
        said = []
        monkeypatch.setattr(trackers.get_logger(), 'warning', said.append)
        watchers = Trackers(tmp_path, {}, wandb=True)
    watchers.log_scalars(dict(loss=1.), 1)
    watchers.close()
    assert ('does not answer after 10 s: the run is logged in' in said[0]
            and list(tmp_path.glob('wandb/offline-run-*')))


def test_wandb_waits_no_longer_than_it_says(monkeypatch):
    monkeypatch.setattr(trackers, '_PATIENCE', .2)
    monkeypatch.setattr(trackers.socket, 'create_connection', lambda *a, **k: time.sleep(5))
    for n in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY'): monkeypatch.delenv(n, raising=False)
    began = time.monotonic()
    assert not trackers._reach_wandb() and time.monotonic()-began < 2
