"""Edge cases: every one is what it says, exactly annotated and reproducible, and the segmenter has
a floor on each
"""
import numpy as np, pytest
from pahcl.data.edge_cases import _EDGE_CASES, _simulate_edge_case
from pahcl.data.noise import _mix_at_level, speech_noise
from pahcl.segmentation.scoring import pool_scores, score_states
from pahcl.segmentation.segmenter import segment

FLOOR = {'irregular beats': 0.75}     # measured 0.85 on six hearts; all others 0.977 and above

@pytest.mark.parametrize('name', _EDGE_CASES)
def test_floor(name):
    made = [_simulate_edge_case(name, s) for s in range(4)]
    assert (pool_scores(score_states(segment(x, 2000), t) for x, t in made)['pooled']['f1']
            > FLOOR.get(name, 0.95))

@pytest.mark.parametrize('name', _EDGE_CASES)
def test_truth_tiles_the_recording(name):
    signal, states = _simulate_edge_case(name, 3)
    assert signal.shape == (40000,) and signal.dtype == np.float32 and np.isfinite(signal).all()
    assert (states.start_s.iloc[0] == 0 and states.end_s.iloc[-1] == 20
            and np.allclose(states.start_s[1:], states.end_s[:-1]))
    again = _simulate_edge_case(name, 3)
    assert (again[0] == signal).all() and again[1].equals(states)
    if name.endswith('a minute'):
        onsets = states.start_s[states.state == 1].to_numpy()
        assert 60/np.diff(onsets).mean() == pytest.approx(int(name.split()[0]), rel=0.08)

def test_each_is_difficult_in_its_own_way():
    level = np.abs(_simulate_edge_case('clipping')[0]).max()
    assert (np.abs(_simulate_edge_case('clipping')[0]) > 0.99*level).mean() > 0.01
    signal, states = _simulate_edge_case('silence')
    assert (not signal[10000:24000].any()
            and set(states.state[(states.start_s > 5) & (states.end_s < 12)]) == {0})
    intervals = lambda name: np.diff(_simulate_edge_case(name)[1].query('state == 1').start_s)
    assert intervals('irregular beats').std() > 2*intervals('60 a minute').std()

@pytest.mark.parametrize('db', [-20, -6, 3])
def test_mixing_is_as_loud_as_it_says(db):
    rng = np.random.default_rng(1)
    signal, other = rng.standard_normal(20000), speech_noise(20000, 2000, rng)
    added = _mix_at_level(signal, other, db)-signal
    assert 20*np.log10(added.std()/signal.std()) == pytest.approx(db, abs=0.1)
