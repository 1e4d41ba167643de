"""Whether an installed wheel brings the compiled scan, right, and the examples"""
import torch

from pahcl.data.examples import list_examples, load_example
from pahcl.models.compiled_scan import _find_library
from pahcl.models.selective_scan import selective_scan

if __name__ == '__main__':
    found, why = _find_library()
    assert found, why
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 6, 50)
    A, B, C = -torch.rand(6, 4), torch.randn(2, 4, 50), torch.randn(2, 4, 50)
    answers = [selective_scan(u, delta, A, B, C, z=z, delta_softplus=True, backend=b)
               for b in ('reference', 'c')]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    print('the compiled scan agrees with the definition')
    assert all(load_example(name).signal.any() for name in list_examples().index)
    print('the examples sound')
