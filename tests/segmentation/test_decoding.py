"The decoder is exact: against every sequence, and against the definition"
import itertools
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from pahcl.segmentation.decoding import _make_duration_tables
from pahcl.segmentation.parameters import load_parameters, PERIODS, SegmenterParameters

def likelihood(states, score, model):
    "the definition of the model, segment by segment: no recursion"
    tables, shortest, longest = model.log, model.shortest, model.longest
    runs = [(int(k), len(list(g))) for k, g in itertools.groupby(states)]
    total = sum(score[i, k] for i, k in enumerate(states))
    for n, (k, d) in enumerate(runs):
        if n and (runs[n-1][0]+1)%4 != k: return -np.inf
        first, last = n == 0, n == len(runs)-1
        if d > longest[k] or not (first or last) and d < shortest[k]: return -np.inf
        total += tables[3 if first and last else 2 if first else 1 if last else 0, k, d]
    return total

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**31), st.floats(0, 3))
def test_decode_is_exact(frames, seed, loudness):
    rng = np.random.default_rng(seed)
    score, model = (loudness*rng.standard_normal((frames, 4)),
                    _make_duration_tables(rng.uniform(1, 3, 4), rng.uniform(0.2, 1, 4)))
    value, states = model.decode(np.r_[np.zeros((1, 4)), score.cumsum(0)])
    # all others are impossible
    cyclic = ([(a+n)%4 for n in itertools.accumulate(steps, initial=0)] for a in range(4)
              for steps in itertools.product((0, 1), repeat=frames-1))
    assert value == pytest.approx(max(likelihood(s, score, model) for s in cyclic), abs=1e-9)
    assert value == pytest.approx(likelihood(states, score, model), abs=1e-9)

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 400), st.floats(0.3, 1.71), st.integers(0, 2**31))
def test_every_length_can_be_decoded(frames, period, seed):
    model = _make_duration_tables(*(50*x for x in load_parameters().mean_durations(period)))
    score = np.random.default_rng(seed).standard_normal((frames, 4))
    value, states = model.decode(np.r_[np.zeros((1, 4)), score.cumsum(0)])
    # the path it returns is worth what it says
    assert value == pytest.approx(likelihood(states, score, model), rel=1e-9)
    assert set(np.diff(states)%4) <= {0, 1}

def test_durations_are_probabilities():
    for p in PERIODS:
        model = _make_duration_tables(*(50*x for x in load_parameters().mean_durations(p)))
        inner, last, first, _ = np.exp(model.log)
        assert (np.allclose(inner.sum(1), 1) and np.allclose(last[:, 1], 1)
                and first[:, 1:].sum() == pytest.approx(1))
        assert ((np.diff(last, axis=1) <= 1e-12).all() and (model.shortest >= 1).all()
                and (model.longest > model.shortest).all())

def test_durations_of_few_hearts_can_be_decoded():
    """a line through hearts of one rate may cross zero at another: no state gets shorter than a
    frame, and the decoder ends
    """
    p = SegmenterParameters(durations=dict(constant_s=np.array([0.1, -0.03, 0.35]),
                                           per_root=np.array([0., 0.2, -0.5]),
                                           spread_s=np.full(3, 0.01), diastole_spread=0.05))
    for period in PERIODS:
        mean, spread = p.mean_durations(period)
        assert (mean.min() >= 0.02
                and np.isfinite(_make_duration_tables(50*mean, 50*spread).log).all())
