"""A training step of cnn_mamba against the same network with the sliced loop, and all encoders:
python benchmarks/encoders.py [--quick] [--one-thread]; with --frames, milliseconds of a training
step over 64 windows of 256 log-mel frames
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

FRAME_MAMBA = dict(encoder_type='cnn_mamba', cnn_channels=[48, 64, 96], cnn_kernel_sizes=[5, 3, 3],
                   cnn_strides=[2, 2, 1], mamba_d_model=96, mamba_n_layers=2)

def over_frames(quick=False, threads=2):
    "Print a step's time for every encoder, least and median of some: others use the machine, too."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, length = torch.randn(64, 84, 256), torch.full((64,), 256)
    padded = torch.randint(128, 257, (64,))
    rows = [(name, dict(encoder_type=name), length) for name in ENCODERS]
    rows += [('logmel_cnn, padded', dict(encoder_type='logmel_cnn'), padded),
             ('small cnn_mamba', FRAME_MAMBA, length),
             ('  both ways', FRAME_MAMBA | dict(mamba_bidirectional=True), length)]
    print(f'{threads} thread(s), ms a step: {"parameters":>11}{"wall, least":>13}'
          f'{"processor, median":>19}')
    for name, settings, n in rows:
        model = build_encoder(settings, in_channels=84).train()
        optimiser = torch.optim.AdamW(model.parameters(), 1e-4)
        times = []
        for _ in range(4 if quick else 10):
            before = time.perf_counter(), time.process_time()
            step(model, optimiser, x, n, False)
            times.append((time.perf_counter()-before[0], time.process_time()-before[1]))
        wall, processor = (sorted(t[1:]) for t in zip(*times))
        print(f'{name:24}{sum(p.numel() for p in model.parameters()):11,}{1000*wall[0]:13.0f}'
              f'{1000*processor[len(processor)//2]:19.0f}', flush=True)
    print(f'load average {os.getloadavg()[0]:.1f}')

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
        if ENCODERS[name].preset['in_channels'] > 1: continue
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

if __name__ == '__main__':
    run = over_frames if '--frames' in sys.argv else main
    run('--quick' in sys.argv, 1 if '--one-thread' in sys.argv else 2)
