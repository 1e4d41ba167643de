"operations of a cycle: the convolutions and Mamba's products counted by hand"
from pahcl.encoder import _encoder_cost, _scan_operations
from pahcl.models.encoders import build_encoder

def test_the_operations_of_cnn_and_cnn_mamba_by_hand():
    cost = {name: _encoder_cost(build_encoder(name))['operations'] for name in ('cnn', 'cnn_mamba')}
    convolutions = sum(2*4000//2**(i+1)*o*n*k for i, (n, o, k) in enumerate(
        zip([1, 32, 64, 128], [32, 64, 128, 256], [7, 5, 5, 3])))
    assert cost['cnn'] == convolutions
    # projections in, to B, C and Δ, from Δ's bottleneck, out; and a convolution of four steps,
    # whose last three frames are computed and dropped
    layer = 2*250*(256*1024 + 512*48 + 16*512 + 512*256)+2*(250+3)*512*4
    assert cost['cnn_mamba'] == convolutions+4*(layer+_scan_operations(250, 512, 16))
