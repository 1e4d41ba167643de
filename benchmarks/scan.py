"""Time and peak memory of the selective scan, forward + backward: python benchmarks/scan.py
[--quick] [--one-thread] [--without-parallel]
"""
import os, subprocess, sys
import torch
from torch.utils.benchmark import Timer
from loops import parallel, sliced, unbound
from pahcl.models.compiled_scan import _have_compiled
from pahcl.models.selective_scan import selective_scan

SIZES = dict(B=32, L=250, D=512, N=16)
KEYS = 'u delta A B C D z delta_bias'.split()

def arguments(B, L, D, N, dtype=torch.float32):
    "In the memory layout in which a Mamba block passes them."
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    last = lambda *shape: r(shape[0], shape[2], shape[1]).transpose(1, 2)
    values = (last(B, D, L), last(B, D, L)*0.5-3, -r(D, N).exp(), last(B, N, L), last(B, N, L),
              r(D), last(B, D, L), r(D)*0.1)
    return dict(zip(KEYS, (v.detach().requires_grad_() for v in values)))

FORMS = dict(c=lambda **a: selective_scan(**a, delta_softplus=True, backend='c'),
             torch=lambda **a: selective_scan(**a, delta_softplus=True, backend='torch'),
             sliced=sliced, unbind=unbound, parallel=parallel)
GOALS = {('c', 'sliced'): 20, ('c', 'unbind'): 7, ('c', 'parallel'): 40, ('torch', 'sliced'): 2.5}

def once(form, a, weights): return torch.autograd.grad(FORMS[form](**a), list(a.values()), weights)

def high_water():
    """Largest resident size of this process so far, in MiB (Linux; getrusage's would start from
    that of the process that started this one).
    """
    return int(next(line for line in open('/proc/self/status')
                    if line.startswith('VmHWM')).split()[1])/1024

def peak_mib(form):
    "Growth of the largest resident size over a warm-up, in a process of its own."
    code = (f"import sys; sys.path[:0] = {[os.path.dirname(__file__), *sys.path]!r}\n"
            "import torch, scan\ntorch.set_num_threads(2)\n"
            "small = scan.arguments(1, 20, 32, 16)\n"
            f"scan.once({form!r}, small, torch.ones_like(small['u']))\n"
            "a = scan.arguments(**scan.SIZES); w = torch.randn_like(a['u'])\n"
            "before = scan.high_water()\n"
            f"scan.once({form!r}, a, w)\nprint(scan.high_water()-before)")
    return float(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                                check=True).stdout)

def main(quick=False, threads=2, parallel=True):
    torch.set_num_threads(threads)
    a = arguments(**SIZES)
    weights = torch.randn_like(a['u'])
    forms = [f for f in FORMS if (f != 'c' or _have_compiled()) and (f != 'parallel' or parallel)]
    rounds = 2 if quick else 7
    times = {f: [] for f in forms}
    for form in forms[:2]: once(form, a, weights)  # warm; the others are too slow for it to matter
    # one after the other, so that other load of the machine meets all of them
    for _ in range(rounds):
        for form in forms:
            timer = Timer('once(form, a, weights)',
                          globals=dict(once=once, form=form, a=a, weights=weights),
                          num_threads=threads)
            times[form].append(
                timer.timeit(1 if form in ('sliced', 'parallel', 'unbind') else 5).mean)
            print(f'  {form} {times[form][-1]*1000:.0f} ms', file=sys.stderr, flush=True)
    median = {f: sorted(v)[(len(v)-1)//2] for f, v in times.items()}
    memory = {f: peak_mib(f) for f in forms}
    print(f'selective scan, forward + backward, {SIZES}, float32, {threads} threads, '
          f'medians of {rounds} rounds; load average {os.getloadavg()[0]:.1f}')
    print(f'{"form":10}{"ms":>9}{"peak MiB":>10}')
    for form in forms: print(f'{form:10}{median[form]*1000:9.0f}{memory[form]:10.0f}')
    for (fast, slow), goal in GOALS.items():
        if fast in median and slow in median:
            print(f'{fast} is {median[slow]/median[fast]:.1f} times {slow} (goal {goal})')
    for fast in ('c', 'torch'):
        if fast in memory:
            print(f'peak memory of {fast}: 1/{memory["sliced"]/max(memory[fast], 0.1):.0f} of the '
                  'sliced loop (goal 1/10)')

if __name__ == '__main__':
    main('--quick' in sys.argv, 1 if '--one-thread' in sys.argv else 2,
         '--without-parallel' not in sys.argv)
