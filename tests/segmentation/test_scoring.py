"Scores of states agree with an oracle; what is not annotated costs nothing"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from pahcl.data.heart_sounds import simulate_recording
from pahcl.segmentation.scoring import _match_onsets, pool_scores, score_states
from pahcl.segmentation.segmenter import segment

def table(rows): return pd.DataFrame(rows, columns=['start_s', 'end_s', 'state'])

@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=12), st.lists(st.floats(0, 3), max_size=12),
       st.floats(0.01, 0.3))
def test_matching_is_as_large_as_an_assignment(a, b, tolerance):
    a, b = np.sort(a), np.sort(b)
    pairs = _match_onsets(a, b, tolerance)
    allowed = np.abs(a[:, None]-b[None]) <= tolerance+1e-9
    i, j = linear_sum_assignment(-allowed.astype(float)) if allowed.size else ([], [])
    assert len(pairs) == (allowed[i, j].sum() if allowed.size else 0)
    assert (all(allowed[p, q] for p, q in pairs)
            and len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs))

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(2, 30))
def test_scores_agree_with_an_oracle(seed, n, m):
    "onsets by assignment, time by a fine grid"
    rng = np.random.default_rng(seed)
    def made(k, top):
        cuts = np.r_[0, np.sort(rng.choice(np.arange(1, 999), k-1, replace=False))/100, 10]
        return table(dict(start_s=cuts[:-1], end_s=cuts[1:], state=rng.integers(1-top, 5, k)))
    predicted, truth = made(n, 0), made(m, 1)
    score = score_states(predicted, truth)
    for name, k in (('s1', 1), ('s2', 3)):
        p, t = (x.start_s[(x.state == k) & (x.start_s > 0)].to_numpy() for x in (predicted, truth))
        allowed = np.abs(p[:, None]-t[None]) <= 0.06+1e-9
        i, j = linear_sum_assignment(-allowed.astype(float)) if allowed.size else ([], [])
        hits = int(allowed[i, j].sum()) if allowed.size else 0
        assert (score[name]['hits'], score[name]['missed']) == (hits, len(t)-hits)
        assert score[name]['extra'] <= len(p)-hits
    middle = (np.arange(1000)+0.5)/100
    true, found = (x.state.to_numpy()[((x.start_s.to_numpy() <= middle[:, None]) & (
        middle[:, None] < x.end_s.to_numpy())).argmax(1)] for x in (truth, predicted))
    known = true > 0
    assert score['annotated_s'] == pytest.approx(known.mean()*10, abs=1e-9)
    if known.any(): assert score['frame_accuracy'] == pytest.approx((true == found)[known].mean())
    assert score_states(truth[truth.state > 0], truth)['pooled']['missed'] == 0

def test_what_is_not_annotated_costs_nothing():
    signal, truth = simulate_recording(10, 2000, 80, seed=2)
    found = segment(signal, 2000)
    whole, part = (score_states(found, truth),
                   score_states(found, truth[(truth.start_s > 3) & (truth.end_s < 7)]))
    assert (part['pooled']['extra'] <= whole['pooled']['extra'] and part['pooled']['f1'] >= 0.95
            and 3 < part['annotated_s'] < 4)
    half_beat_off = found.assign(state=(found.state+1)%4+1)
    assert score_states(half_beat_off, truth)['pooled']['f1'] < 0.2
    nothing = score_states(found, truth[:0])
    assert (nothing['pooled']['hits'] == nothing['pooled']['extra'] == 0
            and np.isnan(nothing['frame_accuracy']))
    assert pool_scores([whole,
                        part])['pooled']['hits'] == whole['pooled']['hits']+part['pooled']['hits']
