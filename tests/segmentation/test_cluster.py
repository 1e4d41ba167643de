"""A Dask cluster of two local workers: the same bytes as without it, a killed worker loses nothing,
what cannot go on ends with a sentence and does not hang
"""
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import dask
import pytest
from dask.distributed import LocalCluster
from pahcl.core import parallel
from pahcl.core.basics import PahclError
from pahcl.core.parallel import map_in_parallel
from pahcl.cycles import pahcl_preprocess
from pahcl.data.simulation import simulate_dataset
from pahcl.evaluation.prediction import predict
from pahcl.models.checkpoints import classifier_checkpoint, save_checkpoint
from pahcl.models.classifier import Classifier
from pahcl.models.encoders import build_encoder
from pahcl.segmentation.preprocessing import preprocess

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def cluster():
    "two worker processes that are started again when killed; two deaths of a job are one too many"
    with dask.config.set({'distributed.scheduler.allowed-failures': 1}):
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0') as cluster:
            yield cluster

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "raw data, and what is made of them without a cluster"
    folder = tmp_path_factory.mktemp('cluster')
    simulate_dataset(folder/'raw', 'circor', subjects=9, seed=3, seconds=6)
    return folder/'raw', folder/'local', preprocess(folder/'raw', folder/'local', num_workers=1)

def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def kill_midway(cluster, folder, killed):
    "Kill a worker as soon as some recordings are done, and note how many were."
    while len(done := list(folder.glob('*/rec_*/.done.json'))) < 5: time.sleep(0.002)
    os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
    killed.append(len(done))

def test_the_same_bytes_though_a_worker_is_killed(made, cluster, tmp_path):
    raw, local, stats = made
    killed, there = [], tmp_path/'there'
    killer = threading.Thread(target=kill_midway, args=(cluster, there, killed), daemon=True)
    killer.start()
    assert preprocess(raw, there, scheduler=cluster.scheduler_address) == stats
    killer.join(1)
    expected = content(local)
    assert content(there) == expected and len(expected) > 300
    assert 5 <= killed[0] < len(stats['recordings'])
    # what a killed one had begun is gone, and nothing is left to do
    assert not list(there.rglob('*.tmp'))
    times = {p: p.stat().st_mtime_ns for p in there.rglob('*.npy')}
    assert not pahcl_preprocess(['--raw-dir', str(raw), '--output-dir', str(there),
                                 '--scheduler', cluster.scheduler_address])
    assert content(there) == expected and times == {p: p.stat().st_mtime_ns for p in times}

def test_the_same_predictions(made, cluster, tmp_path):
    "a folder with a file that is no sound"
    saved = classifier_checkpoint(Classifier(build_encoder('cnn', cnn_channels=[4, 8, 8, 8]), 3),
                                  'circor_murmur', dict(Present=0, Absent=1, Unknown=2), {}, ['p1'])
    save_checkpoint(tmp_path/'best_model.pt', saved)
    (tmp_path/'clinic').mkdir()
    for path in sorted(made[0].rglob('*.wav'))[:5]: shutil.copy(path, tmp_path/'clinic')
    (tmp_path/'clinic'/'broken.wav').write_text('no sound')
    here, there = (predict(tmp_path/'clinic', tmp_path/'best_model.pt', threshold='argmax', **how)
                   for how in ({}, dict(scheduler=cluster.scheduler_address)))
    assert here.to_csv() == there.to_csv() and here.beats.equals(there.beats)
    assert len(here.recordings) == 6 and here.recordings.error.notna().sum() == 1

def die(number): return os.kill(os.getpid(), signal.SIGKILL) if number == 3 else number**2

def test_a_job_that_kills_its_workers_is_named(cluster):
    "those in front of it come, and no neighbour is blamed"
    cluster.scheduler.allowed_failures = 0
    results = map_in_parallel(die, [(n,) for n in range(6)], scheduler=cluster.scheduler_address,
                              name_job=lambda n: f'recording {n}')
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(PahclError, match='^recording 3: each worker that took it was killed'):
        next(results)

def fail(number): raise PahclError(f'recording {number} is broken.')

def test_an_error_of_a_job_is_that_of_the_run(cluster):
    with pytest.raises(PahclError, match='recording 1 is broken'):
        list(map_in_parallel(fail, [(1,), (2,)], scheduler=cluster.scheduler_address))

def test_what_cannot_go_on_ends(monkeypatch):
    """a worker as a user starts it, but without our modules; without a nanny nobody starts it
    again
    """
    with LocalCluster(n_workers=0, dashboard_address=':0') as cluster:
        there = dict(scheduler=cluster.scheduler_address, name_job=lambda *job: 'recording 9')
        worker = subprocess.Popen([sys.executable, '-m', 'dask', 'worker', '--no-nanny',
                                   '--no-dashboard', cluster.scheduler_address],
                                  stderr=subprocess.DEVNULL)
        assert list(map_in_parallel(abs, [(-1,)], **there)) == [1]
        with pytest.raises(PahclError, match='a Dask worker has no module test_cluster'):
            list(map_in_parallel(die, [(1,)], **there))
        monkeypatch.setattr(parallel, '_QUIET', 1.5)   # to answer in, on a loaded machine
        with pytest.raises(PahclError, match='no worker .* is left; recording 9 was not done'):
            list(map_in_parallel(os.abort, [()], **there))
        assert worker.wait(120) == -signal.SIGABRT

def test_no_scheduler_answers(made, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, '_QUIET', 1)
    with pytest.raises(PahclError, match='tcp://127.0.0.1:9'):
        preprocess(made[0], tmp_path, 'circor', scheduler='tcp://127.0.0.1:9')

def test_dask_is_asked_for_when_missing(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'dask.distributed', None)
    with pytest.raises(PahclError, match='pip install "pahcl.cluster."'):
        preprocess(made[0], tmp_path, 'circor', scheduler='tcp://localhost:1')
