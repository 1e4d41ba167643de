"""The weights that come with the package: what the files hold, what they answer, whom they met, and
the script that makes them.
"""
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file
from pahcl.core.basics import hash_file, PahclError, UsageError
from pahcl.data.datasets import DATASETS, TASKS
from pahcl.data.given_splits import _PUBLISHED, read_splits
from pahcl.data.persons import _hash_person, find_met_persons
from pahcl.evaluation.evaluator import note_trained_persons
from pahcl.models.checkpoints import (
    load_checkpoint, load_classifier, persons_trained_on, save_checkpoint)
from pahcl.models.packaged import _strip_to_classifier, _write_card, _write_segmenter_card
from pahcl.models.pretrained import (
    _classifier_files, _WEIGHTS, load_pretrained_encoder, resolve_checkpoint)

find = lambda task: resolve_checkpoint('packaged', task=task)
PACKAGED = sorted(_classifier_files())
ENCODERS = {'encoder', 'encoder_window'}
FILES = sorted({p.stem for p in _WEIGHTS.glob('*.safetensors')}-ENCODERS)
load = lambda name: load_checkpoint(_WEIGHTS/f'{name}.safetensors')


@pytest.fixture(scope='module')
def script():
    path = Path(__file__).parents[2]/'benchmarks'/'packaged_classifiers.py'
    spec = importlib.util.spec_from_file_location('packaged_classifiers', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', FILES)
def test_a_file_and_its_card(name, tmp_path):
    saved, definition = load(name), TASKS[name.removesuffix('_unseen')]
    assert saved['task'] == name.removesuffix('_unseen')
    assert saved['label_map'] == definition.label_map
    assert saved['package']['name'] == name and 'training_state' not in saved
    # no path of the machine that made it, nobody's id
    assert not any(Path(p).is_absolute() for p in map(str, saved['config']['data'].values()))
    assert all('#' in p for key in ('training_persons', 'pretrain_persons')
               for p in saved.get(key, []))
    # what is kept of the validation, or of those out of fold, is whole
    for units in saved['validation'].values():
        p = units['probabilities']
        assert p.shape == (len(units['label']), len(definition.label_map))
        assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5)
    # scores lie in their intervals
    for level, scored in saved['evaluations'].items():
        assert scored['level'] == level and scored['split'] == 'test'
        for part in (scored, *scored.get('groups', [])):
            for k, (low, high) in part['intervals'].items():
                assert low <= part['metrics'][k] <= high
    # the card says what the file says
    path = _WEIGHTS/f'{name}.md'
    card = ModelCard.load(path)
    assert card.data.datasets[0] == definition.dataset or len(card.data.datasets) > 1
    assert f'{len(persons_trained_on(saved))} persons' in card.text
    assert DATASETS[definition.dataset].source.credit in card.text and 'not a medical' in card.text
    save_checkpoint(tmp_path/f'{name}.safetensors', saved)
    _write_card(tmp_path/f'{name}.safetensors')
    assert (tmp_path/path.name).read_text(encoding='utf-8') == path.read_text(encoding='utf-8')
    # the same content has the same bytes
    assert hash_file(tmp_path/f'{name}.safetensors') == hash_file(path.with_suffix('.safetensors'))


def test_all_of_them_are_small_and_no_other_is_known(tmp_path):
    assert PACKAGED == ['circor_murmur', 'circor_outcome', 'pascal', 'physionet2016']
    assert sum(p.stat().st_size for p in _WEIGHTS.iterdir()) < 12e6
    models = {p.stem for p in _WEIGHTS.iterdir() if p.suffix != '.md'}
    assert models == {p.stem for p in _WEIGHTS.glob('*.md')} == {*FILES, *ENCODERS,
                                                                     'heart_states'}
    assert not {p.suffix for p in _WEIGHTS.iterdir()}-{'.safetensors', '.json', '.md'}   # no pickle
    assert resolve_checkpoint('packaged').stem == 'encoder'
    assert resolve_checkpoint('packaged_window').stem == 'encoder_window'
    with pytest.raises(UsageError, match='packaged_window is an encoder without a classifier'):
        resolve_checkpoint('packaged_window', 'pascal')
    assert resolve_checkpoint('a/b.pt', task='nonsense') == Path('a/b.pt')
    with pytest.raises(PahclError, match='no classifier of nonsense comes with pahcl as packaged, '
                                         'only of '+', '.join(PACKAGED)): find('nonsense')
    with pytest.raises(UsageError, match='the encoder is called packaged'):
        resolve_checkpoint('packaged_unseen')
    (tmp_path/'heart_states.json').write_bytes((_WEIGHTS/'heart_states.json').read_bytes())
    _write_segmenter_card(tmp_path/'heart_states.json')
    assert (tmp_path/'heart_states.md').read_bytes() == (_WEIGHTS/'heart_states.md').read_bytes()


@pytest.mark.parametrize('name', FILES)
def test_answers_and_serves_as_an_encoder(name):
    path = _WEIGHTS/f'{name}.safetensors'
    model, saved = load_classifier(path)
    channels = saved['encoder_config'].get('in_channels', 1)
    x = torch.randn(2, channels, 4000 if channels == 1 else 256)
    with torch.no_grad(): answers = model(x)
    assert answers.shape == (2, len(saved['label_map'])) and answers.isfinite().all()
    assert load_pretrained_encoder(path).found['encoder_skipped'] == []


def test_the_encoder_of_windows_hears_and_names_nobody():
    saved = load('encoder_window')
    assert saved['kind'] == 'pretrain' and saved['config']['seed'] == 0
    assert all('#' in p for p in saved['pretrain_persons'])
    assert not any(Path(p).is_absolute() for p in map(str, saved['config']['data'].values()))
    found = load_pretrained_encoder('packaged_window')
    assert not found.found['encoder_skipped'] and not found.found['at_random']
    features = found.encoder.eval()(torch.randn(2, 80, 256, generator=torch.manual_seed(0)))
    assert features.shape == (2, 144) and features.std() > .01


def test_the_encoder_answers_as_it_always_did():
    "Its file was another format once; weights and persons are the same."
    saved = load('encoder')
    values = torch.cat([v.double().flatten() for _, v in sorted(saved['model_state_dict'].items())])
    assert (len(values), len(persons_trained_on(saved))) == (182304, 671)
    ramp = torch.arange(1, len(values)+1, dtype=torch.float64)
    assert [values.sum().item(), (values*ramp).mean().item()] == pytest.approx(SUMS, rel=1e-12)

# of pretrained_small.pt, as it lay in pahcl/parameters
SUMS = [10841.228490119429, 4834.142526850829]


# ---- whom they have met

@pytest.mark.parametrize('name', [n for n in FILES if n.startswith('circor')])
def test_persons_met_are_named(name):
    saved, known = load(name), persons_trained_on(load(name))
    met = next(i for i in read_splits('published1')['subject_id'] if _hash_person(i) in known)
    table = pd.DataFrame(dict(subject_id=[met, 'new'], person_id=[met, 'new']))
    note, = note_trained_persons(saved, table)
    assert note.startswith('1 of 2 persons trained the model') and note.endswith(met)
    assert note_trained_persons(saved, table[1:]) == []


@pytest.mark.parametrize('task', sorted(_classifier_files('packaged_unseen')))
def test_the_second_set_has_met_no_held_out_person(task):
    saved = load_checkpoint(resolve_checkpoint('packaged_unseen', task=task))
    known = persons_trained_on(saved)
    for split in _PUBLISHED:
        table = read_splits(split)
        held = table.loc[table['split'] != 'train', 'subject_id']
        assert not known & {_hash_person(i) for i in held}
        met = saved['package']['met'][split]
        assert met['val'] == met['test'] == 0
        assert (met['train'] > 100) == (TASKS[task].dataset == 'circor')


@settings(max_examples=20)
@given(st.from_regex(r'(2016-|pascal-|my clinic-)?[a-z0-9_-]{1,12}', fullmatch=True))
def test_a_hash_names_a_person_as_the_id_does(person):
    hashed, table = _hash_person(person), pd.DataFrame(dict(person_id=[person, 'somebody else']))
    assert hashed == _hash_person(hashed) and hashed != _hash_person(person+'x')
    assert find_met_persons({hashed}, table) == find_met_persons({person}, table) == {person}
    assert persons_trained_on(dict(pretrain_persons=[hashed, '#0'], training_persons=[person])) == {
        person, '#0'}   # nobody counts twice


def test_what_is_shipped_of_a_run_names_nobody():
    saved = load('pascal') | dict(training_persons=['pascal-b1', 'pascal-b2'], training_state={})
    out = _strip_to_classifier(saved | dict(pretrain_persons=['2530']))
    assert out['training_persons'] == sorted(map(_hash_person, ['2530', 'pascal-b1', 'pascal-b2']))
    assert 'training_state' not in out and 'pretrain_persons' not in out
    assert 'pascal-b1' not in json.dumps({k: v for k, v in out.items() if not isinstance(v, dict)})


# ---- the format

def test_a_safetensors_file_says_what_a_pt_file_says(tmp_path):
    for end in ('pt', 'safetensors'): save_checkpoint(tmp_path/f'm.{end}', load('pascal'))
    (old, saved), (new, again) = (load_classifier(tmp_path/f'm.{e}') for e in ('pt', 'safetensors'))
    plain = lambda content: {k: v for k, v in content.items() if k != 'model_state_dict'}
    assert str(plain(saved)) == str(plain(again))
    for k, v in old.state_dict().items(): assert torch.equal(v, new.state_dict()[k])
    with safe_open(tmp_path/'m.safetensors', 'pt') as file:
        assert json.loads(file.metadata()['pahcl'])['task'] == 'pascal'


@pytest.mark.parametrize('write, told', [
    (lambda p: save_file(dict(w=torch.ones(2)), p), 'does not say of what'),
    (lambda p: p.write_bytes(find('pascal').read_bytes()[:5000]), 'not a readable safetensors'),
    (lambda p: torch.save(dict(model_state_dict={}), p), 'not a readable safetensors'),
    (lambda p: save_checkpoint(p, dict(some='thing')), 'holds no model_state_dict')])
def test_another_file_is_refused(tmp_path, write, told):
    write(tmp_path/'a.safetensors')
    with pytest.raises(PahclError, match=told): load_checkpoint(tmp_path/'a.safetensors')


# ---- the script

def test_the_script_lets_nobody_learn_whom_a_published_split_holds_out(script):
    splits = script.published()
    trains, held = (splits.index[m] for m in (splits.eq('train').all(axis=1),
                                              splits.ne('train').any(axis=1)))
    subjects = [*trains[:20], *held[:20], 'stranger']
    person = {s: s for s in subjects} | {trains[1]: trains[0], held[0]: trains[2],
                                         trains[3]: held[1]}   # linked by a second id
    table = pd.DataFrame(dict(dataset='circor', subject_id=subjects, murmur='Absent'))
    split = script.deal_unseen(table.assign(person_id=table['subject_id'].map(person)))
    split = split.set_index('person_id')['split']
    learns = {s for s in subjects if split[person[s]] != 'test'}
    # the person of two training ids learns; who has an id that is held out, or none there, does not
    assert learns == {*trains[:20]}-{trains[2], trains[3]}
    assert set(split) == {'train', 'val', 'test'}


def test_the_script_makes_every_file(script):
    assert {*FILES} == {*script.MODELS}
    assert {n: task for n, (task, *_) in script.MODELS.items()} == {
        n: n.removesuffix('_unseen') for n in (*PACKAGED, 'circor_murmur_unseen',
                                               'circor_outcome_unseen')}


def test_the_script_parts_a_test_split(script, tmp_path):
    recordings = pd.DataFrame(dict(subject_id=['1', '1', '2'], recording_id=['a', 'b', 'c'],
                                   location=['AV', 'Phc', 'AV']))
    tables = dict(subject=pd.DataFrame(dict(subject_id=['1', '2'])),
                  recording=recordings.drop(columns='location'),
                  cycle=recordings.iloc[[0, 0, 1, 2]].drop(columns='location'))
    (tmp_path/'circor').mkdir()
    (tmp_path/'circor'/'training_data.csv').write_text(
        'Patient ID,Age,Sex\n1,Child,Female\n2,,Female\n3,Infant,Male\n')
    decisions = SimpleNamespace(levels={k: SimpleNamespace(table=t) for k, t in tables.items()})
    task = SimpleNamespace(recordings=recordings, dataset='circor')
    found = {(by, group): (level, [''.join('01'[int(v)] for v in masks[k])
                                   for k in ('subject', 'recording', 'cycle')])
             for by, group, level, masks in script.list_groups(task, decisions, tmp_path)}
    assert found == {
        ('age', 'Child'): ('subject', ['10', '110', '1110']),
        ('age', 'not recorded'): ('subject', ['01', '001', '0001']),
        ('sex', 'Female'): ('subject', ['11', '111', '1111']),
        ('place', 'AV'): ('recording', ['11', '101', '1101']),
        ('place', 'Phc'): ('recording', ['10', '010', '0010'])}
