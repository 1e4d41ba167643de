"""A training step of cnn_mamba against the same network with the sliced loop, and all encoders:
python benchmarks/encoders.py [--quick] [--one-thread]
"""
import os, sys, time
import torch
from torch.utils.benchmark import Timer
from loops import sliced
import pahcl.models.selective_scan as scan
from pahcl.models.encoder_base import ENCODERS
from pahcl.models.encoders import build_encoder
from pahcl.models.mamba_block import MambaBlock
from pahcl.models.scan_reference import _to_common_precision
from pahcl.encoder import _encoder_cost

B, T = 32, 4000

def use_loop(encoder, wanted):
    "Let every Mamba block use the sliced loop, or what it used before."
    scan._BACKENDS['sliced'] = lambda u, delta, A, B, C, D, z, bias, softplus: (
        sliced(*_to_common_precision(u, delta, A, B, C, D, z, bias)), None)
    for m in encoder.modules():
        if isinstance(m, MambaBlock): m.backend = 'sliced' if wanted else 'auto'

def step(encoder, optimiser, x, length, half):
    optimiser.zero_grad()
    with torch.autocast('cpu', torch.bfloat16, enabled=half): y = encoder(x, length)
    y.float().square().mean().backward()
    optimiser.step()

def seconds(function):
    "Wall-clock time; on one thread the time of the processor, to which other programs matter less."
    clock = {'timer': time.process_time} if torch.get_num_threads() == 1 else {}
    return Timer('f()', globals=dict(f=function), num_threads=torch.get_num_threads(),
                 **clock).timeit(1).mean

def main(quick=False, threads=2):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, length = torch.randn(B, 1, T), torch.randint(2000, T+1, (B,))
    encoder = build_encoder('cnn_mamba').train()
    optimiser = torch.optim.AdamW(encoder.parameters(), 1e-4)
    times = {}
    for half in (False, True): step(encoder, optimiser, x, length, half)  # warm
    for _ in range(1 if quick else 5):
        for half in (False, True):
            for loop in (False, True):
                use_loop(encoder, loop)
                times.setdefault((half, loop), []).append(
                    seconds(lambda: step(encoder, optimiser, x, length, half)))
                print(f'  half {half}, loop {loop}: {times[half, loop][-1]:.2f} s', file=sys.stderr,
                      flush=True)
    use_loop(encoder, False)
    median = {k: sorted(v)[(len(v)-1)//2] for k, v in times.items()}
    print(f'training step of cnn_mamba, B {B}, {threads} thread(s), '
          f'{"wall-clock" if threads > 1 else "processor"} time, medians; '
          f'load average {os.getloadavg()[0]:.1f}')
    print(f'{"":14}{"ours, cycles/s":>16}{"sliced loop":>14}{"ratio":>8}')
    for half, name in ((False, 'float32'), (True, 'bf16 autocast')):
        print(f'{name:14}{B/median[half, False]:16.1f}{B/median[half, True]:14.1f}'
              f'{median[half, True]/median[half, False]:8.1f}')
    print('bf16 autocast against the sliced loop in float32: '
          f'{median[False, True]/median[True, False]:.1f} times (goals: 4 in float32, 6 in bf16)')
    print(f'\n{"":16}{"":12}{"":15}{"seconds for 1000 cycles":>45}')
    print(f'{"":16}{"parameters":>12}{"MFLOP a cycle":>15}{"training":>12}{"training, bf16":>17}'
          f'{"inference":>12}')
    for name in ENCODERS:
        model, counted = build_encoder(name), _encoder_cost(build_encoder(name))
        optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
        def infer():
            with torch.no_grad(): model(x, length)
        def middle(f):
            f()
            times = sorted(seconds(f) for _ in range(1 if quick else 3))
            return times[len(times)//2]*1000/B
        model.train()
        train, half = (middle(lambda: step(model, optimiser, x, length, h)) for h in (False, True))
        model.eval()
        print(f'{name:16}{counted["parameters"]:12,}{counted["operations"]/1e6:15.1f}'
              f'{train:12.1f}{half:17.1f}{middle(infer):12.1f}', flush=True)
    print(f'load average {os.getloadavg()[0]:.1f}')

if __name__ == '__main__': main('--quick' in sys.argv, 1 if '--one-thread' in sys.argv else 2)
