"""Scoring folders of states: files survive the round trip, counts agree with an independent count,
nothing missing is forgiven, groups are what the table says
"""
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from pahcl.core.basics import PahclError
from pahcl.data.recordings import read_annotation
from pahcl.cycles import pahcl_score_states
from pahcl.segmentation.folder_scoring import (
    _find_annotation_files, _group_recordings, _score_folders, _score_folders_in_groups)
from pahcl.segmentation.scoring import f1_interval
from pahcl.data.heart_sounds import simulate_recording
from pahcl.data.simulation import simulate_dataset
from pahcl.segmentation.segmenter import segment, write_states

pytestmark = pytest.mark.usefixtures('quiet')

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "a simulated CirCor with its annotations, and states found in it"
    root = tmp_path_factory.mktemp('states')
    simulate_dataset(root/'raw', 'circor', subjects=9, seed=1, seconds=6)
    import soundfile
    for wav in (root/'raw').rglob('*.wav'):
        write_states(root/'pred'/f'{wav.stem}.tsv', segment(*soundfile.read(wav)))
    return root/'pred', root/'raw'/'circor'/'training_data', root/'raw'/'circor'/'training_data.csv'

def test_states_survive_the_file(tmp_path):
    states = segment(*[simulate_recording(6, 4000, 80, seed=3)[0], 4000])
    write_states(tmp_path/'a.tsv', states)
    back = read_annotation(tmp_path/'a.tsv')
    assert np.allclose(back[['start_s', 'end_s']], states[['start_s', 'end_s']],
                       atol=1e-6) and (back.state == states.state).all()

def by_hand(pred, true, tolerance):
    "counts from the text of two files, by assignment"
    read = lambda p: np.array([[float(x) for x in line.split('\t')]
                               for line in p.read_text().splitlines()])
    p, t = read(pred), read(true)
    known = t[t[:, 2] > 0]
    hits = missed = extra = 0
    for k in (1, 3):
        a, b = p[(p[:, 2] == k) & (p[:, 0] > 0), 0], t[(t[:, 2] == k) & (t[:, 0] > 0), 0]
        allowed = np.abs(a[:, None]-b) <= tolerance
        i, j = linear_sum_assignment(-allowed.astype(float))
        n = int(allowed[i, j].sum())
        inside = lambda x: ((known[:, 0] <= x) & (x < known[:, 1])).any()
        near = (np.abs(a[:, None]-b) <= tolerance).any(1)
        hits, missed, extra = (hits+n, missed+len(b)-n, extra
                               +sum(inside(x) for x, m in zip(a, near) if not m)+int(near.sum())-n)
    return hits, missed, extra

@pytest.mark.parametrize('tolerance', [0.06, 0.1])
def test_counts_agree_with_a_count_by_hand(folders, tolerance):
    pred, true, _ = folders
    scores = _score_folders(pred, true)
    assert list(scores) == sorted(p.stem for p in true.glob('*.tsv')) and len(scores) > 10
    for name, s in scores.items():
        assert tuple(s[tolerance]['pooled'][k] for k in ('hits', 'missed', 'extra')) == by_hand(
            pred/f'{name}.tsv', true/f'{name}.tsv', tolerance)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 50), st.integers(0, 9),
                          st.integers(0, 9)), min_size=1, max_size=20))
def test_interval_holds_the_score(rows):
    scores = [dict(pooled=dict(hits=h, missed=m, extra=e)) for _, h, m, e in rows]
    low, high = f1_interval([p for p, *_ in rows], scores)
    h, m, e = (sum(r[i] for r in rows) for i in (1, 2, 3))
    # nobody else to draw
    if len({p for p, *_ in rows}) == 1 or not h+m+e: assert np.isnan([low, high]).all()
    elif not np.isnan(low):
        assert 0 <= low <= 2*h/(2*h+m+e)+1e-6 and 2*h/(2*h+m+e)-1e-6 <= high <= 1

def test_what_is_missing_counts(folders, tmp_path):
    pred, true, _ = folders
    for p in sorted(pred.glob('*.tsv'))[::2]: write_states(tmp_path/p.name, read_annotation(p))
    strict, kind = (_score_folders_in_groups(tmp_path, true)[0],
                    _score_folders_in_groups(tmp_path, true, only_predicted=True)[0])
    assert (strict.sensitivity_60['all'] < 0.7 < 0.9 < kind.sensitivity_60['all']
            and strict.frame_accuracy['all'] < 0.7
            and kind.recordings['all'] < strict.recordings['all'])
    assert strict.below_half['all'] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(PahclError, match='no recording in common'):
        _score_folders(tmp_path, _renamed(tmp_path))

def _renamed(folder):
    other = folder.parent/f'{folder.name}-renamed'
    write_states(other/'zzz.tsv', read_annotation(next(folder.glob('*.tsv'))))
    return other

def test_groups(folders, tmp_path):
    pred, true, labels = folders
    table, each = _score_folders_in_groups(pred, true, labels)
    murmur = pd.read_csv(labels, dtype=str).set_index('Patient ID').Murmur
    for value in ('Present', 'Absent', 'Unknown'):
        assert table.recordings[f'Murmur {value}'] == sum(murmur[n.split('_')[0]] == value
                                                          for n in each.recording)
    assert table.onsets['all'] == sum(table.onsets[f'Outcome {v}'] for v in ('Normal', 'Abnormal'))
    (tmp_path/'list.csv').write_text('record\n'+each.recording[0]+'\n')
    assert _group_recordings(list(each.recording),
                             tmp_path/'list.csv')['list'] == [each.recording[0]]

def test_2016_annotations_can_be_the_truth(tmp_path):
    simulate_dataset(tmp_path/'raw', 'physionet2016', subjects=9, seed=2, seconds=6)
    files = _find_annotation_files(tmp_path/'raw'/'physionet2016'/'annotations')
    for name, path in files.items():
        write_states(tmp_path/'pred'/f'{name}.tsv', read_annotation(path))
    assert _score_folders_in_groups(
        tmp_path/'pred', tmp_path/'raw'/'physionet2016'/'annotations')[0].f1_60['all'] == 1

def test_console_script(folders, tmp_path, capsys):
    pred, true, labels = folders
    assert pahcl_score_states([str(pred), str(true), '--groups', str(labels), '--output',
                               str(tmp_path/'s.json')]) == 0
    text, written = capsys.readouterr().out, json.loads((tmp_path/'s.json').read_text())
    assert 'Murmur Present' in text and f'{written["all"]["f1_60"]:.4f}'.rstrip('0') in text
    assert len(pd.read_csv(tmp_path/'s.csv')) == written['all']['recordings']
    for bad, message in (([str(tmp_path/'none'), str(true)], 'none'),
                         ([str(pred), str(Path(labels).parent/'training_data'), '--groups',
                           str(labels), '--columns', 'Colour'], 'Colour'),
                         ([str(pred), str(_empty(tmp_path))], 'no states')):
        assert pahcl_score_states(bad) == 1 and message in capsys.readouterr().err

def test_the_interval_is_over_persons_that_a_table_names(folders, tmp_path, capsys):
    "of a recording's name nothing follows: five clips of one raw recording have five names"
    pred, true, labels = folders
    alone, each = _score_folders_in_groups(pred, true)
    assert alone.persons['all'] == alone.recordings['all'] == len(each) and each.person.isna().all()
    (tmp_path/'one.csv').write_text(
        'recording_id,person_id\n'+''.join(f'{n},P\n' for n in each.recording))
    one = _score_folders_in_groups(pred, true, persons=tmp_path/'one.csv')[0]
    # nobody else to draw
    assert one.persons['all'] == 1 and one[['f1_low', 'f1_high']].isna().loc['all'].all()
    raw = _score_folders_in_groups(pred, true, persons=labels.parent.parent)[0]
    assert raw.persons['all'] == 9   # the simulated children; the first is there under two ids
    # the table of patients alone does not know that
    assert _score_folders_in_groups(pred, true, labels)[0].persons['all'] == 10
    for more, message in (([], 'persons are not known'),
                          (['--persons', str(tmp_path/'one.csv')], 'over 1 persons')):
        assert (pahcl_score_states([str(pred), str(true), *more]) == 0
                and message in capsys.readouterr().out)

def _empty(folder):
    (folder/'empty').mkdir(exist_ok=True)
    return folder/'empty'

def test_a_broken_line_is_named(folders, tmp_path):
    pred, true, _ = folders
    name = next(true.glob('*.tsv')).name
    (tmp_path/name).write_text('0\t1\n')
    with pytest.raises(PahclError, match=name): _score_folders(tmp_path, true)
