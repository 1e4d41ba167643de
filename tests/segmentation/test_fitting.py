"Fitting: the same seed gives the same numbers, nobody is judged by a fit that has seen them"
import os
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError
from pahcl.segmentation.left_out_scores import _held_out_groups, _score_held_out, _score_recordings
from pahcl.segmentation.annotated import (
    _assign_person_fold, _find_annotated_recordings, _read_annotated_recordings)
from pahcl.segmentation.emission import _normalise_features, _run_emission_networks
from pahcl.segmentation.fitting import (
    _annotated_beat_durations, _export_network_weights, _fit_cross_validated, _fit_parameters,
    _sample_batch, _sampling_probabilities, _StateNetwork)
from pahcl.segmentation.parameters import load_parameters
from pahcl.segmentation.scoring import pool_scores

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 80),
       st.sampled_from([((9, 5, 5, 5), (1, 4, 8, 16)), ((3,), (1,)), ((5, 7), (2, 3))]),
       st.integers(0, 2**31))
def test_network_in_numpy_is_that_of_torch(networks, frames, shape, seed):
    "in double precision: the oracle is torch's own convolution"
    import torch
    torch.manual_seed(seed)
    made = [_StateNetwork(7, 6, *shape).double() for _ in range(networks)]
    x = np.random.default_rng(seed).standard_normal((frames, 7))
    with torch.no_grad():
        expected = torch.stack([n(torch.from_numpy(x)[None])[0] for n in made]).numpy()
    assert np.allclose(_run_emission_networks(x, _export_network_weights(made)), expected, rtol=0,
                       atol=1e-12)

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "annotated recordings of nine simulated children with two changed copies each"
    folder = tmp_path_factory.mktemp('few')
    from pahcl.data.simulation import simulate_dataset
    simulate_dataset(folder, 'circor', subjects=9, seed=4, seconds=8)
    table = _find_annotated_recordings(folder)
    return table, _read_annotated_recordings(table, copies=2)

SMALL = dict(networks=1, steps=10, size=4, frames=100)

def test_same_seed_same_parameters(few):
    _, data = few
    one, two, other = (_fit_parameters(data[:12], seed=seed, **SMALL) for seed in (0, 0, 1))
    for group in ('emission', 'durations', 'confidence', 'heartbeat'):
        assert all(np.array_equal(v, getattr(two, group)[k])
                   for k, v in getattr(one, group).items())
    assert not np.array_equal(one.emission['weights_0'], other.emission['weights_0'])

def test_folds_are_disjoint_by_person(few):
    table, data = few
    seen = []
    for parameters, unseen in _fit_cross_validated(data, **SMALL):
        inside = {d.person_id for d in unseen}
        assert not inside & {d.person_id for d in data
                             if d.recording_id not in {u.recording_id for u in unseen}}
        seen += [d.recording_id for d in unseen]
    assert sorted(seen) == sorted(table.recording_id)
    assert {_assign_person_fold(d.person_id) for d in data} <= {0, 1, 2}
    parts = _held_out_groups(data, np.where(np.arange(len(data))%2, 'circor', 'other'))
    assert ((np.sum(parts['person'], 0) == 1).all() and (np.sum(parts['data set'], 0) == 1).all()
            and parts['folder'] == [])
    scores = _score_held_out(data, parts['data set'][:1], **SMALL)
    assert [x is not None for x in scores] == parts['data set'][0].tolist()

def test_changed_copies_keep_their_states(few):
    "a copy's states are those of the recording, at the copy's tempo"
    _, data = few
    for d in data[:10]:
        for features, states in zip(d.features[1:], d.states[1:]):
            assert len(features) == len(states)
            speed = len(d.features[0])/len(features)
            assert np.exp(-0.16) < speed < np.exp(0.16)
            moved = d.states[0][np.minimum((np.arange(len(states))*speed).astype(int),
                                           len(d.states[0])-1)]
            assert (moved == states).mean() > 0.85

def test_drawn_stretches_are_what_they_say(few):
    _, data = few
    curves, states = ([[_normalise_features(f) for f in d.features] for d in data],
                      [d.states for d in data])
    x, y = _sample_batch(curves, states, _sampling_probabilities([d.place for d in data]),
                         np.random.default_rng(0), size=16, frames=2000)
    # longer than any recording here
    assert (y > 0).any(1).all() and (x[:, -1] == 0).all() and (y[:, -1] == 0).all()
    assert np.allclose(_sampling_probabilities(['a']*9+['b']*4), [3/5/9]*9+[2/5/4]*4)

def test_beats_leave_gaps_out():
    rows = [(i+a, i+b, k) for i in (0, 1, 2, 3, 5, 6)
            for a, b, k in ((0, 0.1, 1), (0.1, 0.35, 2), (0.35, 0.45, 3), (0.45, 1, 4))]
    b = _annotated_beat_durations(pd.DataFrame(rows, columns=['start_s', 'end_s', 'state']))
    # 3 → 5 s is no beat of two seconds, the last has no end
    assert np.allclose(b, [[1, 0.1, 0.25, 0.1, 0.55]]*4)

def test_packaged_parameters_say_where_they_are_from():
    p = load_parameters()
    made = p.made_from
    assert ('Oliveira' in str(made['data']) and 'Liu' in str(made['data'])
            and 'ODC-By' in str(made['data']))
    assert (made['scores']['CirCor']['f1'] > 0.95 and made['scores']['2016']['f1'] > 0.96
            and made['scores']['2016, changed by hand']['f1'] > 0.93)
    assert made['fitted_on']['circor']['persons'] > 400 and 'three fits' in made['scores_of']
    assert all(np.isfinite(v).all() for g in (p.emission, p.durations) for v in g.values())
    with pytest.raises(PahclError): load_parameters('no/such.json')

@pytest.mark.skipif('PAHCL_RAW_DIR' not in os.environ,
                    reason='PAHCL_RAW_DIR names no real recordings')
@pytest.mark.parametrize('dataset', ['circor', 'physionet2016'])
def test_real_recordings(dataset):
    """the packaged numbers know these persons, so this guards the program; what a stranger gets
    stands in nbs/measured/segmenter.csv
    """
    t = _find_annotated_recordings(os.environ['PAHCL_RAW_DIR'], dataset)
    data = _read_annotated_recordings(t[::max(1, len(t)//60)])
    assert pool_scores(_score_recordings(data))['pooled']['f1'] > 0.95
