"Device changes: each does what it says, measured on tones and noise, and no state moves"
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import generator
from pahcl.data.device_changes import (
    _add_room_noise, _apply_random_device, augment_recording, _draw_response, _edge_response,
    _equaliser_response, _random_slow_gain, _resonance_response, _ROOM_NOISE_KINDS,
    _simulate_other_device, _simulate_room_noise)
from pahcl.data.heart_sounds import simulate_recording

def level(x): return 20*np.log10(np.sqrt(np.mean(np.square(x))))

@settings(max_examples=30, deadline=None)
@given(st.floats(20, 400), st.integers(1, 3), st.sampled_from(['high', 'low']))
def test_a_band_ends_where_it_says(edge, order, kind):
    "three decibels an order at the edge, six a doubling beyond it; the closed form of the filter"
    at = lambda f: 20*np.log10(np.abs(_edge_response(np.array([f]), edge, order, kind)))[0]
    assert at(edge) == pytest.approx(-3.0103*order, abs=1e-3)
    far = (edge/100, edge/200) if kind == 'high' else (100*edge, 200*edge)
    assert (at(far[0])-at(far[1]) == pytest.approx(6.02*order, abs=0.02)
            and at(edge*100 if kind == 'high' else edge/100) == pytest.approx(0, abs=0.01))

@pytest.mark.parametrize('hertz', [40, 100, 250])
def test_tones_come_through_as_the_response_says(hertz):
    "a tone through the filter is measured against the gain at its frequency"
    tone = np.sin(2*np.pi*hertz*np.arange(20000)/2000)
    for response in (lambda f, rng: _edge_response(f, 80, 2, 'low'),
                     lambda f, rng: _resonance_response(f, 100, 4, 12),
                     lambda f, rng: _equaliser_response(f, [0, 3, -6, 2, 9, 0, 0])):
        heard = _apply_random_device(tone, 2000, None, response)[5000:15000]
        assert level(heard)-level(tone[5000:15000]) == pytest.approx(
            20*np.log10(np.abs(response(np.array([float(hertz)]), None))[0]), abs=0.05)

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(-5, 30))
def test_noise_is_as_loud_as_asked(seed, below_db):
    signal = simulate_recording(6, 2000, 80, seed=1)[0].astype(float)
    noise = _add_room_noise(signal, 2000, generator(seed, 'noise'), below_db)-signal
    assert level(signal)-level(noise) == pytest.approx(below_db, abs=0.05)

@pytest.mark.parametrize('kind', _ROOM_NOISE_KINDS)
def test_rooms_are_finite_and_different(kind):
    one, two = (_simulate_room_noise(kind, 20000, 2000, generator(s, 'room')) for s in (0, 1))
    assert (one.shape == (20000,) and np.isfinite(one).all() and np.std(one) > 0
            and not np.allclose(one, two))
    steady = lambda x: np.std([level(p) for p in x.reshape(-1, 500)])
    if kind in ('gusts', 'speech', 'friction', 'breath'):
        assert steady(one) > 2*steady(_simulate_room_noise('steady', 20000, 2000,
                                                           generator(0, 'room')))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1000, 2000, 4000]))
def test_copies_are_finite_and_as_long_as_their_tempo(seed, rate):
    signal = simulate_recording(5, rate, 90, seed=2)[0]
    made = augment_recording(signal, rate, generator(seed, 'copy'))
    copy, out_rate, speed = made.signal, made.sample_rate, made.speed
    assert np.isfinite(copy).all() and out_rate == 2000 and np.exp(-0.15) <= speed <= np.exp(0.15)
    assert len(copy)/2000 == pytest.approx(5/speed, abs=2/2000)
    assert np.array_equal(copy, augment_recording(signal, rate, generator(seed, 'copy')).signal)

def test_silence_stays_finite():
    assert all(np.isfinite(_simulate_other_device(np.zeros(4000), 2000, generator(s, 'x'))).all()
               for s in range(20))

def test_a_click_stays_where_it_is():
    "without its tempo a copy moves nothing: a train of clicks comes back within 20 ms, one frame"
    clicks = np.zeros(20000)
    clicks[1000::2000] = 1
    late = []
    for seed in range(40):
        heard = np.abs(_apply_random_device(clicks, 2000, generator(seed, 'device')))
        fold = heard[:20000].reshape(10, 2000).mean(0)
        late.append((fold.argmax()-1000)/2000)
    assert np.median(np.abs(late)) < 0.01 and np.mean(np.abs(late) < 0.02) > 0.9

def test_gain_drifts_slowly():
    gain = _random_slow_gain(20000, 2000, generator(0, 'gain'), 2, 6)
    step = np.abs(np.diff(20*np.log10(gain))).max()
    assert (gain.min() > 0 and 0 < step < 0.01
            and _draw_response(np.array([100.]), generator(0, 'd')).shape == (1,))
