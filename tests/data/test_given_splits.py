"""pahcl.data.given_splits: any split is accepted disjoint or refused by name; the packaged ones;
what a marked leak says everywhere; the commands
"""
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import forked
import pandas as pd
import pytest
from hypothesis import example, given, settings, strategies as st

from pahcl.core.basics import PahclError, read_json
from pahcl.core.pipeline import PipelineSettings
from pahcl.data.datasets import TASKS
from pahcl.data.given_splits import (
    _GivenSplits, _open_splits, read_splits, _to_recording_ids)
from pahcl.data.loader import Cycles
from pahcl.data.splitting import prepare, _split_dataset
from pahcl.data.task_folders import write_fold
from pahcl.data.persons import check_leaks, find_held_out_persons
from pahcl.data.tasks import SPLIT_FRACTIONS, Task
from pahcl.evaluation.evaluator import evaluate
from pahcl.evaluation.scoring import Evaluation
from pahcl.splits import pahcl_prepare
from pahcl.studies.ablation import _write_given_splits
from pahcl.studies.cross_validation import _note_whole_persons
from pahcl.studies.downstream import _prepare_stage
from pahcl.studies.summary import summarize
from pahcl.testing.made import _make_processed_folder, _make_recordings
from pahcl.training.finetuning import finetune

PREPARE = Path(sys.executable).parent/'pahcl_prepare'
PUBLISHED = ['published1', 'published2', 'published3']
ALL = list(SPLIT_FRACTIONS)


# ---- any table, any split

# a row a subject: whose it is, and where it is put (None: nowhere)
subjects = st.lists(st.tuples(st.integers(0, 8).map('p{}'.format),
                              st.sampled_from([*ALL, None])), min_size=3, max_size=30)

def table_of(rows):
    of = lambda i, person, place: dict(subject_id=f's{i:02d}', person_id=person,
                                       recording_id=f's{i:02d}_{place}')
    return pd.DataFrame([of(i, person, place) for i, (person, _) in enumerate(rows)
                         for place in ('AV', 'MV')[:1+i % 2]])

def torn_persons(rows):
    "The oracle, without pandas: who is in several splits."
    where = {}
    for person, split in rows:
        if split: where.setdefault(person, set()).add(split)
    return {p for p, splits in where.items() if len(splits) > 1}

def splits_of(rows, **how):
    table = pd.DataFrame(dict(subject_id=[f's{i:02d}' for i in range(len(rows))],
                              split=pd.Series([s for _, s in rows], dtype=object)))
    return _GivenSplits(table, 'mine.csv', **how)

def assigned(rows, **how):
    "Recordings with their split, or why not."
    table = table_of(rows)
    try: return table.assign(split=splits_of(rows, **how).assign(table)), ''
    except PahclError as e: return None, str(e)

def named(message):
    "The persons that a refusal names."
    told = message.partition('are in more than one split: ')[2].partition('. Give each')[0]
    return {part.split(' (')[0] for part in told.split('), ') if part}

@given(subjects)
@settings(max_examples=60)
@example([('p0', 'train'), ('p0', 'test'), ('p1', 'val'), ('p1', None), ('p2', 'train')])
def test_accepted_disjoint_or_refused_by_name(rows):
    torn = torn_persons(rows)
    found, why = assigned(rows)
    if torn:
        assert found is None and named(why) == torn and f'{len(torn)} persons are in more' in why
    elif {s for _, s in rows if s} != set(ALL): assert 'leaves nobody in' in why
    else:
        kept = found.dropna(subset='split')
        check_leaks(kept.groupby('split')['person_id'].agg(set).to_dict())
        assert dict(zip(found['subject_id'], found['split'].astype(object).where(
            found['split'].notna(), None))) == {f's{i:02d}': s for i, (_, s) in enumerate(rows)}

@given(subjects)
@settings(max_examples=60)
@example([('p0', 'train'), ('p0', 'val'), ('p0', 'test'), ('p1', 'val'), ('p1', 'train')])
def test_published_is_made_disjoint(rows):
    """Nobody is on two sides, nobody changes sides, the test split is the published one, and
    somebody is left out only for an id in a stricter split.
    """
    found, why = assigned(rows, published=True)
    if {s for _, s in rows if s} != set(ALL): return
    if found is None:   # all of a split were in a stricter one
        assert 'leaves nobody in' in why
        return
    now = found.drop_duplicates('subject_id')['split'].tolist()
    strictest = {}
    for person, split in rows:
        if split: strictest[person] = max(strictest.get(person, -1), ALL.index(split))
    for (person, split), kept in zip(rows, now):
        if split and ALL.index(split) == strictest[person]: assert kept == split
        else: assert pd.isna(kept)

@given(subjects)
@settings(max_examples=30)
def test_leaky_is_kept_to_the_letter(rows):
    if {s for _, s in rows if s} != set(ALL): return
    found, _ = assigned(rows, leaky=True)
    assert [s if isinstance(s, str) else None
            for s in found.drop_duplicates('subject_id')['split']] == [s for _, s in rows]


# ---- the packaged splits

def test_packaged_counts_by_pandas_alone():
    path = str(files('pahcl')/'parameters'/'circor_published_splits.csv')
    plain = pd.read_csv(path, comment='#', dtype=str)
    assert len(plain) == plain['patient_id'].nunique() == 942
    for name in PUBLISHED:
        ours = read_splits(name)
        assert ours.set_index('subject_id')['split'].to_dict() == dict(
            zip(plain['patient_id'], plain[name]))
        assert ours['split'].value_counts().to_dict() == dict(train=611, val=95, test=236)
    # each is another one
    assert all((plain[a] != plain[b]).mean() > .3 for a, b in zip(PUBLISHED, PUBLISHED[1:]))

@pytest.fixture(scope='module')
def children():
    "A made table of the 942 published ids, every seventh child under two of them."
    ids = read_splits('published1')['subject_id']
    person = ids.where(ids.index % 7 != 6, ids.shift(1))
    # labels repeat every five ids, so that none of them goes with the pairs
    return pd.DataFrame(dict(
        dataset='circor', subject_id=ids, person_id=person, recording_id=ids+'_AV', cycles_kept=1,
        murmur=[('Present', 'Absent', 'Unknown', 'Absent', 'Absent')[i % 5] for i in ids.index],
        outcome=[('Normal', 'Abnormal')[i % 2] for i in ids.index]))

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_on_all_ids(children, name, logged):
    tasks = {n: t for n, t in TASKS.items() if t.dataset == 'circor'}
    plain = pd.read_csv(str(files('pahcl')/'parameters'/'circor_published_splits.csv'),
                        comment='#', dtype=str).set_index('patient_id')[name]
    where = children.assign(split=children['subject_id'].map(plain))
    rank = where['split'].map(ALL.index)
    out = rank < rank.groupby(where['person_id']).transform('max')
    clean = _split_dataset(tasks, children, given=_open_splits(name))
    for rows in clean.values():
        assert set(rows['subject_id']) == set(where.loc[~out, 'subject_id'])
        check_leaks(rows.groupby('split')['person_id'].agg(set).to_dict())
    assert (clean['circor_murmur']['split'] == 'test').sum() == 236 - (
        out & (where['split'] == 'test')).sum()
    torn = where.groupby('person_id')['split'].nunique().gt(1).sum()
    gone = where[out]['split'].value_counts()
    said = next(m for m in logged if 'what is not in the strictest' in m)
    assert f'{torn} of {children["person_id"].nunique()} persons' in said
    assert f'{gone["train"]} in train' in said and f'({out.sum()} recordings)' in said
    kept = _split_dataset(tasks, children, given=_open_splits(name, leaky=True))['circor_outcome']
    assert kept.set_index('subject_id')['split'].to_dict() == plain.to_dict()

@pytest.mark.skipif('PAHCL_RAW_DIR' not in os.environ, reason='needs real recordings')
def test_real_children():
    from pahcl.data.recordings import load_recordings
    table = load_recordings(os.environ['PAHCL_RAW_DIR'], 'circor').assign(cycles_kept=1)
    tasks = {n: t for n, t in TASKS.items() if t.dataset == 'circor'}
    for name in PUBLISHED:
        plain = read_splits(name).set_index('subject_id')['split']
        if set(table['subject_id'].map(plain).dropna()) != set(ALL): continue
        rows = _split_dataset(tasks, table, given=_open_splits(name))['circor_murmur']
        assert rows.groupby('person_id')['split'].nunique().max() == 1
        assert (rows['split'] == rows['subject_id'].map(plain)).all()


def test_files_mean_recordings():
    known = {'a_1', 'b_1', '2', '3.5', 'sub-07'}
    asked = ['a/1.wav', r'.\b\1.flac', 'somewhere/2.wav', '3.5', 'sub-07', 'c/4.wav']
    assert _to_recording_ids(asked, known) == ['a_1', 'b_1', '2', '3.5', 'sub-07', '4']


# ---- the files of a task

SHORT = {'data.target_length': 1000}   # of the made cycles
PERSONS = 24   # person 1023 is subject 1023 and subject 9023

@pytest.fixture(scope='module')
def processed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('given')
    return _make_processed_folder(folder/'processed', _make_recordings(['circor'], PERSONS),
                                  cycles=2, length=1000)

@pytest.fixture
def house(processed, tmp_path):
    "A processed folder and a function that prepares it by a given text."
    class House:
        folder, out, path = processed, tmp_path/'out', tmp_path/'mine.csv'
        def prepare(self, text=None, splits=None, **how):
            if text is not None: splits = self.write(text)
            return prepare('circor', tmp_path/'raw', processed, self.out, splits=splits, **how)
        def write(self, text):
            self.path.write_text(text)
            return self.path
    return House()

def csv_of(last='test', column='split', who='subject_id', split=None):
    "Sixteen train, four val, four test, and the second id of the last one where it is said."
    rows = [f'{1000+i},{split or ("train" if i < 16 else "val" if i < 20 else "test")}'
            for i in range(PERSONS)]
    return '\n'.join([f'{who},{column}', *rows, f'9023,{last}'])+'\n'

def test_a_file_decides(house, logged):
    config = house.prepare(csv_of(who='Patient ID'))['circor_outcome']
    assert config['split_source'].startswith('mine.csv, sha256 ') and config['seed'] is None
    assert 'leaky_splits' not in config
    assert config['split_subjects'] == dict(
        train=[str(1000+i) for i in range(16)], val=[str(1016+i) for i in range(4)],
        test=[*(str(1020+i) for i in range(4)), '9023'])
    assert any('circor: the split is mine.csv' in m for m in logged)
    digest = subprocess.run(['sha256sum', house.path], capture_output=True, text=True).stdout
    assert digest.startswith(config['split_source'].split()[-1])

def test_what_is_left_out_is_said(house, logged):
    text = csv_of(last='').replace('1000,train\n', '')+'77,train\n78,test\n'
    configs = house.prepare(text)
    assert not {'1000', '9023'} & {i for c in configs.values() for ids in
                                   c['split_subjects'].values() for i in ids}
    told = '\n'.join(logged)
    assert '2 of 26 subject_ids have no recordings here: 77, 78' in told
    assert '1 subject_ids of the data are not in it and are left out: 1000' in told
    assert '1 subject_ids have no split there and are left out: 9023' in told

def test_by_recording_and_by_person(house):
    recordings = pd.read_csv(house.folder/'recordings.csv', dtype=str)
    by_subject = house.prepare(csv_of())['circor_murmur']['split_subjects']
    split = {i: s for s, ids in by_subject.items() for i in ids}
    rows = zip(recordings['recording_id'], recordings['subject_id'])
    text = 'file,split\n'+''.join(f'some/where/{r}.wav,{split[s].upper()}\n' for r, s in rows)
    assert house.prepare(text)['circor_murmur']['split_subjects'] == by_subject
    # a person's split is that of all of their ids
    people = csv_of(who='person').rsplit('\n', 2)[0]+'\n'
    assert house.prepare(people)['circor_murmur']['split_subjects'] == by_subject

@pytest.mark.parametrize('text, message', [
    (csv_of('train'), r'1 persons are in more than one split: 1023 \(1023 test, 9023 train\)'),
    (csv_of(column='fold'), 'has no column split; it has subject_id, fold. Name the one'),
    (csv_of(who='name'), 'has no column that says who; it has name, split'),
    (csv_of('train', split='train'), 'leaves nobody in val: it names none'),
    (csv_of()+'77,test\n77,val\n', 'subject_id 77 is in test and in val'),
    (csv_of()+'77,tset\n', "row 26 below the header: the split of 77 is 'tset'"),
    (csv_of()+',test\n', 'row 26 below the header: subject_id is empty'),
    ('subject,split\na,train\nb,test\n', 'names nobody who is here: its subject_ids are a, b'),
    ('', 'cannot be read as a table'), ('subject_id,split\n', 'names nobody who is here')])
def test_refused(house, text, message):
    house.prepare(csv_of())
    before = (house.out/'circor_murmur'/'task_config.json').read_bytes()
    with pytest.raises(PahclError, match=message): house.prepare(text)
    assert (house.out/'circor_murmur'/'task_config.json').read_bytes() == before

def test_classes_that_are_missing(house, logged):
    "The sentences of a split by seed."
    order = sorted(range(PERSONS), key=lambda i: i % 3)   # Present first, Unknown last
    text = 'subject_id,split\n'+''.join(f'{1000+i},{s}\n' for i, s in zip(
        order, ['train']*16+['val']*4+['test']*4))
    house.prepare(text)
    assert any('have the class Present; it is not in val and test' in m for m in logged)
    with pytest.raises(PahclError, match='training split of circor_murmur holds less than two'):
        house.prepare(text.replace('train', 'x').replace('test', 'train').replace('x', 'test'))

def test_which_data_set(processed, tmp_path):
    made = _make_recordings(['circor', 'pascal'], 12)
    folder = _make_processed_folder(tmp_path/'two', made, cycles=1, length=500)
    def go(dataset, splits=None, **how):
        return prepare(dataset, tmp_path/'raw', folder, tmp_path/'out', splits=splits, **how)
    with pytest.raises(PahclError, match='is of one data set, and .* holds circor, pascal'):
        go('all', 'published1')
    with pytest.raises(PahclError, match='published1 is of circor alone, and this is pascal'):
        go('pascal', 'published1')
    with pytest.raises(PahclError, match='a seed separates nobody'): go('pascal', leaky_splits=True)
    with pytest.raises(PahclError, match='table of splits not found: published4'):
        go('circor', 'published4')
    assert go('all', 'seed')['pascal']['split_source'] == 'seed 42'

def test_a_column_of_the_recordings(house, tmp_path, logged):
    recordings = _make_recordings(['circor'], PERSONS)
    by_hand = ['train' if int(s)-1000 < 16 else 'valid' if int(s)-1000 < 20 else 'test'
               for s in recordings['person_id']]
    folder = _make_processed_folder(tmp_path/'own', recordings.assign(split=by_hand), cycles=1,
                                    length=500)
    def go(**how): return prepare('circor', tmp_path/'raw', folder, house.out, **how)
    config = go()['circor_murmur']
    assert config['split_source'] == 'column split of recordings.csv'
    assert len(config['split_persons']['train']) == 16 and any(
        'circor: the split is column split of recordings.csv' in m for m in logged)
    assert go(splits='seed')['circor_murmur']['split_source'] == 'seed 42'
    # a column that is not whole is not used
    table = pd.read_csv(folder/'recordings.csv', dtype=str)
    def rewrite(): table.assign(split=by_hand).to_csv(folder/'recordings.csv', index=False)
    by_hand[3] = None
    rewrite()
    assert go()['circor_murmur']['split_source'] == 'seed 42'
    assert any('1 of 49 recordings have nothing in the column split' in m for m in logged)
    # it is checked like a file
    by_hand[3], by_hand[-1] = 'train', 'train'
    rewrite()
    with pytest.raises(PahclError, match='1 persons are in more than one split: 1023'): go()
    assert go(leaky_splits=True)['circor_murmur']['leaky_splits'] == ['1023']

def test_a_seed_is_as_before(house):
    plain = house.prepare()['circor_murmur']
    assert plain['split_source'] == 'seed 42' and plain['seed'] == 42
    assert house.prepare(splits='seed')['circor_murmur'] == plain


# ---- a leak that is marked

@pytest.fixture(scope='module')
def leaky(processed, tmp_path_factory, quiet):
    "Tasks in which person 1023 trains and is tested, and a model that was fine-tuned on one."
    folder = tmp_path_factory.mktemp('leaky')
    (folder/'mine.csv').write_text(csv_of('train', 'split1'))
    flags = ['--dataset', 'circor', '--raw-dir', folder/'raw', '--processed-dir', processed,
             '--output-dir', folder/'downstream', '--splits', folder/'mine.csv',
             '--split-column', 'split1', '--leaky-splits']
    assert pahcl_prepare(list(map(str, flags))) == 0
    finetune(task='circor_murmur', pretrained='none', data_dir=folder/'downstream', epochs=1,
             output_dir=folder/'outputs', encoder_type='cnn', **SHORT)
    return folder

SAID = 'leaky split: 1 of 24 persons are in more than one split of mine.csv, column split1, sha256 '

def test_the_task_is_marked(leaky):
    config = read_json(leaky/'downstream'/'circor_murmur'/'task_config.json')
    assert config['leaky_splits'] == ['1023'] and config['split_source'].startswith(
        'mine.csv, column split1, sha256 ')
    assert Task.open(leaky/'downstream', 'circor_outcome').split_notes[0].startswith(SAID)

def test_every_score_says_so(leaky, capsys, logged):
    run = leaky/'outputs'/'circor_murmur_downstream'
    assert any(n.startswith(SAID) for n in read_json(run/'final_metrics.json')['notes'])
    results = evaluate(run/'best_model.pt', 'circor_murmur', leaky/'downstream', draws=50)
    metrics = read_json(Path(results['output_dir'])/'metrics.json')
    assert any(n.startswith(SAID) for n in metrics['notes'])
    assert SAID in Evaluation.load(results['output_dir']).summary()
    assert SAID in (Path(results['output_dir'])/'report.html').read_text()
    capsys.readouterr()
    summarize(leaky/'outputs')
    assert f'circor_murmur_downstream: {SAID}' in capsys.readouterr().out
    assert SAID in (leaky/'outputs'/'summary.md').read_text()

def test_training_warns_of_it_and_refuses_others(leaky, tmp_path, logged):
    import shutil
    where = dict(task='circor_murmur', pretrained='none', epochs=1, encoder_type='cnn')
    def again(data_dir):
        finetune(**where, data_dir=data_dir, output_dir=leaky/'outputs', **SHORT)
    again(leaky/'downstream')   # finished: only the data are checked
    assert any('1 persons are both in train and in test, by --leaky-splits: 1023' in m
               for m in logged)
    # somebody else on two sides is no marked leak
    other = tmp_path/'downstream'
    shutil.copytree(leaky/'downstream'/'circor_murmur', other/'circor_murmur')
    table = pd.read_csv(other/'circor_murmur'/'cycles.csv', dtype=str)
    table.loc[table['person_id'] == '1022', 'person_id'] = '1001'
    table.to_csv(other/'circor_murmur'/'cycles.csv', index=False)
    with pytest.raises(PahclError, match='says person_id 1001 of 1022_AV, recordings.csv 1022'):
        again(other)
    # nor is the marked one, without its mark
    path = other/'circor_murmur'/'task_config.json'
    path.write_text(json.dumps(read_json(path) | dict(leaky_splits=[])))
    with pytest.raises(PahclError, match='says person_id 1001 of 1022_AV'):
        again(other)

def test_pretraining_leaves_them_out(leaky, processed, logged):
    held = find_held_out_persons(leaky/'downstream')
    left = Cycles.from_processed(processed, exclude_persons=held).table
    assert '1023' in held and set(left['subject_id']) == {str(1000+i) for i in range(16)}
    assert any('leaky split: 1 of 24 persons' in m and 'All of them are held out' in m
               for m in logged)

def test_folds_are_of_whole_persons(leaky, tmp_path):
    task = Task.open(leaky/'downstream', 'circor_murmur')
    assert 'the folds are of whole persons' in _note_whole_persons(task)[0]
    fold = {str(1000+i): ('train', 'val', 'test')[i//3 % 3] for i in range(PERSONS)}
    write_fold(task.folder, tmp_path/'fold', fold)
    config = read_json(tmp_path/'fold'/'task_config.json')
    check_leaks(config['split_persons'])
    assert 'leaky_splits' not in config and Task(tmp_path/'fold', config).split_notes == []

def test_an_ablation_splits_its_variants_alike(leaky, processed, tmp_path, logged):
    class Plan: data_dir, tasks = leaky/'downstream', ('circor_murmur', 'circor_outcome')
    (path, is_leaky), = _write_given_splits(Plan, tmp_path/'variant').values()
    assert is_leaky
    again = prepare('circor', tmp_path/'raw', processed, tmp_path/'variant', splits=path,
                    leaky_splits=True)
    config = read_json(leaky/'downstream'/'circor_murmur'/'task_config.json')
    assert any('circor_murmur: 24 persons, train 17' in m for m in logged)
    assert again['circor_murmur']['split_subjects'] == config['split_subjects']
    assert again['circor_murmur']['leaky_splits'] == ['1023']


# ---- the commands

def test_the_stage_knows_the_file(processed, tmp_path):
    path = tmp_path/'mine.csv'
    def inputs(**how):
        return _prepare_stage(PipelineSettings(processed_dir=str(processed), dataset='circor',
                                               **how)).inputs()
    plain = inputs()
    assert list(plain) == ['cycles', 'seed', 'dataset'] and plain['seed'] == 42   # as ever
    path.write_text(csv_of())
    first = inputs(splits=str(path))
    assert first == inputs(splits=str(path)) and first['seed'] != plain['seed']
    path.write_text(csv_of('train'))
    seen = [first, inputs(splits=str(path)), inputs(splits=str(path), leaky_splits=True),
            inputs(splits='published1'), inputs(splits='published2'), inputs(splits='seed'),
            inputs(leaky_splits=True), plain]
    assert len({json.dumps(s, sort_keys=True) for s in seen}) == len(seen)

def test_downstream_refuses_before_it_begins(tmp_path):
    def plan(**how): _prepare_stage(PipelineSettings(processed_dir=str(tmp_path), **how))
    with pytest.raises(PahclError, match='is of one data set. Name it with --dataset'):
        plan(splits='published1')
    with pytest.raises(PahclError, match='table of splits not found'):
        plan(splits=str(tmp_path/'no.csv'), dataset='circor')
    plan(splits='published1', dataset='circor'), plan(splits='seed'), plan()

def test_downstream_prepares_again(processed, tmp_path, capsys):
    from pahcl.evaluate import pahcl_downstream
    path, out = tmp_path/'mine.csv', tmp_path/'downstream'
    (tmp_path/'raw'/'circor').mkdir(parents=True)
    def plan(*more):
        flags = ['prepare', '--dataset', 'circor', '--raw-dir', tmp_path/'raw', '--processed-dir',
                 processed, '--data-dir', out, '--splits', path, *more, '--dry-run']
        assert pahcl_downstream(list(map(str, flags))) == 0
        line = next(l for l in capsys.readouterr().out.splitlines() if l.startswith('  prepare'))
        return line
    from pahcl.core.stages import run_stage
    path.write_text(csv_of())
    stage = _prepare_stage(PipelineSettings(
        raw_dir=str(tmp_path/'no'), processed_dir=str(processed), data_dir=str(out),
        dataset='circor', splits=str(path)))
    assert run_stage(stage) and not run_stage(stage)
    path.write_text(csv_of('train'))
    with pytest.raises(PahclError, match='1 persons are in more than one split'): run_stage(stage)
    assert 'runs: ' in plan()

def test_script_refuses_by_name(processed, tmp_path):
    (tmp_path/'mine.csv').write_text(csv_of('val'))
    done = forked.run([PREPARE, '--dataset', 'circor', '--raw-dir', tmp_path/'raw',
                           '--processed-dir', processed, '--output-dir', tmp_path/'out',
                           '--splits', tmp_path/'mine.csv'], capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert '1023 (1023 test, 9023 val). Give each person one split' in done.stderr
    assert not (tmp_path/'out'/'circor_murmur').exists()
