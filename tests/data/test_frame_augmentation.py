"""Changes of log-mel frames: every key has an effect, padding and states stay what they are, and
what is drawn belongs to the window
"""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pahcl.core.basics import PahclError
from pahcl.core.config import load_config
from pahcl.core.config_sections import AugmentationSection, _FinetuneAugmentation
from pahcl.training.pretraining_data import _check_pretrain_input
from pahcl.data.augmentation_steps import AUGMENTATIONS
from pahcl.data.frame_augmentation import (
    _FrameAugmenter, _gap_masks, _raise_floor, _smooth_gains, _stretch_frames)

BANDS, L = 10, 64
ON = [f'{name}_probability' for name, cls in AUGMENTATIONS.items() if cls.of_frames]
OTHER = dict(rate_change=.3, equaliser_db=6., equaliser_waves=2, noise_floor_db=[5., 6.],
             spec_augment_masks=1, spec_augment_time=.4, spec_augment_bands=.5)


def windows(B=12, states=4, seed=0):
    "Frames of recordings: a level, a spectrum, and states; windows of 40 to 64 valid frames."
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(40, L+1, (B,), generator=g)
    inside = (torch.arange(L) < length[:, None])
    phases = (1+torch.arange(L)//5 % 4)*inside
    shape, quiet = torch.randn(B, BANDS, L, generator=g), torch.randn(B, BANDS, 1, generator=g)
    told = (phases[:, None] == torch.arange(1, states+1)[:, None]).float()
    x = torch.cat([shape+quiet, shape, told], 1)*inside[:, None]
    return dict(x=x, phases=phases.to(torch.uint8), valid_length=length, label=torch.arange(B))


def change(batch, seed=0, keys=None, **given):
    keys = torch.arange(len(batch['x'])) if keys is None else keys
    return _FrameAugmenter(_FinetuneAugmentation(**given), BANDS)(batch, seed, keys)


@pytest.mark.parametrize('key', [*ON, *OTHER])
def test_every_key_has_an_effect(key):
    batch = windows()
    [on] = [k for k in ON if key.startswith(k.removesuffix('probability'))]
    before = change(batch, **({} if key == on else {on: 1.}))['x']
    after = change(batch, **{on: 1., **({} if key == on else {key: OTHER[key]})})['x']
    assert all(not torch.equal(a, b) for a, b in zip(before, after))


def test_off_by_default_and_no_change_of_sound():
    batch = windows()
    assert not _FrameAugmenter(_FinetuneAugmentation(), BANDS).steps
    assert torch.equal(change(batch)['x'], batch['x'])
    assert not set(ON) & set(AugmentationSection.model_fields)
    sound = load_config('pretrain', dict(augmentation=dict(rate_probability=.5)))
    with pytest.raises(PahclError, match='waveform, which augmentation.rate_prob.* cannot change'):
        _check_pretrain_input(sound)
    with pytest.raises(PahclError, match='noise_floor_db must be .smallest, largest.'):
        change(batch, noise_floor_db=[5., -5.])


@given(st.integers(0, 10**6), st.sampled_from([0, 4]))
@settings(max_examples=15, deadline=None)
def test_what_stays(seed, states):
    "Padding is zero, states agree with phases, the input is not changed; any batch gives the same."
    batch = windows(states=states, seed=seed % 50)
    before = {k: v.clone() for k, v in batch.items()}
    given = dict.fromkeys(ON, .7)
    whole = change(batch, seed, **given)
    assert all(torch.equal(before[k], v) for k, v in batch.items())
    n, t = whole['valid_length'][:, None], torch.arange(L)
    assert (whole['x'].abs().amax(1)*(t >= n)).max() == 0 and whole['x'].isfinite().all()
    if states:
        told = whole['x'][:, 2*BANDS:].argmax(1)+1
        assert (told == whole['phases'])[t < n].all()
    rows = torch.arange(12).split(5)
    parts = [change({k: v[r] for k, v in batch.items()}, seed, r, **given) for r in rows]
    for key, value in whole.items(): assert torch.equal(torch.cat([p[key] for p in parts]), value)


def test_an_equaliser_leaves_what_is_against_the_median():
    batch = windows()
    y = change(batch, equaliser_probability=1.)['x']
    assert torch.equal(y[:, BANDS:], batch['x'][:, BANDS:])
    gain = (y-batch['x'])[:, :BANDS]
    assert gain[..., 0].sum(1).abs().max() < 1e-4 and gain[:, :, :40].std(-1).max() < 1e-5
    u = torch.rand(5000, 3, generator=torch.Generator().manual_seed(0))
    assert _smooth_gains(u, 40, 2.).std().item() == pytest.approx(2*.2302585, rel=.03)


def test_a_floor_is_noise_added_to_powers():
    "Both channels made anew from a whole recording's powers, of which the window is all."
    g = torch.Generator().manual_seed(1)
    log = torch.randn(1, BANDS, 63, generator=g)*2+torch.randn(1, BANDS, 1, generator=g)
    both = lambda s: torch.cat([s-s.mean(), s-s.median(-1, keepdim=True)[0]], 1)
    for colour in (0., .4, 1.):
        quiet = log.median(-1, keepdim=True)[0]
        floor = torch.lerp(quiet.mean(), quiet, colour)+3*.2302585
        made = _raise_floor(both(log), torch.ones(1, 63), torch.tensor([3.]),
                            torch.tensor([colour]), BANDS)
        assert torch.allclose(made, both((log.exp()+floor.exp()).log()), atol=1e-4)


def test_a_rate_is_read_as_numpy_reads_between_points():
    import numpy as np
    batch, rate = windows(), torch.linspace(.8, 1.2, 12)
    y, phases = _stretch_frames(batch['x'], batch['phases'], batch['valid_length'], rate, 2*BANDS)
    for x, p, n, r, a, b in zip(*(v.numpy() for v in (
            batch['x'], batch['phases'], batch['valid_length'], rate, y, phases))):
        at = np.arange(n)*r % n
        known = np.interp(at, np.arange(n+1), np.append(x[3, :n], x[3, 0]))
        assert a[3, :n] == pytest.approx(known, abs=1e-3)
        sure = abs(at % 1-.5) > .01   # not half-way between two
        assert (b[:n] == p[np.floor(at+.5).astype(int) % n])[sure].all()


def test_masks_hide_the_share_that_is_asked_for():
    "One mask of up to a share hides half of it in the mean, wherever it is; none leaves its size."
    u = torch.rand(4000, 2, 1, generator=torch.Generator().manual_seed(0))
    size = torch.full((4000,), 50)
    hidden = 1-_gap_masks(u, .3, size, L)
    assert hidden.sum(1).mean().item() == pytest.approx(50*.15, rel=.05)
    assert hidden[:, 50:].max() == 0 and hidden.sum(1).max() <= 16
    three = 1-_gap_masks(u.expand(-1, -1, 3), .3, size, L)
    assert torch.equal(three, hidden)   # the same mask three times
