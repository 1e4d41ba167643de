"""Time of the selective scan, forward + backward, against the length, beside attention over as many
channels: python benchmarks/lengths.py [--quick] [--one-thread]

With one thread it is processor time, and the table is written to nbs/measured/scan_lengths.csv,
with the numbers that are kept for the backward pass.
"""
import os, sys, time
import pandas as pd
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer
from pahcl.models.selective_scan import selective_scan
from scan import arguments

KEPT = 'nbs/measured/scan_lengths.csv'
LENGTHS, SIZES, HEADS = (125, 250, 500, 1000, 2000, 4000), dict(B=4, D=512, N=16), 16

def scan_of(L):
    a = arguments(L=L, **SIZES)
    w = torch.randn_like(a['u'])
    return lambda: torch.autograd.grad(selective_scan(**a, delta_softplus=True),
                                       list(a.values()), w)

def attention_of(L):
    q, k, v = (torch.randn(SIZES['B'], HEADS, L, SIZES['D']//HEADS, requires_grad=True)
               for _ in range(3))
    return lambda: torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v),
                                       torch.ones_like(q))

def milliseconds(f, rounds):
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    once = lambda: Timer('f()', globals=dict(f=f), timer=clock, num_threads=threads).timeit(1).mean
    first = once()
    return 1000*(first if first > 5 else sorted(once() for _ in range(rounds))[rounds//2])

def count_kept(f):
    "How many numbers the forward pass keeps for the backward pass."
    numbers = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t,
                                                  lambda t: t): f()
    return sum(numbers)

def main(quick=False, threads=2):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = {L: [milliseconds(f(L), 3 if quick else 11) for f in (scan_of, attention_of)]
             for L in LENGTHS}
    if threads == 1:
        rows = [dict(length=L, what=name, milliseconds=round(found[L][i], 2), kept=count_kept(f(L)))
                for L in LENGTHS
                for i, (name, f) in enumerate(dict(scan=scan_of, attention=attention_of).items())]
        pd.DataFrame(rows).to_csv(KEPT, index=False)
    print(f'forward + backward, {SIZES}, float32, {threads} threads, medians; '
          f'load average {os.getloadavg()[0]:.1f}')
    print(f'{"length":>8}{"scan, ms":>12}{"µs a step":>12}{"attention, ms":>16}{"µs a step":>12}')
    for L, (scan, attention) in found.items():
        print(f'{L:8}{scan:12.1f}{1000*scan/L:12.1f}{attention:16.1f}{1000*attention/L:12.1f}')
    print('longest against shortest, a step: ' + ', '.join(
        f'{name} {found[LENGTHS[-1]][i]/LENGTHS[-1]/(found[LENGTHS[0]][i]/LENGTHS[0]):.2f} times'
        for i, name in enumerate(('scan', 'attention'))) + ' (1 is a straight line)')

if __name__ == '__main__': main('--quick' in sys.argv, 1 if '--one-thread' in sys.argv else 2)
