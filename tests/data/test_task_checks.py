"tables that contradict each other or lead out of their folder are refused, edits are accepted"
import importlib.util
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from pahcl.core.basics import _inside, PahclError, read_json, write_json
from pahcl.data.loader import Cycles
from pahcl.data.task_checks import _list_tables
from pahcl.data.task_folders import _accept_changes, write_fold
from pahcl.data.persons import find_held_out_persons
from pahcl.data.processed import read_processed
from pahcl.data.tasks import Task
from pahcl.splits import pahcl_prepare

spec = importlib.util.spec_from_file_location(
    'bad_tables', Path(__file__).parents[2]/'benchmarks'/'bad_tables.py')
B = importlib.util.module_from_spec(spec)
spec.loader.exec_module(B)
pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def made(tmp_path_factory, quiet):
    folder = tmp_path_factory.mktemp('tables')/'made'
    B.make(folder)
    return folder

@pytest.fixture
def task(made, tmp_path):
    "A copy that a test may change."
    B.CASES['nothing'] = 'task', lambda folder: None
    assert B.try_case(made, tmp_path/'copy', 'nothing') == [('success', '')]
    del B.CASES['nothing']
    return tmp_path/'copy'/'tasks'/B.TASK

@pytest.mark.parametrize('name', B.CASES)
def test_each_has_its_sentence(made, tmp_path, name):
    assert {end for end, _ in B.try_case(made, tmp_path/'new', name)} == {'sentence'}
    if B.CASES[name][0] == 'task' and (name in B.UNSEEN or list(B.CASES).index(name) % 6 == 0):
        (end, _), = B.try_case(made, tmp_path/'old', name, manifest=False)
        assert end == ('success' if name in B.UNSEEN else 'sentence')

@pytest.mark.parametrize('out', ['../../../x.npy', '/etc/passwd'])
def test_a_forged_manifest_leads_nowhere(task, out):
    for name in ('train.csv', 'cycles.csv'): B.edit(task/name, B.first('file_path', out))
    config = read_json(task/'task_config.json')
    write_json(task/'task_config.json', config | dict(manifest=_list_tables(task, config)))
    with pytest.raises(PahclError, match='train.csv names .*, which is no file or folder below'):
        Cycles.from_task(task, 'train')

@settings(max_examples=40)
@given(st.lists(st.sampled_from(['a', '..', '.', '', 'b c', '\\', 'ü']), max_size=6))
def test_nothing_leads_out(parts):
    try: path = _inside('/root', '/'.join(parts), 'a table')
    except PahclError: return
    assert Path('/root') in path.resolve().parents or path.resolve() == Path('/root')

def test_edits_are_accepted(task):
    "A person goes from train to val, another is relabelled, one cycle is left out."
    before, table = read_json(task/'task_config.json'), {}
    for name in ('train', 'val'):
        table[name] = pd.read_csv(task/f'{name}.csv', dtype=str, comment='#')
    train = table['train']
    moved, relabelled, less = train['subject_id'].unique()[:3]
    new = train['label'][train['subject_id'] == moved].iloc[0]
    train.loc[train['subject_id'] == relabelled, 'label'] = new
    gone = train[train['subject_id'] == less].index[:1]
    rest = train[(train['subject_id'] != moved) & ~train.index.isin(gone)]
    rest.to_csv(task/'train.csv', index=False)
    pd.concat([table['val'], train[train['subject_id'] == moved]]).to_csv(task/'val.csv',
                                                                          index=False)
    with pytest.raises(PahclError, match='--accept-changes'): Task.open(task.parent, B.TASK)
    pahcl_prepare(['--accept-changes', str(task)])
    config, train = read_json(task/'task_config.json'), Cycles.from_task(task, 'train')
    assert moved in config['split_persons']['val'] and moved not in train.table['person_id'].values
    assert config['split_sizes']['train'] == len(train) == len(rest)
    assert set(train.table.label[train.table.subject_id == relabelled]) == {int(new)}
    assert moved in find_held_out_persons(task.parent)
    assert config['class_weights'] != before['class_weights']
    recordings = Task.open(task.parent, B.TASK).recordings
    assert set(recordings.label[recordings.subject_id == relabelled]) == {new}
    state = {p.name: p.read_bytes() for p in task.glob('[!.]*.*')}
    _accept_changes(task)
    assert {p.name: p.read_bytes() for p in task.glob('[!.]*.*')} == state   # again changes nothing

def test_what_cannot_be_accepted(task):
    lines = (task/'train.csv').read_text().splitlines()
    (task/'val.csv').write_text('\n'.join([lines[1], lines[2]])+'\n')   # one cycle of a recording
    (task/'train.csv').write_text('\n'.join([*lines[:2], *lines[3:]])+'\n')
    with pytest.raises(PahclError, match='several values of split'): _accept_changes(task)
    (task/'train.csv').write_text('\n'.join([*lines, lines[2]])+'\n')
    with pytest.raises(PahclError, match='is listed twice'): _accept_changes(task)
    with pytest.raises(PahclError, match='task not found'): _accept_changes(task/'nowhere')

def test_a_fold_has_its_own_manifest_and_links(task, tmp_path):
    config = read_json(task/'task_config.json')
    other = {p: {'train': 'test', 'test': 'train'}.get(s, s)
             for s, ids in config['split_persons'].items() for p in ids}
    write_fold(task, tmp_path/'folds'/B.TASK, other)
    fold = tmp_path/'folds'/B.TASK
    assert (fold/'train').is_symlink() and len(Cycles.from_task(fold, 'test').batch([0])['x']) == 1
    with (fold/'cycles.csv').open('a') as f: f.write('\n')
    with pytest.raises(PahclError, match='is not as it was prepared'):
        Task.open(fold.parent, B.TASK)

def test_what_plays_no_part_may_be_edited(task):
    config = read_json(task/'task_config.json')
    write_json(task/'task_config.json', config | dict(primary_metric='auroc', note='mine'))
    assert Task.open(task.parent, B.TASK).primary_metric == 'auroc'
    for manifest in ([], {'train.csv': 'x'}, 'none', {}):
        write_json(task/'task_config.json', config | dict(manifest=manifest))
        with pytest.raises(PahclError, match='task_config.json'): Task.open(task.parent, B.TASK)

@pytest.mark.parametrize('key, kinds', [
    ('task_name', [3]), ('label_map', [['a'], {'a': '0'}, {'a': 1}, {}, 'a', {'a': True}]),
    ('num_classes', ['3', 2.5, -1]), ('target_length', ['60', 0]), ('length_mode', ['cut', 1]),
    ('split_persons', [['1'], {'val': '1'}, {'val': [['1']]}, {'train': []}]),
    ('split_subjects', [3, {'test': {}}])])
def test_what_is_read_of_a_task_has_its_kind(task, key, kinds):
    "An entry that is gone or of another kind: whoever reads it names it."
    path = task/'task_config.json'
    config = read_json(path)
    config.pop('manifest')
    if key.startswith('split'): read = lambda: find_held_out_persons(task.parent)
    elif key in ('task_name', 'label_map'): read = lambda: Task.open(task.parent, B.TASK)
    else: read = lambda: Cycles.from_task(task, 'val')
    for content in [{k: v for k, v in config.items() if k != key},
                    *(config | {key: kind} for kind in kinds)]:
        write_json(path, content)
        with pytest.raises(PahclError, match=f'task_config.json.*{key}'): read()

@pytest.mark.parametrize('content, says', [
    ({}, 'has no settings sample_rate'), ({'settings': 5}, 'settings'),
    ({'settings': {'sample_rate': 'fast'}}, "settings.sample_rate is 'fast'; a number is expected"),
    ({'settings': {'target_length': 0}}, 'settings.target_length'), ({'datasets': []}, 'datasets'),
    ({'definitions': {'ward': {'source': {}, 'tasks': []}}}, 'definitions.ward.tasks'),
    ({'definitions': {'ward': {'source': {'title': 3}, 'tasks': {}}}}, 'source.title is 3'),
    ({'definitions': {'ward': {'source': {}, 'tasks': {'a': {'label_map': {}}}}}}, 'column')])
def test_what_is_read_of_a_processed_folder_has_its_kind(made, tmp_path, content, says):
    processed = tmp_path/'processed'
    shutil.copytree(next(made.rglob('processing_stats.json')).parent, processed)
    write_json(processed/'processing_stats.json', content)
    with pytest.raises(PahclError, match=f'processing_stats.json.*{says}'):
        read_processed(processed)
