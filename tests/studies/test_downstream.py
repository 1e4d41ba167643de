"pahcl_downstream: the plan, what is skipped and why, several fine-tunings at once, one that fails"
import io
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from pahcl.core.basics import PahclError
from pahcl.studies.downstream import _build_pipeline, run_downstream
from pahcl.core.jobs import run_jobs
from pahcl.core.pipeline import PipelineSettings
from pahcl.core.stages import hash_files

FAST = dict(epochs=1, num_workers=1, pretrained='none', encoder_type='cnn_mamba_small',
            config='small_finetune')


def planned(settings, *words):
    "stage -> what the dry run says of it"
    with redirect_stdout(io.StringIO()) as told:
        assert run_downstream(words, settings, dry_run=True) is None
    lines = [line for line in told.getvalue().splitlines() if line.startswith('  ')]
    return {line[2:30].strip(): line[31:79].strip() for line in lines}


@contextmanager
def written(path, text):
    "A file with another content for a while."
    kept = path.read_bytes()
    path.write_text(text)
    yield
    path.write_bytes(kept)


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
    "Two small prepared tasks."
    from pahcl.segmentation.preprocessing import preprocess
    from pahcl.data.simulation import simulate_dataset
    from pahcl.data.splitting import prepare
    folder = tmp_path_factory.mktemp('downstream')
    for dataset in ('physionet2016', 'pascal'):
        simulate_dataset(folder/'raw', dataset, subjects=12, seed=0, seconds=4)
    preprocess(folder/'raw', folder/'processed', num_workers=1)
    prepare('all', folder/'raw', folder/'processed', folder/'downstream')
    return PipelineSettings(raw_dir=str(folder/'raw'), processed_dir=str(folder/'processed'),
                            data_dir=str(folder/'downstream'), output_dir=str(folder/'out'), **FAST)


@pytest.fixture(scope='module')
def half(settings, quick_starts):
    """Both tasks were fine-tuned at once, one of them on a table that cannot be read: the settings,
    and what was said.
    """
    # nothing but the plan
    assert ((before := planned(settings, 'train-all', 'linear'))
            and not Path(settings.output_dir).exists())
    with (written(Path(settings.data_dir)/'physionet2016'/'val.csv', 'nonsense'),
          pytest.raises(PahclError) as said):
        run_downstream(['train-all', 'linear'], replace(settings, jobs=2))
    return settings, before, str(said.value)


def test_two_at_once_and_a_failing_one(half):
    """The failing task names itself and its log, the other is there, the exit code is 1; a second
    call repeats only the failed one.
    """
    settings, before, said = half
    assert ([n for n in before if n.startswith('fine-tune')] == ['fine-tune physionet2016',
                                                                 'fine-tune pascal']
            and before['fine-tune pascal'] == 'runs: not done yet')
    assert before['evaluate pascal'] == 'runs: fine-tune runs before it'
    assert re.match(r'1 of 2 fine-tunings failed: physionet2016: .*val.csv.* \(exit code 1, '
                    r'log .*physionet2016_linear.log\)', said)
    logs = {p.stem: p.read_text() for p in (Path(settings.output_dir)/'logs').iterdir()}
    assert (set(logs) == {'physionet2016_linear', 'pascal_linear'} and 'pascal, linear'
            in logs['pascal_linear'] and 'physionet2016' not in logs['pascal_linear'])
    assert (
        Path(settings.output_dir)/'pascal_linear'/'evaluation_pascal_test'/'report.html').exists()
    after = planned(settings, 'train-all', 'linear')
    assert {k for k, v in after.items() if v.startswith('runs:')} == {'fine-tune physionet2016',
                                                                      'evaluate physionet2016'}
    assert after['fine-tune pascal'] == 'skipped: made from the same inputs and settings'


def test_a_killed_job_leaves_the_others(tmp_path, monkeypatch):
    real, settings = subprocess.run, PipelineSettings(output_dir=str(tmp_path), jobs=2)
    def run(command, **options):
        if json.loads(command[3])['task'] == 'pascal':
            return real([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'], **options)
        return real([sys.executable, '-c', 'print("done")'], **options)
    monkeypatch.setattr('pahcl.core.jobs.subprocess.run', run)
    told = run_jobs([_build_pipeline().task_job(settings, t, 'linear', 'none')
                     for t in ('pascal', 'physionet2016')], settings.jobs)
    assert told[0].startswith('it said nothing (exit code -9') and told[1] == ''


def shares(monkeypatch, tmp_path, gpus, jobs, tasks, named=None):
    """The environments in which `Pipeline.train_tasks` starts its processes on a machine with so
    many GPUs and eight processors.
    """
    # all of the first ones are under way before any is done: each holds a place of its own
    seen, begun = [], Barrier(min(jobs, tasks))
    def run(command, **options):
        seen.append(options['env'])
        if len(seen) <= begun.parties: begun.wait(10)
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr('pahcl.core.jobs.os.cpu_count', lambda: 8)
    monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
    monkeypatch.setattr('pahcl.core.jobs.subprocess.run', run)
    if named: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', named)
    else: monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    settings = PipelineSettings(output_dir=str(tmp_path), jobs=jobs)
    assert _build_pipeline().train_tasks(settings, [f't{i}' for i in range(tasks)], 'linear',
                                         'none') == {}
    return seen


@pytest.mark.parametrize('jobs, threads', [(2, '4'), (3, '2'), (20, '1')])
def test_threads_are_shared(tmp_path, monkeypatch, jobs, threads):
    seen = shares(monkeypatch, tmp_path, 0, jobs, 3)
    assert ({e['OMP_NUM_THREADS'] for e in seen} == {threads}
            and not any('CUDA_VISIBLE_DEVICES' in e for e in seen))


@pytest.mark.parametrize('gpus, jobs, tasks, named, expected', [
    (4, 4, 4, None, '0123'), (2, 4, 4, None, '0011'), (4, 2, 2, None, '01'), (2, 2, 2, '5,7', '57'),
    (1, 3, 3, None, ['', '', ''])])
def test_gpus_are_handed_out(tmp_path, monkeypatch, gpus, jobs, tasks, named, expected):
    """Each process sees one GPU, all GPUs are used alike, and only those that this process may use
    itself; a single one is everybody's.
    """
    seen = shares(monkeypatch, tmp_path, gpus, jobs, tasks, named)
    assert sorted(e.get('CUDA_VISIBLE_DEVICES', '') for e in seen) == list(expected)


def test_the_plan_names_what_changed(half):
    settings = half[0]
    said = lambda settings=settings: planned(settings, 'train', 'pascal', 'linear')
    # the summary is always made
    assert set(said().values()) == {'skipped: made from the same inputs and settings', 'runs'}
    for path in Path(settings.data_dir).glob('pascal/*.csv'): os.utime(path, (1, 1))
    assert said()['fine-tune pascal'].startswith('skipped')   # touched only
    assert said(replace(settings, epochs=2))['fine-tune pascal'] == 'runs: configuration changed'
    assert said(replace(settings, overwrite=True))['fine-tune pascal'] == 'runs: --overwrite'
    tables = {task: Path(settings.data_dir)/task/'train.csv'
              for task in ('physionet2016', 'pascal')}
    # another task's table
    with written(tables['physionet2016'], tables['physionet2016'].read_text()+'\n'):
        assert said()['fine-tune pascal'].startswith('skipped')
    with written(tables['pascal'], tables['pascal'].read_text()+'\n'):
        assert said()['fine-tune pascal'] == 'runs: data changed'
    with written(Path(settings.output_dir)/'pascal_linear'/'best_model.pt', 'other'):
        assert said()['fine-tune pascal'] == 'runs: best_model.pt was changed since'


def test_a_dry_run_of_everything_writes_nothing(tmp_path):
    settings = PipelineSettings(**{k: str(tmp_path/k)
                                   for k in ('raw_dir', 'processed_dir', 'data_dir', 'output_dir')},
                                demo=True)
    said = planned(settings, 'all')
    assert (list(said)[:4] == ['simulate', 'preprocess', 'prepare', 'pretrain']
            and said['simulate'] == 'runs: missing: circor, physionet2016, pascal'
            and said['preprocess'] == 'runs: simulate runs before it')
    assert (said['pretrain'] == 'runs: preprocess runs before it' and said['evaluate circor_murmur']
            == 'runs: fine-tune runs before it' and not list(tmp_path.iterdir()))


def test_hashes_are_remembered_but_not_believed_blindly(tmp_path):
    for name in 'ab': (tmp_path/name).write_text(name)
    files, cache = [tmp_path/n for n in 'ab'], tmp_path/'.hashes.json'
    first = hash_files(files, tmp_path, cache)
    assert hash_files(files, tmp_path, cache) == hash_files(files, tmp_path) == first
    (tmp_path/'a').write_text('changed')
    now = hash_files(files, tmp_path, cache)
    assert now['a'] != first['a'] and now['b'] == first['b']
    (tmp_path/'b').rename(tmp_path/'c')
    assert set(hash_files([tmp_path/'a', tmp_path/'c'], tmp_path, cache)) == {'a', 'c'}
