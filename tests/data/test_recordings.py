"""One table from every layout; annotations; the real data's published numbers where PAHCL_RAW_DIR
names them
"""
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import soundfile
from hypothesis import given, settings, strategies as st

from pahcl.core.basics import PahclError
from pahcl.data.datasets import DATASETS, get_recording_columns
from pahcl.data.physionet2016 import _APPENDIX_COLUMNS, _identify_person_2016
from pahcl.data.recordings import load_recordings, read_annotation
from pahcl.data.simulation import simulate_dataset

RAW = os.environ.get('PAHCL_RAW_DIR')


# --- the table ---

@pytest.fixture(scope='module')
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw')
    simulate_dataset(folder, subjects=9, seconds=1)
    return folder


@pytest.fixture
def raw(simulated, tmp_path): return Path(shutil.copytree(simulated, tmp_path/'raw'))


def test_table_is_as_promised(simulated):
    table = load_recordings(simulated)
    assert (list(table.columns) == get_recording_columns()
            and (table.dtypes[['sample_rate', 'seconds']] == [int, float]).all())
    assert table[['dataset', 'subject_id', 'person_id', 'recording_id', 'path', 'folder',
                  'source']].notna().all().all()
    assert (not table.duplicated(['dataset', 'recording_id']).any()
            and not table.duplicated('folder').any())
    assert (table[['dataset', 'subject_id', 'recording_id']].apply(tuple,
                                                                   axis=1).is_monotonic_increasing)
    for row in table.itertuples():
        info = soundfile.info(row.path)
        assert ((row.sample_rate, row.seconds) == (info.samplerate, info.frames/info.samplerate)
                and row.folder.startswith(f'subject_{row.subject_id}/rec_'))
    assert table[table.dataset == 'circor'].folder.str.fullmatch(
        r'subject_\d+/rec_(AV|PV|TV|MV|Phc)(_\d)?').all()
    pd.testing.assert_frame_equal(load_recordings(simulated, ['pascal', 'circor']),
                                  table[table.dataset != 'physionet2016'].reset_index(drop=True))


def test_2016_layouts_and_files_that_are_no_labels(raw):
    folder = raw/'physionet2016'
    before = load_recordings(raw, 'physionet2016').drop(columns='path')
    top = ''.join((p/'REFERENCE.csv').read_text() for p in sorted(folder.glob('training-*')))
    for place in folder.glob('training-*'):
        (place/'REFERENCE.csv').unlink()
        (place/'REFERENCE-SQI.csv').write_text('a0001,1,0\n')
    (folder/'REFERENCE.csv').write_text(top)                    # one on top
    shutil.copytree(folder/'training-a', folder/'validation')   # repeats what is in training-a
    known = load_recordings(raw, 'physionet2016').drop(columns='path')
    # no label comes from a file about quality
    pd.testing.assert_frame_equal(known.assign(signal_quality=before['signal_quality']), before)
    assert known.set_index('recording_id')['signal_quality'].dropna().to_dict() == dict(
        a0001='poor')
    (folder/'training').mkdir()
    for place in list(folder.glob('training-*')): place.rename(folder/'training'/place.name)
    pd.testing.assert_frame_equal(load_recordings(raw, 'physionet2016').drop(columns='path'), known)
    (folder/'REFERENCE.csv').write_text('a0001,2\n')
    with pytest.raises(PahclError, match=r"REFERENCE.csv line 1, the label of 'a0001', is '2'; "
                                         r"expected one of -1, 1"):
        load_recordings(raw, 'physionet2016')
    (folder/'REFERENCE.csv').unlink()
    with pytest.raises(PahclError, match='no labels found for physionet2016'): load_recordings(raw)


def test_2016_signal_quality_and_what_contradicts_it(raw, logged):
    folder, before = raw/'physionet2016', load_recordings(raw,
                                                          'physionet2016').set_index('recording_id')
    assert before['signal_quality'].isna().all()
    own, updated = (folder/'training-a'/'REFERENCE-SQI.csv',
                    folder/'annotations'/'updated'/'training-a'/'REFERENCE_withSQI.csv')
    ids = [r for r in before.index if r[0] == 'a']
    right = {r: '1' if before.label[r] == 'abnormal' else '-1' for r in ids}
    wrong = '-1' if right[ids[0]] == '1' else '1'
    own.write_text(f'{ids[0]},{wrong},1\n{ids[1]},{right[ids[1]]},0\n{ids[2]},0,1\na9999,1,1\n')
    updated.parent.mkdir(parents=True)
    updated.write_text(f'{ids[1]},{right[ids[1]]},1,1,0\n')   # older copies have further columns
    logged.clear()
    table = load_recordings(raw, 'physionet2016').set_index('recording_id')
    assert table['signal_quality'].dropna().to_dict() == {ids[0]: 'good', ids[1]: 'good',
                                                          ids[2]: 'good'}
    pd.testing.assert_frame_equal(table.drop(columns='signal_quality'),
                                  before.drop(columns='signal_quality'))
    told = [m for m in logged if m.startswith('signal quality')]
    assert told == [
        f'signal quality: 1 rows are of recordings that are not there: {own} line 4 (a9999)',
        f'signal quality: 1 rows have another class than REFERENCE.csv, which counts: {own} line 1 '
        f'({ids[0]}) says {wrong}', 'signal quality: 1 rows contradict an earlier one, and count: '
                                    f'{updated} line 1 ({ids[1]}) says good']
    for text, why in [('a0001,1\n', "the quality of 'a0001', is ''"),
                      ('a0001,2,1\n', "the label of 'a0001', is '2'")]:
        own.write_text(text)
        with pytest.raises(PahclError, match=f'REFERENCE-SQI.csv line 1, {why}'):
            load_recordings(raw, 'physionet2016')


def test_2016_signal_quality_is_fetched():
    for name in ('training-a/REFERENCE-SQI.csv',
                 'annotations/updated/training-f/REFERENCE_withSQI.csv',
                 'annotations/Online Appendix_training set.csv',
                 'annotations/Recordings need to be removed in training-e.txt'):
        assert re.fullmatch(DATASETS['physionet2016'].source.wanted, name)
    assert (not re.fullmatch(DATASETS['physionet2016'].source.wanted,
                             'annotations/updated/README.txt')
            and not re.fullmatch(DATASETS['physionet2016'].source.wanted,
                                 'validation/REFERENCE-SQI.csv'))


def test_without_the_appendix_a_record_stands_for_its_person(raw, logged):
    next((raw/'physionet2016/annotations').glob('Online*')).unlink()
    table = load_recordings(raw, 'physionet2016')
    assert ((table.subject_id == table.recording_id).all()
            and (table.person_id == table.recording_id).all())
    assert [m[:m.index('. The')]
            for m in logged] == ['physionet2016: it is not known whose recordings these are: '
                                 '6 of training-a, 6 of training-b, 6 of training-e']


APPENDIX = '''\
Challenge record name,Database,Original record name,Diagnosis,Class (-1=normal 1=abnormal),"Age, \
years",Subject ID,# Raw record,Transducer site on body,"Noise (2=None
3=Weak)"
a0001,training-a,"C45S1",MVP,1,,,,Left of parasternum   ,
a0002,training-a,C45S2b ,MVP,1,,,,"at rest, sitting",
a0003,training-a,D45S2,MVP,1,,,,,
b0001,training-b,S98f2_data,Normal,-1,,98,,,2
b0002,training-b,S98f1_data,Normal,-1,,98.0,,,2
b0003,training-b,S98f3_data,Normal,-1,,unknown,,,2
c0001,training-c,id17,MR,1,70,,,,
d0001,training-d,42432,Normal: MARS500,-1,,,,,
d0002,training-d,42374,Normal: MARS500 ,-1,,,,,
d0003,training-d,C20PSPE,Pathologic,1,,,,,
e00001,training-e,e01430,Normal,-1,25,,198,,
e00002,training-e,e01668,CAD,1,25,,198,,
e00003,training-e,e01669,Normal,-1,25,,198,,
e00004,training-e,e01670,CAD,,25,,198,,
e00005,training-e,e01671,CAD,1,25,,,,
'''
PERSONS = dict(a0001='2016-a-C45', a0002='2016-a-C45', b0001='2016-b-98', b0002='2016-b-98',
               c0001='c0001', c0002='c0002', d0001='2016-d-MARS500',
               d0002='2016-d-MARS500', d0003='d0003', e00001='2016-e-normal-198',
               e00002='2016-e-abnormal-198', e00003='2016-e-normal-198', f0001='f0001')


def made_2016(raw, records):
    "a raw folder with these records and `APPENDIX`"
    folder, quiet = raw/'physionet2016', np.zeros(2000)
    for r in records:
        place = folder/f'training-{r[0]}'
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place/f'{r}.wav', quiet, 2000)
        with open(place/'REFERENCE.csv', 'a') as f: f.write(f'{r},-1\n')
    (folder/'annotations').mkdir()
    (folder/'annotations/Online Appendix_training set.csv').write_text(APPENDIX,
                                                                       encoding='utf-8-sig')
    return folder


def test_2016_persons_are_those_of_the_appendix(tmp_path, logged):
    """records it lacks or names strangely stand for their persons, and are counted; spaces, quotes,
    a line break in a heading and 98.0 do no harm
    """
    strange = ['a0003', 'b0003', 'e00004', 'e00005', 'a0009', 'd0009']
    folder = made_2016(tmp_path, [*PERSONS, *strange])
    table = load_recordings(tmp_path, 'physionet2016').set_index('recording_id')
    assert (table.person_id.to_dict() == PERSONS | {r: r for r in strange}
            and (table.subject_id == table.index).all())
    assert [m[:m.index('. The')]
            for m in logged] == ['physionet2016: it is not known whose recordings these are: 2 of '
                                 'training-a, 1 of training-b, 1 of training-d, 2 of training-e']
    assert _identify_person_2016('e00001', dict.fromkeys(_APPENDIX_COLUMNS, '') | {
        _APPENDIX_COLUMNS[3]: '-1.0', '# Raw record': '098'}) == '2016-e-normal-98'
    assert _identify_person_2016('a0001', dict.fromkeys(_APPENDIX_COLUMNS, '')
                                 | {'Original record name': 'C007S2'}) == '2016-a-C7'
    path = folder/'annotations/Online Appendix_training set.csv'
    path.write_text(APPENDIX.replace('# Raw record', 'Raw record'))
    with pytest.raises(PahclError,
                       match="Online Appendix_training set.csv has no column '# Raw record'"):
        load_recordings(tmp_path, 'physionet2016')


def test_withdrawn_recordings_are_left_out_unless_they_are_asked_for(tmp_path, logged):
    folder = made_2016(tmp_path, PERSONS)
    (folder/'annotations/Recordings need to be removed in training-e.txt').write_bytes(
        b'e00002\r\ne00077\r\n\r\n')
    table = load_recordings(tmp_path, 'physionet2016')
    assert set(table.recording_id) == set(PERSONS)-{'e00002'}
    assert (len(logged) == 1
            and logged[0].startswith('physionet2016: 1 recordings are left out, as the publisher '
                                     'withdrew them; pahcl_preprocess --keep-withdrawn keeps them'))
    assert (set(load_recordings(tmp_path, 'physionet2016', keep_withdrawn=True).recording_id)
            == set(PERSONS) and len(logged) == 1)
    (folder/'annotations/Recordings need to be removed in training-e.txt').write_text(
        '\n'.join(PERSONS))
    with pytest.raises(PahclError, match='keep-withdrawn'):
        load_recordings(tmp_path, 'physionet2016')


def test_a_second_id_saved_as_a_float_is_the_same_person(tmp_path):
    folder = tmp_path/'circor'
    simulate_dataset(tmp_path, 'circor', subjects=9, seed=0)
    table = pd.read_csv(folder/'training_data.csv', dtype=str, keep_default_na=False)
    first, second = table['Patient ID'][4:6]
    table.loc[4, 'Additional ID'], table.loc[5, 'Additional ID'] = f'{second}.0', ''
    table.to_csv(folder/'training_data.csv', index=False)
    assert load_recordings(tmp_path, 'circor').set_index(
        'subject_id').person_id.loc[[first, second]].nunique() == 1


def test_set_a_files_of_one_sitting_are_one_person(raw):
    folder = raw/'pascal/set_a'
    for wav in folder.glob('*.wav'): wav.unlink()
    for name in ('murmur__201108222221', 'murmur__201108222235', 'normal__201108222236',
                 'murmur__201108222252', 'extrahls__201104021355', 'murmur__201104021355'):
        soundfile.write(folder/f'{name}.wav', np.zeros(4000), 4000)
    table = load_recordings(raw, 'pascal').query('source == "set_a"').set_index('recording_id')
    assert table.groupby('person_id').size().to_dict() == {
        'pascal-a201108222221': 3, 'pascal-a201108222252': 1, 'pascal-a201104021355': 2}
    assert (table.subject_id['normal__201108222236'] == 'pascal-a201108222236'
            and table.subject_id.nunique() == 5)


def test_2016_missing_and_unlabelled(raw, logged):
    place = raw/'physionet2016/training-a'
    (place/'a0001.wav').rename(place/'a0999.wav')
    table = load_recordings(raw, 'physionet2016').set_index('recording_id')
    assert 'a0001' not in table.index and pd.isna(table.label['a0999'])
    assert (logged[0] == '1 recordings that REFERENCE.csv lists are not in '
                         f'{raw/"physionet2016"} and are left out'
            and logged[1] == 'physionet2016: 1 recordings are there that no table labels')
    assert logged[2].startswith('physionet2016: it is not known whose recordings these are: '
                                '1 of training-a. ') and len(logged) == 3


def test_pascal_labels_come_from_the_files_names(raw):
    table = load_recordings(raw, 'pascal')
    assert set(table.raw_label.dropna()) == {'normal', 'murmur', 'extrastole', 'extrahls',
                                             'artifact'}
    assert (set(table.label[table.raw_label.isin(['extrastole', 'extrahls'])]) == {'extrasystole'}
            and table.label[table.raw_label == 'artifact'].isna().all())
    assert table.label[table.recording_id.str.contains('unlabelled')].isna().all()
    assert (table.subject_id[table.source == 'set_b'].str.fullmatch(r'pascal-b\d+').all()
            and table[table.source == 'set_b'].groupby('subject_id').size().eq(2).all())
    # one place heard twice: folders stay apart
    first = sorted((raw/'pascal/set_b').glob('normal__*.wav'))[0]
    shutil.copy(first, first.with_name(first.name.replace('normal__', 'normal_noisynormal_')))
    assert not load_recordings(raw, 'pascal').folder.duplicated().any()
    (raw/'pascal/set_b.csv').write_text('dataset,file,label\n')
    with pytest.raises(PahclError,
                       match="set_b.csv has no column 'fname'; it has dataset, file, label"):
        load_recordings(raw, 'pascal')


def test_nothing_there_says_what_was_expected_and_seen(tmp_path):
    (tmp_path/'heart sounds').mkdir()
    with pytest.raises(PahclError,
                       match=r'no labels found for circor, physionet2016, pascal.*Expected: '
                             r'circor/training_data.csv.*REFERENCE.csv.*set_a.*Seen: '
                             r'.* holds heart sounds/\.'):
        load_recordings(tmp_path)
    (tmp_path/'circor').mkdir()   # empty folders are as good as none
    with pytest.raises(PahclError, match='circor/ holds nothing'):
        load_recordings(tmp_path, 'circor')
    simulate_dataset(tmp_path, 'pascal', subjects=9, seconds=0.6)
    assert set(load_recordings(tmp_path).dataset) == {'pascal'}
    (tmp_path/'circor/readme.txt').write_text('')
    with pytest.raises(PahclError, match='circor/ holds readme.txt'): load_recordings(tmp_path)


def test_unreadable_files_are_named(raw):
    wav = next((raw/'pascal/set_a').glob('*.wav'))
    wav.write_bytes(b'')
    with pytest.raises(PahclError, match=wav.name): load_recordings(raw, 'pascal')
    (raw/'circor/training_data.csv').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(PahclError, match='training_data.csv'): load_recordings(raw, 'circor')


# --- annotations ---

def write_mat(path, rows):
    cells = np.empty((len(rows), 2), object)
    for i, (sample, name) in enumerate(rows): cells[i] = np.array([[sample]]), name
    scipy.io.savemat(path, {'state_ans': cells})
    return path


def test_noisy_spans_and_the_end_of_a_mat(tmp_path):
    path = write_mat(tmp_path/'x_StateAns.mat', [(1, 'diastole'), (2001, 'S1'), (2201, '(N'),
                                                 (4001, 'N)'), (6001, 'S1'), (6201, 'systole')])
    assert read_annotation(path, 4).values.tolist() == [[0, 1, 4], [1, 1.1, 1], [1.1, 2, 0],
                                                        [2, 3, 0], [3, 3.1, 1], [3.1, 4, 2]]
    # where the last state ends is not in the file
    assert read_annotation(path).end_s.iloc[-1] == 3.1
    # nothing reaches beyond the recording
    assert read_annotation(path, 3.05).end_s.iloc[-1] == 3.05
    scipy.io.savemat(path, {'other': 1})
    with pytest.raises(PahclError, match='x_StateAns.mat is no annotation'): read_annotation(path)
    path.write_bytes(b'')
    with pytest.raises(PahclError, match='x_StateAns.mat is no annotation'): read_annotation(path)


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 2), st.integers(-2, 30)), max_size=20))
@settings(deadline=None)
def test_any_tsv_comes_out_sorted_without_overlap(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp('tsv')/'x.tsv'
    path.write_text(''.join(f'{a}\t{a+d}\t{s}\n' for a, d, s in rows))
    table = read_annotation(path, 20)
    assert (table.start_s.is_monotonic_increasing and (table.end_s > table.start_s).all()
            and (table.end_s <= 20).all())
    assert ((table.start_s.values[1:] >= table.end_s.values[:-1]).all()
            and table.state.between(0, 4).all())


# --- the real thing ---

@pytest.mark.skipif(not RAW, reason='PAHCL_RAW_DIR names no real data')
def test_real_data():
    "whatever part of the real sets is there: identities, labels and annotations hold together"
    table = load_recordings(RAW)
    assert (not table.duplicated('folder').any()
            and not table.duplicated(['dataset', 'recording_id']).any())
    for row in table.dropna(subset='annotation_path').iloc[::10].itertuples():
        states = read_annotation(row.annotation_path, row.seconds)
        assert (states.end_s.max() <= row.seconds+1e-9
                and (states.start_s.values[1:] >= states.end_s.values[:-1]-1e-9).all())
    circor = table[table.dataset == 'circor'].drop_duplicates('subject_id')
    if len(circor) == 497:   # a known part of the data
        assert (circor.murmur.value_counts().to_dict() == dict(Present=124, Absent=325, Unknown=48)
                and circor.outcome.value_counts().to_dict() == dict(Normal=246, Abnormal=251))
        assert table.groupby('source').size().to_dict() == {'': 1665, 'training-a': 245,
                                                            'training-b': 300, 'training-e': 350,
                                                            'set_a': 74, 'set_b': 280}
        assert table.groupby('source').person_id.nunique().to_dict() == {
            '': 469, 'training-a': 59, 'training-b': 64, 'training-e': 198, 'set_a': 60,
            'set_b': 98}
        assert table[table.dataset == 'pascal'].raw_label.value_counts().to_dict() == dict(
            normal=212, murmur=80, extrastole=27, artifact=24, extrahls=11)


@pytest.mark.skipif(not RAW, reason='PAHCL_RAW_DIR names no real data')
def test_real_persons_of_2016():
    """the publisher's appendix, read in another way; withdrawn recordings; nobody's recordings are
    in two splits, and the shares hold
    """
    import csv
    from pahcl.data.datasets import TASKS
    from pahcl.data.splitting import _split_dataset
    from pahcl.data.tasks import SPLIT_FRACTIONS
    folder = Path(RAW)/'physionet2016'/'annotations'
    if not (appendix := folder/'Online Appendix_training set.csv').exists():
        pytest.skip('no appendix there')
    with open(appendix, newline='', encoding='utf-8-sig') as f:
        rows = {r[0]: [c.strip() for c in r] for r in csv.reader(f)}
    name = dict(a=lambda r: r[2].split('S')[0], b=lambda r: r[14],
                e=lambda r: f'{dict([("-1", "normal"), ("1", "abnormal")])[r[4]]}-{r[15]}')
    table = load_recordings(RAW, 'physionet2016')
    assert (table.subject_id == table.recording_id).all()
    for r in table.itertuples():
        assert (r.person_id
                == f'2016-{r.recording_id[0]}-{name[r.recording_id[0]](rows[r.recording_id])}')
    gone = set((folder/'Recordings need to be removed in training-e.txt').read_text().split())
    more = load_recordings(RAW, 'physionet2016', keep_withdrawn=True)
    assert (not gone & set(table.recording_id) and set(more.recording_id[more.withdrawn])
            == set(more.recording_id)-set(table.recording_id) <= gone)
    own = _split_dataset(dict(physionet2016=TASKS['physionet2016']), table.assign(cycles_kept=1),
                         42)['physionet2016']
    assert own.groupby('person_id').split.nunique().max() == 1
    persons = own.drop_duplicates('person_id').split.value_counts()
    assert all(abs(persons[s]-SPLIT_FRACTIONS[s]*persons.sum()) <= 3 for s in SPLIT_FRACTIONS)
