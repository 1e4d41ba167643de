"""CPU time of the views, an operation a row: python benchmarks/views.py [--quick]

One thread, CPU time (not wall time: others may use the machine), the least of many repeats.
`cycles/s on 2 cores` is 2 divided by the CPU time of a cycle's two views: what two idle cores give,
because batches are made by threads that do not wait for each other.
"""
import os, sys, time
import torch
from pahcl.core.config_sections import AugmentationSection
from pahcl.data.augmentation import Augmenter
from pahcl.data.distortions import (
    _add_noise_at_snr, _apply_gain, _band_gain, _draw_coloured_noise, _mask_time,
    _modulate_loudness, _notch_gain, _warp_cycles, _warp_tensors)
from pahcl.data.phases import normalise_valid, valid_lengths
from pahcl.data.random_numbers import _hash_words, sample_keys

B, T, RATE = 128, 4000, 5000  # the two views of a batch of 64 cycles in one call

def made():
    "Noise under four phases; cycles of 0.4 to 0.8 s."
    g = torch.Generator().manual_seed(0)
    n, t = torch.randint(2000, T+1, (B,), generator=g), torch.arange(T)
    phases = ((t*4//n[:, None]+1)*(t < n[:, None])).to(torch.uint8)
    return torch.randn(B, T, generator=g)*(phases > 0), phases

def cost(f, repeats):
    "Microseconds of CPU time a view: least and median."
    f(); times = []
    for i in range(repeats):
        start = time.thread_time(); f(); times.append((time.thread_time()-start)/B*1e6)
    return min(times), sorted(times)[repeats//2]

def main(quick=False):
    torch.set_num_threads(1)
    # what any training step does: after it, glibc keeps freed memory rather than giving it
    # back and asking for it again
    del (large := [torch.zeros(30_000_000//4)])[:]
    x, phases = made()
    views, keys, length = (Augmenter(AugmentationSection()), sample_keys(torch.arange(B)),
                           valid_lengths(phases))
    draw, f = views.draws(0, keys), torch.fft.rfftfreq(T, 1/RATE)
    ones, gain, epoch = torch.ones(B), torch.ones(B, T//2+1), iter(range(10**9))
    words_of = lambda bins: _hash_words(0, keys[:, None], bins)
    noise = _draw_coloured_noise(words_of, T, RATE, ones)
    rows = dict(draws=lambda: views.draws(0, keys), valid_length=lambda: valid_lengths(phases),
                warp=lambda: _warp_cycles(x, phases, draw['time_shift'], draw['time_stretch']),
                warp_as_tensors=lambda: _warp_tensors(x, phases, draw['time_shift'],
                                                      draw['time_stretch']),
                respire=lambda: _modulate_loudness(x, RATE, ones, ones, ones),
                coloured_noise=lambda: _draw_coloured_noise(words_of, T, RATE, ones),
                add_noise=lambda: _add_noise_at_snr(x, length, noise, 20*ones),
                band_gain=lambda: _band_gain(f, 20*ones, 400*ones),
                notch_gain=lambda: _notch_gain(f, 100*ones, 40*ones),
                apply_gain=lambda: _apply_gain(x, gain, length),
                time_mask=lambda: _mask_time(x, 100*ones, 300*ones),
                standardise=lambda: normalise_valid(x, length))
    repeats = 20 if quick else 200
    print(f'one thread, CPU time, {B} views of {T} samples a call; '
          f'load average {os.getloadavg()[0]:.1f}')
    print(f'{"operation, on every view":28}{"least, us":>10}{"median":>8}')
    for name, call in rows.items(): print(f'{name:28}{"%10.1f%8.1f" % cost(call, repeats)}')
    c = views.config
    print(f'a default view draws: noise {c.noise_probability:.0%}, breathing '
          f'{c.respiration_probability:.0%}, band filter {c.band_filter_probability:.0%}, '
          f'frequency mask {c.frequency_mask_probability:.0%}, '
          f'time mask {c.time_mask_probability:.0%}')
    least, median = cost(lambda: views(x[:, None], phases, RATE, 0,
                                       sample_keys(torch.arange(B), next(epoch))), repeats)
    print(f'{"the default chain":28}{least:10.1f}{median:8.1f}')
    print(f'cycles/s on 2 cores, two views each: {1e6/least:,.0f} by the least, {1e6/median:,.0f} '
          'by the median (goal 20,000)')

if __name__ == '__main__': main('--quick' in sys.argv)
