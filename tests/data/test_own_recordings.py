"A user's own data set: any table, its mistakes, and the way from a csv to a report"
import csv
import io
import json
import shutil

import numpy as np
import pytest
import soundfile
from hypothesis import given, HealthCheck, settings, strategies as st

from pahcl.core.basics import PahclError
from pahcl.cycles import pahcl_preprocess
from pahcl.data.datasets import DATASETS, TASKS
from pahcl.data.heart_sounds import simulate_recording
from pahcl.data.labelled_audio import write_recordings_table
from pahcl.data.own_recordings import _forget_own_datasets, _OWN_PLACES, register_own_datasets
from pahcl.data.own_rows import _make_recording_ids, _read_persons
from pahcl.data.own_tables import _OwnTable, _read_own_table
from pahcl.data.own_tasks import _order_classes, _why_no_classes
from pahcl.data.recordings import load_recordings
from pahcl.data.splitting import prepare
from pahcl.data.tasks import Task
from pahcl.segmentation.preprocessing import preprocess


@pytest.fixture(autouse=True)
def forgotten():
    "No own data set stays registered after a test."
    yield
    _forget_own_datasets(list(_OWN_PLACES))


@pytest.fixture(scope='module')
def sounds(tmp_path_factory):
    "Twenty-four recordings of twelve persons, in four formats and at six sample rates."
    folder = tmp_path_factory.mktemp('own')/'sounds'
    folder.mkdir()
    for i in range(24):
        rate = (1000, 2000, 4000, 8000, 22050, 44100)[i % 6]
        ending = 'mp3' if rate == 44100 else ('wav', 'flac', 'ogg')[i % 3]
        signal = simulate_recording(4, rate, seed=i)[0]
        noise = 0.05*np.random.default_rng(i).normal(size=len(signal))
        soundfile.write(folder/f'{i:02d}.{ending}', np.clip(signal+noise*(i//2 % 2), -1, 1), rate)
    return folder


def list_rows(sounds, **columns):
    "A row a sound; of every person two recordings; columns are functions of the person's number."
    return [dict(file=str(p), subject=f'P{i//2:02d}', **{c: f(i//2) for c, f in columns.items()})
            for i, p in enumerate(sorted(sounds.iterdir()))]


def write_set(folder, rows, about=None, separator=','):
    "Write recordings.csv, and dataset.yaml where something is said about it."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'recordings.csv', 'w', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    if about: (folder/'dataset.yaml').write_text(about)
    return folder


def murmur(person): return ('absent', 'present')[person % 2]


# ---- any table -------------------------------------------------------------------------------

CELLS = st.text('aé心"\',;|0.', max_size=6)

@settings(deadline=None, max_examples=50,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=8), st.sampled_from(',;\t'),
       st.booleans(), st.sampled_from(['\n', '\r\n']))
def test_a_table_is_read_as_it_was_written(tmp_path, rows, separator, marked, ending):
    rows = [(f'{i}.wav', *row) for i, row in enumerate(rows)]   # no row is empty
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=ending).writerows(
        [('File', ' Subject ID ', 'HEART-murmur', 'x'), *rows])
    path = tmp_path/'recordings.csv'
    path.write_bytes((b'\xef\xbb\xbf' if marked else b'')+text.getvalue().encode())
    table = _read_own_table(path)
    assert list(table.columns) == ['file', 'subject_id', 'heart_murmur', 'x']
    assert [tuple(row.values()) for _, row in table.rows] == rows
    assert [line for line, _ in table.rows] == list(range(2, len(rows)+2))

@given(st.lists(st.text('ab./\\ é-', min_size=1).map(lambda t: t+'.wav'), unique=True, min_size=1))
def test_names_of_recordings_are_different_and_fit_for_files(files):
    names = _make_recording_ids(files)
    assert len({n.casefold() for n in names}) == len(files)
    assert all(n and '/' not in n and '\\' not in n and n[0] != '.' and ' ' not in n
               for n in names)

@given(st.lists(st.tuples(st.sampled_from('abcd'), st.sampled_from(['', *'abcd'])), min_size=1))
def test_a_subject_is_one_person_or_an_error(rows):
    lines = list(enumerate((dict(subject=s, person=p) for s, p in rows), 2))
    table = _OwnTable('r.csv', dict(subject='subject', person='person'), lines)
    try: pairs = _read_persons(table)
    except PahclError: return
    persons = dict(pairs)
    assert all(persons[s] == p for s, p in pairs)                  # one person each
    assert all(persons.get(p, p) == p for p in persons.values())   # and no chain of them

@given(st.lists(st.sampled_from(['Normal', 'murmur', 'AS', '3', '2.5', 'no']), min_size=1))
def test_what_is_learned_has_classes_from_zero(values):
    classes = _order_classes(values)
    assert sorted(classes.values()) == list(range(len(set(values)))) and set(classes) == set(values)
    assert (_why_no_classes(values) == '') <= (len(classes) > 1)


# ---- what the table of recordings says -------------------------------------------------------

def test_a_spreadsheet_becomes_a_data_set(sounds, tmp_path):
    rows = [{'File': str(p), 'SUBJECT': f'{i//2}.0', 'Location': 'AV', 'Heart Murmur': murmur(i//2),
             'Gender': 'F', 'Age (years)': '7,5', 'Comments': 'x', 'Split': 'Training',
             'Seconds': '9'} for i, p in enumerate(sorted(sounds.iterdir()))]
    write_set(tmp_path/'ward', rows, separator=';')
    table = load_recordings(tmp_path, 'ward')
    assert set(table['subject_id']) == {f'ward-{i}' for i in range(12)}
    assert set(table['heart_murmur']) == {'absent', 'present'} and set(table['sex']) == {'F'}
    assert set(table['age']) == {'7,5'} and set(table['split']) == {'train'}
    assert table['seconds'].between(3.9, 4.2).all()            # measured, not believed
    assert set(table['sample_rate']) == {1000, 2000, 4000, 8000, 22050, 44100}
    assert TASKS['ward_heart_murmur'].label_map == dict(absent=0, present=1)
    assert load_recordings(tmp_path)['path'].tolist() == table['path'].tolist()   # of all: the same

def test_another_raw_folder_has_other_data_sets(sounds, tmp_path):
    write_set(tmp_path/'a'/'ward', list_rows(sounds, murmur=murmur))
    write_set(tmp_path/'b'/'clinic', list_rows(sounds, rhythm=murmur))
    assert register_own_datasets(tmp_path/'a') == ['ward'] and 'ward_murmur' in TASKS
    assert register_own_datasets(tmp_path/'b') == ['clinic']
    assert 'ward_murmur' not in TASKS and 'ward' not in DATASETS
    shutil.rmtree(tmp_path/'b'/'clinic')
    assert register_own_datasets(tmp_path/'b') == [] and list(DATASETS) == [
        'circor', 'physionet2016', 'pascal']

def test_a_label_that_is_none_is_named_and_the_rest_goes_on(sounds, tmp_path, logged):
    write_set(tmp_path/'ward', list_rows(sounds, murmur=murmur, pressure=lambda p: 90.5+p,
                                         heard=lambda p: ('MR', 'AS', 'MR;AS')[p % 3]))
    table = load_recordings(tmp_path, 'ward')
    assert list(DATASETS['ward'].tasks) == ['ward_murmur'] and 'pressure' in table
    told = ' '.join(logged)
    assert 'no task of column pressure, which holds 12 different numbers: regression' in told
    assert "no task of column heard, which holds several classes in a cell ('MR;AS')" in told


# ---- mistakes --------------------------------------------------------------------------------

FAULTS = {   # what is changed in the text of the table -> what is said
    ('subject,', 'patient,'): "has no column 'subject'; it has file, patient, murmur. "
                              "Is it 'patient'. Rename that column 'subject'",
    ('00.wav', 'no.wav'): "line 2, column file: '.*no.wav' is not there",
    ('01.flac', '00.wav'): "line 3, column file: '.*00.wav' is listed in line 2 already",
    (',P00,', ',,'): "line 2, column subject: '' is empty",
    (',P00,', ',../P00,'): "line 2, column subject: '../P00' is no name for a folder",
    (',P00,absent', ',p00,absent'): "line 3, column subject: 'P00' is 'p00' in line 2",
    (',P00,absent', ',P00,Absent'): "line 3, column murmur: 'absent' is 'Absent' in line 2",
    (',P00,absent', ',P00,absent,1'): 'line 2 has 4 cells, but the header has 3',
    ('subject,murmur', 'subject,SUBJECT'): 'line 1: the columns .* are the same'}

@pytest.mark.parametrize('old, new', FAULTS)
def test_a_mistake_is_named_with_its_place(sounds, tmp_path, old, new):
    path = write_set(tmp_path/'ward', list_rows(sounds, murmur=murmur))/'recordings.csv'
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PahclError, match=FAULTS[old, new]): load_recordings(tmp_path, 'ward')

def test_only_what_cannot_be_learned_is_an_error(sounds, tmp_path):
    write_set(tmp_path/'ward', list_rows(sounds, pressure=lambda p: 90.5+p))
    with pytest.raises(PahclError, match='column pressure: .* regression cannot be learned'):
        load_recordings(tmp_path, 'ward')

@pytest.mark.parametrize('about, why', {
    'tasks: {murmur: {label_map: [absent, loud]}}': "'present' is no class of .*dataset.yaml",
    'tasks: {murmur: {label: [1]}}': "tasks.murmur: unknown key 'label'; .* 'label_map'",
    'tasks: {x: {column: mumur}}': "unknown key 'mumur'; the nearest valid one is 'murmur'",
    'tasks: {murmur: {primary_metric: best}}': "primary_metric is 'best'; choose",
    'tasks: {murmur: {official_score: precision_sum}}': 'is of 3 classes, and the task has 2',
    'licens: x': "unknown key 'licens'; the nearest valid one is 'licence'"}.items())
def test_a_mistake_in_dataset_yaml_is_named(sounds, tmp_path, about, why):
    write_set(tmp_path/'ward', list_rows(sounds, murmur=murmur), about)
    with pytest.raises(PahclError, match=why): load_recordings(tmp_path, 'ward')

@pytest.mark.parametrize('name, why', {'CirCor': 'name of a public', 'all': 'every data set',
                                       'my ward': 'no name for a data set'}.items())
def test_a_name_that_cannot_be(sounds, tmp_path, name, why):
    write_set(tmp_path/name, list_rows(sounds, murmur=murmur))
    with pytest.raises(PahclError, match=why): register_own_datasets(tmp_path)
    assert register_own_datasets(tmp_path, 'pascal') == []   # other data sets are not disturbed

def test_recordings_without_a_table_are_told_how(sounds, tmp_path):
    shutil.copytree(sounds, tmp_path/'raw'/'ward')
    for asked in ('all', 'circor'):
        with pytest.raises(PahclError, match='no labels found.*24 recordings.*recordings.csv with '
                                             'the columns file, subject.*--audio-dir .*ward'):
            load_recordings(tmp_path/'raw', asked)
    with pytest.raises(PahclError, match="dataset is 'ward'; choose .*recordings.csv"):
        load_recordings(tmp_path/'raw', 'ward')


# ---- from a csv to a report ------------------------------------------------------------------

ABOUT = """
title: Ward 3
licence: CC0
citation: nobody 2026
tasks:
  murmur: {label_map: [absent, present], official_score: outcome_cost}
  ward_level: {column: stage}
"""

@pytest.fixture(scope='module')
def house(sounds, tmp_path_factory, quiet):
    "A folder with raw, processed and downstream of an own data set."
    folder = tmp_path_factory.mktemp('house')
    rows = list_rows(sounds, murmur=murmur, stage=lambda p: p % 3, age=lambda p: 5+p,
                     device=lambda p: ('old', 'new')[p//6])
    write_set(folder/'raw'/'ward', rows, ABOUT)
    preprocess(folder/'raw', folder/'processed', 'ward', num_workers=1)
    (folder/'raw').rename(folder/'away')
    prepare('ward', folder/'raw', folder/'processed', folder/'downstream')
    _forget_own_datasets(list(_OWN_PLACES))
    return folder

def test_a_processed_folder_remembers_its_tasks(house):
    task = Task.open(house/'downstream', 'ward_murmur')
    assert (task.dataset, task.primary_metric, task.official_metric.name) == (
        'ward', 'auroc', 'outcome_cost')
    assert task.config['licence'] == 'CC0' and task.config['citation'] == 'nobody 2026'
    assert Task.open(house/'downstream', 'ward_level').num_classes == 3
    assert set(task.add_devices(task.recordings)['device']) == {'old', 'new'}

def test_fine_tuned_and_evaluated_without_the_raw_folder(house, one_thread):
    from pahcl.evaluation.evaluator import evaluate
    from pahcl.training.finetuning import finetune
    finetune(task='ward_murmur', pretrained='none', data_dir=house/'downstream', encoder_type='cnn',
             output_dir=house/'outputs', epochs=1, **{'training.cycles_per_recording': 2})
    results = evaluate(house/'outputs'/'ward_murmur_downstream'/'best_model.pt', 'ward_murmur',
                       house/'downstream', draws=20, threshold='cost')
    assert results['official']['name'] == 'outcome_cost'
    assert {'heart rate', 'demographics', 'device'} <= results['shortcuts'].keys()
    assert not [n for n, s in results['shortcuts'].items() if 'reason' in s]
    saved = json.loads((house/'outputs'/'ward_murmur_downstream'/'evaluation_ward_murmur_test'/
                        'metrics.json').read_text())
    assert saved['official']['value'] == results['official']['value']

def test_recordings_without_labels_are_pretrained_on(sounds, tmp_path, logged):
    from pahcl.core.config import load_config
    from pahcl.training.pretraining_data import _find_heldout_persons
    write_set(tmp_path/'raw'/'ward', list_rows(sounds)[:2])
    preprocess(tmp_path/'raw', tmp_path/'processed', 'ward', num_workers=1)
    assert prepare('ward', tmp_path/'raw', tmp_path/'processed', tmp_path/'downstream') == {}
    assert 'no column is a label, so there is nothing to prepare' in ' '.join(logged)
    where = dict(processed_dir=tmp_path/'processed', downstream_dir=tmp_path/'downstream')
    persons, told = _find_heldout_persons(load_config('pretrain', overrides=where))
    assert persons == set() and 'has labels' in told

def test_audio_and_labels_in_one_command(sounds, tmp_path, capsys):
    some = sorted(sounds.iterdir())[:4]
    rows = ['Patient ID;Recording;Sick',
            *(f'{i//2}.0;{p.stem};{i//2 % 2}' for i, p in enumerate(some))]
    (tmp_path/'labels.csv').write_text('\ufeff'+'\n'.join(rows), encoding='utf-8')
    flags = ['--audio-dir', str(sounds), '--labels', str(tmp_path/'labels.csv'),
             '--dataset', 'ward', '--raw-dir', str(tmp_path/'raw'),
             '--output-dir', str(tmp_path/'processed'), '--num-workers', '1']
    assert pahcl_preprocess(flags) == 0
    assert 'ward sick 1' in capsys.readouterr().out
    assert pahcl_preprocess(flags[:2]) == 2   # one without the other
    with pytest.raises(PahclError, match='says something else'):
        (tmp_path/'labels.csv').write_text('\n'.join(rows[:3]))
        write_recordings_table(sounds, tmp_path/'labels.csv', tmp_path/'raw', 'ward')
