"""CPU time of a pretraining, for 1,000 cycles: python benchmarks/pretraining.py [--quick] [encoder
...]

One thread, CPU time (not wall time: others may use the machine). A micro-batch is 64 cycles: read
and made into two views, forward, backward; an optimiser step is 4 of them. The cycles are made:
what they hold does not matter for time.
"""
import os, sys, time
import torch
from pahcl.core.config_sections import AugmentationSection, _ContrastSection
from pahcl.training.contrastive_model import ContrastiveModel
from pahcl.models.encoders import build_encoder
from pahcl.training.schedule import _parameter_groups
from pahcl.data.augmentation import Augmenter
from pahcl.data.random_numbers import sample_keys

B, T, RATE, ACCUMULATION = 64, 4000, 5000, 4

def made():
    "Noise under four phases; cycles of 0.4 to 0.8 s."
    g = torch.Generator().manual_seed(0)
    n, t = torch.randint(2000, T+1, (B,), generator=g), torch.arange(T)
    phases = ((t*4//n[:, None]+1)*(t < n[:, None])).to(torch.uint8)
    return (torch.randn(B, T, generator=g)*(phases > 0))[:, None], phases

def seconds(name, moco, repeats):
    """CPU seconds a micro-batch: (views, forward and backward, an optimiser step's own share, the
    encoder alone without gradient: what a probe costs a cycle).
    """
    torch.manual_seed(0)
    model = ContrastiveModel(build_encoder(name), _ContrastSection(moco=moco)).train()
    optimiser, (x, phases), views = torch.optim.AdamW(
        _parameter_groups(model.parts(), 1e-4), 1e-4), made(), Augmenter(AugmentationSection())
    def view(epoch):
        keys = torch.cat([sample_keys(torch.arange(B), epoch, v) for v in (1, 2)])
        y, p = views(torch.cat([x]*2), torch.cat([phases]*2), RATE, 0, keys)
        return dict(x1=y[:B], x2=y[B:], phases1=p[:B], phases2=p[B:], person=torch.arange(B),
                    group=torch.arange(B))
    def step():
        optimiser.step(); optimiser.zero_grad(); model.follow()
    def encode():
        with torch.no_grad(): model.encoder(x)
    def timed(f, *args):
        start = time.thread_time(); out = f(*args)
        return out, time.thread_time()-start
    times = []
    for i in range(repeats+1):
        batch, a = timed(view, i)
        _, b = timed(lambda: model(batch)[0].backward())
        times.append((a, b, timed(step)[1]/ACCUMULATION, timed(encode)[1]))
    return [sorted(t)[repeats//2] for t in zip(*times[1:])]

def main(names, repeats):
    torch.set_num_threads(1)
    print(f'one thread, CPU time, medians of {repeats} micro-batches of {B} cycles; '
          f'load average {os.getloadavg()[0]:.1f}')
    print(f'{"seconds for 1,000 cycles":28}{"views":>8}{"training":>10}{"step":>8}{"together":>10}'
          f'{"probe":>8}   {"an epoch of 10,000, 20 epochs, on one core":>20}')
    for name in names:
        for moco in (False, True):
            views, train, step, probe = (1000/B*s for s in seconds(name, moco, repeats))
            total = views+train+step
            print(
                f'{name+(" MoCo" if moco else ""):28}{views:8.2f}{train:10.1f}'
                f'{step:8.2f}{total:10.1f}{probe:8.2f}   {total/6:8.1f} min {total*20/360:8.1f} h')

if __name__ == '__main__':
    quick = '--quick' in sys.argv
    main([a for a in sys.argv[1:] if not a.startswith('--')] or ['cnn_mamba_small', 'cnn_mamba'],
         2 if quick else 7)
