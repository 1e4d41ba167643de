"Properties of the views: draws belong to samples, labels follow the sound, every key has an effect"
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from pahcl.core.config_sections import AugmentationSection
from pahcl.core.basics import PahclError
from pahcl.data.augmentation import Augmenter
from pahcl.data.augmentation_steps import _DRAW_COLUMNS
from pahcl.data.distortions import _warp_cycles, _warp_rows, _warp_tensors
from pahcl.data.phases import gap_mask, valid_lengths, valid_mask
from pahcl.data.random_numbers import _draw_uniforms, _hash_words, sample_keys
from pahcl.studies.augmentation_effects import _feature_change

OFF = dict(time_shift=0.0, time_stretch=0.0, polarity_probability=0.0, noise_probability=0.0,
           respiration_probability=0.0,
           time_mask_probability=0.0, frequency_mask_probability=0.0, band_filter_probability=0.0)
# the step's keys that switch it on, then for each key another value that must be seen
KEYS = [(dict(time_shift=0.1), dict(time_shift=0.3)),
        (dict(time_stretch=0.1), dict(time_stretch=0.3)),
        (dict(polarity_probability=1.0), dict(polarity_probability=0.0)),
        (dict(noise_probability=1.0), dict(noise_probability=0.0)),
        (dict(noise_probability=1.0), dict(noise_snr_db=[0.0, 5.0])),
        (dict(noise_probability=1.0), dict(noise_colour=2.0)),
        (dict(respiration_probability=1.0), dict(respiration_probability=0.0)),
        (dict(respiration_probability=1.0), dict(respiration_depth=0.3)),
        (dict(time_mask_probability=1.0), dict(time_mask_probability=0.0)),
        (dict(time_mask_probability=1.0), dict(time_mask_fraction=0.4)),
        (dict(frequency_mask_probability=1.0), dict(frequency_mask_probability=0.0)),
        (dict(frequency_mask_probability=1.0), dict(frequency_mask_width_hz=150.0)),
        (dict(band_filter_probability=1.0), dict(band_filter_probability=0.0)),
        (dict(band_filter_probability=1.0), dict(band_filter_low_hz=[80.0, 90.0])),
        (dict(band_filter_probability=1.0), dict(band_filter_high_hz=[100.0, 150.0]))]

def batch(B=12, T=1000, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = torch.randint(300, T+1, (B,), generator=g)
    t = torch.arange(T)
    phases = ((t*4//n[:, None]+1)*(t < n[:, None])).to(torch.uint8)
    x = torch.randn(B, T, generator=g)*(phases > 0)
    return x[:, None], phases

@pytest.mark.parametrize('on,other', KEYS, ids=lambda d: next(iter(d)))
def test_every_key_has_an_effect(on, other):
    x, phases = batch()
    look = lambda keys: Augmenter(AugmentationSection(**{**OFF, **keys}))(x, phases, 5000, 0,
                                                                          torch.arange(12))
    (y, p), (z, _) = look(on), look({**on, **other})
    assert all(not torch.equal(a, b) for a, b in zip(y, x))
    assert all(not torch.equal(a, b) for a, b in zip(y, z))
    assert torch.equal(p, phases) == (not on.keys() & {'time_shift', 'time_stretch'})

def test_no_key_is_forgotten():
    assert {k for on, other in KEYS for k in (*on, *other)} == set(AugmentationSection.model_fields)

def test_all_off_is_the_identity_and_the_input_stays():
    x, phases = batch()
    before = x.clone(), phases.clone()
    y, p = Augmenter(AugmentationSection(**OFF))(x, phases, 5000, 0, torch.arange(12))
    assert torch.equal(y, x) and torch.equal(p, phases)
    Augmenter(AugmentationSection())(x, phases, 5000, 0, torch.arange(12))
    assert torch.equal(x, before[0]) and torch.equal(phases, before[1])

@settings(max_examples=25, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12), st.integers(0, 2**31),
       st.sampled_from([999, 1000, 1003]), st.sets(st.sampled_from(sorted(OFF))))
def test_views_do_not_depend_on_the_batch(order, size, seed, T, off):
    x, phases = batch(T=T)
    views, keys = (Augmenter(AugmentationSection(**{k: OFF[k] for k in off})),
                   sample_keys(torch.arange(12), epoch=3))
    y, p = views(x, phases, 5000, seed, keys)
    for rows in torch.tensor(order).split(size):
        a, b = views(x[rows], phases[rows], 5000, seed, keys[rows])
        assert torch.equal(a, y[rows]) and torch.equal(b, p[rows])

@settings(max_examples=50, deadline=None)
@given(st.floats(-1, 1), st.floats(-0.4, 0.4), st.integers(0, 40))
def test_labels_follow_the_sound(shift, stretch, n):
    T, t = 40, torch.arange(40)
    phases = ((t*4//max(n, 1)+1)*(t < n)).to(torch.uint8)[None]
    x, labels = _warp_cycles(phases.float(), phases, torch.tensor([shift]), torch.tensor([stretch]))
    m = int(valid_lengths(labels))
    assert (m == min(T, max(round(n*(1+float(torch.tensor(stretch)))), 1) if n else 0)
            or abs(n*(1+stretch) % 1-0.5) < 1e-4)
    assert (x[:, m:] == 0).all() and (labels[:, :m] > 0).all()
    assert set(labels[labels > 0].tolist()) <= set(phases[phases > 0].tolist())
    # the largest jump, 4 -> 1 at the seam, is halved by taking the nearer
    assert (x-labels).abs().max() <= 1.5001 and (x != labels).sum() <= 8

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 40, 257]), st.booleans())
def test_compiled_warp_equals_the_tensor_operations(seed, T, gaps):
    g = torch.Generator().manual_seed(seed)
    n, t = torch.randint(0, T+1, (9,), generator=g), torch.arange(T)
    phases = ((t*4//n[:, None].clamp(min=1)+1)*(t < n[:, None])).to(torch.uint8)
    if gaps: phases *= torch.randint(0, 2, phases.shape, generator=g).to(torch.uint8)
    x = torch.randn(9, T, generator=g)*(phases > 0)
    shift, stretch = 2*torch.rand(9, generator=g)-1, 0.8*torch.rand(9, generator=g)-0.4
    shift[::3], stretch[::2] = 0, 0
    (a, p), (b, q) = _warp_rows(x, phases, shift, stretch), _warp_tensors(x, phases, shift, stretch)
    assert torch.equal(p, q) and (a-b).abs().max() <= 1e-6
    assert (_warp_cycles(x.double(), phases, shift, stretch)[0]-a).abs().max() < 1e-5

@settings(max_examples=40, deadline=None)
@given(st.floats(-3, 12), st.floats(-3, 12), st.integers(0, 9))
def test_masks_against_comparisons(start, end, length):
    t = torch.arange(9.)
    start, end = torch.tensor([start]), torch.tensor([end])
    assert torch.equal(gap_mask(start, end, 9)[0] == 0, (t >= start) & (t < end))
    assert torch.equal(valid_mask(torch.tensor([length]), 9)[0] == 1, t < length)

def test_silent_padding_and_empty_cycles_stay_finite():
    x, phases = batch()
    x[0], phases[1], x[1] = 0, 0, 0
    y, p = Augmenter(AugmentationSection(noise_probability=1.0, band_filter_probability=1.0))(
        x, phases, 5000, 0, torch.arange(12))
    assert (y.isfinite().all() and (y[:2] == 0).all() and (p[1] == 0).all()
            and (y[:, 0][p == 0] == 0).all())

def test_views_are_standardised():
    x, phases = batch()
    y, p = Augmenter(AugmentationSection())(x, phases, 5000, 0, torch.arange(12))
    for row, label in zip(y[:, 0], p):
        assert abs(row[label > 0].mean()) < 1e-4 and abs(row[label > 0].std(correction=0)-1) < 1e-4

def test_hash_against_python_integers():
    def mix(z):
        z = (z ^ z >> 30)*0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27)*0x94D049BB133111EB % 2**64
        return z ^ z >> 31
    h = 0
    for w in (42, 7, 3): h = mix((h+0x9E3779B97F4A7C15) % 2**64 ^ w)
    assert int(_hash_words(42, torch.tensor([7]), 3)) % 2**64 == h
    assert float(_draw_uniforms(42, torch.tensor([7]), 4)[0, 3]) == (h >> 40)/2**24

def test_accepts_any_object_with_the_fields():
    fields = AugmentationSection().model_dump()
    x, phases = batch(2)
    a, b = (Augmenter(c)(x, phases, 5000, 0, torch.arange(2))[0]
            for c in (SimpleNamespace(**fields), AugmentationSection()))
    assert torch.equal(a, b)

def test_a_column_that_is_not_used_keeps_the_others_in_place():
    "The draws of all other steps are what they were when loudness still had the third column."
    keys, u = torch.arange(50), _draw_uniforms(3, torch.arange(50), 20)
    draw = Augmenter(AugmentationSection()).draws(3, keys)
    assert (len(_DRAW_COLUMNS) == 20 and _DRAW_COLUMNS[2] == 'unused'
            and set(draw) == {*_DRAW_COLUMNS}-{'unused'})
    assert torch.equal(draw['polarity'],
                       u[:, 3] < 0.5) and torch.equal(draw['time_mask_start'], u[:, 13])
    assert torch.equal(draw['band_filter_high_hz'], 200+200*u[:, 19])

def test_limits_of_the_band_filter_stay_where_there_is_sound():
    keys = torch.arange(500)
    # as older files have them
    old = Augmenter(AugmentationSection(band_filter_low_hz=[15.0, 60.0],
                                        band_filter_high_hz=[250.0, 800.0])).draws(0, keys)
    assert old['band_filter_low_hz'].min() >= 25 and old['band_filter_high_hz'].max() <= 400
    assert Augmenter(AugmentationSection(),
                     band=(30., 300.)).limits['band_filter_high_hz'] == [200, 300]
    for limits in (dict(band_filter_high_hz=[500.0, 800.0]), dict(band_filter_low_hz=[1.0, 20.0])):
        with pytest.raises(PahclError, match='hold 25 to 400 Hz: it would change nothing'):
            Augmenter(AugmentationSection(**limits))
        Augmenter(AugmentationSection(band_filter_probability=0.0, **limits))

# what a step alone, at its default size, must at least move features by; a share of the
# distance between two persons
LEAST = 0.005
ALONE = dict(time_shift={}, time_stretch={},
             **{k: {k: 1.0} for k in OFF if k.endswith('probability')})

@pytest.fixture(scope='module')
def cycles_of_persons(work):
    from pahcl.data.loader import Cycles
    cycles = Cycles.from_processed(work/'processed')
    rows = np.random.default_rng(0).permutation(len(cycles))[:30]
    b = cycles.batch(rows, 4)
    return b['x'], b['phases'], torch.tensor(pd.factorize(cycles.table['person_id'].iloc[rows])[0])

# a quarter as wide: the layers are what matters here
NARROW = dict(resnet34_1d=dict(cnn_channels=[16, 32, 64, 128]))

@pytest.mark.parametrize('name', ['cnn', 'cnn_mamba_small', 'resnet34_1d'])
def test_every_default_step_changes_features(cycles_of_persons, name):
    from pahcl.models.encoders import build_encoder
    torch.manual_seed(1)
    encoder = build_encoder(name, **NARROW.get(name, {})).eval()
    change = lambda keys: _feature_change(
        encoder, Augmenter(AugmentationSection(**{**OFF, **keys})), *cycles_of_persons, 5000)
    defaults = AugmentationSection().model_dump()
    found = {step: change({step: defaults[step]} | on) for step, on in ALONE.items()}
    assert ALONE.keys() == OFF.keys() and min(found.values()) > LEAST, found
    assert change({}) < 1e-5

# recorded before the steps of a view became classes of their own
RECORDED = dict(
    time_shift=[0.051268, -0.098593, 0.075578],
    time_stretch=[-0.074829, 0.075264, 0.006879],
    polarity=[0.0, 1.0, 0.0],
    noise=[0.0, 1.0, 0.0],
    noise_snr_db=[16.504803, 11.238594, 23.423973],
    noise_colour=[0.153618, 0.264129, 0.167208],
    respiration=[0.0, 0.0, 0.0],
    respiration_rate=[0.524028, 0.394091, 0.49194],
    respiration_angle=[0.749412, 0.601654, 0.843639],
    respiration_depth=[0.4931, 0.229879, 0.169416],
    time_mask=[0.0, 0.0, 0.0],
    time_mask_width=[0.886978, 0.071387, 0.757324],
    time_mask_start=[0.007293, 0.603552, 0.633265],
    frequency_mask=[0.0, 0.0, 1.0],
    frequency_mask_width=[0.218683, 0.799253, 0.095784],
    frequency_mask_start=[0.709013, 0.616452, 0.59662],
    band_filter=[0.0, 1.0, 0.0],
    band_filter_low_hz=[58.064781, 36.841839, 36.832375],
    band_filter_high_hz=[227.888412, 349.819275, 302.183502],
)
DEFAULT_VIEWS = [[-0.31878, 1.36916, -0.94108], [-0.88393, -0.60153, 1.69174],
                 [1.3995, -0.13731, -0.94382], [-1.27727, 1.29742, 1.07121],
                 [1.17885, -0.11386, -0.18979], [-0.73229, -1.12827, -0.8766]]
ALL_STEPS = [[0.00756, -0.53885, 1.2979], [-0.89182, -0.79716, 1.54309],
             [-0.99374, 0.07099, 1.12023], [-1.12362, 0.22772, 1.273]]

def test_views_are_those_of_earlier_versions():
    """Draws to the last digit that is written here, views up to rounding: a change of the order of
    columns or steps changes every result.
    """
    t, keys = torch.arange(1000), sample_keys(torch.arange(12), 3, 1)
    g = torch.Generator().manual_seed(0)
    n = torch.randint(300, 1001, (12,), generator=g)
    phases = ((t*4//n[:, None]+1)*(t < n[:, None])).to(torch.uint8)
    x = (torch.sin(t*t/3000+torch.arange(12)[:, None])*(phases > 0))[:, None]
    views = Augmenter(AugmentationSection())
    draw = views.draws(7, keys)
    assert draw.keys() == RECORDED.keys()
    for k, v in RECORDED.items(): assert draw[k][:3].tolist() == pytest.approx(v, abs=1e-5), k
    y, p = views(x, phases, 5000, 7, keys)
    assert p.sum(1).tolist() == [1644, 1693, 1331, 1380, 2084, 2140, 2147, 1270, 2044, 1723,
                                 1216, 2425]
    torch.testing.assert_close(y[:6, 0, [5, 100, 250]], torch.tensor(DEFAULT_VIEWS),
                               atol=1e-3, rtol=0)
    every = Augmenter(AugmentationSection(**{k: 1.0 for k in OFF if k.endswith('probability')}))
    torch.testing.assert_close(every(x, phases, 5000, 7, keys)[0][:4, 0, [5, 100, 250]],
                               torch.tensor(ALL_STEPS), atol=1e-3, rtol=0)
