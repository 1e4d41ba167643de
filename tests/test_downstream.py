"pahcl_downstream: the plan, what is skipped and why, several fine-tunings at once, one that fails"
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
from pahcl.basics import PahclError
from pahcl.downstream import Way, content, downstream, run_job

FAST = dict(epochs=1, num_workers=1, pretrained='none', encoder_type='cnn_mamba_small', config='small_finetune')


def planned(way, *words):
    "stage -> what the dry run says of it"
    with redirect_stdout(io.StringIO()) as told: assert downstream(words, way, dry_run=True) is None
    lines = [line for line in told.getvalue().splitlines() if line.startswith('  ')]
    return {line[2:30].strip(): line[31:79].strip() for line in lines}


@pytest.fixture
def way(work, raw, tmp_path):
    "The prepared tasks of the other tests, linked; runs of its own."
    for task in ('physionet2016', 'pascal'): shutil.copytree(work/'downstream'/task, tmp_path/'downstream'/task, copy_function=os.link)
    return Way(raw_dir=str(raw), processed_dir=str(work/'processed'), data_dir=str(tmp_path/'downstream'), output_dir=str(tmp_path/'out'), **FAST)


def test_two_at_once_and_a_failing_one(way):
    "The failing task names itself and its log, the other is there, the exit code is 1; a second call repeats only the failed one."
    before = planned(way, 'train-all', 'linear')
    assert [n for n in before if n.startswith('fine-tune')] == ['fine-tune physionet2016', 'fine-tune pascal'] and before['fine-tune pascal'] == 'runs: not done yet'
    assert before['evaluate pascal'] == 'runs: fine-tune runs before it' and not Path(way.output_dir).exists()   # nothing but the plan
    broken = Path(way.data_dir)/'physionet2016'/'val.csv'
    text = broken.read_text()
    broken.unlink()   # a link to the shared folder: not to be written through
    broken.write_text('nonsense')
    with pytest.raises(PahclError, match=r'1 of 2 fine-tunings failed: physionet2016: .*val.csv.* \(exit code 1, log .*physionet2016_linear.log\)'):
        downstream(['train-all', 'linear'], replace(way, jobs=2))
    logs = {p.stem: p.read_text() for p in (Path(way.output_dir)/'logs').iterdir()}
    assert set(logs) == {'physionet2016_linear', 'pascal_linear'} and 'pascal, linear' in logs['pascal_linear'] and 'physionet2016' not in logs['pascal_linear']
    assert (Path(way.output_dir)/'pascal_linear'/'evaluation_pascal_test'/'report.html').exists()
    broken.write_text(text)
    after = planned(way, 'train-all', 'linear')
    assert {k for k, v in after.items() if v.startswith('runs:')} == {'fine-tune physionet2016', 'evaluate physionet2016'}
    assert after['fine-tune pascal'] == 'skipped: made from the same inputs and settings'


def test_a_killed_job_leaves_the_others(way, monkeypatch):
    real = subprocess.run
    def run(command, **options):
        if json.loads(command[3])['task'] == 'pascal': return real([sys.executable, '-c', 'import os; os.kill(os.getpid(), 9)'], **options)
        return real([sys.executable, '-c', 'print("done")'], **options)
    monkeypatch.setattr('pahcl.downstream.subprocess.run', run)
    told = [run_job(replace(way, jobs=2), t, 'linear', 'none') for t in ('pascal', 'physionet2016')]
    assert told[0].startswith('it said nothing (exit code -9') and told[1] == ''


def test_threads_are_shared(way, monkeypatch):
    seen = []
    monkeypatch.setattr('pahcl.downstream.os.cpu_count', lambda: 8)
    monkeypatch.setattr('pahcl.downstream.subprocess.run', lambda command, **options: seen.append(options['env']['OMP_NUM_THREADS']) or subprocess.CompletedProcess(command, 0))
    for jobs in (1, 3, 20): run_job(replace(way, jobs=jobs), 'pascal', 'linear', 'none')
    assert seen == ['8', '2', '1']


def test_the_plan_names_what_changed(way, tmp_path):
    downstream(['train', 'pascal', 'linear'], way)
    assert set(planned(way, 'train', 'pascal', 'linear').values()) == {'skipped: made from the same inputs and settings', 'runs'}   # the summary is always made
    for path in Path(way.data_dir).glob('pascal/*.csv'): os.utime(path, (1, 1))
    assert planned(way, 'train', 'pascal', 'linear')['fine-tune pascal'].startswith('skipped')   # touched only
    assert planned(replace(way, epochs=2), 'train', 'pascal', 'linear')['fine-tune pascal'] == 'runs: configuration changed'
    assert planned(replace(way, overwrite=True), 'train', 'pascal', 'linear')['fine-tune pascal'] == 'runs: --overwrite'
    other = Path(way.data_dir)/'physionet2016'/'train.csv'
    text = other.read_text()
    other.unlink()   # a link to the shared folder: not to be written through
    other.write_text(text+'\n')
    assert planned(way, 'train', 'pascal', 'linear')['fine-tune pascal'].startswith('skipped')   # another task's table
    own = Path(way.data_dir)/'pascal'/'train.csv'
    text = own.read_text()
    own.unlink()
    own.write_text(text+'\n')
    assert planned(way, 'train', 'pascal', 'linear')['fine-tune pascal'] == 'runs: data changed'
    (Path(way.output_dir)/'pascal_linear'/'best_model.pt').write_bytes(b'other')
    own.write_text(text)
    assert planned(way, 'train', 'pascal', 'linear')['fine-tune pascal'] == 'runs: best_model.pt was changed since'


def test_a_dry_run_of_everything_writes_nothing(tmp_path):
    way = Way(**{k: str(tmp_path/k) for k in ('raw_dir', 'processed_dir', 'data_dir', 'output_dir')}, demo=True)
    said = planned(way, 'all')
    assert list(said)[:4] == ['simulate', 'preprocess', 'prepare', 'pretrain'] and said['simulate'] == 'runs: missing: circor, physionet2016, pascal' and said['preprocess'] == 'runs: simulate runs before it'
    assert said['pretrain'] == 'runs: preprocess runs before it' and said['evaluate circor_murmur'] == 'runs: fine-tune runs before it' and not list(tmp_path.iterdir())


def test_hashes_are_remembered_but_not_believed_blindly(tmp_path):
    for name in 'ab': (tmp_path/name).write_text(name)
    files, cache = [tmp_path/n for n in 'ab'], tmp_path/'.hashes.json'
    first = content(files, tmp_path, cache)
    assert content(files, tmp_path, cache) == content(files, tmp_path) == first
    (tmp_path/'a').write_text('changed')
    now = content(files, tmp_path, cache)
    assert now['a'] != first['a'] and now['b'] == first['b']
    (tmp_path/'b').rename(tmp_path/'c')
    assert set(content([tmp_path/'a', tmp_path/'c'], tmp_path, cache)) == {'a', 'c'}
